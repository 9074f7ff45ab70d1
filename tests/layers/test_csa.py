"""Compressed Sparse Attention as a layer: against loops and against `transformers`, decoding, and what learns."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Attention, DeepseekV4RotaryEmbedding

from nsa.layers import CompressedSparseAttention, record_index_sets, replay_index_sets
from nsa.layers.csa.config import CsaConfig
from nsa.layers.csa.figures import measure
from nsa.layers.csa.kind import CSA, HEAVY, WITHOUT_INDEXER
from nsa.layers.figure import values
from nsa.layers.rotary import Rotary
from nsa.layers.rotary_scaling import RopeScaling
from nsa.models import AttentionConfig, Decoder, ModelConfig
from tests.layers.test_projections import randomised
from tests.ops.cases import cumulative

HIDDEN, HEADS, WIDTH, THETA = 16, 4, 8, 100.0
SIZES: dict[str, Any] = {"ratio": 4, "topk": 2, "window": 5, "rotary_dims": 4}
SIZES |= {"index_heads": 3, "index_head_dim": 6, "index_rotary_dims": 4}
HCA = {"ratio": 3, "overlap": False, "topk": None}
CHANGES = [{}, {"phase": "warm-up", "q_lora_rank": 10}, {"overlap": False, "window": 1}, HCA, {"topk": 30}]
by_change = pytest.mark.parametrize("changes", CHANGES, ids=str)


def layer_of(**changes: Any) -> CompressedSparseAttention:
    layer = CompressedSparseAttention(HIDDEN, HEADS, WIDTH, rope_theta=THETA, **{**SIZES, **changes})
    return randomised(layer).double()


def some_input(tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def normed(x: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, dims: int | None) -> Tensor:
    """The last dims of x (.., D), as complex numbers, by the angles of a position."""
    dims = dims or x.shape[-1]
    rest, turning = x.split([x.shape[-1] - dims, dims], -1)
    angle = position * THETA ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    pairs = torch.view_as_complex(turning.unflatten(-1, (-1, 2)).contiguous())
    return torch.cat((rest, torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)), -1)


def entries_of(compress: Any, x: Tensor, ratio: int, overlap: bool, dims: int | None) -> list[Tensor]:
    """Those of one document x (T, C), channel by channel."""
    value, gate, bias = x @ compress.value.weight.T, x @ compress.gate.weight.T, compress.position
    width, found = compress.norm.weight.numel(), []
    for i in range(len(x) // ratio):
        channels = []
        for c in range(width):
            own = c + width if overlap else c
            rows = [(gate[i * ratio + j, own] + bias[j, own], value[i * ratio + j, own]) for j in range(ratio)]
            if overlap and i > 0:
                rows += [
                    (gate[(i - 1) * ratio + j, c] + bias[j, c], value[(i - 1) * ratio + j, c]) for j in range(ratio)
                ]
            gates, values = (torch.stack(x) for x in zip(*rows, strict=True))
            channels.append(gates.softmax(0) @ values)
        found.append(turned(normed(torch.stack(channels), compress.norm.weight), i * ratio, dims))
    return found


def by_hand(layer: Any, x: Tensor, ratio: int, overlap: bool, topk: int | None, window: int, phase: str) -> tuple:
    """Output (T, C) and the indexer's loss of one document x (T, C), query by query and head by head."""
    dims, indexer = layer.rotary.width, layer.indexer
    asking = x if layer.query_down is None else normed(x @ layer.query_down.weight.T, layer.query_norm.weight)
    queries = normed((asking @ layer.query.weight.T).unflatten(-1, (HEADS, WIDTH)))
    rows = normed(x @ layer.key_value.weight.T, layer.key_value_norm.weight)
    rows = [turned(row, t, dims) for t, row in enumerate(rows)]
    entries = entries_of(layer.compress, x, ratio, overlap, dims)
    if indexer is not None:
        y, its_asking = x.detach(), asking.detach()
        keys = entries_of(indexer.compress, y, ratio, overlap, 4)
        asked = (its_asking @ indexer.query.weight.T).unflatten(-1, (3, 6))
        weights = y @ indexer.head_weight.weight.T * 3**-0.5 * 6**-0.5
    outs, loss = [], x.new_zeros(())
    for t in range(len(x)):
        chosen = list(range((t + 1) // ratio))
        if indexer is not None:
            scores = [(weights[t] * (turned(asked[t], t, 4) @ keys[s]).relu()).sum() for s in chosen]
            if phase == "sparse":
                chosen = sorted(chosen, key=lambda s: (-scores[s].item(), s))[:topk]
        seen = [*(rows[s] for s in range(max(0, t - window + 1), t + 1)), *(entries[s] for s in chosen)]
        heads, target = [], torch.zeros(len(chosen), dtype=torch.float64)
        for h in range(HEADS):
            query = turned(queries[t, h], t, dims)
            p = torch.stack([layer.sink[h], *(query @ key * WIDTH**-0.5 for key in seen)]).softmax(0)[1:]
            heads.append(turned(sum(a * value for a, value in zip(p, seen, strict=True)), -t, dims))
            target += p[len(seen) - len(chosen) :].detach()
        outs.append(torch.cat(heads) @ layer.output.weight.T)
        if indexer is not None and chosen:
            index = torch.stack([scores[s] for s in chosen]).log_softmax(0)
            loss = loss + torch.nn.functional.kl_div(index, target / target.sum(), reduction="sum")
    return torch.stack(outs), loss


@pytest.mark.parametrize("backend", ["torch", "naive"])
@by_change
def test_it_is_its_definition(changes: dict[str, Any], backend: str) -> None:
    """Packed documents of one token, of fewer than an entry has, and empty ones; outputs, and all gradients."""
    layer, documents = layer_of(backend=backend, **changes), [9, 1, 0, 3, 14]
    x = some_input(sum(documents)).requires_grad_()
    names = ("ratio", "topk", "window", "overlap", "phase")
    sizes = {
        name: value for name, value in ({"overlap": True, "phase": "sparse"} | SIZES | changes).items() if name in names
    }
    pieces = [by_hand(layer, piece, **sizes) for piece in x[0].split(documents) if len(piece)]
    expected = torch.cat([out for out, _ in pieces])[None]
    loss = sum(part for _, part in pieces)
    out = layer(x, cu_seqlens=cumulative(documents))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)  # the tables are fp32
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    inputs = [x, *layer.parameters()]
    found = torch.autograd.grad((out * weight).sum(), inputs)
    wanted = torch.autograd.grad((expected * weight).sum() + loss / sum(documents), inputs)
    for name, ours, theirs in zip(["x", *dict(layer.named_parameters())], found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert all(gradient.ne(0).any() for gradient in found)
    if loss:
        layer.attend.loss.clear()
        layer(x, cu_seqlens=cumulative(documents)).sum().backward()
        assert layer.attend.loss.tally[0].item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
@by_change
def test_without_an_entry_it_is_a_window_and_every_weight_has_a_gradient(changes: dict[str, Any], tokens: int) -> None:
    layer, x = layer_of(**{"ratio": 4, **changes} | {"ratio": 4}), some_input(tokens, batch=2)
    out = layer(x)
    window = 1 if changes.get("window") == 1 else 5
    for b in range(2):
        sizes = {"ratio": 4, "overlap": True, "topk": 2, "window": window, "phase": "sparse"}
        torch.testing.assert_close(out[b], by_hand(layer, x[b], **sizes)[0], rtol=1e-5, atol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in layer.parameters()), "DistributedDataParallel waits for them"


NAMES = {
    "query_down.weight": "q_a_proj.weight",
    "query_norm.weight": "q_a_norm.weight",
    "query.weight": "q_b_proj.weight",
    "key_value.weight": "kv_proj.weight",
    "key_value_norm.weight": "kv_norm.weight",
    "sink": "sinks",
    "indexer.query.weight": "compressor.indexer.q_b_proj.weight",
    "indexer.head_weight.weight": "compressor.indexer.scorer.weights_proj.weight",
}
PARTS = {"value.weight": "kv_proj.weight", "gate.weight": "gate_proj.weight", "position": "position_bias"}
PARTS |= {"norm.weight": "kv_norm.weight"}
NAMES |= {f"compress.{ours}": f"compressor.{theirs}" for ours, theirs in PARTS.items()}
NAMES |= {f"indexer.compress.{ours}": f"compressor.indexer.{theirs}" for ours, theirs in PARTS.items()}


@pytest.mark.parametrize("kind", ["compressed_sparse_attention", "heavily_compressed_attention"])
@pytest.mark.parametrize("yarn", [False, True])
def test_it_is_the_attention_of_deepseek_v4(kind: str, yarn: bool) -> None:
    """Outputs, gradients and chosen entries. Its low-rank, grouped output is one matrix here.

    With so many index heads no two scores are 0, a tie that torch.topk would break in its own way.
    """
    tokens, sparse = 30, kind == "compressed_sparse_attention"
    ratio = 4 if sparse else 6
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64} if yarn else None
    config = DeepseekV4Config(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=WIDTH, q_lora_rank=10, num_hidden_layers=1,
        layer_types=[kind], mlp_layer_types=["moe"], compress_rates={kind: ratio}, compress_rope_theta=THETA,
        sliding_window=5, o_groups=2, o_lora_rank=6, index_n_heads=16, index_head_dim=6, index_topk=2,
        partial_rotary_factor=0.5, max_position_embeddings=64, attn_implementation="eager",
        rope_parameters=rope and {**rope},
    )  # fmt: skip
    theirs = randomised(DeepseekV4Attention(config, 0))
    sizes = {"index_heads": 16, "q_lora_rank": 10, "ratio": ratio}
    sizes |= {} if sparse else {"overlap": False, "topk": None}
    ours = layer_of(**sizes).float()
    weights = theirs.state_dict()
    down, up = weights["o_a_proj.weight"].chunk(2), weights["o_b_proj.weight"]
    found = {n: weights[NAMES[n]] for n in ours.state_dict() if n != "output.weight"}
    ours.load_state_dict(found | {"output.weight": up @ torch.block_diag(*down)})
    assert len(found) + 2 == len(weights)
    position = torch.arange(tokens)
    mask = (position > position[:, None]) | (position <= position[:, None] - 5)
    mask = torch.zeros(1, 1, tokens, tokens).masked_fill(mask, -torch.inf).expand(2, -1, -1, -1)
    x, embedding = torch.randn(2, tokens, HIDDEN, requires_grad=True), DeepseekV4RotaryEmbedding(config)
    tables = {"compress": embedding(x, position[None], layer_type="compress")}
    chosen: list[Tensor] = []
    if sparse:
        theirs.compressor.indexer.register_forward_hook(lambda module, inputs, lists: chosen.append(lists))
        ours.attend.choose.register_forward_hook(lambda module, inputs, lists: chosen.append(lists))
    expected = theirs(x, tables, position[None].expand(2, -1), mask)[0]
    rotary = Rotary(THETA, scaling=RopeScaling(**rope) if rope else None)
    assert (rotary.factor > 1.1) == yarn, "it is left out"
    out = ours(x, rotary.at(position))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    if sparse:
        assert torch.equal(chosen[0][:, 11:].sort(-1).values, chosen[1][:, 11:])
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    names = [n for n in found if not n.startswith("indexer.")]  # there the indexer does not learn
    ours_by_name, theirs_by_name = dict(ours.named_parameters()), dict(theirs.named_parameters())
    mine = torch.autograd.grad((out * weight).sum(), [x, *(ours_by_name[n] for n in names)])
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *(theirs_by_name[NAMES[n]] for n in names)])
    for name, a, b in zip(["x", *names], mine, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("steps", [[1] * 30, [20, 1, 1, 8], [3, 27], [8, 4, 18]], ids=len)
@by_change
def test_decoding_on_a_cache_equals_the_whole(changes: dict[str, Any], steps: list[int]) -> None:
    layer, x = layer_of(**changes), some_input(30, batch=2)
    chosen: list[Tensor] = []
    if layer.attend.choose is not None:
        layer.attend.choose.register_forward_hook(lambda module, inputs, sets: chosen.append(sets))
    whole, cache = layer(x), layer.new_cache()
    pieces = torch.cat([layer(piece, cache=cache) for piece in x.split(steps, 1)], 1)
    torch.testing.assert_close(pieces, whole)
    assert not chosen or torch.equal(torch.cat(chosen[1:], 1), chosen[0])
    twice = cache.take(torch.tensor([1, 1]))
    last = some_input(1, batch=2)[1:].expand(2, -1, -1)
    torch.testing.assert_close(layer(last, cache=twice)[0], layer(last, cache=cache)[1])


def test_a_cache_keeps_a_window_and_entries_only() -> None:
    layer = layer_of()
    cache = layer.new_cache()
    for token in some_input(41).split(1, 1):
        layer(token, cache=cache)
    kept = (cache.window, cache.entries, cache.tail, cache.index_entries, cache.index_tail)
    assert [rows.length for rows in kept] == [5, 10, 5, 10, 5]


@by_change
def test_nothing_depends_on_later_tokens(changes: dict[str, Any]) -> None:
    """To the last bit, in the definition; the gradient is exactly 0 in tiles, too."""
    for backend in ("naive", "torch"):
        layer, x = layer_of(backend=backend, **changes), some_input(30).requires_grad_()
        for token in (6, 7, 20):
            (gradient,) = torch.autograd.grad(layer(x)[0, token].sum(), x)
            assert gradient[0, token + 1 :].eq(0).all() and gradient[0, token].ne(0).any()
            other = torch.cat((x[:, : token + 1], some_input(50)[:, token + 1 : 30]), 1)
            if backend == "naive":
                assert torch.equal(layer(other)[:, : token + 1], layer(x)[:, : token + 1])


@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_the_indexer_learns_from_its_loss_alone_and_nothing_else_does(phase: str) -> None:
    x = some_input(20).requires_grad_()

    def gradients(kl_weight: float) -> dict[str, Tensor]:
        layer = layer_of(phase=phase, kl_weight=kl_weight)
        layer(x).square().sum().backward()
        found = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
        x.grad = None
        return found

    none, much = gradients(0.0), gradients(1000.0)
    for name, gradient in none.items():
        if name.startswith("indexer"):
            assert gradient.eq(0).all() and much[name].ne(0).any(), name
        else:
            assert torch.equal(gradient, much[name]), name


def decoder_of(kind: Any, **sizes: Any) -> Decoder:
    shape = ModelConfig(
        vocab_size=11, hidden_size=HIDDEN, num_layers=2, num_heads=HEADS, num_kv_heads=2, head_dim=WIDTH,
        intermediate_size=24, max_position=64,
    )  # fmt: skip
    torch.manual_seed(0)
    return Decoder(shape, AttentionConfig.model_validate({"kind": kind, "csa": {**SIZES, **sizes}}))


def test_a_short_training_lowers_both_losses() -> None:
    """A sequence that repeats: the tokens of before are in entries."""
    decoder = decoder_of("csa")
    ids = torch.randint(11, (4, 12), generator=torch.Generator().manual_seed(1)).repeat(1, 3)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    losses = [layer.attention.attend.loss for layer in decoder.layers]
    curve = []
    for _ in range(40):
        optimizer.zero_grad()
        for loss in losses:
            loss.clear()
        mean = decoder(ids[:, :-1], ids[:, 1:]).mean()
        mean.backward()
        optimizer.step()
        curve.append((mean.item(), sum(loss.tally[0].item() for loss in losses)))
    assert curve[-1][0] < 0.8 * curve[0][0] and min(kl for _, kl in curve[-5:]) < max(kl for _, kl in curve[5:20])


def test_the_indexer_finds_the_attention() -> None:
    """Trained alone."""
    layer, x = layer_of(topk=3), some_input(64)
    loss, optimizer = layer.attend.loss, torch.optim.Adam(layer.indexer.parameters(), 0.02)
    seen: list[tuple] = []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    curve, recalls = [], []
    for _ in range(40):
        optimizer.zero_grad()
        loss.clear()
        layer(x).sum().backward()
        optimizer.step()
        curve.append(loss.tally[0].item() / 64)
        recalls.append(values(measure(layer.attend, *seen[-1]))["entry_recall"])
    assert curve[-1] < 0.8 * curve[0] and recalls[-1] > recalls[0]


def test_figures_of_uniform_attention() -> None:
    """Queries of 0: of t + 1 tokens the last 5, the entries and the sink have equal shares."""
    layer = layer_of(topk=3)
    torch.nn.init.zeros_(layer.query.weight), torch.nn.init.zeros_(layer.sink)
    seen: list[tuple] = []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    layer(some_input(30))
    found = values(measure(layer.attend, *seen[0]))
    shares = [(min(t + 1, 5), (t + 1) // 4) for t in range(3, 30)]
    assert found["window_mass"] == pytest.approx(sum(w / (w + e + 1) for w, e in shares) / 27)
    assert found["sink_mass"] == pytest.approx(sum(1 / (w + e + 1) for w, e in shares) / 27)
    more = [e for _, e in shares if e > 3]
    assert found["entry_recall"] == pytest.approx(sum(3 / e for e in more) / len(more))


def test_variants_are_configuration_only() -> None:
    """HCA beside dense layers, with the record of a layer without an indexer; and another ratio."""
    attention = AttentionConfig.model_validate({"kind": ["csa", "dense"], "csa": {**SIZES, **HCA}})
    assert attention.kind_at(0) is WITHOUT_INDEXER and WITHOUT_INDEXER.loss is None
    decoder = decoder_of(["csa", "dense"], **HCA)
    names = [name for name, _ in decoder.named_parameters()]
    assert not any("indexer" in name for name in names) and "layers.0.attention.compress.position" in names
    ids = torch.randint(11, (1, 30))
    caches = decoder.new_caches()
    pieces = torch.cat([decoder(piece, caches=caches) for piece in ids.split([10, 1, 19], 1)], 1)
    torch.testing.assert_close(pieces, decoder(ids), rtol=1e-4, atol=1e-5)
    assert decoder_of("csa", ratio=2).layers[0].attention.compress.ratio == 2


def test_every_second_layer_may_be_heavily_compressed() -> None:
    """Also where others are between them. Such a layer is that of a section of its own."""
    attention = AttentionConfig.model_validate({"kind": ["csa", "dense"], "csa": {**SIZES, "heavy_ratio": 6}})
    assert attention.kinds(8)[::2] == [CSA, HEAVY, CSA, HEAVY]
    first, second = (layer.attention for layer in decoder_of("csa", heavy_ratio=6).layers)
    alone = layer_of(ratio=6, overlap=False, topk=None).float()
    assert [name for name, _ in second.named_parameters()] == [name for name, _ in alone.named_parameters()]
    alone.load_state_dict(second.state_dict())
    x, rotary = some_input(20).float(), Rotary(THETA).at(torch.arange(20))
    assert torch.equal(second(x, rotary), alone(x, rotary)) and first.indexer is not None


def test_index_sets_are_recorded_and_replayed() -> None:
    decoder, ids = decoder_of("csa"), torch.randint(11, (2, 21))
    with record_index_sets(decoder) as sets:
        expected = decoder(ids)
    assert {n: tuple(s.shape) for n, s in sets.items()} == {0: (2, 21, 2), 1: (2, 21, 2)}
    other = {number: s.where(s < 0, 0) for number, s in sets.items()}
    other = {number: s.masked_fill(torch.arange(2) > 0, -1) for number, s in other.items()}  # the first entry alone
    with replay_index_sets(decoder, other):
        assert (decoder(ids) - expected).abs().max() > 1e-4
    with replay_index_sets(decoder, sets):
        assert torch.equal(decoder(ids), expected)
    sets[0][0, 6] = torch.tensor([1, -1])  # entry 1 ends at token 7
    wrong = pytest.raises(ValueError, match="layer 0 have an index that its query does not see")
    with wrong, replay_index_sets(decoder, sets):
        pass


def test_counted_keys_are_those_of_a_loop() -> None:
    for ratio, topk, window, tokens in itertools.product((2, 5), (1, 4, None), (1, 7), (1, 6, 33)):
        config = CsaConfig(ratio=ratio, topk=topk, window=window)
        seen = [(t + 1) // ratio for t in range(tokens)]
        found = CSA.keys(config, tokens)
        far = [e if topk is None else min(e, topk) for e in seen]
        assert found["entries" if topk is None else "selected"] == pytest.approx(sum(far) / tokens)
        assert found["window"] == pytest.approx(sum(min(t + 1, window) for t in range(tokens)) / tokens)
        index = 0 if topk is None else 2 * 64 * 128 * sum(seen) / tokens
        assert CSA.other_flops(config, tokens) == pytest.approx(index)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"topk": None, "phase": "warm-up"}, "with topk null there is none: set phase to sparse"),
        ({"rotary_dims": 3}, "attention.csa.rotary_dims .3. must be even"),
        ({"index_rotary_dims": 10, "index_head_dim": 8}, "must be even and at most index_head_dim"),
    ],
)
def test_bad_sections_are_named(section: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        CsaConfig(**section)


def test_what_does_not_go_with_it_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exceeds model.head_dim \(8\): lower it"):
        layer_of(rotary_dims=10)
    assert "nothing would be left out" in (CSA.problem(CsaConfig(topk=9), 32) or "")
    assert "there is no entry" in (CSA.problem(CsaConfig(ratio=64), 32) or "")
    assert "heavy_ratio (64) exceeds" in (CSA.problem(CsaConfig(topk=8, heavy_ratio=64), 32) or "")
    assert CSA.problem(CsaConfig(topk=8), 32) is None and CSA.problem(CsaConfig(topk=None), 32) is None
    shape = {"vocab_size": 11, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 1, "head_dim": 8}
    shape |= {"intermediate_size": 8, "max_position": 8, "v_head_dim": 4}
    with pytest.raises(ValueError, match=r"model.v_head_dim does not go with attention.kind csa"):
        Decoder(ModelConfig(**shape), AttentionConfig(kind="csa"))
