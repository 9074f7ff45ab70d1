"""Attention of each query to a list of tokens (DSA) by tiles of all keys, where lists hold a large part of the keys.

The programs are those of dense attention. A word for each query and tile of keys has a bit for each key that the query
lists, or that a mask of it allows; the scores of the others are -inf. Tiles of keys that no query of a tile lists are
left out. The time is that of dense attention at most, however little neighbouring queries share, and no part of dK and
dV goes through memory.
`nsa.ops.kernels.tokens` gathers the listed keys instead: `pays` says which of the two a case takes.

Algorithm: FlashAttention-2 (arXiv 2307.08691), with two passes backward, as in `nsa.ops.kernels.ranges`. Nothing is
added by atomics but bits, whose order does not matter, so the results have the same bits each time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels.device_functions import (
    SMALLEST_DOT,
    load_base2_lse,
    load_row_parts,
    load_rows,
    scores,
    store_key_gradients,
    store_output,
    store_query_gradient,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E
from nsa.ops.kernels.ranges import shape_constants

# Gathering a key for a KV head takes as long as so many products with a query of width 128 in a dense tile, about; for
# the indexer's loss, which gathers for each query alone, as long as a dense row of so many keys (H200, docs/log).
PRODUCTS_OF_GATHER = 16
KEYS_OF_GATHER = 10
MOST_BYTES = 2**29  # of the bits of all queries
WIDEST = 256  # bytes of a head
TILES = {2: (128, 64), 4: (64, 32)}  # (queries, keys) of a tile, by the bytes of an element
PARTS = 2  # of a tile of queries, which the kernel of the keys goes through one after the other
SLOTS = 1024  # that a program of `bits_kernel` loads at once


class Tiles(NamedTuple):
    """Which tiles of BM queries and BN keys have a listed key, and which of their keys are listed.

    bits (B, key tiles, T) int64: bit i is set where the query lists key i of the tile. occupied (B, query tiles, key
    tiles) uint8: whether some query of the tile lists a key of the other.
    """

    bits: Tensor
    occupied: Tensor

    def of_queries(self) -> tuple[Tensor, Tensor]:
        """(B, query tiles, key tiles) int32: numbers of the tiles of keys, first those with a listed key, ascending.

        (B, query tiles) int64: how many have one.
        """
        return _numbers(self.occupied)

    def of_keys(self) -> tuple[Tensor, Tensor]:
        """The same from the side of the keys."""
        return _numbers(self.occupied.transpose(1, 2))


def tile_shape(itemsize: int) -> tuple[int, int]:
    """(queries, keys) of a tile."""
    return (32, 16) if INTERPRETED else TILES[itemsize]


def pays(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, longest: int) -> bool:
    """Whether tiles of all keys take less time than gathering the listed ones.

    Args:
        q (B, T, H, D), k (B, S, G, D), v (B, S, G, Dv), lists (B, T, slots).
        longest: tokens of the longest document, or an upper bound.
    """
    (heads, width), groups = q.shape[2:], k.shape[2]
    if not takes(q, v) or not _fits(lists, k.shape[1]):
        return False
    products = longest / 2 * (heads // groups) * max(width, v.shape[3]) / 128  # half of the keys lie behind a query
    return products <= PRODUCTS_OF_GATHER * lists.shape[2]


def takes(q: Tensor, v: Tensor) -> bool:
    """Whether these kernels attend with q (B, T, H, D) to values v (B, S, G, Dv)."""
    if max(q.shape[3], v.shape[3]) * q.element_size() > WIDEST:
        return False
    # Others are not proven on a GPU: an illegal access was seen there in fp32 (docs/log/2026-11.md).
    return INTERPRETED or (q.element_size() == 2 and q.shape[3] == v.shape[3])


def pays_for_loss(keys: int, lists: Tensor, longest: int) -> bool:
    """Whether the indexer's loss over lists (B, T, slots) of ``keys`` keys takes less time by tiles of all of them."""
    return longest <= KEYS_OF_GATHER * lists.shape[2] and _fits(lists, keys)


def _fits(lists: Tensor, keys: int) -> bool:
    return lists.shape[0] * lists.shape[1] * keys <= 8 * MOST_BYTES


@triton.jit(do_not_specialize=INTEGERS)
def bits_kernel(Lists, Bits, Occupied, num_tokens, num_slots, num_tiles, BM: tl.constexpr, BN: tl.constexpr,
                BLOCK: tl.constexpr):  # fmt: skip
    """Sets the bits of one query. Bits (B, key tiles, T) int64, Occupied (B, query tiles, key tiles) uint8: 0 before.

    Lists (B, T, slots) int32.
    """
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    Lists += (batch * num_tokens + token) * num_slots
    Bits += batch * num_tiles * num_tokens + token
    Occupied += (batch * tl.cdiv(num_tokens, BM) + token // BM) * num_tiles
    one = tl.full([BLOCK], 1, tl.int64)  # [BLOCK]
    for start in tl.range(0, num_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)  # [BLOCK]
        key = tl.load(Lists + slot, mask=slot < num_slots, other=-1)  # [BLOCK]
        tile = tl.maximum(key, 0) // BN  # [BLOCK]
        bit = one << (tl.maximum(key, 0) % BN).to(tl.int64)  # [BLOCK]
        tl.atomic_or(Bits + tile.to(tl.int64) * num_tokens, bit, mask=key >= 0, sem="relaxed")  # in any order
        tl.store(Occupied + tile, tl.full([BLOCK], 1, tl.uint8), mask=key >= 0)


@triton.jit(do_not_specialize=INTEGERS)
def mask_bits_kernel(Mask, Bits, Occupied, num_tokens, num_keys, num_tiles, BM: tl.constexpr, BN: tl.constexpr):
    """Bits (B, key tiles, T) int64 of BM queries and BN keys of Mask (B, T, S) uint8; keys after a query have none.

    Occupied (B, query tiles, key tiles) uint8: whether there is a bit.
    """
    tile, query_tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = query_tile * BM + tl.arange(0, BM)  # [BM]
    within = tl.arange(0, BN)  # [BN]
    key, ok = tile * BN + within, token < num_tokens  # [BN], [BM]
    seen = ok[:, None] & (key[None, :] <= (num_keys - num_tokens + token)[:, None])  # [BM, BN]
    row = batch * num_tokens + token  # [BM]
    keep = tl.load(Mask + row[:, None] * num_keys + key[None, :], mask=seen, other=0) != 0  # [BM, BN]
    bit = tl.full([BN], 1, tl.int64) << within.to(tl.int64)  # [BN]
    word = tl.sum(tl.where(keep, bit[None, :], 0), 1)  # [BM]
    tl.store(Bits + (batch * num_tiles + tile) * num_tokens + token, word, mask=ok)
    place = (batch * tl.num_programs(1) + query_tile) * num_tiles + tile
    tl.store(Occupied + place, tl.max(tl.max(keep.to(tl.int32), 1), 0).to(tl.uint8))


@triton.jit
def is_listed(word, BN: tl.constexpr):
    """[BM, BN]: bit i of each word [BM]."""
    return ((word[:, None] >> tl.arange(0, BN).to(tl.int64)[None, :]) & 1) == 1


@triton.jit
def _query_tile(Tiles, Count, num_tiles):
    """(number of the tile, its list of tiles of keys, their number). The last tiles see the most keys: they start."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tile
    return tile, Tiles + place * num_tiles, tl.load(Count + place).to(tl.int32)


@triton.jit(do_not_specialize=INTEGERS)
def forward_kernel(Q, K, V, Bits, Tiles, Count, Out, Lse, num_tokens, num_keys, num_tiles, scale_log2,
                   GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                   D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                   PRECISION: tl.constexpr):  # fmt: skip
    """Output and LSE of one head of BM queries.

    Q, Out (B, T, H, D or Dv); K, V (B, S, G, D or Dv); Lse (B, T, H) fp32; Bits, Tiles, Count: see `Tiles`.
    """
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tile, Tiles, count = _query_tile(Tiles, Count, num_tiles)
    token = tile * BM + tl.arange(0, BM)  # [BM]
    ok = token < num_tokens  # [BM]
    q_row = (batch * num_tokens + token) * (GROUPS * HEADS) + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    Bits += batch * num_tiles * num_tokens
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM], in units of log2
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    for i in tl.range(0, count):
        at = tl.load(Tiles + i, mask=i < count, other=0)
        key = at * BN + tl.arange(0, BN)  # [BN]
        k_row = (batch * num_keys + key) * GROUPS + head // HEADS  # [BN]
        k1, k2 = load_row_parts(K, k_row, key < num_keys, D, D1, D2)  # [BN, D1], [BN, D2]
        v = load_rows(V, k_row, key < num_keys, tl.arange(0, DV1), DV)  # [BN, DV1]
        word = tl.load(Bits + at.to(tl.int64) * num_tokens + token, mask=ok, other=0)  # [BM]
        s = tl.where(is_listed(word, BN), scores(q1, q2, k1, k2, D2, PRECISION), float("-inf"))  # [BM, BN]
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)  # [BM]
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # [BM]: -inf - -inf would be NaN
        p = tl.exp2(s * scale_log2 - base[:, None])  # [BM, BN]
        rescale = tl.exp2(row_max - base)  # [BM]
        row_sum = row_sum * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    store_output(Out, Lse, q_row, ok, acc, row_max, row_sum, DV, DV1)


@triton.jit(do_not_specialize=INTEGERS)
def query_kernel(Q, K, V, DOut, Lse, Delta, Bits, Tiles, Count, DQ, num_tokens, num_keys, num_tiles, scale_log2, scale,
                 GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                 D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """DQ (B, T, H, D) of one head of BM queries. Arguments as in `forward_kernel`; Delta (B, T, H) fp32."""
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    tile, Tiles, count = _query_tile(Tiles, Count, num_tiles)
    token = tile * BM + tl.arange(0, BM)  # [BM]
    ok = token < num_tokens  # [BM]
    q_row = (batch * num_tokens + token) * (GROUPS * HEADS) + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
    lse = load_base2_lse(Lse, q_row, ok)  # [BM]
    delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
    Bits += batch * num_tiles * num_tokens
    dq1 = tl.zeros([BM, D1], tl.float32)  # [BM, D1]
    dq2 = tl.zeros([BM, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BM, D2], unused if D2 is 0
    for i in tl.range(0, count):
        at = tl.load(Tiles + i, mask=i < count, other=0)
        key = at * BN + tl.arange(0, BN)  # [BN]
        k_row = (batch * num_keys + key) * GROUPS + head // HEADS  # [BN]
        k1, k2 = load_row_parts(K, k_row, key < num_keys, D, D1, D2)  # [BN, D1], [BN, D2]
        v = load_rows(V, k_row, key < num_keys, tl.arange(0, DV1), DV)  # [BN, DV1]
        word = tl.load(Bits + at.to(tl.int64) * num_tokens + token, mask=ok, other=0)  # [BM]
        p = tl.exp2(scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2 - lse[:, None])  # [BM, BN]
        p = tl.where(is_listed(word, BN), p, 0.0)
        ds = (p * (tl.dot(d_out, v.T, input_precision=PRECISION) - delta[:, None])).to(k1.dtype)  # [BM, BN]
        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
    store_query_gradient(DQ, q_row, ok, dq1, dq2, scale, D, D1, D2, False)


@triton.jit(do_not_specialize=INTEGERS)
def key_kernel(Q, K, V, DOut, Lse, Delta, Bits, Tiles, Count, DK, DV_, num_tokens, num_keys, num_tiles, scale_log2,
               scale, GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
               D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """DK, DV_ (B, S, G, D or Dv) of BN keys of a KV head.

    It goes through BM queries at a time. ``num_tiles``: tiles of queries, of PARTS times as many.
    """
    tile, group, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    place = batch * tl.num_programs(0) + tile
    Tiles += place * num_tiles
    Bits += place * num_tokens
    key = tile * BN + tl.arange(0, BN)  # [BN]
    k_row = (batch * num_keys + key) * GROUPS + group  # [BN]
    k1, k2 = load_row_parts(K, k_row, key < num_keys, D, D1, D2)  # [BN, D1], [BN, D2]
    v = load_rows(V, k_row, key < num_keys, tl.arange(0, DV1), DV)  # [BN, DV1]
    dk1 = tl.zeros([BN, D1], tl.float32)  # [BN, D1]
    dk2 = tl.zeros([BN, D2 if D2 > 0 else SMALLEST_DOT], tl.float32)  # [BN, D2], unused if D2 is 0
    dv = tl.zeros([BN, DV1], tl.float32)  # [BN, DV1]
    steps = tl.load(Count + place).to(tl.int32) * (PARTS * HEADS)
    for i in tl.range(0, steps):
        part = tl.load(Tiles + i // (PARTS * HEADS), mask=i < steps, other=0) * PARTS + i // HEADS % PARTS
        token = part * BM + tl.arange(0, BM)  # [BM]
        ok = token < num_tokens  # [BM]
        q_row = ((batch * num_tokens + token) * GROUPS + group) * HEADS + i % HEADS  # [BM]
        q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
        d_out = load_rows(DOut, q_row, ok, tl.arange(0, DV1), DV)  # [BM, DV1]
        lse = load_base2_lse(Lse, q_row, ok)  # [BM]
        delta = tl.load(Delta + q_row, mask=ok, other=0.0)  # [BM]
        word = tl.load(Bits + token, mask=ok, other=0)  # [BM]
        p = tl.exp2(scores(k1, k2, q1, q2, D2, PRECISION) * scale_log2 - lse[None, :])  # [BN, BM]
        p = tl.where(((word[None, :] >> tl.arange(0, BN).to(tl.int64)[:, None]) & 1) == 1, p, 0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        ds = (p * (tl.dot(v, d_out.T, input_precision=PRECISION) - delta[None, :])).to(q1.dtype)  # [BN, BM]
        dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
    store_key_gradients(DK, DV_, k_row, key < num_keys, dk1, dk2, dv, scale, D, DV, D1, D2, DV1)


def tiles_of(lists: Tensor, keys: int, itemsize: int) -> Tiles:
    """lists (B, T, slots) int32 of ``keys`` keys, for tensors with elements of so many bytes."""
    batch, tokens, slots = lists.shape
    queries, of_tile = tile_shape(itemsize)
    query_tiles, key_tiles = triton.cdiv(tokens, queries), triton.cdiv(keys, of_tile)
    bits = lists.new_zeros(batch, key_tiles, tokens, dtype=torch.int64)
    occupied = lists.new_zeros(batch, query_tiles, key_tiles, dtype=torch.uint8)
    if lists.numel():
        bits_kernel[tokens, batch](
            lists, bits, occupied, tokens, slots, key_tiles, queries, of_tile, 16 if INTERPRETED else SLOTS, num_warps=4
        )
    return Tiles(bits, occupied)


def tiles_of_mask(mask: Tensor, itemsize: int) -> Tiles:
    """The same of a mask (B, T, S) bool, without keys after the query, which is one of the last T positions."""
    batch, tokens, keys = mask.shape
    queries, of_tile = tile_shape(itemsize)
    query_tiles, key_tiles = triton.cdiv(tokens, queries), triton.cdiv(keys, of_tile)
    bits = mask.new_empty(batch, key_tiles, tokens, dtype=torch.int64)
    occupied = mask.new_empty(batch, query_tiles, key_tiles, dtype=torch.uint8)
    mask_bits_kernel[key_tiles, query_tiles, batch](
        mask.view(torch.uint8), bits, occupied, tokens, keys, key_tiles, queries, of_tile, num_warps=8
    )
    return Tiles(bits, occupied)


def _numbers(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of (B, m, n): the numbers of the columns that are not 0, ascending, then the others; the count."""
    occupied = occupied.contiguous()  # a sort keeps the strides of what it sorts
    order = occupied.sort(dim=-1, descending=True, stable=True).indices
    return order.int(), occupied.sum(-1, dtype=torch.int64)


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.kernels.tokens.forward`."""
    if not (q.numel() and k.numel() and lists.numel()):
        return _nothing(q, v)
    return _forward(q, k, v, tiles_of(lists, k.shape[1], q.element_size()), scale)


def forward_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `forward`, for a mask (B, T, S) bool that all heads share: see `tiles_of_mask`. All are contiguous."""
    if not (q.numel() and k.numel()):
        return _nothing(q, v)
    return _forward(q, k, v, tiles_of_mask(mask, q.element_size()), scale)


def _nothing(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    return q.new_zeros(*q.shape[:3], v.shape[3]), lse


def _forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles, scale: float) -> tuple[Tensor, Tensor]:
    (batch, tokens, heads, _), keys = q.shape, k.shape[1]
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, tokens, heads, dtype=torch.float32)
    queries, of_tile = tile_shape(q.element_size())
    listed, count = tiles.of_queries()
    forward_kernel[heads, listed.shape[1], batch](
        q, k, v, tiles.bits, listed, count, out, lse, tokens, keys, listed.shape[2],
        scale * LOG2_E, **shape_constants(q, k, v), BM=queries, BN=of_tile, **_options(queries),
    )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `nsa.ops.kernels.tokens.backward`."""
    (batch, tokens, heads, _), (keys, groups) = q.shape, k.shape[1:3]
    if not (q.numel() and k.numel() and lists.numel()):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    tiles, (queries, of_tile) = tiles_of(lists, keys, q.element_size()), tile_shape(q.element_size())
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    inputs = (q, k, v, d_out, lse, delta, tiles.bits)
    constants = {**shape_constants(q, k, v), "BN": of_tile}
    query_tiles, key_tiles = tiles.occupied.shape[1:]
    query_kernel[heads, query_tiles, batch](
        *inputs, *tiles.of_queries(), dq, tokens, keys, key_tiles, scale * LOG2_E, scale, **constants,
        BM=queries, **_options(queries),
    )  # fmt: skip
    key_kernel[key_tiles, groups, batch](
        *inputs, *tiles.of_keys(), dk, dv, tokens, keys, query_tiles, scale * LOG2_E, scale, **constants,
        BM=queries // PARTS, PARTS=PARTS, **_options(of_tile),
    )  # fmt: skip
    return dq, dk, dv


def _options(rows: int) -> dict[str, int]:
    """Of a kernel whose products have so many rows: a warpgroup for each 64 of them."""
    return {} if INTERPRETED else {"num_warps": max(4, rows // 16), "num_stages": 2}
