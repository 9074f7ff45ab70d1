"""Attention of one query token per sequence (decoding): split over keys, then merged by log-sum-exp.

The keys of a KV head are cut into chunks of a fixed number of slots. A program takes a chunk and the heads that share
its list, so a key is read once for all of them. It writes a part: the normalized output of its chunk, and the LSE. A
second kernel merges the parts of a row in their order. The grid depends on shapes alone, and so do the chunks: nothing
waits for the host, and a sequence gets the same bits beside any others.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import first_columns, memory_rows
from nsa.ops.kernels import hardware
from nsa.ops.kernels.device_functions import LSE_TO_NATURAL, load_row_parts, load_rows, scores, store_rows
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, MAX_ROW_BYTES, MAX_WIDTH, tile_width
from nsa.ops.kernels.ranges import shape_constants

MOST_ROWS = 64  # heads of a program
SPLITS = 64  # chunks of a long list, unless they would be smaller or larger than these:
LEAST_CHUNK, MOST_CHUNK = 128, 1024  # slots
LEAST_LATENTS = 256  # slots; the sums of fewer would be more bytes than their rows
COUNTS = ("num_terms", "num_term_keys", "num_parts", "first_part", "num_compressed", "num_pages")
BASE_2 = tl.constexpr(LOG2_E)


@triton.jit
def place(LISTS: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """(batch int64, list, KV head, query head [BM], whether it exists [BM]) of this program.

    LISTS are lists of a sequence: one for each KV head, or one for each query head. HEADS share one.
    """
    tiles: tl.constexpr = (HEADS + BM - 1) // BM
    index = tl.program_id(1) // tiles
    head = tl.program_id(1) % tiles * BM + tl.arange(0, BM)  # [BM]
    return tl.program_id(2).to(tl.int64), index, index * GROUPS // LISTS, index * HEADS + head, head < HEADS


@triton.jit
def attend_chunk(q1, q2, K, V, Pages, LogWeights, Scores, row, row_ok, begin, end, length, key_row, num_keys,
                 scale_log2, group, LISTED: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr,
                 SHARED: tl.constexpr, PAGE: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                 D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """(sums [BM, DV1], maxima [BM] to base 2, sums of probabilities [BM]) of slots ``begin .. end - 1``.

    Slot s is token s; or with LISTED token ``s % PAGE`` of page ``Pages[s // PAGE]``, which has LogWeights if WEIGHTED.
    Tokens from ``length`` on are not there. KEEP: also store the scores, to base 2, in Scores (rows, num_keys).
    SHARED: values are the first D1 columns of the keys, DV1 = D1, and are not loaded again.
    """
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    for start in tl.range(begin, end, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        key = slot
        ok = slot < end  # [BN]
        if LISTED:
            page = tl.load(Pages + slot // PAGE, mask=ok, other=-1)  # [BN]
            key = page * PAGE + slot % PAGE
            ok = page >= 0
        ok = ok & (key < length)
        k_row = (key_row + key) * GROUPS + group  # [BN]
        k1, k2 = load_row_parts(K, k_row, ok, D, D1, D2)  # [BN, D1], [BN, D2]
        s = scores(q1, q2, k1, k2, D2, PRECISION) * scale_log2  # [BM, BN]
        if WEIGHTED:
            s += (tl.load(LogWeights + slot // PAGE, mask=ok, other=0.0) * BASE_2)[None, :]
        if KEEP:
            tl.store(Scores + row[:, None] * num_keys + key[None, :], s, mask=row_ok[:, None] & ok[None, :])
        s = tl.where(ok[None, :], s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))  # [BM]
        # A row that has seen nothing yet: exp2(-inf - 0) = 0, where -inf - -inf would be NaN.
        base = tl.where(new_max == float("-inf"), 0.0, new_max)  # [BM]
        p = tl.exp2(s - base[:, None])  # [BM, BN]
        rescale = tl.exp2(row_max - base)  # [BM]
        row_sum = row_sum * rescale + tl.sum(p, 1)
        if SHARED:
            v = k1  # [BN, DV1]
        else:
            v = load_rows(V, k_row, ok, tl.arange(0, DV1), DV)  # [BN, DV1]
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def store_part(Parts, PartLse, row, ok, part, num_parts, acc, row_max, row_sum, DV: tl.constexpr, DV1: tl.constexpr):
    """Part ``part`` of each row: its output, and its LSE to base 2. `merged_parts` does not read empty outputs."""
    at = row * num_parts + part  # [BM]
    tl.store(PartLse + at, row_max + tl.log2(row_sum), mask=ok)
    some = row_sum > 0  # [BM]
    out = acc / tl.where(some, row_sum, 1.0)[:, None]  # [BM, DV1]
    store_rows(Parts, at, ok & some, tl.arange(0, DV1), DV, out)


@triton.jit
def merged_parts(Parts, PartLse, row, first, count, num_parts, MOST: tl.constexpr, SIDE: tl.constexpr,
                 DV: tl.constexpr, DV1: tl.constexpr):  # fmt: skip
    """(output [DV1], LSE to base 2) of parts ``first .. first + count - 1`` of a row, at most MOST, SIDE at a time."""
    at = row * num_parts + first
    # What a loop assigns to has the shape that it had before: the names for all parts are not those of some.
    every = tl.arange(0, MOST)  # [MOST]
    lses = tl.load(PartLse + at + every, mask=every < count, other=float("-inf"))  # [MOST]
    top = tl.max(lses, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lses - base), 0)
    out = tl.zeros([DV1], tl.float32)  # [DV1]
    for start in tl.range(0, count, SIDE):
        part = start + tl.arange(0, SIDE)  # [SIDE]
        lse = tl.load(PartLse + at + part, mask=part < count, other=float("-inf"))  # [SIDE]
        x = load_rows(Parts, at + part, lse > float("-inf"), tl.arange(0, DV1), DV)  # [SIDE, DV1]
        out += tl.sum(x * tl.exp2(lse - base)[:, None], 0)
    return out / tl.where(total == 0, 1.0, total), base + tl.log2(total)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def split_kernel(Q, K, V, Lengths, Pages, LogWeights, TermK, TermV, TermIndices, TermWeights, Parts, PartLse,
                 num_rows, num_keys, num_pages, num_splits, num_term_keys, num_terms, first_part, num_parts, scale_log2,
                 LISTS: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr, TERMS: tl.constexpr,
                 SHARED: tl.constexpr, PAGE: tl.constexpr, CHUNK: tl.constexpr, TERM_CHUNK: tl.constexpr,
                 GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
                 D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Part ``first_part`` + program of some heads: a chunk of the keys, or with TERMS after these one of the terms.

    Q (B, H, D); K, V (B, S, G, D or Dv), of which the sequences are ``num_rows`` tokens apart; Lengths (B,) int32;
    Pages, LogWeights (B, LISTS, num_pages) int32, fp32; TermK, TermV (B, C, G, D or Dv); TermIndices, TermWeights (B,
    LISTS, num_terms); Parts (B, H, num_parts, Dv) fp32; PartLse (B, H, num_parts) fp32.
    """
    batch, index, group, head, ok = place(LISTS, GROUPS, HEADS, BM)
    split = tl.program_id(0)
    row = batch * (LISTS * HEADS) + head  # [BM]
    q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    if split < num_splits:
        length = tl.load(Lengths + batch)
        begin = split * CHUNK
        end = begin + CHUNK
        if LISTED:
            end = tl.minimum(end, num_pages * PAGE)
            Pages += (batch * LISTS + index) * num_pages
            if WEIGHTED:
                LogWeights += (batch * LISTS + index) * num_pages
        else:
            end = tl.minimum(end, tl.minimum(length, num_keys))
        acc, row_max, row_sum = attend_chunk(
            q1, q2, K, V, Pages, LogWeights, PartLse, row, ok, begin, end, length, batch * num_rows, num_keys,
            scale_log2, group, LISTED, WEIGHTED, False, SHARED, PAGE, GROUPS, D, DV, D1, D2, DV1, BM, BN, PRECISION,
        )  # fmt: skip
        store_part(
            Parts, PartLse, row, ok, first_part + split, num_parts, acc, row_max, row_sum, DV, DV1
        )  # fmt: skip
    else:
        if TERMS:
            begin = (split - num_splits) * TERM_CHUNK
            end = tl.minimum(begin + TERM_CHUNK, num_terms)
            TermIndices += (batch * LISTS + index) * num_terms
            TermWeights += (batch * LISTS + index) * num_terms
            acc, row_max, row_sum = attend_chunk(
                q1, q2, TermK, TermV, TermIndices, TermWeights, PartLse, row, ok, begin, end, num_term_keys,
                batch * num_term_keys, num_term_keys, scale_log2, group, True, True, False, False, 1, GROUPS, D, DV, D1,
                D2, DV1, BM, BN, PRECISION,
            )  # fmt: skip
            store_part(Parts, PartLse, row, ok, first_part + split, num_parts, acc, row_max, row_sum, DV, DV1)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def merge_kernel(Parts, PartLse, Out, Lse, num_parts, MOST: tl.constexpr, SIDE: tl.constexpr, DV: tl.constexpr,
                 DV1: tl.constexpr):  # fmt: skip
    """Out (B, H, Dv), and Lse (B, H) fp32 in natural units, of one row. A row that sees nothing gets 0 and -inf."""
    row = tl.program_id(0).to(tl.int64)
    out, lse = merged_parts(Parts, PartLse, row, 0, num_parts, num_parts, MOST, SIDE, DV, DV1)
    column = tl.arange(0, DV1)  # [DV1]
    tl.store(Out + row * DV + column, out.to(Out.dtype.element_ty), mask=column < DV)
    tl.store(Lse + row, lse * LSE_TO_NATURAL)


@triton.jit
def append_kernel(Rows, Memories, Slots, Index, WIDTHS: tl.constexpr, BLOCK: tl.constexpr):
    """Each of the Rows (B, width) goes to slot ``Index % slots`` of its memory (B, slots, width)."""
    batch, index = tl.program_id(1).to(tl.int64), tl.load(Index)
    for part in tl.static_range(len(WIDTHS)):
        if tl.program_id(0) == part:
            slots = Slots[part]  # a constant if it is 1
            for start in tl.range(0, WIDTHS[part], BLOCK):
                column = start + tl.arange(0, BLOCK)  # [BLOCK]
                ok = column < WIDTHS[part]  # [BLOCK]
                x = tl.load(Rows[part] + batch * WIDTHS[part] + column, mask=ok)  # [BLOCK]
                tl.store(Memories[part] + (batch * slots + index % slots) * WIDTHS[part] + column, x, mask=ok)


def append(memories: list[Tensor], rows: list[Tensor], index: Tensor) -> None:
    """Write rows (B, 1, ...) to slot ``index % slots`` of each memory (B, slots, ...): contiguous; index (1,) int64."""
    widths = tuple(x[0, 0].numel() for x in rows)
    if len(rows[0]):
        append_kernel[len(rows), len(rows[0])](
            tuple(rows), tuple(memories), tuple(x.shape[1] for x in memories), index, widths,
            min(1024, triton.next_power_of_2(max(widths))), num_warps=4,
        )  # fmt: skip


def chunk_of(slots: int, least: int) -> int:
    """Slots of a chunk: a function of the shape alone, so that results do not depend on what runs beside."""
    if INTERPRETED:
        return 32
    return min(MOST_CHUNK, max(least, triton.next_power_of_2(triton.cdiv(slots, SPLITS))))


def tile(constants: dict[str, int | str], itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """(tile constants, launch options): rows for the heads of a list, and as many keys as fit beside them."""
    rows = min(MOST_ROWS, tile_width(int(constants["HEADS"])))
    if INTERPRETED:
        return {"BM": rows, "BN": 16}, {}
    bytes_ = max(int(constants["D1"]) + int(constants["D2"]), int(constants["DV1"])) * itemsize
    if bytes_ > MAX_ROW_BYTES:  # latents: their sums take all registers of two warpgroups
        keys = 64 if hardware.architecture() == "sm_90" else 32  # what shared memory holds
        return {"BM": rows, "BN": keys}, {"num_warps": 8, "num_stages": 2}
    return {"BM": rows, "BN": 64 if bytes_ <= 384 else 32}, {"num_warps": 4, "num_stages": 3 if bytes_ <= 256 else 2}


def parts_of(q: Tensor, v_width: int, number: int) -> tuple[Tensor, Tensor]:
    """Room for ``number`` parts of each row: outputs (B, H, number, Dv) and LSEs (B, H, number), fp32."""
    shape = (*q.shape[:2], number)
    return q.new_empty(*shape, v_width, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def merge_options(number: int, v_width: int) -> dict[str, int]:
    """Constants of a kernel that merges ``number`` parts."""
    most = triton.next_power_of_2(max(1, number))
    return {"MOST": most, "SIDE": min(16, most), "DV": v_width, "DV1": tile_width(v_width)}


def splits_of(slots: int, least: int = LEAST_CHUNK) -> tuple[int, int]:
    """(slots of a chunk, number of chunks)."""
    chunk = chunk_of(slots, least)
    return chunk, triton.cdiv(slots, chunk)


def list_splits(k: Tensor, pages: Tensor | None, page_size: int) -> tuple[int, int]:
    """`splits_of` a list of pages; None: of the whole memory k (B, S, G, D)."""
    least = LEAST_CHUNK if k.shape[3] <= MAX_WIDTH else LEAST_LATENTS
    return splits_of(k.shape[1] if pages is None else pages.shape[2] * page_size, least)


def write_parts(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int,
    log_weights: Tensor | None, terms: tuple[Tensor, ...] | None, scale: float, parts: tuple[Tensor, Tensor],
    first_part: int = 0,
) -> None:  # fmt: skip
    """Write the parts of the listed keys, and of the terms, from ``first_part`` on: see `split_kernel`.

    Args:
        q (B, H, D), k (B, S, G, D), v (B, S, G, Dv), lengths (B,) int32, pages (B, N, P) int32, log_weights (B, N, P)
            fp32, terms (keys, values, indices int32, log weights fp32): contiguous, but for k and v from sequence to
            sequence; v may be the first columns of k, at most D1. parts: from `parts_of`.
    """
    batch, heads, groups = len(q), q.shape[1], k.shape[2]
    chunk, splits = list_splits(k, pages, page_size)
    term_chunk, term_splits = (1, 0) if terms is None else splits_of(terms[2].shape[2])
    lists = groups if pages is None and terms is None else (terms[2] if pages is None else pages).shape[1]
    constants = shape_constants(q[:, None], k, v) | {"HEADS": heads // lists}
    if shared := first_columns(v, k):
        constants["DV1"] = constants["D1"]
    sizes, options = tile(constants, q.element_size())
    term_k, term_v, term_indices, term_weights = terms or (k, v, lengths, lengths)
    rows = lists * triton.cdiv(heads // lists, sizes["BM"])
    if not q.numel() or not splits + term_splits:
        return
    split_kernel[splits + term_splits, rows, batch](
        q, k, v, lengths, lengths if pages is None else pages, lengths if log_weights is None else log_weights,
        term_k, term_v, term_indices, term_weights, *parts, memory_rows(k), k.shape[1],
        0 if pages is None else pages.shape[2], splits, term_k.shape[1],
        0 if terms is None else term_indices.shape[2], first_part, parts[1].shape[2], scale * LOG2_E,
        LISTS=lists, LISTED=pages is not None, WEIGHTED=log_weights is not None, TERMS=terms is not None,
        SHARED=shared, PAGE=page_size, CHUNK=chunk, TERM_CHUNK=term_chunk, **constants, **sizes, **options,
    )  # fmt: skip


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int,
    log_weights: Tensor | None, terms: tuple[Tensor, ...] | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Dv) in q's dtype and lse (B, H) fp32. Arguments as for `write_parts`."""
    number = list_splits(k, pages, page_size)[1] + (0 if terms is None else splits_of(terms[2].shape[2])[1])
    parts = parts_of(q, v.shape[3], number)
    write_parts(q, k, v, lengths, pages, page_size, log_weights, terms, scale, parts)
    out, lse = q.new_empty(*q.shape[:2], v.shape[3]), q.new_empty(q.shape[:2], dtype=torch.float32)
    if lse.numel():
        merge_kernel[(lse.numel(),)](*parts, out, lse, number, **merge_options(number, v.shape[3]), num_warps=4)
    return out, lse
