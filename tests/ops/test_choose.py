"""The best of each row, against loops over sorted rows.

The kernels run within tests/ops/test_kernels.py::test_in_the_interpreter, or on a GPU.
"""

from fractions import Fraction

import pytest
import torch

from nsa.ops.choose import WIDEST, cover, top
from tests.ops.test_kernels import DEVICE, needs_kernels

INF = float("inf")
# Ties, both zeros, what is never chosen, one entry, all alike, a row longer than a warp's part.
ROWS = {
    "ties": [[3.0, 1, 3, 2, 1, 3], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]],
    "zeros": [[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, 1, -1]],
    "left out": [[-INF, 1, -INF, -2], [-INF] * 4, [INF, -INF, 7, INF]],
    "tiny": [[1e-45, 1e-44, 0, 1e-38], [1e-45, 3e38, -2e38, -1e-45]],
    "one": [[2.0], [-INF]],
}
COUNTS = (0, 1, 2, 3, 5, 10**6)
SHARES = (0.0, 1e-9, 0.3, 0.5, 0.75, 0.999999, 1.0)


def rows_of(name: str) -> torch.Tensor:
    if name == "random":
        generator = torch.Generator().manual_seed(0)
        return torch.randn(2, 2, 70, generator=generator).mul(4).round().div(4)
    return torch.tensor(ROWS[name])


def best(row: list[float]) -> list[int]:
    """The indices, the best first; -inf is none."""
    return sorted((i for i in range(len(row)) if row[i] > -INF), key=lambda i: (-row[i], i))


def by_loops(rows: torch.Tensor, chosen) -> torch.Tensor:
    flat = rows.flatten(0, -2)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    for number, row in enumerate(flat.tolist()):
        mask[number, chosen(number, row)] = True
    return mask.view(rows.shape)


def fewest(row: list[float], share: float) -> list[int]:
    """Those that hold the share of the sum, in exact arithmetic."""
    order, total, found = best(row), sum(map(Fraction, row)), Fraction(0)
    taken: list[int] = []
    for i in order:
        if share < 1 and found >= Fraction(share) * total:
            break
        taken, found = [*taken, i], found + Fraction(row[i])
    return [i for i in taken if row[i] > 0]


@pytest.mark.parametrize("name", [*ROWS, "random"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_top(name: str, backend: str) -> None:
    rows = rows_of(name)
    for count in COUNTS:
        expected = by_loops(rows, lambda _, row, count=count: best(row)[:count])
        assert torch.equal(top(rows.to(DEVICE), count, backend=backend).cpu(), expected), count
    each = torch.arange(rows[..., 0].numel()).view(rows.shape[:-1])
    expected = by_loops(rows, lambda number, row: best(row)[:number])
    assert torch.equal(top(rows.to(DEVICE), each.to(DEVICE), backend=backend).cpu(), expected)


@pytest.mark.parametrize("name", ["ties", "zeros", "tiny", "random"])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_cover(name: str, backend: str) -> None:
    rows = rows_of(name).abs()
    for share in SHARES:
        expected = by_loops(rows, lambda _, row, share=share: fewest(row, share))
        assert torch.equal(cover(rows.to(DEVICE), share, backend=backend).cpu(), expected), share
    number = rows[..., 0].numel()
    each = (torch.arange(number) / max(1, number - 1)).view(rows.shape[:-1])
    expected = by_loops(rows, lambda at, row: fewest(row, each.flatten()[at].item()))
    assert torch.equal(cover(rows.to(DEVICE), each.to(DEVICE), backend=backend).cpu(), expected)


@needs_kernels
def test_half_precision_and_a_limit_that_is_shared() -> None:
    rows = torch.randn(2, 3, 4, 40, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    count = torch.tensor([3, 7])[:, None, None].to(DEVICE)
    for found, expected in (
        (top(rows, count, backend="triton"), top(rows, count, backend="torch")),
        (cover(rows.abs(), 0.5, backend="triton"), cover(rows.abs().float(), 0.5, backend="torch")),
    ):
        assert torch.equal(found, expected)
    assert top(rows[:, :0], 1, backend="triton").shape == (2, 0, 4, 40)


@needs_kernels
def test_rows_that_are_too_long_are_sorted() -> None:
    rows = torch.arange(WIDEST + 1.0, device=DEVICE)[None]
    assert top(rows, 2)[0].nonzero()[:, 0].tolist() == [WIDEST - 1, WIDEST]
    with pytest.raises(ValueError, match=f"rows may have {WIDEST} entries, these have {WIDEST + 1}"):
        top(rows, 2, backend="triton")
