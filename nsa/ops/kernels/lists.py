"""Builds for each block the list of the tokens that selected it, divided into work items. dK and dV sum over them.

One stable sort of (block, token) pairs puts each block's tokens together, ascending. A second, small sort puts the work
items into the order in which they start. The kernels here write the keys of both sorts and read their results, in four
launches.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import NO_BLOCK, count_up_to
from nsa.ops.kernels.hardware import INTEGERS

BLOCK = 1024  # entries of one program
LISTS = 32  # begins of lists that a program looks for at a time
ITEM_BLOCK = 256  # items of one program


class Items(NamedTuple):
    """The lists and their work items. There is one list for each (batch, KV head, block). int32 except for ``turns``.

    Attributes:
        order: (entries,) the tokens of the lists, one list after the other. Entries of no block come last.
        list_begin: (lists + 1,) first entry of each list.
        item_block: (items,) the list of each work item; ``lists`` for those beyond the last.
        item_begin: (lists + 1,) first item of each list.
        part_begin: (lists + 1,) first part of each list. If a list has several items, each writes a part: its fp32 sum.
        turns: (items,) int64, the items in the order in which they start. Within a (batch, KV head) they are sorted by
            their last token: items that run at the same time then read much the same tokens.
    """

    order: Tensor
    list_begin: Tensor
    item_block: Tensor
    item_begin: Tensor
    part_begin: Tensor
    turns: Tensor


@triton.jit(do_not_specialize=[*INTEGERS, "num_entries"])
def pair_kernel(Blocks, Keys, num_entries, num_tokens, num_blocks, num_lists, GROUPS: tl.constexpr, N: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Keys (B, G, T, N): the list of each entry of Blocks (B, T, G, N); ``num_lists`` if it has no block."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = entry < num_entries  # [BLOCK]
    token = entry // N % num_tokens  # [BLOCK]
    slot = entry // N // num_tokens  # [BLOCK], batch and KV head
    source = ((slot // GROUPS * num_tokens + token) * GROUPS + slot % GROUPS) * N + entry % N  # [BLOCK]
    block = tl.load(Blocks + source, mask=ok, other=NO_BLOCK)  # [BLOCK]
    tl.store(Keys + entry, tl.where(block == NO_BLOCK, num_lists, block + slot.to(tl.int32) * num_blocks), mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, "num_entries", "steps"])
def order_kernel(Keys, Entry, Order, ListBegin, num_entries, num_tokens, num_lists, steps, N: tl.constexpr,
                 BLOCK: tl.constexpr, LISTS: tl.constexpr):  # fmt: skip
    """Order: the token of each sorted Entry. ListBegin: where each list begins in the sorted Keys."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    entry = tl.load(Entry + at, mask=at < num_entries, other=0)  # [BLOCK]
    tl.store(Order + at, (entry // N % num_tokens).to(tl.int32), mask=at < num_entries)
    for first in tl.range(tl.program_id(0) * LISTS, num_lists + 1, tl.num_programs(0) * LISTS):
        index = first + tl.arange(0, LISTS)  # [LISTS]
        tl.store(ListBegin + index, count_up_to(Keys, index - 1, num_entries, steps), mask=index <= num_lists)


@triton.jit(do_not_specialize=INTEGERS)
def item_kernel(ListBegin, ItemBegin, PartBegin, num_lists, chunk, BLOCK: tl.constexpr):
    """ItemBegin and PartBegin (lists + 1,): running sums over all lists, in a single program."""
    items_before = tl.program_id(0)  # 0, as a tensor that the loop can carry
    parts_before = tl.program_id(0)
    for first in tl.range(0, num_lists, BLOCK):
        index = first + tl.arange(0, BLOCK)  # [BLOCK]
        ok = index < num_lists  # [BLOCK]
        begin = tl.load(ListBegin + index, mask=ok, other=0)  # [BLOCK]
        end = tl.load(ListBegin + index + 1, mask=ok, other=0)  # [BLOCK]
        items = tl.where(ok, tl.maximum(tl.cdiv(end - begin, chunk), 1), 0)  # [BLOCK]
        parts = tl.where(items > 1, items, 0)  # [BLOCK]
        item_end = tl.cumsum(items, 0) + items_before  # [BLOCK]
        part_end = tl.cumsum(parts, 0) + parts_before  # [BLOCK]
        tl.store(ItemBegin + index + 1, item_end, mask=ok)
        tl.store(PartBegin + index + 1, part_end, mask=ok)
        items_before += tl.sum(items, 0)
        parts_before += tl.sum(parts, 0)
    tl.store(ItemBegin, 0)
    tl.store(PartBegin, 0)


@triton.jit(do_not_specialize=[*INTEGERS, "num_items", "steps"])
def item_block_kernel(Order, ListBegin, ItemBegin, ItemBlock, Keys, num_items, num_tokens, num_blocks, num_lists, chunk,
                      steps, BLOCK: tl.constexpr):  # fmt: skip
    """ItemBlock: the list of each item. Keys: what the items are sorted by, (batch, KV head) and then their last token.

    Items beyond the last one get the largest keys.
    """
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    index = count_up_to(ItemBegin + 1, item, num_lists, steps)  # [BLOCK]
    ok = (item < num_items) & (index < num_lists)  # [BLOCK]
    begin = tl.load(ListBegin + index, mask=ok, other=0)  # [BLOCK]
    end = begin + (item - tl.load(ItemBegin + index, mask=ok, other=0) + 1) * chunk  # [BLOCK]
    end = tl.minimum(end, tl.load(ListBegin + index + 1, mask=ok, other=0))
    last = tl.load(Order + end - 1, mask=ok & (end > begin), other=0)  # [BLOCK]
    tl.store(ItemBlock + item, index, mask=item < num_items)
    key = (index // num_blocks).to(Keys.dtype.element_ty) * num_tokens + last  # [BLOCK]
    tl.store(Keys + item, key, mask=item < num_items)


def work_items(blocks: Tensor, num_blocks: int, chunk: int) -> Items:
    """The lists of all blocks, divided into items of at most ``chunk`` entries. A list has at least one item.

    Args:
        blocks: (B, T, G, n) int32, contiguous; numbers below ``num_blocks``, or NO_BLOCK. T, n > 0.
    """
    batch, tokens, groups, n = blocks.shape
    entries, lists = blocks.numel(), batch * groups * num_blocks
    grid = (triton.cdiv(entries, BLOCK),)
    keys = blocks.new_empty(entries, dtype=torch.int16 if lists < 1 << 15 else torch.int32)  # 16 bits halve the passes
    pair_kernel[grid](
        blocks, keys, entries, tokens, num_blocks, lists, GROUPS=groups, N=n, BLOCK=BLOCK, num_warps=4
    )  # fmt: skip
    keys, entry = torch.sort(keys, stable=True)
    order, list_begin = blocks.new_empty(entries), blocks.new_empty(lists + 1)
    order_kernel[grid](
        keys, entry, order, list_begin, entries, tokens, lists, entries.bit_length(), N=n, BLOCK=BLOCK, LISTS=LISTS,
        num_warps=4,
    )  # fmt: skip
    item_begin, part_begin = blocks.new_empty(lists + 1), blocks.new_empty(lists + 1)
    item_kernel[(1,)](list_begin, item_begin, part_begin, lists, chunk, BLOCK=BLOCK, num_warps=4)
    num_items = lists + entries // chunk
    wide = (batch * groups + 1) * tokens >= 1 << 31
    item_block, keys = (
        blocks.new_empty(num_items, dtype=d) for d in (torch.int32, torch.int64 if wide else torch.int32)
    )
    item_block_kernel[(triton.cdiv(num_items, ITEM_BLOCK),)](
        order, list_begin, item_begin, item_block, keys, num_items, tokens, num_blocks, lists, chunk,
        lists.bit_length(), BLOCK=ITEM_BLOCK, num_warps=4,
    )  # fmt: skip
    turns = torch.sort(keys, stable=True).indices
    return Items(order, list_begin, item_block, item_begin, part_begin, turns)
