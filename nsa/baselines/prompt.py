"""Attention of a prompt to plans of blocks and columns, and the choice of both, by the kernels of block lists."""

from typing import NamedTuple

import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.plan import Part, Plan, View, of_one_head

MASKED = 2**28  # entries of a mask, of all query heads, that are looked at or copied at once


class BlockLists(NamedTuple):
    """What `nsa.ops.block_sparse_attention` attends to: blocks, counts and columns, as it takes them."""

    blocks: Tensor
    counts: Tensor
    columns: Tensor | None = None


def on_gpu(view: View) -> bool:
    """Whether there is anything to gain: on a CPU the portable path is as fast."""
    return view.q.is_cuda


def by_kernels(view: View) -> bool:
    """Whether a method chooses by kernels: those of the prompt want it `View.whole`, on a GPU."""
    return on_gpu(view) and view.whole


def can_list(view: View, plan: Plan | None) -> bool:
    """Whether `attend_blocks` computes this: parts of blocks for tiles of queries, of one size, and of columns."""
    if plan is None or plan.terms is not None or plan.blend is not None or not view.whole:
        return False
    if any(p.query_at is not None or p.key_at is not None or p.log_weight is not None for p in plan.parts):
        return False
    blocks, columns = _sorted(plan)
    return len(blocks) == 1 and len(columns) <= 1 and len(blocks) + len(columns) == len(plan.parts)


def attend_blocks(view: View, plan: Plan, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """As `nsa.baselines.attention.attend`, where `can_list`. The host waits for the number of columns."""
    (part,), _ = _sorted(plan)
    blocks, counts, columns = lists_of(view, plan, backend=backend)
    out, lse = ops.block_sparse_attention(
        view.q, view.k, view.v, blocks, counts, tile_size=part.tile, block_size=part.unit, columns=columns,
        scale=view.scale, return_lse=True, backend=backend,
    )  # fmt: skip
    return out.to(view.q.dtype), lse  # autocast may have another


def lists_of(view: View, plan: Plan, *, backend: str = "auto") -> BlockLists:
    """The lists of a plan, where `can_list`."""
    (part,), columns = _sorted(plan)
    lists = max(p.keep.shape[1] for p in plan.parts)  # one for each query head, if some part has that
    keep = _expanded(part.keep, lists)
    rows, units = (torch.arange(n, device=keep.device) for n in keep.shape[2:])
    seen = units * part.unit < ((rows + 1) * part.tile).clamp(max=view.k.shape[1])[:, None]
    blocks, counts = ops.block_lists(keep & seen, backend=backend)
    if not columns:
        return BlockLists(blocks, counts)
    each = _expanded(columns[0].keep, lists)  # (B, N, 1, S)
    number = int(each.sum(-1).max())
    found, there = ops.block_lists(each, backend=backend)
    found = found[:, :, 0, :number]
    return BlockLists(blocks, counts, found.masked_fill(torch.arange(number, device=found.device) >= there, -1))


def pairs_of(view: View, plan: Plan) -> Tensor | None:
    """(B, G) fp64: pairs of a query and a key of each KV head; None: only a mask of all parts together could tell."""
    if any(part.keep.shape[1] != view.k.shape[2] for part in plan.parts):
        return None
    keep = plan.parts[0].keep
    if view.whole and len(plan.parts) == 1 and keep.shape[2:] == (view.k.shape[1],) * 2:
        one = of_one_head(keep)
        blocks = one.split(max(1, MASKED // one[:, :, 0].numel()), 2)  # rows
        before = [sum(block.shape[2] for block in blocks[:number]) for number in range(len(blocks))]
        counts = [block.tril(at).sum((2, 3)).double() for block, at in zip(blocks, before, strict=True)]
        return torch.stack(counts).sum(0).expand(-1, keep.shape[1])
    if not can_list(view, plan):
        return None
    (part,), _ = _sorted(plan)
    return pairs(lists_of(view, plan), view.q.shape[1], part.unit) if part.unit == part.tile else None


def pairs(lists: BlockLists, tokens: int, block: int) -> Tensor:
    """(B, N) fp64: pairs of a query and a key, of a whole prompt whose queries and keys are cut into equal blocks."""
    blocks, counts, columns = lists
    row = torch.arange(blocks.shape[2], device=blocks.device)
    there = torch.arange(blocks.shape[3], device=blocks.device) < counts[..., None]  # (B, N, R, L)
    queries = (tokens - row * block).clamp(max=block)  # of each tile
    own = (there & (blocks == row[:, None])).any(-1)  # (B, N, R)
    found = ((counts - own.int()) * queries * block + own * (queries * (queries + 1) // 2)).sum(-1)
    if columns is not None:
        keep = mask_of(blocks.masked_fill(~there, -1), len(row))
        key = columns[:, :, None].long().expand(-1, -1, len(row), -1)  # (B, N, R, C)
        seeing = (row[:, None] * block + queries[:, None] - key).clamp(min=0).minimum(queries[:, None])
        beside = (key >= 0) & ~keep.gather(3, key.clamp(min=0) // block)
        found = found + (seeing * beside).sum((2, 3))
    return found.double()


def mask_of(numbers: Tensor, size: int) -> Tensor:
    """Lists of numbers (..., n) int32, -1 for none, as a mask (..., size) bool."""
    mask = torch.zeros(*numbers.shape[:-1], size + 1, dtype=torch.bool, device=numbers.device)
    return mask.scatter_(-1, numbers.masked_fill(numbers < 0, size).long(), True)[..., :size]


def _sorted(plan: Plan) -> tuple[list[Part], list[Part]]:
    """The parts of blocks for tiles of queries, and those of single keys for all queries."""
    columns = [part for part in plan.parts if part.unit == 1 and part.keep.shape[2] == 1]
    return [part for part in plan.parts if part.unit > 1 and part.tile > 1], columns


def _expanded(keep: Tensor, lists: int) -> Tensor:
    return keep.repeat_interleave(lists // keep.shape[1], 1) if keep.shape[1] != lists else keep
