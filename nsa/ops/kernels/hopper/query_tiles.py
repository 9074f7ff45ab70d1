"""Tiles of 128 query rows on Hopper: code that the forward kernel over ranges and the dQ kernel share.

Two computing warpgroups take 64 rows each. A row is one (token, head of the group), or idle. A producer warp loads the
queries, and the keys and values that both warpgroups read. A ``slot`` is one (batch, KV head).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nsa.ops.kernels.hopper import (
    allocate_barriers,
    allocate_stages,
    load_box,
    stage_and_phase,
    tokens_per_warpgroup,
)

WARPGROUPS = gl.constexpr(2)  # that compute


@gluon.constexpr_function
def tokens_per_tile(heads):
    """Tokens in the 128 rows of a tile."""
    return WARPGROUPS.value * tokens_per_warpgroup(heads)


class Memory(NamedTuple):
    """Shared memory of a program.

    Attributes:
        q: stages of queries for each part of the columns. Those of the first warpgroup come first.
        d_out: the same for dO; q itself in the forward pass.
        k: stages of keys for each part of the columns.
        v: stages of values.
        q_ready, q_free: mbarriers of q and d_out.
        k_ready, k_free, v_ready, v_free: mbarriers of k and v. Both warpgroups free a stage.
    """

    q: Any
    d_out: Any
    k: Any
    v: Any
    q_ready: Any
    q_free: Any
    k_ready: Any
    k_free: Any
    v_ready: Any
    v_free: Any


@gluon.jit
def allocate_memory(q_descs, k_descs, v_desc, STAGES: gl.constexpr, QUEUE: gl.constexpr, BACKWARD: gl.constexpr):
    """Memory for the queries of QUEUE tiles, and for STAGES tiles of keys and values."""
    q = allocate_stages(q_descs, WARPGROUPS * QUEUE)
    d_out = q
    if BACKWARD:
        d_out = allocate_stages(q_descs, WARPGROUPS * QUEUE)
    k = allocate_stages(k_descs, STAGES)
    (v,) = allocate_stages((v_desc,), STAGES)
    q_ready, q_free = allocate_barriers(WARPGROUPS * QUEUE), allocate_barriers(WARPGROUPS * QUEUE)
    k_ready, k_free = allocate_barriers(STAGES), allocate_barriers(STAGES)
    v_ready, v_free = allocate_barriers(STAGES), allocate_barriers(STAGES)
    for i in gl.static_range(WARPGROUPS * QUEUE):
        mbarrier.init(q_ready.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=WARPGROUPS)
        mbarrier.init(v_free.index(i), count=WARPGROUPS)
    return Memory(q, d_out, k, v, q_ready, q_free, k_ready, k_free, v_ready, v_free)


@gluon.jit
def tile_of(index, num_tiles, slots, GROUPS: gl.constexpr, HEADS: gl.constexpr):
    """(batch, KV head, slot, tile, first token) of the ``index``-th tile. The last tiles see the most and go first."""
    tile, slot = num_tiles - 1 - index // slots, index % slots
    return slot // GROUPS, slot % GROUPS, slot, tile, tile * tokens_per_tile(HEADS)


@gluon.jit
def end_of_tile(token0, num_tokens, HEADS: gl.constexpr):
    """One past the last token of the tile that begins with ``token0``."""
    return gl.minimum(token0 + tokens_per_tile(HEADS), num_tokens)


@gluon.jit
def keys_of_tile(first_last, token0, num_tokens, HEADS: gl.constexpr, BN: gl.constexpr):
    """(first key that the tile sees, tiles of BN keys from there on): at least one tile. first_last: First, Last."""
    First, Last = first_last
    token1 = end_of_tile(token0, num_tokens, HEADS) - 1
    begin, end = gl.load(First + token0), gl.load(Last + token1)
    return begin, gl.maximum(gl.cdiv(end - begin, BN), 1)


@gluon.jit
def token_of_warpgroup(token0, WARPGROUP: gl.constexpr, HEADS: gl.constexpr):
    """The first token of one warpgroup, in the tile that begins with ``token0``."""
    return token0 + WARPGROUP * tokens_per_warpgroup(HEADS)


@gluon.jit
def load_keys(k_descs, memory, row, group, step, D: gl.constexpr, STAGES: gl.constexpr):
    """Producer: load the ``step``-th tile of keys, from ``row`` on, once its stage is free."""
    stage, phase = stage_and_phase(step, STAGES)
    mbarrier.wait(memory.k_free.index(stage), phase ^ 1)
    load_box(k_descs, (row,), group * D, memory.k_ready, memory.k, stage)


@gluon.jit
def load_keys_and_values(k_descs, v_desc, memory, row, group, step, D: gl.constexpr, STAGES: gl.constexpr):
    """Producer: load the ``step``-th tile of keys and of values, from ``row`` on, once their stages are free."""
    load_keys(k_descs, memory, row, group, step, D, STAGES)
    stage, phase = stage_and_phase(step, STAGES)
    mbarrier.wait(memory.v_free.index(stage), phase ^ 1)
    load_box((v_desc,), (row,), group * v_desc.block_shape[1], memory.v_ready, (memory.v,), stage)


@gluon.jit
def mask_scores(s, first, last, key0, BN: gl.constexpr):
    """Scores (64, BN) of keys from ``key0`` on: -inf outside of each row's range first .. last - 1."""
    key = key0 + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))  # [BN]
    return gl.where((key[None, :] >= first[:, None]) & (key[None, :] < last[:, None]), s, float("-inf"))
