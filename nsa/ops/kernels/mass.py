"""Attention probabilities of some queries, summed over the heads of a KV head, and their sums along lines.

They are what methods choose by: those of a prompt's last queries, or of means of blocks of queries. Two passes over the
keys: the first has the LSE of each query in parts, the second has the probabilities.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.kernels import hardware
from nsa.ops.kernels.device_functions import load_row_parts, load_rows, scores
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, split_width

PROGRAMS = 528  # target number of programs of `lse_kernel`
MOST_SPLITS = 64
LINES = 256  # of a program
COUNTS = ("num_queries", "offset", "part", "block_size")
MEAN_ROWS, MEAN_COLUMNS = 64, 128  # tokens that a program of `means_kernel` loads at once, and its columns


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def means_kernel(X, Means, num_tokens, num_blocks, block_size, WIDTH: tl.constexpr, ROWS: tl.constexpr,
                 COLUMNS: tl.constexpr):  # fmt: skip
    """Means (B, num_blocks, WIDTH) fp32 of X (B, T, WIDTH) over blocks of tokens; the last block may be shorter."""
    block, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)  # [COLUMNS]
    first = block * block_size
    count = tl.minimum(block_size, num_tokens - first)
    total = tl.zeros([COLUMNS], tl.float32)  # [COLUMNS]
    for start in tl.range(0, count, ROWS):
        token = start + tl.arange(0, ROWS)  # [ROWS]
        x = load_rows(X, batch * num_tokens + first + token, token < count, column, WIDTH)  # [ROWS, COLUMNS]
        total += tl.sum(x.to(tl.float32), 0)
    row = batch * num_blocks + block
    tl.store(Means + row * WIDTH + column, total / count, mask=column < WIDTH)


@triton.jit
def _keys(K, batch, group, key, num_keys, GROUPS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Both parts of (BN, D)."""
    row = (batch.to(tl.int64) * num_keys + key) * GROUPS + group  # [BN]
    return load_row_parts(K, row, key < num_keys, D, D1, D2)  # [BN, D1], [BN, D2]


@triton.jit
def _scores(q1, q2, k1, k2, key, position, scale_log2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """(BM, BN), in units of log2, -inf for keys after the query."""
    s = scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2  # [BM, BN]
    return tl.where(key[None, :] <= position[:, None], s, float("-inf"))


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def lse_kernel(Q, K, Lse, num_queries, num_keys, offset, part, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr,
               D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Lse (B, H, R, splits) fp32, in units of log2: of BM queries of one head over ``part`` keys, a multiple of BN.

    Q (B, R, H, D), K (B, S, G, D). Query r is at position ``offset + r``.
    """
    split, head, batch = tl.program_id(1), tl.program_id(2) % (GROUPS * HEADS), tl.program_id(2) // (GROUPS * HEADS)
    query = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    ok = query < num_queries  # [BM]
    q_row = (batch.to(tl.int64) * num_queries + query) * (GROUPS * HEADS) + head  # [BM]
    q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    position = offset + query  # [BM]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    end = tl.minimum((split + 1) * part, tl.minimum(num_keys, offset + (tl.program_id(0) + 1) * BM))
    for start in tl.range(split * part, end, BN):
        key = start + tl.arange(0, BN)  # [BN]
        k1, k2 = _keys(K, batch, head // HEADS, key, num_keys, GROUPS, D, D1, D2)  # [BN, D1], [BN, D2]
        s = _scores(q1, q2, k1, k2, key, position, scale_log2, D2, PRECISION)  # [BM, BN]
        new_max = tl.maximum(row_max, tl.max(s, 1))  # [BM]
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # [BM]
        row_sum = row_sum * tl.exp2(row_max - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        row_max = new_max
    at = ((batch * (GROUPS * HEADS) + head).to(tl.int64) * num_queries + query) * tl.num_programs(1) + split  # [BM]
    tl.store(Lse + at, row_max + tl.log2(row_sum), mask=ok)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def mass_kernel(Q, K, Lse, Mass, num_queries, num_keys, offset, scale_log2, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                SPLITS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Mass (B, G, R, S) fp32 of BM queries and BN keys, 0 after the query; Lse as of `lse_kernel`, of SPLITS parts."""
    group, batch = tl.program_id(2) % GROUPS, tl.program_id(2) // GROUPS
    query0 = tl.program_id(1) * BM
    query = query0 + tl.arange(0, BM)  # [BM]
    key = tl.program_id(0) * BN + tl.arange(0, BN)  # [BN]
    ok = query < num_queries  # [BM]
    mass = tl.zeros([BM, BN], tl.float32)  # [BM, BN]
    if tl.program_id(0) * BN < offset + query0 + BM:
        split = tl.arange(0, SPLITS)  # [SPLITS]
        k1, k2 = _keys(K, batch, group, key, num_keys, GROUPS, D, D1, D2)  # [BN, D1], [BN, D2]
        for j in tl.range(0, HEADS):
            head = group * HEADS + j
            q_row = (batch.to(tl.int64) * num_queries + query) * (GROUPS * HEADS) + head  # [BM]
            q1, q2 = load_row_parts(Q, q_row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
            s = _scores(q1, q2, k1, k2, key, offset + query, scale_log2, D2, PRECISION)  # [BM, BN]
            at = ((batch * (GROUPS * HEADS) + head).to(tl.int64) * num_queries + query) * SPLITS  # [BM]
            parts = tl.load(Lse + at[:, None] + split[None, :], mask=ok[:, None], other=0.0)  # [BM, SPLITS]
            most = tl.max(parts, 1)  # [BM], every query sees a key
            lse = most + tl.log2(tl.sum(tl.exp2(parts - most[:, None]), 1))  # [BM]
            mass += tl.exp2(s - lse[:, None])
    row = (batch * GROUPS + group).to(tl.int64) * num_queries + query  # [BM]
    inside = ok[:, None] & (key < num_keys)[None, :]  # [BM, BN]
    tl.store(Mass + row[:, None] * num_keys + key[None, :], mass, mask=inside)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def line_kernel(Mass, Columns, Diagonals, num_queries, num_keys, BLOCK: tl.constexpr):
    """Sums of Mass (slots, R, S): Columns (slots, S) over queries; Diagonals (slots, S), number d is d keys back."""
    slot = tl.program_id(1).to(tl.int64)
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    ok = line < num_keys  # [BLOCK]
    column, diagonal = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)  # [BLOCK], [BLOCK]
    for query in tl.range(0, num_queries):
        row = Mass + (slot * num_queries + query) * num_keys
        last = num_keys - num_queries + query
        column += tl.load(row + line, mask=ok & (line <= last), other=0.0)
        diagonal += tl.load(row + last - line, mask=ok & (line <= last), other=0.0)
    tl.store(Columns + slot * num_keys + line, column, mask=ok)
    tl.store(Diagonals + slot * num_keys + line, diagonal, mask=ok)


def means(x: Tensor, block_size: int) -> Tensor:
    """(B, R, N, D) fp32: means of x (B, T, N, D), contiguous, over blocks of tokens; R = ceil(T / block_size)."""
    batch, tokens, heads, width = x.shape
    blocks = triton.cdiv(tokens, block_size)
    found = x.new_empty(batch, blocks, heads, width, dtype=torch.float32)
    if found.numel():
        rows = min(MEAN_ROWS, triton.next_power_of_2(block_size))
        means_kernel[blocks, triton.cdiv(heads * width, MEAN_COLUMNS), batch](
            x, found, tokens, blocks, block_size, WIDTH=heads * width, ROWS=rows, COLUMNS=MEAN_COLUMNS, num_warps=4
        )  # fmt: skip
    return found


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """(B, G, R, S) fp32: the probabilities of q (B, R, H, D) over k (B, S, G, D), summed over the heads of a KV head.

    The queries are the last R of the S positions; both are contiguous. After a query it is 0.
    """
    (batch, queries, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    mass = q.new_empty(batch, groups, queries, keys, dtype=torch.float32)
    if not mass.numel():
        return mass
    d1, d2 = split_width(width)
    rows, block, warps = _tile(q)
    tiles = triton.cdiv(queries, rows)
    wanted = max(1, min(MOST_SPLITS, PROGRAMS // (tiles * batch * heads), triton.cdiv(keys, 4 * block)))
    splits = 4 if INTERPRETED else 1 << (wanted.bit_length() - 1)
    part = triton.cdiv(triton.cdiv(keys, splits), block) * block
    lse = mass.new_empty(batch, heads, queries, splits)
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    constants = {"GROUPS": groups, "HEADS": heads // groups, "D": width, "D1": d1, "D2": d2, "BM": rows, "BN": block}
    options = {"PRECISION": precision, "num_warps": warps, "num_stages": 2}
    lse_kernel[tiles, splits, batch * heads](
        q, k, lse, queries, keys, keys - queries, part, scale * LOG2_E, **constants, **options
    )  # fmt: skip
    mass_kernel[triton.cdiv(keys, block), tiles, batch * groups](
        q, k, lse, mass, queries, keys, keys - queries, scale * LOG2_E, **constants, SPLITS=splits, **options
    )  # fmt: skip
    return mass


def lines(mass: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``mass`` (B, G, R, S) along columns and along diagonals, (B, G, S) fp32 each."""
    batch, groups, queries, keys = mass.shape
    columns, diagonals = (mass.new_empty(batch, groups, keys) for _ in range(2))
    if mass.numel():
        block = 32 if INTERPRETED else LINES
        line_kernel[triton.cdiv(keys, block), batch * groups](
            mass, columns, diagonals, queries, keys, BLOCK=block, num_warps=4
        )  # fmt: skip
    return columns, diagonals


def _tile(q: Tensor) -> tuple[int, int, int]:
    """Queries of a program, keys of a step, and warps: without spills of registers."""
    if INTERPRETED:
        return 16, 16, 4
    if q.element_size() == 2:
        return 64, 64, 4
    return (64, 64, 8) if hardware.architecture() == "sm_90" and q.shape[3] <= 128 else (16, 32, 4)
