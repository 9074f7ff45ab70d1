"""The indexer's option of fp8: what a row becomes, and that all backends, decoding and an export select the same."""

import itertools

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.models.hf.indexer_nsa import rounded_to_fp8 as rounded_in_exports
from nsa.ops.index_topk.fp8 import rounded_to_fp8, to_fp8
from tests.ops.cases import cumulative

# What a byte of e4m3 stands for: four bits of exponent with bias 7, three of mantissa, no infinity; the last is NaN.
CODES = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]


def nearest(x: float) -> float:
    """Of the numbers of e4m3; between two, that with an even mantissa."""
    code = min(range(len(CODES)), key=lambda i: (abs(CODES[i] - abs(x)), i % 2))
    return CODES[code] if x >= 0 else -CODES[code]


def by_hand(row: list[float]) -> list[float]:
    scale, largest = 2.0**-40, max(1e-4, *map(abs, row))
    while largest > 448 * scale:
        scale *= 2
    return [nearest(x / scale) * scale for x in row]


def rows(dtype: torch.dtype) -> Tensor:
    """Of many magnitudes; one of zeros, one of tiny values, one whose largest is 448, and one just above.

    With the largest at 448 the scale decides what the smallest values become.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 16, generator=generator) * 2.0 ** torch.arange(-12, 12)[:, None]
    x[0], x[1] = 0, 1e-9 * torch.arange(16)
    x[2, 0], x[3, 0] = 448, 450
    x[2:4, 1:] /= x[2:4, 1:].abs().max()
    x[2:4, 1:8] = 2**-9 * torch.arange(1, 8)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_rounded_to_the_nearest_with_a_power_of_two_as_scale(dtype: torch.dtype) -> None:
    x = rows(dtype)
    expected = torch.tensor([by_hand(row) for row in x.tolist()], dtype=dtype)
    assert torch.equal(rounded_to_fp8(x), expected)
    assert torch.equal(rounded_in_exports(x), expected)
    assert torch.equal(rounded_to_fp8(expected), expected), "a rounded row stays as it is"
    values, scale = to_fp8(x)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (24,)
    assert torch.equal(scale, 2 ** scale.log2().round())
    assert values.double().abs().amax(-1)[2:].gt(223).all(), "half of the range is not left unused"


def indexer(tokens: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((batch, tokens, 3, 32), (batch, tokens, 32), (batch, tokens, 3))
    q, k, weights = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, weights.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_selects_by_the_scores_of_rounded_rows(backend: str, dtype: torch.dtype) -> None:
    q, k, weights = indexer(90, dtype=dtype)
    options = {"topk": 7, "num_initial": 1, "num_local": 2, "cu_seqlens": cumulative([31, 0, 59])}
    found, scores = ops.index_topk(q, k, weights, **options, fp8=True, backend=backend)
    q8, k8 = ([by_hand(row) for row in x.flatten(0, -2).tolist()] for x in (q, k))
    for t, place in itertools.product(range(90), range(7)):
        if (s := int(found[0, t, place])) >= 0:
            products = [sum(a * b for a, b in zip(q8[3 * t + j], k8[s], strict=True)) for j in range(3)]
            expected = sum(w * max(0.0, p) for w, p in zip(weights[0, t].tolist(), products, strict=True))
            assert scores[0, t, place].item() == pytest.approx(expected, abs=1e-4)
    rounded = (torch.tensor(x, dtype=dtype).view_as(y) for x, y in ((q8, q), (k8, k)))
    assert torch.equal(found, ops.index_topk(*rounded, weights, **options, backend="naive")[0])
    assert not torch.equal(found, ops.index_topk(q, k, weights, **options, backend="naive")[0])


def test_decoding_selects_the_same() -> None:
    """Keys were rounded as they were written."""
    q, k, weights = indexer(90, batch=2)
    whole, _ = ops.index_topk(q, k, weights, topk=40, fp8=True)
    memory = torch.cat((rounded_to_fp8(k), torch.full((2, 5, 32), torch.nan)), 1)
    lengths = torch.tensor([90, 90], dtype=torch.int32)
    for fp8 in (True, False):
        found = ops.index_topk_decode(q[:, -1], memory, weights[:, -1], lengths, topk=40, fp8=fp8)
        assert torch.equal(found, whole[:, -1]) is fp8
