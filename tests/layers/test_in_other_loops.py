"""The layers in training loops of others: autocast, second derivatives, DistributedDataParallel."""

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.layers import NativeSparseAttention
from nsa.layers.linear import joint_linear, parallel_linear
from nsa.models import AttentionConfig, Decoder, ModelConfig, MoEConfig
from nsa.models.moe import Router, take

SIZES = {"length": 8, "stride": 4, "block_size": 8, "num_blocks": 3}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_a_decoder_trains_under_autocast(kind: str, experts: bool) -> None:
    """Losses and gradients are those of fp32 up to bf16's digits, and gradients have the weights' dtype."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    moe = MoEConfig(num_experts=4, top_k=2, expert_size=16, loss_weight=0.1) if experts else None
    config = ModelConfig(vocab_size=40, intermediate_size=48, max_position=256, moe=moe, **sizes)
    decoder = Decoder(config, AttentionConfig(kind=kind))
    ids, targets = torch.randint(40, (2, 1, 120))
    given = {"targets": targets, "cu_seqlens": torch.tensor([0, 50, 120], dtype=torch.int32)}
    losses = decoder(ids, **given)
    expected = torch.autograd.grad(losses.mean(), list(decoder.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder(ids, **given)
        assert decoder(ids).dtype == torch.bfloat16, "computed in fp32"
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, losses, rtol=0, atol=0.03)
    gradients = torch.autograd.grad(found.mean(), list(decoder.parameters()))
    for (name, parameter), ours, theirs in zip(decoder.named_parameters(), gradients, expected, strict=True):
        assert ours.dtype == parameter.dtype
        assert (ours - theirs).norm() < 0.06 * theirs.norm() + 1e-6, name


def test_experts_are_chosen_in_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    router, x = Router(32, 4, 2), torch.randn(1, 300, 32)
    torch.nn.init.normal_(router.weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = router(x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, router(x), strict=True))


def test_an_operator_under_autocast_is_the_operator_on_cast_inputs() -> None:
    """To the bit: nothing within it is rounded more often. The gradients come back in fp32."""
    q, k, v = normal(1, 40, 4, 8), normal(1, 40, 2, 8, seed=1), normal(1, 40, 2, 8, seed=2)
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.dense_attention(q, k, v, window=9)
    expected = ops.dense_attention(*low, window=9)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    d_out = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), d_out), torch.autograd.grad(expected, low, d_out), strict=True
    ):
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())


def attend(name: str, x: list[Tensor]) -> Tensor:
    q, k, v, k_cmp, v_cmp, gates = x
    if name == "dense":
        return ops.dense_attention(q, k, v, backend="torch")
    if name == "compressed":
        return ops.compressed_attention(q, k_cmp, v_cmp, length=8, stride=4, backend="torch")[0]
    if name == "selected":
        blocks = torch.zeros(1, 24, 1, 1, dtype=torch.int32)
        return ops.selected_attention(q, k, v, blocks, block_size=8, backend="torch")
    return ops.native_sparse_attention(q, (k_cmp, v_cmp), (k, v), (k, v), gates, **SIZES, window=5, backend="torch")


@pytest.mark.parametrize("name", ["dense", "compressed", "selected", "native_sparse", "cross_entropy"])
def test_a_second_derivative_that_is_not_there_raises(name: str) -> None:
    heads = [normal(1, 24, n, 4, seed=n) for n in (2, 1, 1)] + [normal(1, 5, 1, 4, seed=n) for n in (3, 4)]
    if name == "cross_entropy":
        x = normal(6, 4)
        out = ops.linear_cross_entropy(x, normal(9, 4, seed=1), torch.arange(6), backend="torch")
    else:
        x = heads[0]
        out = attend(name, [*heads, torch.rand(1, 24, 2, 3)])
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + x.sum(), x)


def test_second_derivatives_of_projections_are_right() -> None:
    x, weights = normal(5, 4, dtype=torch.float64), [normal(n, 4, seed=n, dtype=torch.float64) for n in (3, 2)]
    assert torch.autograd.gradgradcheck(lambda x, *w: joint_linear(x, list(w)), (x, *weights))
    bias = normal(5, seed=7, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda x, bias, *w: joint_linear(x, list(w), bias), (x, bias, *weights))
    assert torch.autograd.gradgradcheck(parallel_linear, (x, weights[0], normal(3, 4, seed=9, dtype=torch.float64)))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.autograd.gradgradcheck(lambda x: take(x, order, order.argsort()), x)


@pytest.mark.parametrize("tokens", [1, 5, 50])
def test_every_parameter_has_a_gradient_at_any_length(tokens: int) -> None:
    """Of a sample shorter than a compression block, too: DistributedDataParallel waits for all of them."""
    torch.manual_seed(0)
    sizes = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 4, "window": 10}
    layer = NativeSparseAttention(16, 4, 2, 6, 4, **sizes)
    layer(torch.randn(1, tokens, 16)).sum().backward()
    assert [name for name, p in layer.named_parameters() if p.grad is None] == []
