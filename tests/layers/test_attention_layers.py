"""Layers: compression against explicit windows, packing, decoding, rotary embedding, and use without a decoder."""

import itertools
import math

import pytest
import torch
from torch.nn.functional import silu

from nsa.layers import DenseAttention, NativeSparseAttention
from nsa.layers.linear import joint_linear, parallel_linear
from nsa.layers.nsa.compression import BlockCompression
from nsa.layers.rotary import Rotary
from nsa.ops import apply_rotary
from nsa.ops.geometry import Documents, RotaryLayout, block_ends

SIZES = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 4, "window": 10}


def nsa_layer(**changes) -> NativeSparseAttention:
    torch.manual_seed(0)
    layer = NativeSparseAttention(16, 4, 2, 6, 4, **{**SIZES, **changes}).double()
    for compression in layer.compress.children():
        torch.nn.init.normal_(compression.position)
    return layer


@pytest.mark.parametrize(("tokens", "length", "stride"), [(7, 8, 4), (8, 8, 4), (33, 8, 4), (31, 6, 2), (9, 3, 3)])
def test_compression_equals_explicit_windows(tokens: int, length: int, stride: int) -> None:
    torch.manual_seed(0)
    phi = BlockCompression(5, length, stride, hidden=7).double()
    torch.nn.init.normal_(phi.position)
    x = torch.randn(2, tokens, 3, 5, dtype=torch.float64)
    if tokens < length:
        assert phi(x).shape == (2, 0, 3, 5)
        return
    windows = x.unfold(1, length, stride).transpose(3, 4)  # (B, M, G, l, D)
    expected = phi.outer(silu((windows + phi.position).flatten(3) @ phi.inner.weight.T))
    torch.testing.assert_close(phi(x), expected)


@pytest.mark.parametrize("documents", [[9], [1, 20, 3, 8, 7, 30], [5, 5], [0, 12, 0, 6], [40, 2]])
def test_packed_compression_equals_each_document_alone(documents: list[int]) -> None:
    torch.manual_seed(0)
    phi = BlockCompression(4, 8, 4).double()
    cu = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32)
    x = torch.randn(1, sum(documents), 2, 4, dtype=torch.float64)
    alone = [phi(x[:, a:b]) for a, b in itertools.pairwise(cu.tolist())]
    blocks = sum(part.shape[1] for part in alone)
    torch.testing.assert_close(phi(x, cu)[:, :blocks], torch.cat(alone, dim=1))
    ends = [a + 4 * i + 7 for a, b in itertools.pairwise(cu.tolist()) for i in range(max(0, (b - a - 8) // 4 + 1))]
    assert block_ends(Documents.of(sum(documents), 0, cu, x.device), 8, 4)[:blocks].tolist() == ends


@pytest.mark.parametrize("steps", [[1] * 45, [45], [20, 1, 1, 7, 16], [3, 42]])
def test_decoding_on_a_cache_equals_the_whole(steps: list[int]) -> None:
    layer = nsa_layer()
    x = torch.randn(2, 45, 16, dtype=torch.float64)
    cache, start, parts = layer.new_cache(), 0, []
    for count in steps:
        parts.append(layer(x[:, start : start + count], cache=cache))
        start += count
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x))
    assert cache.window.length <= SIZES["window"]
    assert cache.tail.length < SIZES["compress_length"]


def test_packed_documents_equal_each_alone() -> None:
    layer = nsa_layer()
    documents = [1, 30, 7, 0, 25]
    cu = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32)
    x = torch.randn(1, sum(documents), 16, dtype=torch.float64)
    alone = [layer(x[:, a:b]) for a, b in itertools.pairwise(cu.tolist()) if b > a]
    torch.testing.assert_close(layer(x, cu_seqlens=cu), torch.cat(alone, dim=1))


def test_future_tokens_change_nothing() -> None:
    layer = nsa_layer()
    x = torch.randn(1, 60, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 40:] += 1
    torch.testing.assert_close(layer(changed)[:, :40], layer(x)[:, :40], rtol=0, atol=0)


def test_every_parameter_gets_a_gradient() -> None:
    layer = nsa_layer()
    layer(torch.randn(1, 60, 16, dtype=torch.float64)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_compressed_scores_depend_on_distance_alone() -> None:
    """Scores stay the same if a sequence is shifted by whole strides, with other tokens before it."""
    layer = nsa_layer(num_blocks=3, num_initial=0)
    tables = [Rotary(1e4).at(torch.arange(s, s + 40)) for s in (0, 16)]
    x = torch.randn(1, 40, 16, dtype=torch.float64)
    # Tables are fp32, so angles of other absolute positions round differently.
    torch.testing.assert_close(layer(x, tables[0]), layer(x, tables[1]), rtol=1e-4, atol=1e-5)


def test_joint_linear_equals_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (4, 1, 7)]
    assert torch.autograd.gradcheck(lambda x, *w: joint_linear(x, w), (x, *weights))
    torch.testing.assert_close(joint_linear(x, weights), torch.cat([x @ w.T for w in weights], -1))
    (frozen,) = torch.autograd.grad(joint_linear(x.detach(), weights).sum(), weights[:1])  # x wants no gradient
    torch.testing.assert_close(frozen, x.detach().sum((0, 1)).expand(4, -1))


def test_rotary_rotates_pairs_and_keeps_norms() -> None:
    x = torch.randn(1, 9, 2, 8)
    cos, sin = Rotary(1e4).tables(torch.arange(9), 8)
    turned = apply_rotary(x, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    pair = torch.complex(x[..., 0], x[..., 4]) * torch.exp(1j * torch.arange(9.0))[None, :, None]
    torch.testing.assert_close(torch.complex(turned[..., 0], turned[..., 4]), pair)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("pairs", ["half-split", "interleaved"])
def test_rotary_rotates_the_dims_of_its_layout(place: str, pairs: str) -> None:
    """Four of ten dims are rotated, each pair as one complex number; the others stay unchanged."""
    torch.manual_seed(0)
    x, positions = torch.randn(2, 9, 3, 10), torch.arange(5, 14)
    first = 0 if place == "first" else 6
    turning = [first + d for d in ((0, 2, 1, 3) if pairs == "half-split" else (0, 1, 2, 3))]
    expected = x.clone()
    for number, (a, b) in enumerate(zip(turning[::2], turning[1::2], strict=True)):
        angle = positions * 100.0 ** (-number / 2)
        pair = torch.complex(x[..., a], x[..., b]) * torch.exp(1j * angle)[None, :, None]
        expected[..., a], expected[..., b] = pair.real, pair.imag
    layout = RotaryLayout(4, place, pairs)  # type: ignore[arg-type]
    torch.testing.assert_close(apply_rotary(x, *Rotary(100.0).tables(positions, 4), layout=layout), expected)


def test_rotary_refuses_layouts_that_do_not_fit() -> None:
    x, tables = torch.randn(1, 3, 1, 8), Rotary().tables(torch.arange(3), 6)
    with pytest.raises(ValueError, match="3 cannot turn"):
        apply_rotary(x, *tables, layout=RotaryLayout(3))
    with pytest.raises(ValueError, match="10 cannot turn"):
        apply_rotary(x, *tables, layout=RotaryLayout(10))
    with pytest.raises(ValueError, match=r"must be \(T, 4 / 2\)"):
        apply_rotary(x, *tables, layout=RotaryLayout(4))


def test_yarn_keeps_fast_and_stretches_slow_frequencies() -> None:
    plain = Rotary(1e4, 4096).frequencies(64)
    yarn = Rotary(1e4, 4096, yarn_factor=4).frequencies(64)
    assert torch.equal(yarn[:4], plain[:4])
    torch.testing.assert_close(yarn[-4:], plain[-4:] / 4)
    assert (yarn <= plain).all() and (yarn >= plain / 4 * 0.999).all()


def test_yarn_counts_turns_over_the_trained_range() -> None:
    """And not over the extended one: a loop over the frequencies, by the paper's section 3.2."""
    rotary, found = Rotary(10000.0, 512, 8.0, 16.0, 2.0), []
    for pair in range(32):
        plain = 10000.0 ** (-2 * pair / 64)
        turns = 512 / (2 * math.pi / plain)
        gamma = 0.0 if turns < 2 else 1.0 if turns > 16 else (turns - 2) / (16 - 2)
        found.append((1 - gamma) * plain / 8 + gamma * plain)
    assert sum(2 < 512 * 10000.0 ** (-pair / 32) / (2 * math.pi) < 16 for pair in range(32)) > 5, "some are between"
    torch.testing.assert_close(rotary.frequencies(64), torch.tensor(found))


def test_dense_layer_decodes_as_the_whole() -> None:
    torch.manual_seed(0)
    layer = DenseAttention(16, 4, 2, 6, 4).double()
    x = torch.randn(1, 21, 16, dtype=torch.float64)
    rotary = Rotary(1e4)
    cache = layer.new_cache()
    parts = [layer(x[:, t : t + 1], rotary.at(torch.tensor([t])), cache=cache) for t in range(21)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x, rotary.at(torch.arange(21))))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 5, 16), (0, 16)])
def test_parallel_linear_is_two_projections(shape: tuple[int, ...]) -> None:
    """For one vector, none, and a batch. The gradient of x is the sum of both projections'."""
    torch.manual_seed(0)
    given = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in (shape, (24, 16), (24, 16))]
    ours, theirs = parallel_linear(*given), [given[0] @ weight.T for weight in given[1:]]
    d_both = [torch.randn_like(out) for out in theirs]
    gradients, expected = (torch.autograd.grad(outs, given, d_both) for outs in (ours, theirs))
    for a, b in zip((*ours, *gradients), (*theirs, *expected), strict=True):
        torch.testing.assert_close(a, b)
