"""The mixture of experts against the reference implementation: a float64 loop over tokens."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import silu

from nsa.models import Decoder, MoEConfig, count_parameters, training_flops_per_token
from nsa.models.decoder import MLP
from nsa.models.moe import Experts, MixtureOfExperts, Router, expert_counts, moved_bias, take
from nsa.training.activation_checkpointing import checkpoint_layers
from tests.models.test_decoder import small

WIDTH = 10
MOE = {"num_experts": 6, "top_k": 2, "num_shared": 1, "expert_size": 5}


def mixture(seed: int = 0, **changes) -> MixtureOfExperts:
    config = MoEConfig(**{**MOE, **changes})
    shared = MLP(WIDTH, config.num_shared * config.expert_size) if config.num_shared else None
    moe = MixtureOfExperts(WIDTH, config, shared)
    torch.manual_seed(seed)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    moe.router.bias.normal_(0, 0.1)
    return moe.double()


def naive(moe: MixtureOfExperts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, balance loss (mean over sequences) and load, token by token."""
    router, experts = moe.router, moe.experts
    num_experts, top_k = len(router.weight), router.top_k
    out, losses, load = torch.zeros_like(x), [], torch.zeros(num_experts, dtype=torch.int64)
    for b in range(x.shape[0]):
        f = torch.zeros(num_experts, dtype=torch.float64)
        p = torch.zeros(num_experts, dtype=torch.float64)
        for t in range(x.shape[1]):
            u = x[b, t]
            s = torch.stack([torch.sigmoid(u @ row) for row in router.weight])
            ranked = sorted(range(num_experts), key=lambda i, s=s: (-(s[i].item() + router.bias[i].item()), i))
            chosen = ranked[:top_k]
            total = sum(s[i] for i in chosen)
            y = moe.shared(u) if moe.shared is not None else torch.zeros_like(u)
            for i in chosen:
                y = y + s[i] / total * ((silu(u @ experts.gate[i]) * (u @ experts.up[i])) @ experts.down[i])
                load[i] += 1
                f[i] += num_experts / (top_k * x.shape[1])
            out[b, t] = y
            p = p + s / s.sum() / x.shape[1]
        losses.append(f @ p)
    return out, torch.stack(losses).mean(), load


@pytest.mark.parametrize("loss_weight", [0.0, 0.7])
@pytest.mark.parametrize(
    ("rows", "tokens", "changes"),
    [
        (1, 1, {}),
        (2, 17, {}),
        (1, 63, {"num_shared": 0}),
        (3, 5, {"num_experts": 40, "top_k": 3}),  # more experts than tokens: most are empty
        (1, 9, {"top_k": 6}),
    ],
)
def test_outputs_gradients_and_loads_equal_the_reference(rows, tokens, changes, loss_weight) -> None:
    moe = mixture(loss_weight=loss_weight, **changes)
    x = torch.randn(rows, tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    expected, loss, load = naive(moe, x)
    output = moe(x)
    torch.testing.assert_close(output, expected)

    inputs = [x, *moe.parameters()]
    wanted = torch.autograd.grad((expected * weights).sum() + loss_weight * loss, inputs)
    assert moe.balance.tally is None, "nothing is counted before the backward pass"
    for a, b in zip(torch.autograd.grad((output * weights).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(moe.balance.tally[1:], load.double())
    if loss_weight:
        torch.testing.assert_close(moe.balance.tally[0] / (rows * tokens), loss)


def test_ties_go_to_the_lower_number_and_the_bias_affects_selection_only() -> None:
    router = Router(WIDTH, 6, 2)
    torch.nn.init.zeros_(router.weight)
    _, chosen, gates = router(torch.randn(7, WIDTH))
    assert chosen.tolist() == [[0, 1]] * 7
    router.bias[4], router.bias[2] = 0.2, 0.1
    _, chosen, biased = router(torch.randn(7, WIDTH))
    assert chosen.tolist() == [[4, 2]] * 7
    assert torch.equal(biased, gates) and torch.allclose(gates, torch.tensor(0.5))
    router.weight.data.fill_(-1.0)
    assert router(torch.full((1, WIDTH), 500.0))[2].isfinite().all(), "every affinity rounds to zero"


def test_the_bias_moves_against_the_load() -> None:
    load = torch.tensor([4, 1, 3, 4])  # mean 3
    moved = moved_bias(torch.tensor([0.0, 0.5, 0.25, 0.0]), load, 0.125)
    assert moved.tolist() == [-0.125, 0.625, 0.25, -0.125]


def test_the_bias_balances_a_router_that_prefers_one_expert() -> None:
    router = Router(WIDTH, 6, 2)
    torch.manual_seed(0)
    torch.nn.init.normal_(router.weight, std=0.1)
    x = torch.randn(1, 300, WIDTH) + 2 * router.weight[3] / router.weight[3].norm()
    loads = []
    for _ in range(100):
        loads.append(expert_counts(router(x)[1], 6)[0])
        router.bias = moved_bias(router.bias, loads[-1], 0.01)
    assert loads[0].max() > 180 and loads[0].sum() == 600
    assert loads[-1].max() < 110 and loads[-1].min() > 90


def test_the_balance_loss_evens_the_load() -> None:
    moe = mixture(loss_weight=1.0, num_shared=0)
    moe.router.bias.zero_()
    with torch.no_grad():
        moe.router.weight[3] += 0.5
    x = torch.randn(1, 200, WIDTH, dtype=torch.float64) + 0.5
    uneven = []
    optimizer = torch.optim.SGD([moe.router.weight], 1.0)
    for _ in range(60):
        optimizer.zero_grad()
        moe.balance.clear()
        (0 * moe(x).sum()).backward()
        uneven.append(int(moe.balance.tally[1:].max()))
        optimizer.step()
    assert uneven[-1] < 0.75 * uneven[0]


def test_take_has_the_gradient_of_indexing() -> None:
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randperm(20)
    d = torch.randn(20, 3, dtype=torch.float64)
    taken = take(rows, index, index.argsort(), copies=4)
    expected = rows.repeat_interleave(4, 0)[index]
    assert torch.equal(taken, expected)
    for a, b in zip(torch.autograd.grad(taken, rows, d), torch.autograd.grad(expected, rows, d), strict=True):
        torch.testing.assert_close(a, b)


def test_a_recomputed_layer_counts_once_and_validation_not_at_all() -> None:
    loads = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        decoder = Decoder(*small("nsa", moe=MoEConfig(**MOE, loss_weight=0.1)))
        if recomputed:
            checkpoint_layers(decoder.layers)
        ids = torch.randint(97, (1, 30))
        with torch.no_grad():
            decoder(ids, ids)
        for _ in range(2):
            decoder(ids, ids).sum().backward()
        moe = decoder.layers[2].mlp
        loads.append((moe.balance.tally[1:].tolist(), float(moe.balance.tally[0]), moe.router.weight.grad))
    assert sum(loads[0][0]) == 2 * 30 * 2
    assert loads[0][:2] == loads[1][:2] and torch.equal(loads[0][2], loads[1][2])


def test_the_bias_stays_fp32() -> None:
    moe = mixture()
    before = moe.router.bias.clone()
    moe.float().to(torch.bfloat16)
    assert moe.router.weight.dtype == torch.bfloat16
    assert torch.equal(moe.router.bias, before) and before.dtype == torch.float32
    assert moe(torch.randn(1, 4, WIDTH, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_meta_device_has_even_loads() -> None:
    """On the meta device, which plans use, every expert gets equally many tokens."""
    with torch.device("meta"):
        moe = MixtureOfExperts(WIDTH, MoEConfig(**MOE, loss_weight=0.1), MLP(WIDTH, 5))
        x = torch.empty(1, 17, WIDTH, requires_grad=True)
        moe(x).sum().backward()
    assert x.grad.shape == x.shape and moe.experts.gate.grad.shape == moe.experts.gate.shape


@pytest.mark.parametrize("first_dense", [0, 1, 3])
def test_counted_parameters_and_flops(first_dense: int) -> None:
    model, attention = small("nsa", moe=MoEConfig(**MOE, first_dense=first_dense))
    with torch.device("meta"):
        decoder = Decoder(model, attention)
    counted = count_parameters(model, attention)
    assert counted["total"] == sum(p.numel() for p in decoder.parameters())
    assert counted["total"] == counted["embedding"] + counted["non_embedding"]
    idle = (4 - first_dense) * 4 * 3 * 24 * 5  # layers x unused experts per token x matrices x their size
    routed = [p.numel() for name, p in decoder.named_parameters() if ".experts." in name]
    assert counted["routed"] == sum(routed)
    assert counted["active"] == counted["total"] - idle
    more = small("nsa", moe=MoEConfig(**{**MOE, "num_experts": 7}, first_dense=first_dense))[0]
    flops = [training_flops_per_token(m, attention, 64)["sparse"] for m in (model, more)]
    assert flops[1] - flops[0] == pytest.approx(6 * (4 - first_dense) * 24), "a router's row"


def test_initial_scale_is_that_of_a_dense_decoder() -> None:
    torch.manual_seed(0)
    moe = MoEConfig(num_experts=8, top_k=4, num_shared=2, expert_size=64, first_dense=1)
    model, attention = small("nsa", hidden_size=64, moe=moe, init_std=0.02)
    decoder = Decoder(model, attention)
    out = 0.02 / (2 * 4) ** 0.5
    mlp = decoder.layers[1].mlp
    for weight, std in ((mlp.experts.down, out), (mlp.shared.down.weight, out), (mlp.experts.up, 0.02)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert isinstance(decoder.layers[0].mlp, MLP)


def test_decoding_and_packing_with_experts() -> None:
    """Tokens do not affect each other."""
    torch.manual_seed(0)
    decoder = Decoder(*small("nsa", moe=MoEConfig(**MOE))).double()
    ids = torch.randint(0, 97, (2, 40))
    caches = decoder.new_caches()
    parts = [decoder(ids[:, a:b], caches=caches) for a, b in ((0, 13), (13, 14), (14, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), decoder(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 7}, r"model.moe.top_k \(7\) exceeds model.moe.num_experts \(6\)"),
        ({"top_k": 1}, "greater than or equal to 2"),
        ({"capacity": 1.0}, "capacity"),
    ],
)
def test_invalid_moe_configurations_are_rejected(changes, message) -> None:
    with pytest.raises(ValidationError, match=message):
        MoEConfig(**{**MOE, **changes})


def test_a_model_whose_layers_are_all_dense_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"first_dense \(4\) leaves none"):
        small("nsa", moe=MoEConfig(**MOE, first_dense=4))


@pytest.mark.gpu
def test_grouped_kernel_equals_a_loop_over_experts() -> None:
    """Grouped matrix products in bf16, some experts empty, against float64; bitwise deterministic."""
    torch.manual_seed(0)
    for num_experts, hidden, width, counts in ((6, 64, 40, [5, 0, 17, 1, 0, 9]), (3, 8, 16, [0, 0, 3])):
        experts = Experts(num_experts, hidden, width)
        for weight in experts.parameters():
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        experts = experts.cuda().bfloat16()
        exact = Experts(num_experts, hidden, width).cuda().double()
        exact.load_state_dict(experts.state_dict())
        rows = torch.randn(sum(counts), hidden, device="cuda").bfloat16().requires_grad_()
        rows64 = rows.detach().double().requires_grad_()
        d, load = torch.randn_like(rows), torch.tensor(counts, device="cuda")
        assert experts._grouped(rows) and not exact._grouped(rows64)
        results = []
        for _ in range(2):
            out = experts(rows, load)
            results.append([out, *torch.autograd.grad(out, [rows, *experts.parameters()], d)])
        out = exact(rows64, load)
        expected = [out, *torch.autograd.grad(out, [rows64, *exact.parameters()], d.double())]
        for a, again, b in zip(*results, expected, strict=True):
            assert torch.equal(a, again)
            assert (a - b).abs().max() < 0.02 * b.abs().max()
