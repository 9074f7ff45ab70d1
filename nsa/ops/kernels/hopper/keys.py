"""dK and dV on Hopper: the queries that see a tile of keys come by, in boxes of (tokens, heads of the group) rows.

The tile's keys and values stay in shared memory; the copy engine puts the boxes, their dO, LSE and delta into a ring.
Which tokens come is all that differs between the two uses: a run of them (dense, window, compressed), or the list of
those that chose a block (selected). Runs are gone through in such an order that programs side by side want the same
tokens at the same time: all of them do not fit the L2 cache.

With S = K Q^T and dP = V dO^T, keys down and queries across, P and dS are left-hand operands in registers of
dV += P dO and dK += dS Q. The products of one box run on while the scores of the next begin; two such programs share a
multiprocessor, and one's softmax hides behind the other's products. A program has 128 threads of 255 registers, of
which the accumulators take 192: there is no room for a warp that only copies.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.ops.kernels.hopper import boxes, key_boxes, span
from nsa.ops.kernels.launch import INTEGERS


@gluon.jit
def _box(i, first_box, boxes, LISTED: gl.constexpr):
    """Which box the ``i``-th is: those from ``first_box`` on, then those before it."""
    return i if LISTED else i + first_box - gl.where(i + first_box >= boxes, boxes, 0)


@gluon.jit
def _entries(Order, i, entries, HEADS: gl.constexpr, BM: gl.constexpr):
    """The tokens of the ``i``-th listed box, all in every thread; beyond the list its last one, masked later."""
    BT: gl.constexpr = BM // span(HEADS)
    each: gl.constexpr = gl.BlockedLayout([BT], [32], [gl.num_warps()], [0])
    at = gl.minimum(i * BT + gl.arange(0, BT, each), entries - 1)
    return gl.load(Order + at, mask=at >= 0, other=0)


@gluon.jit
def _fetch(q_desc, d_desc, q_ring, d_ring, ready, tokens, row0, i, first_box, boxes, group, HEADS: gl.constexpr,
           BM: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """Start the copies of the ``i``-th box, if there is one, of its ``tokens`` if listed, else of those after row0."""
    BT: gl.constexpr = BM // span(HEADS)
    COPIES: gl.constexpr = BT if LISTED else 1
    ROWS: gl.constexpr = BT // COPIES
    slot, ok = i % STAGES, i < boxes
    landed, q_box, d_box = ready.index(slot), q_ring.index(slot), d_ring.index(slot)
    mbarrier.expect(landed, COPIES * (q_desc.block_type.nbytes + d_desc.block_type.nbytes), pred=ok)
    for b in gl.static_range(COPIES):
        if LISTED:
            at = row0 + gl.sum(gl.where(gl.arange(0, BT, tokens.type.layout) == b, tokens, 0), 0)
        else:
            at = row0 + _box(i, first_box, boxes, LISTED) * BT
        tma.async_copy_global_to_shared(q_desc, [at, group * HEADS, 0], landed, q_box.slice(b * ROWS, ROWS, 0), ok)
        tma.async_copy_global_to_shared(d_desc, [at, group * HEADS, 0], landed, d_box.slice(b * ROWS, ROWS, 0), ok)


@gluon.jit
def _token(Order, token0, i, first_box, boxes, entries, HEADS: gl.constexpr, BM: gl.constexpr, LISTED: gl.constexpr,
           layout: gl.constexpr):  # fmt: skip
    """(BM,) token of each row of the ``i``-th box, and which rows there are."""
    entry = _box(i, first_box, boxes, LISTED) * (BM // span(HEADS)) + gl.arange(0, BM, layout) // span(HEADS)
    ok = entry < entries
    if LISTED:
        return gl.load(Order + entry, mask=ok, other=0), ok
    else:
        return token0 + entry, ok


@gluon.jit
def _load_stats(Lse, Delta, token, ok, q_row0, GROUPS: gl.constexpr, HEADS: gl.constexpr, BM: gl.constexpr,
                layout: gl.constexpr):  # fmt: skip
    """LSE and delta (BM,) of rows; -inf and 0 where there is none."""
    head = gl.arange(0, BM, layout) % span(HEADS)
    if span(HEADS) > HEADS:
        ok = ok & (head < HEADS)
    row = q_row0 + token.to(gl.int64) * (GROUPS * HEADS) + head
    return gl.load(Lse + row, mask=ok, other=float("-inf")), gl.load(Delta + row, mask=ok, other=0.0)


@gluon.jit
def _accumulate(dk, dv, tokens, memory, stats, work, key, start, stop, scale_log2, scale, GROUPS: gl.constexpr,
                HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
                STAGES: gl.constexpr, LISTED: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """Boxes start .. stop - 1 into the accumulators dk, dv, whose last products may be under way; ``tokens``: of the
    next box to be copied, asked for early, as the copy cannot be started before they are there."""
    q_desc, d_desc, k_smem, v_smem, q_ring, d_ring, lse_ring, delta_ring, ready = memory
    Lse, Delta, First, Last = stats
    Order, group, row0, q_row0, token0, entries, first_box, boxes = work
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, BM, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, DV, 16])
    across: gl.constexpr = gl.SliceLayout(0, s_layout)
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [BN // 16], [0])
    next_token, next_ok = _token(Order, token0, start + 1, first_box, boxes, entries, HEADS, BM, LISTED, spread)
    for i in range(start, stop):
        slot, phase = i % STAGES, (i // STAGES) & 1
        lse, delta = _load_stats(Lse, Delta, next_token, next_ok, q_row0, GROUPS, HEADS, BM, spread)
        next_token, next_ok = _token(Order, token0, i + 2, first_box, boxes, entries, HEADS, BM, LISTED, spread)
        # The products start from -LSE and -delta: that saves registers. Nothing seen: every score is -inf.
        s = gl.zeros([BN, BM], gl.float32, s_layout) + lse_ring.index(i % 2).load(across)[None, :]
        if MASKED:
            dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
            token, ok = _token(Order, token0, i, first_box, boxes, entries, HEADS, BM, LISTED, across)
            last = gl.load(Last + token, mask=ok, other=-1 if LISTED else 0)
            last = last + 1 if LISTED else last
            s = gl.where(key[:, None] < last[None, :], s, float("-inf"))
            if not LISTED:
                first = gl.load(First + token, mask=ok, other=0)
                s = gl.where(key[:, None] >= first[None, :], s, float("-inf"))
        mbarrier.wait(ready.index(slot), phase)
        q, d_out = q_ring.index(slot).reshape([BM, D]), d_ring.index(slot).reshape([BM, DV])
        s = warpgroup_mma(k_smem, q.permute([1, 0]), s, is_async=True)
        # All but S is done: the box before this one has been read, and its P and dS leave their registers to dP.
        dk, dv = warpgroup_mma_wait(1, deps=(dk, dv))
        if i > 0:
            _fetch(q_desc, d_desc, q_ring, d_ring, ready, tokens, row0, i - 1 + STAGES, first_box, boxes, group, HEADS,
                   BM, STAGES, LISTED)  # fmt: skip
            if LISTED:
                tokens = _entries(Order, i + STAGES, entries, HEADS, BM)
        dp = gl.zeros([BN, BM], gl.float32, s_layout) + delta_ring.index(i % 2).load(across)[None, :]
        dp = warpgroup_mma(v_smem, d_out.permute([1, 0]), dp, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale_log2)
        left = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, dv_layout, 2))
        dv = warpgroup_mma(left, d_out, dv, is_async=True)
        lse_ring.index((i + 1) % 2).store(gl.where(lse == float("-inf"), lse, lse * (-1.0 / scale)))
        delta_ring.index((i + 1) % 2).store(-delta)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        left = gl.convert_layout((p * dp).to(q.dtype), gl.DotOperandLayout(0, dk_layout, 2))
        dk = warpgroup_mma(left, q, dk, is_async=True)
    return dk, dv, tokens


@gluon.jit
def _store(Out, value, row0, stride, size, BN: gl.constexpr, WIDTH: gl.constexpr):
    layout: gl.constexpr = value.type.layout
    row = gl.arange(0, BN, gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    at = (row0 + row.to(gl.int64) * stride)[:, None] * WIDTH + column[None, :]
    gl.store(Out + at, value.to(Out.dtype.element_ty), mask=(row < size)[:, None])


@gluon.jit
def _gradients(q_desc, d_desc, k_desc, v_desc, stats, Order, batch, group, key0, token0, entries, boxes, full_begin,
               full_end, num_tokens, num_keys, scale_log2, scale, GROUPS: gl.constexpr, HEADS: gl.constexpr,
               D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
               LISTED: gl.constexpr):  # fmt: skip
    """dK (BN, D), dV (BN, DV) of the keys from ``key0`` on, from ``boxes`` boxes of BM rows: of ``entries`` tokens from
    ``token0`` on, or in the list ``Order``. Boxes full_begin .. full_end - 1 need no mask."""
    BT: gl.constexpr = BM // span(HEADS)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, BM, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [BN // 16, 1], [16, DV, 16])
    spread: gl.constexpr = gl.BlockedLayout([1], [32], [BN // 16], [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [BN, DV], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [STAGES, BT, span(HEADS), D], q_desc.layout)
    d_ring = gl.allocate_shared_memory(dtype, [STAGES, BT, span(HEADS), DV], d_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [2, BM], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [2, BM], plain)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    resident = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    mbarrier.init(resident, count=1)
    mbarrier.expect(resident, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    key_row = batch * num_keys + key0
    tma.async_copy_global_to_shared(k_desc, [key_row, group * D], resident, k_smem)
    tma.async_copy_global_to_shared(v_desc, [key_row, group * DV], resident, v_smem)
    row0 = batch * num_tokens + token0
    first_box = 0
    if not LISTED:
        # Programs that run side by side see runs of the same length, each a little further on: they start where they
        # come by the same tokens at the same time, which then come from the L2 cache.
        first_box = boxes - 1 - (token0 // BT + boxes - 1) % gl.maximum(boxes, 1)
        first_box = gl.minimum(gl.maximum(first_box, full_begin), full_end)
    tokens = 0
    for i in gl.static_range(STAGES + 1):
        if LISTED:
            tokens = _entries(Order, i, entries, HEADS, BM)
        if i < STAGES:
            _fetch(q_desc, d_desc, q_ring, d_ring, ready, tokens, row0, i, first_box, boxes, group, HEADS, BM, STAGES,
                   LISTED)  # fmt: skip
    Lse, Delta, _, _ = stats
    q_row0 = batch.to(gl.int64) * num_tokens * (GROUPS * HEADS) + group * HEADS
    token, ok = _token(Order, token0, 0, first_box, boxes, entries, HEADS, BM, LISTED, spread)
    lse, delta = _load_stats(Lse, Delta, token, ok, q_row0, GROUPS, HEADS, BM, spread)
    lse_ring.index(0).store(gl.where(lse == float("-inf"), lse, lse * (-1.0 / scale)))
    delta_ring.index(0).store(-delta)

    memory = (q_desc, d_desc, k_smem, v_smem, q_ring, d_ring, lse_ring, delta_ring, ready)
    work = (Order, group, row0, q_row0, token0, entries, first_box, boxes)
    key = key0 + gl.arange(0, BN, gl.SliceLayout(1, s_layout))
    dk = warpgroup_mma_init(gl.zeros([BN, D], gl.float32, dk_layout))
    dv = warpgroup_mma_init(gl.zeros([BN, DV], gl.float32, dv_layout))
    mbarrier.wait(resident, 0)
    # Boxes that need a mask: listed, the first and the last ones; else, counted from first_box on, those in the middle.
    masked = (0, full_begin, full_end, boxes)
    if not LISTED:
        masked = (0, full_end - first_box, boxes - first_box + full_begin, boxes)
    for i in gl.static_range(3):
        dk, dv, tokens = _accumulate(
            dk, dv, tokens, memory, stats, work, key, masked[i], masked[i + 1], scale_log2, scale, GROUPS, HEADS, BM,
            BN, D, DV, STAGES, LISTED, (i == 1) != LISTED,
        )  # fmt: skip
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    return dk * scale, dv


@gluon.jit(do_not_specialize=INTEGERS)
def range_key_kernel(q_desc, d_desc, k_desc, v_desc, Lse, Delta, First, Last, SeenBegin, SeenEnd, FullBegin, FullEnd,
                     DK, DV_, num_tokens, num_keys, num_splits, scale_log2, scale, GROUPS: gl.constexpr,
                     HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                     STAGES: gl.constexpr):  # fmt: skip
    """DK, DV_ (splits, B, S, G, D or Dv) of BN keys, from one share of the rows that see them.

    Descriptors: q, dO (B * T, H, D or Dv); k, v (B * S, G * D or Dv). Lse, Delta (B, T, H). SeenBegin .. SeenEnd - 1
    are the tokens that see some key of the tile, FullBegin .. FullEnd - 1 all of them.
    """
    num_tiles = gl.cdiv(num_keys, BN)
    split = num_splits - 1 - gl.program_id(1)  # the last tokens see most: they go first
    tile, slot = gl.program_id(0) % num_tiles, gl.program_id(0) // num_tiles
    slots = gl.num_programs(0) // num_tiles
    batch, group = slot // GROUPS, slot % GROUPS
    BT: gl.constexpr = BM // span(HEADS)
    token0, token1 = gl.load(SeenBegin + tile), gl.load(SeenEnd + tile)
    boxes = gl.cdiv(gl.maximum(token1 - token0, 0), BT)
    # A split is a share of all tokens: the programs of one, side by side, come by the same ones.
    begin = (num_tokens.to(gl.int64) * split // num_splits).to(gl.int32)
    end = (num_tokens.to(gl.int64) * (split + 1) // num_splits).to(gl.int32)
    begin = gl.minimum(gl.cdiv(gl.maximum(begin - token0, 0), BT), boxes)
    end = gl.minimum(gl.cdiv(gl.maximum(end - token0, 0), BT), boxes)
    full_begin = gl.cdiv(gl.maximum(gl.load(FullBegin + tile) - token0, 0), BT)
    full_begin = gl.minimum(gl.maximum(full_begin, begin), end)
    full_end = gl.maximum(gl.load(FullEnd + tile) - token0, 0) // BT
    full_end = gl.minimum(gl.maximum(full_end, full_begin), end)
    token0 += begin * BT
    dk, dv = _gradients(q_desc, d_desc, k_desc, v_desc, (Lse, Delta, First, Last), First, batch, group,
                        tile * BN, token0, token1 - token0, end - begin, full_begin - begin, full_end - begin,
                        num_tokens, num_keys, scale_log2, scale, GROUPS, HEADS, D, DV, BM, BN, STAGES,
                        False)  # fmt: skip
    row = ((split * (slots // GROUPS) + batch).to(gl.int64) * num_keys + tile * BN) * GROUPS + group
    _store(DK, dk, row, GROUPS, num_keys - tile * BN, BN, D)
    _store(DV_, dv, row, GROUPS, num_keys - tile * BN, BN, DV)


@gluon.jit(do_not_specialize=INTEGERS)
def selected_key_kernel(q_desc, d_desc, k_desc, v_desc, Lse, Delta, Position, DK, DV_, PartK, PartV, Order, ListBegin,
                        ItemBlock, ItemBegin, PartBegin, Turns, BlockStart, BlockEnd, list0, list1, num_tokens,
                        num_keys, num_blocks, block_size, chunk, scale_log2, scale, GROUPS: gl.constexpr,
                        HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                        STAGES: gl.constexpr):  # fmt: skip
    """dK, dV of one block from one chunk of its list, one of the lists list0 .. list1 - 1: into DK, DV_ (B, S, G, ..)
    if it is the only one, else into the item's part, PartK, PartV (parts of these lists, BN, ..) fp32."""
    turn = gl.load(ItemBegin + list0) + gl.program_id(0)
    if turn < gl.load(ItemBegin + list1):
        BT: gl.constexpr = BM // span(HEADS)
        item = gl.load(Turns + turn).to(gl.int32)
        index = gl.load(ItemBlock + item)  # of the list: (batch, group, block)
        slot, block = index // num_blocks, index % num_blocks
        batch, group = slot // GROUPS, slot % GROUPS
        item0 = gl.load(ItemBegin + index)
        begin = gl.load(ListBegin + index) + (item - item0) * chunk
        entries = gl.minimum(gl.load(ListBegin + index + 1) - begin, chunk)
        key0 = gl.load(BlockStart + block)
        boxes = gl.cdiv(entries, BT)
        # Lists are in token order: only the first block_size entries can be tokens of the block itself. The last box
        # may reach beyond the list.
        masked = gl.where(item == item0, gl.minimum(gl.cdiv(block_size, BT), boxes), 0)
        dk, dv = _gradients(q_desc, d_desc, k_desc, v_desc, (Lse, Delta, Position, Position), Order + begin, batch,
                            group, key0, 0, entries, boxes, masked, gl.maximum(entries // BT, masked), num_tokens,
                            num_keys, scale_log2, scale, GROUPS, HEADS, D, DV, BM, BN, STAGES, True)  # fmt: skip
        size = gl.minimum(gl.load(BlockEnd + block) - key0, block_size)
        if gl.load(ItemBegin + index + 1) - item0 == 1:
            row = (batch.to(gl.int64) * num_keys + key0) * GROUPS + group
            _store(DK, dk, row, GROUPS, size, BN, D)
            _store(DV_, dv, row, GROUPS, size, BN, DV)
        else:
            row = (gl.load(PartBegin + index) - gl.load(PartBegin + list0) + item - item0).to(gl.int64) * BN
            _store(PartK, dk, row, 1, size, BN, D)
            _store(PartV, dv, row, 1, size, BN, DV)


def descriptors(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, tokens: int, keys: int) -> list[TensorDescriptor]:
    """Of q and d_out (B, T, H, D) in boxes of ``tokens`` tokens, and of k and v (B, S, G, D) in boxes of ``keys``."""
    shape, box = [q.shape[0] * q.shape[1], *q.shape[2:]], [tokens, span(q.shape[2] // k.shape[2]), q.shape[3]]
    return [*(boxes(x, shape, box) for x in (q, d_out)), key_boxes(k, keys), key_boxes(v, keys)]


def shape_constants(q: Tensor, k: Tensor) -> dict[str, int]:
    groups, width = k.shape[2], q.shape[3]
    return {"GROUPS": groups, "HEADS": q.shape[2] // groups, "D": width, "DV": width}
