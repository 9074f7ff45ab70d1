"""`ops.compress_blocks` and `ops.pool_blocks` against references, values and gradients; a token at a time."""

import itertools

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.ops.compression import Pooling, Weights, extend_compressed
from tests.ops.cases import cumulative, gradients

CASES = [  # batch, documents, groups, width, v width, hidden, length, stride
    (1, [4], 2, 16, 24, 8, 4, 2),
    (2, [63], 3, 24, 16, 40, 6, 2),
    (1, [50], 1, 48, 48, 48, 8, 8),
    (1, [1, 20, 0, 3, 8, 37], 2, 16, 16, 16, 8, 4),
    (1, [2, 1, 3], 2, 16, 16, 16, 4, 2),  # no block, though one document of six tokens would have one
    (1, [5, 5], 1, 16, 16, 16, 3, 1),
]
COLUMNS = ("batch", "documents", "groups", "width", "v_width", "hidden", "length", "stride")


def inputs_of(batch, documents, groups, width, v_width, hidden, length, dtype, device="cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(documents))
    shapes = ((batch, sum(documents), groups, width), (hidden, length * width), (length, width), (v_width, hidden))
    scales = (1, (length * width) ** -0.5, 1, hidden**-0.5)
    tensors = (torch.randn(*s, dtype=dtype, generator=generator) * a for s, a in zip(shapes, scales, strict=True))
    return [x.to(device).requires_grad_() for x in tensors]


def packing(documents: list[int], device="cpu") -> Tensor | None:
    return cumulative(documents).to(device) if len(documents) > 1 else None


@pytest.mark.parametrize(COLUMNS, CASES)
def test_fallback_equals_the_reference(batch, documents, groups, width, v_width, hidden, length, stride) -> None:
    inputs = inputs_of(batch, documents, groups, width, v_width, hidden, length, torch.float64)
    options = {"length": length, "stride": stride, "cu_seqlens": packing(documents)}
    out, expected = (ops.compress_blocks(*inputs, **options, backend=name) for name in ("torch", "naive"))
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("documents", [[20], [1, 20, 0, 3, 8, 37]])
def test_reference_equals_windows_of_each_document(documents: list[int]) -> None:
    x, inner, position, outer = inputs_of(1, documents, 2, 16, 16, 24, 8, torch.float64)
    out = ops.compress_blocks(
        x, inner, position, outer, length=8, stride=4, cu_seqlens=packing(documents), backend="naive"
    )
    rows = []
    for begin, end in itertools.pairwise(cumulative(documents).tolist()):
        for start in range(begin, end - 7, 4):
            block = (x[0, start : start + 8] + position[:, None]).transpose(0, 1).flatten(1)
            rows.append(torch.nn.functional.silu(block @ inner.T) @ outer.T)
    torch.testing.assert_close(out[0, : len(rows)], torch.stack(rows))
    assert not out[0, len(rows) :].any()


def test_too_few_tokens_give_no_block() -> None:
    assert ops.compress_blocks(*inputs_of(2, [7], 3, 16, 24, 8, 8, torch.float32), length=8, stride=4).shape == (
        2,
        0,
        3,
        24,
    )


def test_wrong_shapes_are_rejected() -> None:
    x, inner, position, outer = inputs_of(1, [20], 2, 16, 16, 24, 8, torch.float32)
    with pytest.raises(ValueError, match="inner"):
        ops.compress_blocks(x, inner, position, outer, length=4, stride=4)
    with pytest.raises(ValueError, match="hidden width"):
        ops.compress_blocks(x, inner, position, outer[:, 1:], length=8, stride=4)
    with pytest.raises(ValueError, match="multiple of stride"):
        ops.compress_blocks(x, inner, position, outer, length=8, stride=3)


def pooling_of(batch, documents, groups, width, v_width, length, dtype=torch.float64) -> list[Tensor]:
    """x, gate, position and outer of `ops.pool_blocks`."""
    generator = torch.Generator().manual_seed(sum(documents))
    shapes = ((batch, sum(documents), groups, width), (width, width), (length, width), (v_width, width))
    return [torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize(
    ("batch", "documents", "groups", "width", "v_width", "length", "stride"),
    [(2, [31], 3, 6, 4, 6, 2), (1, [16], 1, 4, 8, 8, 8), (1, [1, 20, 0, 3, 8, 13], 2, 5, 5, 8, 4)],
)
def test_pooling_equals_windows_of_each_document(batch, documents, groups, width, v_width, length, stride) -> None:
    """Values by a loop over blocks and channels, and gradients."""
    x, gate, position, outer = inputs = pooling_of(batch, documents, groups, width, v_width, length)
    options = {"length": length, "stride": stride, "cu_seqlens": packing(documents)}
    out = ops.pool_blocks(*inputs, **options)
    rows = []
    for begin, end in itertools.pairwise(cumulative(documents).tolist()):
        for start in range(begin, end - length + 1, stride):
            block = x[:, start : start + length]
            gates = torch.einsum("blgd,ed->blge", block, gate) + position[None, :, None]
            weights = gates.exp() / gates.exp().sum(1, keepdim=True)
            rows.append(torch.einsum("bgd,ed->bge", (weights * block).sum(1), outer))
    expected = torch.nn.functional.pad(torch.stack(rows, 1), (0, 0, 0, 0, 0, out.shape[1] - len(rows)))
    assert out.shape == (batch, (sum(documents) - length) // stride + 1, groups, v_width)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("documents", [[9], [3, 6, 0, 1]])
def test_gradients_of_pooling_are_its_slopes(documents: list[int]) -> None:
    inputs = pooling_of(1, documents, 2, 3, 2, 4)
    options = {"length": 4, "stride": 2, "cu_seqlens": packing(documents)}
    assert torch.autograd.gradcheck(lambda *given: ops.pool_blocks(*given, **options), inputs)


def test_pooling_without_gate_and_position_is_the_mean() -> None:
    x = pooling_of(2, [20], 3, 6, 6, 8)[0]
    out = ops.pool_blocks(x, torch.zeros(6, 6), torch.zeros(8, 6), torch.eye(6), length=8, stride=4)
    torch.testing.assert_close(out, torch.stack([x[:, i : i + 8].mean(1) for i in (0, 4, 8, 12)], 1))


def test_pooling_in_bf16_is_a_mean_in_fp32() -> None:
    """Rounded once. A token that has all of the weight is taken as it is."""
    x, _, position, _ = (y.detach().bfloat16() for y in pooling_of(1, [40], 2, 6, 6, 8))
    none, same = torch.zeros(6, 6, dtype=torch.bfloat16), torch.eye(6, dtype=torch.bfloat16)
    out = ops.pool_blocks(x, none, position, same, length=8, stride=4)
    exact = ops.pool_blocks(*(y.float() for y in (x, none, position, same)), length=8, stride=4)
    assert out.dtype == torch.bfloat16 and torch.equal(out, exact.bfloat16())
    alone = torch.full((8, 6), -1000.0)
    alone[3] = 0
    assert torch.equal(ops.pool_blocks(x, none, alone, same, length=8, stride=4), x[:, 3:36:4])


@pytest.mark.parametrize("documents", [[7], [5, 7, 2]])
def test_pooling_of_too_few_tokens_gives_no_block(documents: list[int]) -> None:
    """And yet every weight has a gradient, for which DistributedDataParallel waits: 0."""
    inputs = pooling_of(1, documents, 3, 6, 4, 8)
    out = ops.pool_blocks(*inputs, length=8, stride=4, cu_seqlens=packing(documents))
    assert out.shape == (1, 0 if len(documents) == 1 else 2, 3, 4) and not out.any()
    for gradient in torch.autograd.grad(out.sum(), inputs):
        assert not gradient.any()


def test_wrong_shapes_of_pooling_are_rejected() -> None:
    x, gate, position, outer = pooling_of(1, [20], 2, 6, 4, 8)
    with pytest.raises(ValueError, match=r"gate \(D, D\), position \(8, D\)"):
        ops.pool_blocks(x, gate[1:], position, outer, length=8, stride=4)
    with pytest.raises(ValueError, match=r"position \(4, D\)"):
        ops.pool_blocks(x, gate, position, outer, length=4, stride=4)
    with pytest.raises(ValueError, match=r"outer \(Dv, D\)"):
        ops.pool_blocks(x, gate, position, outer[:, 1:], length=8, stride=4)
    with pytest.raises(ValueError, match="multiple of stride"):
        ops.pool_blocks(x, gate, position, outer, length=8, stride=3)
    with pytest.raises(ValueError, match=r"x \(B, T, G, D\)"):
        ops.pool_blocks(x[0], gate, position, outer, length=8, stride=4)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("pooled", [(True, False), (False, True), (True, True), (False, False)])
def test_a_block_that_ends_with_the_newest_token_is_appended(pooled: tuple[bool, bool], backend: str) -> None:
    """Token after token, keys and values compressed in either way: the blocks of all tokens at once."""
    tokens, groups, widths, length, stride = 23, 2, (8, 6), 8, 4
    weights, whole, rows = [], [], []
    for number, width in enumerate(widths):
        x, inner, position, outer = (
            y.detach() for y in inputs_of(2, [tokens], groups, width, width, 5, length, torch.float64)
        )
        gate = pooling_of(1, [8], groups, width, width, length)[1].detach()
        options = {"length": length, "stride": stride}
        if pooled[number]:
            outer = outer @ torch.ones(5, width, dtype=x.dtype) + torch.eye(width, dtype=x.dtype)
            weights.append(Pooling(gate, position, outer))
            whole.append(ops.pool_blocks(x, gate, position, outer, **options))
        else:
            weights.append(Weights(inner, position, outer))
            whole.append(ops.compress_blocks(x, inner, position, outer, **options, backend="naive"))
        rows.append(x)
    angle = torch.randn(tokens, widths[0] // 2)
    cos, sin = angle.cos(), angle.sin()
    ends = torch.arange(whole[0].shape[1]) * stride + length - 1
    whole[0] = ops.apply_rotary(whole[0], cos, sin, ends, backend="naive")
    rings = [x.new_zeros(2, length, groups, x.shape[3]) for x in rows]
    found = [x.new_zeros(2, x.shape[1] + 1, groups, x.shape[3]) for x in whole]
    for token in range(tokens):
        newest = [x[:, token : token + 1] for x in rows]
        table = cos[token : token + 1], sin[token : token + 1]
        extend_compressed(
            rings, newest, tuple(weights), tuple(found), *table, torch.tensor([token]), stride=stride, backend=backend
        )
    for ours, theirs in zip(found, whole, strict=True):
        torch.testing.assert_close(ours[:, : theirs.shape[1]], theirs)
