"""dK and dV on Hopper: a program holds a tile of keys and loops over the queries that see it.

The queries come in boxes of BM rows, (tokens, heads of the group). The tile's keys and values stay in shared memory.
TMA loads Q and dO of a box into a pipeline stage; the threads load LSE and delta one box ahead. Two kernels share this
code. They differ in the tokens that they loop over: a range (dense, window, compressed), or the list of those that
selected a block (selected). Ranges are read in such an order that programs which run at the same time read the same
tokens, because the L2 cache does not hold all of them.

S = K Q^T and dP = V dO^T have keys as rows and queries as columns. P and dS are left-hand operands in registers, of
dV += P dO and dK += dS Q. These products of one box overlap with the scores of the next. Two programs share a
multiprocessor, so the softmax of one also overlaps with the products of the other. A program has 128 threads of 255
registers, 192 of which are accumulators. There is no room for a producer warp: the program starts its own loads.
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

from nsa.ops.kernels.hardware import INTEGERS
from nsa.ops.kernels.hopper import (
    accumulator_layout,
    allocate_barriers,
    box_descriptor,
    key_descriptor,
    left_operand_layout,
    rows_per_token,
    stage_and_phase,
)


@gluon.jit
def _box(i, first_box, boxes, LISTED: gl.constexpr):
    """The ``i``-th box in the order of work: boxes from ``first_box`` on, then those before it."""
    return i if LISTED else i + first_box - gl.where(i + first_box >= boxes, boxes, 0)


@gluon.jit
def _tokens_of_box(Order, i, entries, HEADS: gl.constexpr, BM: gl.constexpr):
    """(BT,) tokens of the ``i``-th listed box, all of them in every thread.

    Beyond the list its last token is repeated. Its rows are masked later.
    """
    BT: gl.constexpr = BM // rows_per_token(HEADS)
    replicated: gl.constexpr = gl.BlockedLayout([BT], [32], [gl.num_warps()], [0])
    at = gl.minimum(i * BT + gl.arange(0, BT, replicated), entries - 1)  # [BT]
    return gl.load(Order + at, mask=at >= 0, other=0)


@gluon.jit
def _load_queries(q_desc, d_desc, q_stages, d_stages, ready, tokens, row0, i, first_box, boxes, group,
                  HEADS: gl.constexpr, BM: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr):  # fmt: skip
    """Start the TMA loads of Q and dO of the ``i``-th box, if there is one.

    If LISTED, its ``tokens`` (BT,) are loaded one by one. Otherwise they follow each other from ``row0`` on.
    """
    BT: gl.constexpr = BM // rows_per_token(HEADS)
    LOADS: gl.constexpr = BT if LISTED else 1
    TOKENS: gl.constexpr = BT // LOADS  # of a load
    stage, ok = i % STAGES, i < boxes
    barrier, q_box, d_box = ready.index(stage), q_stages.index(stage), d_stages.index(stage)
    mbarrier.expect(barrier, LOADS * (q_desc.block_type.nbytes + d_desc.block_type.nbytes), pred=ok)
    for b in gl.static_range(LOADS):
        if LISTED:
            at = row0 + gl.sum(gl.where(gl.arange(0, BT, tokens.type.layout) == b, tokens, 0), 0)
        else:
            at = row0 + _box(i, first_box, boxes, LISTED) * BT
        q_part, d_part = q_box.slice(b * TOKENS, TOKENS, 0), d_box.slice(b * TOKENS, TOKENS, 0)
        tma.async_copy_global_to_shared(q_desc, [at, group * HEADS, 0], barrier, q_part, ok)
        tma.async_copy_global_to_shared(d_desc, [at, group * HEADS, 0], barrier, d_part, ok)


@gluon.jit
def _row_tokens(Order, token0, i, first_box, boxes, entries, HEADS: gl.constexpr, BM: gl.constexpr,
                LISTED: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """(BM,) token of each row of the ``i``-th box, and which rows exist."""
    box = _box(i, first_box, boxes, LISTED)
    entry = box * (BM // rows_per_token(HEADS)) + gl.arange(0, BM, layout) // rows_per_token(HEADS)  # [BM]
    ok = entry < entries  # [BM]
    if LISTED:
        return gl.load(Order + entry, mask=ok, other=0), ok
    else:
        return token0 + entry, ok


@gluon.jit
def _load_statistics(Lse, Delta, token, ok, q_row0, GROUPS: gl.constexpr, HEADS: gl.constexpr, BM: gl.constexpr,
                     layout: gl.constexpr):  # fmt: skip
    """LSE and delta (BM,) of rows; -inf and 0 where a row does not exist or is idle."""
    head = gl.arange(0, BM, layout) % rows_per_token(HEADS)  # [BM]
    if rows_per_token(HEADS) > HEADS:
        ok = ok & (head < HEADS)
    row = q_row0 + token.to(gl.int64) * (GROUPS * HEADS) + head  # [BM]
    return gl.load(Lse + row, mask=ok, other=float("-inf")), gl.load(Delta + row, mask=ok, other=0.0)


@gluon.jit
def _accumulate(dk, dv, tokens, memory, stats, work, key, start, stop, scale_log2, scale, GROUPS: gl.constexpr,
                HEADS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, DV: gl.constexpr,
                STAGES: gl.constexpr, LISTED: gl.constexpr, MASKED: gl.constexpr):  # fmt: skip
    """Add boxes ``start .. stop - 1`` to the accumulators dk (BN, D) and dv (BN, DV).

    On entry and on return the accumulators' last products may still run. ``tokens`` are those of the next listed box to
    be loaded. They are read early, because the TMA loads cannot start before they are there.
    """
    q_desc, d_desc, k_smem, v_smem, q_stages, d_stages, lse_ring, delta_ring, ready = memory
    Lse, Delta, First, Last = stats
    Order, group, row0, q_row0, token0, entries, first_box, boxes = work
    s_layout: gl.constexpr = accumulator_layout(BN, BM)
    dk_layout: gl.constexpr = accumulator_layout(BN, D)
    dv_layout: gl.constexpr = accumulator_layout(BN, DV)
    s_columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [BN // 16], [0])  # one row in each thread
    # [BM], [BM]
    next_token, next_ok = _row_tokens(Order, token0, start + 1, first_box, boxes, entries, HEADS, BM, LISTED, one_each)
    for i in range(start, stop):
        stage, phase = stage_and_phase(i, STAGES)
        lse, delta = _load_statistics(Lse, Delta, next_token, next_ok, q_row0, GROUPS, HEADS, BM, one_each)  # [BM] each
        next_token, next_ok = _row_tokens(Order, token0, i + 2, first_box, boxes, entries, HEADS, BM, LISTED, one_each)
        # The accumulators start from -LSE and -delta, which saves registers. Where a row sees nothing, its LSE is -inf
        # and not negated: every score is then -inf.
        s = gl.zeros([BN, BM], gl.float32, s_layout) + lse_ring.index(i % 2).load(s_columns)[None, :]  # [BN, BM]
        if MASKED:
            dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
            token, ok = _row_tokens(Order, token0, i, first_box, boxes, entries, HEADS, BM, LISTED, s_columns)  # [BM]
            last = gl.load(Last + token, mask=ok, other=-1 if LISTED else 0)  # [BM]
            last = last + 1 if LISTED else last  # a listed token's position: it sees keys up to itself
            s = gl.where(key[:, None] < last[None, :], s, float("-inf"))
            if not LISTED:
                first = gl.load(First + token, mask=ok, other=0)  # [BM]
                s = gl.where(key[:, None] >= first[None, :], s, float("-inf"))
        mbarrier.wait(ready.index(stage), phase)
        q, d_out = q_stages.index(stage).reshape([BM, D]), d_stages.index(stage).reshape([BM, DV])
        s = warpgroup_mma(k_smem, q.permute([1, 0]), s, is_async=True)
        # Wait for all products but S. Then the stage of the box before this one is free, and dP may have the registers
        # of its P and dS.
        dk, dv = warpgroup_mma_wait(1, deps=(dk, dv))
        if i > 0:
            _load_queries(q_desc, d_desc, q_stages, d_stages, ready, tokens, row0, i - 1 + STAGES, first_box, boxes,
                          group, HEADS, BM, STAGES, LISTED)  # fmt: skip
            if LISTED:
                tokens = _tokens_of_box(Order, i + STAGES, entries, HEADS, BM)
        dp = gl.zeros([BN, BM], gl.float32, s_layout) + delta_ring.index(i % 2).load(s_columns)[None, :]  # [BN, BM]
        dp = warpgroup_mma(v_smem, d_out.permute([1, 0]), dp, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale_log2)  # [BN, BM]
        p_operand = gl.convert_layout(p.to(q.dtype), left_operand_layout(dv_layout))  # [BN, BM]
        dv = warpgroup_mma(p_operand, d_out, dv, is_async=True)
        lse_ring.index((i + 1) % 2).store(gl.where(lse == float("-inf"), lse, lse * (-1.0 / scale)))
        delta_ring.index((i + 1) % 2).store(-delta)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = gl.convert_layout((p * dp).to(q.dtype), left_operand_layout(dk_layout))  # [BN, BM]
        dk = warpgroup_mma(ds, q, dk, is_async=True)
    return dk, dv, tokens


@gluon.jit
def _store(Out, value, row0, stride, size, BN: gl.constexpr, WIDTH: gl.constexpr):
    """Store the first ``size`` rows of value (BN, WIDTH), to rows row0, row0 + stride, .. of Out (.., WIDTH)."""
    layout: gl.constexpr = value.type.layout
    row = gl.arange(0, BN, gl.SliceLayout(1, layout))  # [BN]
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))  # [WIDTH]
    at = (row0 + row.to(gl.int64) * stride)[:, None] * WIDTH + column[None, :]  # [BN, WIDTH]
    gl.store(Out + at, value.to(Out.dtype.element_ty), mask=(row < size)[:, None])


@gluon.jit
def _gradients(q_desc, d_desc, k_desc, v_desc, stats, Order, batch, group, key0, token0, entries, boxes, full_begin,
               full_end, num_tokens, num_keys, scale_log2, scale, GROUPS: gl.constexpr, HEADS: gl.constexpr,
               D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
               LISTED: gl.constexpr):  # fmt: skip
    """dK (BN, D) and dV (BN, DV) of the keys from ``key0`` on, from ``boxes`` boxes of BM rows.

    The rows are those of ``entries`` tokens: from ``token0`` on, or if LISTED in the list ``Order``. Boxes ``full_begin
    .. full_end - 1`` need no mask.
    """
    BT: gl.constexpr = BM // rows_per_token(HEADS)  # tokens of a box
    s_layout: gl.constexpr = accumulator_layout(BN, BM)
    dk_layout: gl.constexpr = accumulator_layout(BN, D)
    dv_layout: gl.constexpr = accumulator_layout(BN, DV)
    one_each: gl.constexpr = gl.BlockedLayout([1], [32], [BN // 16], [0])  # one row in each thread
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [BN, DV], v_desc.layout)
    q_stages = gl.allocate_shared_memory(dtype, [STAGES, BT, rows_per_token(HEADS), D], q_desc.layout)
    d_stages = gl.allocate_shared_memory(dtype, [STAGES, BT, rows_per_token(HEADS), DV], d_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [2, BM], plain)
    delta_ring = gl.allocate_shared_memory(gl.float32, [2, BM], plain)
    ready = allocate_barriers(STAGES)
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
        # Programs that run side by side go through ranges of the same length, each a little further on. They start at
        # such a box that they read the same tokens at the same time, which then come from the L2 cache.
        first_box = boxes - 1 - (token0 // BT + boxes - 1) % gl.maximum(boxes, 1)
        first_box = gl.minimum(gl.maximum(first_box, full_begin), full_end)
    tokens = 0
    for i in gl.static_range(STAGES + 1):
        if LISTED:
            tokens = _tokens_of_box(Order, i, entries, HEADS, BM)
        if i < STAGES:
            _load_queries(q_desc, d_desc, q_stages, d_stages, ready, tokens, row0, i, first_box, boxes, group, HEADS,
                          BM, STAGES, LISTED)  # fmt: skip
    Lse, Delta, _, _ = stats
    q_row0 = batch.to(gl.int64) * num_tokens * (GROUPS * HEADS) + group * HEADS
    token, ok = _row_tokens(Order, token0, 0, first_box, boxes, entries, HEADS, BM, LISTED, one_each)  # [BM]
    lse, delta = _load_statistics(Lse, Delta, token, ok, q_row0, GROUPS, HEADS, BM, one_each)  # [BM]
    lse_ring.index(0).store(gl.where(lse == float("-inf"), lse, lse * (-1.0 / scale)))
    delta_ring.index(0).store(-delta)

    memory = (q_desc, d_desc, k_smem, v_smem, q_stages, d_stages, lse_ring, delta_ring, ready)
    work = (Order, group, row0, q_row0, token0, entries, first_box, boxes)
    key = key0 + gl.arange(0, BN, gl.SliceLayout(1, s_layout))  # [BN]
    dk = warpgroup_mma_init(gl.zeros([BN, D], gl.float32, dk_layout))  # [BN, D]
    dv = warpgroup_mma_init(gl.zeros([BN, DV], gl.float32, dv_layout))  # [BN, DV]
    mbarrier.wait(resident, 0)
    # If LISTED, the first and the last boxes need a mask. Otherwise the work begins at first_box, within the boxes that
    # need none, and those that need a mask come in the middle.
    border = (0, full_begin, full_end, boxes)
    if not LISTED:
        border = (0, full_end - first_box, boxes - first_box + full_begin, boxes)
    for i in gl.static_range(3):
        dk, dv, tokens = _accumulate(
            dk, dv, tokens, memory, stats, work, key, border[i], border[i + 1], scale_log2, scale, GROUPS, HEADS, BM,
            BN, D, DV, STAGES, LISTED, (i == 1) != LISTED,
        )  # fmt: skip
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    return dk * scale, dv


@gluon.jit(do_not_specialize=INTEGERS)
def range_key_kernel(q_desc, d_desc, k_desc, v_desc, Lse, Delta, First, Last, SeenBegin, SeenEnd, FullBegin, FullEnd,
                     DK, DV_, num_tokens, num_keys, num_splits, scale_log2, scale, GROUPS: gl.constexpr,
                     HEADS: gl.constexpr, D: gl.constexpr, DV: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                     STAGES: gl.constexpr):  # fmt: skip
    """DK, DV_ (splits, B, S, G, D or Dv) of BN keys, from one split: a share of the rows that see them.

    Descriptors: q, dO (B * T, H, D or Dv); k, v (B * S, G * D or Dv). Lse, Delta (B, T, H). SeenBegin .. SeenEnd - 1
    are the tokens that see some key of the tile. FullBegin .. FullEnd - 1 are those that see all of its keys.
    """
    num_tiles = gl.cdiv(num_keys, BN)
    split = num_splits - 1 - gl.program_id(1)  # the last tokens see the most keys, so they go first
    tile, slot = gl.program_id(0) % num_tiles, gl.program_id(0) // num_tiles
    slots = gl.num_programs(0) // num_tiles
    batch, group = slot // GROUPS, slot % GROUPS
    BT: gl.constexpr = BM // rows_per_token(HEADS)
    token0, token1 = gl.load(SeenBegin + tile), gl.load(SeenEnd + tile)
    boxes = gl.cdiv(gl.maximum(token1 - token0, 0), BT)
    # A split is a share of all tokens. So the programs of one split, which run side by side, read the same tokens.
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
    """As `nsa.ops.kernels.selected.key_kernel`; descriptors as in `range_key_kernel`."""
    turn = gl.load(ItemBegin + list0) + gl.program_id(0)
    if turn < gl.load(ItemBegin + list1):
        BT: gl.constexpr = BM // rows_per_token(HEADS)
        item = gl.load(Turns + turn).to(gl.int32)
        index = gl.load(ItemBlock + item)  # number of the list: (batch, KV head, block)
        slot, block = index // num_blocks, index % num_blocks
        batch, group = slot // GROUPS, slot % GROUPS
        item0 = gl.load(ItemBegin + index)
        begin = gl.load(ListBegin + index) + (item - item0) * chunk
        entries = gl.minimum(gl.load(ListBegin + index + 1) - begin, chunk)
        key0 = gl.load(BlockStart + block)
        boxes = gl.cdiv(entries, BT)
        # Only tokens of the block itself need the causal mask. Lists are in token order, so these are among the first
        # block_size entries. The last box may reach beyond the list, which takes a mask, too.
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
    shape = [q.shape[0] * q.shape[1], *q.shape[2:]]
    box = [tokens, rows_per_token(q.shape[2] // k.shape[2]), q.shape[3]]
    return [*(box_descriptor(x, shape, box) for x in (q, d_out)), key_descriptor(k, keys), key_descriptor(v, keys)]


def shape_constants(q: Tensor, k: Tensor) -> dict[str, int]:
    """Compile-time constants of both kernels."""
    groups, width = k.shape[2], q.shape[3]
    return {"GROUPS": groups, "HEADS": q.shape[2] // groups, "D": width, "DV": width}
