"""The best of each row, against loops over sorted rows.

The kernels run within tests/ops/test_kernels.py::test_in_the_interpreter, or on a GPU.
"""

from fractions import Fraction

import pytest
import torch

from nsa.ops.choose import WIDEST, cover, drawn, pair_draws, top
from tests.ops.test_kernels import DEVICE, needs_kernels

INF = float("inf")
# Ties, both zeros, what is never chosen, numbers next to each other, one entry, all alike, a row longer than a warp's.
ROWS = {
    "ties": [[3.0, 1, 3, 2, 1, 3], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]],
    "zeros": [[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, 1, -1]],
    "left out": [[-INF, 1, -INF, -2], [-INF] * 4, [INF, -INF, 7, INF]],
    "tiny": [[1e-45, 1e-44, 0, 1e-38], [1e-45, 3e38, -2e38, -1e-45]],
    "neighbours": [[1, 1 + 2**-22, 1 + 2**-23, 1], [1 + 2**-23, 1, 1 + 2**-22, 1 + 3 * 2**-23]],
    "one": [[2.0], [-INF]],
}
COUNTS = (0, 1, 2, 3, 5, 10**6)
SHARES = (0.0, 1e-9, 0.3, 0.5, 0.75, 0.999999, 1.0)


def rows_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    if name == "random":
        return torch.randn(2, 2, 70, generator=generator).mul(4).round().div(4)
    if name == "softmax":
        return torch.randn(2, 700, generator=generator).mul(3).softmax(-1)
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


@pytest.mark.parametrize("name", ["ties", "zeros", "tiny", "neighbours", "random", "softmax"])
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


def hashed(x: int) -> int:
    """MurmurHash3's finaliser, without its sign, of whole numbers."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        x = (x ^ (x >> 16)) * factor % 2**32
    return (x ^ (x >> 16)) % 2**31


def drawn_by_loops(queries: torch.Tensor, keys: torch.Tensor, seed: int, counts: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(*queries.shape, keys.shape[1], dtype=torch.bool)
    for batch, places in enumerate(keys.tolist()):
        for row, query in enumerate(queries[batch].tolist()):
            draw = {i: hashed(hashed(query * 1_000_003 + key) + seed) // 2**7 for i, key in enumerate(places)}
            seen = [i for i, key in enumerate(places) if 0 <= key <= query]
            order = sorted(seen, key=lambda i: (places[i] != query, -draw[i], i))
            mask[batch, row, order[: int(counts[batch, row])]] = True
    return mask


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_drawn(backend: str) -> None:
    """With padding in front, an empty slot, positions above 2^12, and seeds of more than 32 bits."""
    keys = torch.stack([torch.arange(70), torch.arange(70) - 9, torch.arange(70) + 10**6]).clamp(min=-1)
    keys[0, 20] = -1
    queries = keys[:, 13:].clone()
    queries[0, 7] = 20
    for seed in (0, 7919, 2**40 + 3):
        for count in (0, 1, 5, 10**6):
            expected = drawn_by_loops(queries, keys, seed, torch.full(queries.shape, count))
            assert torch.equal(drawn(queries.to(DEVICE), keys.to(DEVICE), seed, count, backend=backend).cpu(), expected)
        each = torch.tensor([[3], [9], [40]])
        expected = drawn_by_loops(queries, keys, seed, each.expand(queries.shape))
        found = drawn(queries.to(DEVICE), keys.to(DEVICE), seed, each.to(DEVICE), backend=backend)
        assert torch.equal(found.cpu(), expected)
    assert drawn(queries[:, :0].to(DEVICE), keys.to(DEVICE), 1, 2, backend=backend).shape == (3, 0, 70)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_kernels)])
def test_of_keys_with_equal_draws_the_earlier_is_drawn(backend: str) -> None:
    """Equal are the upper 24 of 31 bits. The next bit of the later key is the greater one."""
    keys, query = torch.arange(4000), torch.tensor([[3999]])
    for seed in range(999):
        whole = pair_draws(query[0], keys, seed)[0, :-1]
        order = whole.sort().indices
        equal, later = (whole[order] >> 7).diff() == 0, order.diff() > 0
        at = equal & later & ((whole[order] >> 6).diff() > 0)
        if at.any():
            break
    first, second = order[:-1][at][0], order[1:][at][0]
    count = 2 + int((whole >> 7 > whole[first] >> 7).sum())  # its own, those above, and one of the two
    found = drawn(query.to(DEVICE), keys[None].to(DEVICE), seed, count, backend=backend)[0, 0].cpu()
    assert found[first] and not found[second] and found.sum() == count


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
