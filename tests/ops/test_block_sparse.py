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
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-5, atol=1e-5)


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
