"""Attention of a prompt to lists of blocks and to columns: against the definition in float64, key by key.

Without a GPU the kernels run within tests/ops/test_kernels.py::test_in_the_interpreter.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels


@dataclass(frozen=True)
class Case:
    """Sizes. ``lists``: of a sequence, KV heads or query heads. ``columns``: room for them; None: no columns."""

    tokens: int
    heads: int
    groups: int
    lists: int
    tile: int
    block: int
    columns: int | None = None
    batch: int = 1
    before: int = 0
    width: int = 16
    v_width: int = 16


CASES = [
    Case(1, 1, 1, 1, 64, 64, columns=3),
    Case(17, 4, 2, 2, 8, 8, batch=2),
    Case(63, 6, 2, 2, 16, 16, columns=5),
    Case(129, 4, 1, 4, 32, 16, columns=40, batch=2),
    Case(129, 3, 3, 3, 16, 32, columns=0),
    Case(70, 6, 2, 6, 12, 10, columns=70),  # no power of two
    Case(40, 2, 1, 1, 64, 8, columns=9, before=21),
    Case(50, 2, 2, 2, 16, 128, columns=1, before=3),
    Case(200, 2, 1, 1, 32, 128, columns=11),  # a block in two steps
    Case(45, 2, 1, 1, 7, 5, columns=6, width=24, v_width=8),
]


def case_of(case: Case, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v, blocks, counts and options. Some tiles have no block; what follows the counts must not be read."""
    made = torch.Generator().manual_seed(case.tokens + case.tile)
    keys = case.before + case.tokens
    q, k, v = (
        torch.randn(case.batch, *shape, dtype=dtype, generator=made)
        for shape in (
            (case.tokens, case.heads, case.width),
            (keys, case.groups, case.width),
            (keys, case.groups, case.v_width),
        )
    )
    rows, number = -(-case.tokens // case.tile), -(-keys // case.block)
    last = (case.before + (torch.arange(rows) + 1) * case.tile - 1).clamp(max=keys - 1)
    keep = torch.rand(case.batch, case.lists, rows, number, generator=made) < 0.5
    keep &= torch.arange(number) <= (last // case.block)[:, None]
    keep[:, 0, 0] = False
    counts = keep.sum(-1).int()
    blocks = torch.full(keep.shape, 2**30, dtype=torch.int32)
    for place in itertools.product(*map(range, counts.shape)):
        blocks[place][: counts[place]] = keep[place].nonzero()[:, 0].int()
    options: dict[str, Any] = {"tile_size": case.tile, "block_size": case.block}
    if case.columns is not None:
        columns = torch.full((case.batch, case.lists, case.columns), -1, dtype=torch.int32)
        for b, n in itertools.product(range(case.batch), range(case.lists)):
            found = torch.randperm(keys, generator=made)[: max(0, case.columns - n % 2)].sort().values
            columns[b, n, : len(found)] = found.int()
        options["columns"] = columns.to(device)
    return [x.to(device) for x in (q, k, v, blocks, counts)], options


def brute_force(inputs: list[Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Query by query and head by head, from sets of keys."""
    q, k, v, blocks, counts = (x.cpu() for x in inputs)
    q, k, v = q.double(), k.double(), v.double()
    (batch, tokens, heads, width), (keys, groups), lists = q.shape, k.shape[1:3], blocks.shape[1]
    out = torch.zeros(batch, tokens, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, tokens), -torch.inf, dtype=torch.float64)
    block, columns = options["block_size"], options.get("columns")
    for b, t, h in itertools.product(range(batch), range(tokens), range(heads)):
        n, row, group = h * lists // heads, t // options["tile_size"], h * groups // heads
        listed = blocks[b, n, row, : counts[b, n, row]].tolist()
        seen = {key for j in listed for key in range(j * block, (j + 1) * block)}
        if columns is not None:
            seen |= {key for key in columns[b, n].tolist() if key >= 0}
        here = sorted(key for key in seen if key <= keys - tokens + t)
        if here:
            scores = k[b, here, group] @ q[b, t, h] * width**-0.5
            out[b, t, h], lse[b, h, t] = scores.softmax(0) @ v[b, here, group], scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_sets_of_keys(case: Case, backend: str) -> None:
    inputs, options = case_of(case)
    found = ops.block_sparse_attention(*inputs, **options, return_lse=True, backend=backend)
    for ours, theirs in zip(found, brute_force(inputs, options), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_equals_sets_of_keys(case: Case) -> None:
    inputs, options = case_of(case, torch.float32, DEVICE)
    found = ops.block_sparse_attention(*inputs, **options, return_lse=True, backend="triton")
    for ours, theirs in zip(found, brute_force(inputs, options), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-5)


HOPPER_CASES = [
    Case(1000, 32, 8, 8, 64, 64, columns=77, width=128, v_width=128),
    Case(1000, 32, 8, 8, 64, 64, width=128, v_width=128),
    Case(700, 8, 2, 8, 128, 64, columns=130, width=64, v_width=64),
    Case(700, 8, 1, 1, 64, 128, columns=9, width=192, v_width=128, batch=2),
    Case(640, 8, 2, 2, 64, 64, columns=300, width=128, v_width=128, before=100, batch=2),
    Case(640, 6, 2, 2, 64, 64, columns=300, width=128, v_width=128, before=128),  # idle rows
]


@needs_kernels
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_the_kernel_in_bf16(case: Case) -> None:
    """On Hopper this is the kernel of nsa/ops/kernels/hopper; few programs, so that each computes several tiles."""
    from tests.ops.cases import few_programs

    inputs, options = case_of(case, torch.bfloat16, DEVICE)
    with few_programs():
        out, lse = ops.block_sparse_attention(*inputs, **options, return_lse=True, backend="triton")
    exact = [x.double() for x in inputs[:3]] + inputs[3:]
    expected = ops.block_sparse_attention(*exact, **options, return_lse=True, backend="torch")
    torch.testing.assert_close(out.double(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-3, atol=1e-3)
    again = ops.block_sparse_attention(*inputs, **options, backend="triton")
    assert torch.equal(again, out)  # whatever the number of programs


def test_what_is_wrong_is_said() -> None:
    inputs, options = case_of(CASES[1])
    q, k, v, blocks, counts = inputs
    for bad, words in (
        ((q, k, v, blocks[:, :, 1:], counts), "one for each tile"),
        ((q, k, v, blocks, counts[:, :1]), "counts must be"),
        ((q, k, v, blocks.long(), counts), "blocks must be int32"),
        ((q, k, v, blocks[:, :1], counts), "blocks must be"),
        ((q, k[:, :3], v[:, :3], blocks, counts), "at least as many keys"),
    ):
        with pytest.raises(ValueError, match=words):
            ops.block_sparse_attention(*bad, **options)
    with pytest.raises(ValueError, match="columns must be"):
        ops.block_sparse_attention(*inputs, **options, columns=torch.zeros(1, 1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be positive"):
        ops.block_sparse_attention(*inputs, tile_size=0, block_size=8)


# Tokens, query heads, KV heads, batch.
PROMPTS = [(1, 1, 1, 1), (17, 4, 2, 2), (64, 2, 2, 1), (83, 6, 2, 1)]


def prompt(tokens: int, heads: int, groups: int, batch: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(tokens)
    return tuple(
        (2 * torch.randn(batch, tokens, n, 16, dtype=dtype, generator=made)).to(device) for n in (heads, groups)
    )


def best(scores: list[float], count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count])


def group_attention(q: Tensor, k: Tensor, b: int, g: int, first: int) -> Tensor:
    """(R, S): probabilities of the queries, at positions from ``first`` on, summed over the heads of one KV head."""
    share = q.shape[2] // k.shape[2]
    scores = torch.stack([q[b, :, g * share + j] @ k[b, :, g].T for j in range(share)]) / q.shape[3] ** 0.5
    after = torch.arange(k.shape[1]) > first + torch.arange(q.shape[1])[:, None]
    return scores.masked_fill(after, -torch.inf).softmax(-1).sum(0)


def check_pooled(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    for sizes, (block, number, initial, local) in itertools.product(
        PROMPTS, [(8, 3, 0, 1), (5, 4, 1, 2), (4, 99, 0, 1)]
    ):
        q, k = prompt(*sizes, dtype, device)
        blocks, counts = ops.pooled_blocks(
            q, k, block_size=block, num_blocks=number, num_initial=initial, num_local=local, backend=backend
        )
        assert blocks.dtype == counts.dtype == torch.int32
        q, k = (torch.stack([x.mean(1) for x in y.cpu().double().split(block, 1)], 1) for y in (q, k))
        for b, g in itertools.product(range(len(k)), range(k.shape[2])):
            mass = group_attention(q, k, b, g, 0)
            for row in range(k.shape[1]):
                scores = mass[row, : row + 1].tolist()
                forced = [j for j in range(row + 1) if j < initial or row - j < local]
                scores = [float("inf") if j in forced else s for j, s in enumerate(scores)]
                assert blocks[b, g, row, : counts[b, g, row]].tolist() == best(scores, number), (sizes, b, g, row)


def check_lines(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    for sizes, (number, columns, diagonals) in itertools.product(PROMPTS, [(16, 5, 7), (100, 1, 1), (3, 99, 20)]):
        q, k = prompt(*sizes, dtype, device)
        found = ops.vertical_slash_lines(
            q, k, num_columns=columns, num_diagonals=diagonals, num_queries=number, num_initial=2, num_near=3,
            backend=backend,
        )  # fmt: skip
        q, k = q.cpu().double()[:, -number:], k.cpu().double()
        keys = k.shape[1]
        for b, g in itertools.product(range(len(k)), range(k.shape[2])):
            mass = group_attention(q, k, b, g, keys - q.shape[1])
            down = [float("inf") if key < 2 else float(mass[:, key].sum()) for key in range(keys)]
            along = [float(mass.diagonal(keys - len(mass) - d).sum()) for d in range(keys)]
            along = [float("inf") if d < 3 else x for d, x in enumerate(along)]
            assert found[0][b, g].tolist() == best(down, columns), sizes
            assert found[1][b, g].tolist() == best(along, diagonals), sizes


@pytest.mark.parametrize("check", [check_pooled, check_lines])
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_choice_is_that_of_sorting(check, backend: str) -> None:
    check(backend, torch.float64)


@needs_kernels
@pytest.mark.parametrize("check", [check_pooled, check_lines])
def test_a_choice_by_kernels_is_that_of_sorting(check) -> None:
    check("triton", torch.float32, DEVICE)


def check_lists(backend: str, device: str = "cpu") -> None:
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0, 1, 2], keep[1, 2, 3] = False, True
    blocks, counts = ops.block_lists(keep.to(device), backend=backend)
    for place in itertools.product(range(2), range(3), range(4)):
        assert blocks[place][: counts[place]].tolist() == keep[place].nonzero()[:, 0].tolist()


def test_lists_are_the_mask() -> None:
    check_lists("torch")


@needs_kernels
def test_lists_of_the_kernel_are_the_mask() -> None:
    check_lists("triton", DEVICE)


@pytest.mark.parametrize(("tokens", "block"), [(1, 4), (23, 4), (32, 8), (30, 7)])
def test_blocks_of_slashes_are_those_that_a_diagonal_crosses(tokens: int, block: int) -> None:
    """Each pair of a query and a key on a diagonal lies in a listed block, and each listed block has such a pair.

    Or would have one, were the last block whole.
    """
    made = torch.Generator().manual_seed(tokens)
    diagonals = torch.stack([torch.randperm(tokens, generator=made)[: max(1, tokens // 8)] for _ in range(2)])[None]
    blocks, counts = ops.slash_blocks(diagonals.sort(-1).values.int(), tokens=tokens, block_size=block)
    for n in range(2):
        for row in range(-(-tokens // block)):
            crossed = {
                (t - d) // block
                for t in range(row * block, (row + 1) * block)
                for d in diagonals[0, n].tolist()
                if t >= d
            }
            assert blocks[0, n, row, : counts[0, n, row]].tolist() == sorted(crossed)


@needs_kernels
@pytest.mark.parametrize(("tokens", "block"), [(1, 4), (23, 4), (64, 8), (230, 100)])
def test_means_of_blocks(tokens: int, block: int) -> None:
    """The last block may be shorter."""
    from nsa.ops.kernels import inference_operators as operators

    x = torch.randn(2, tokens, 3, 8, generator=torch.Generator().manual_seed(tokens)).to(DEVICE)
    expected = torch.stack([part.mean(1) for part in x.split(block, 1)], 1)
    torch.testing.assert_close(operators.means(x, block), expected)
