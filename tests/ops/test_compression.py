"""`ops.compress_blocks`: the PyTorch fallback and the kernels against the reference, values and gradients."""

import itertools

import pytest
import torch
from torch import Tensor

from nsa import ops
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
