"""Attention of one query token per sequence (decoding): split over keys, then merged by log-sum-exp.

The keys of a KV head are cut into chunks of a fixed number of slots. A program takes a run of chunks and the heads that
share its list, so a key is read once for all of them. It writes a part for each chunk: its normalized output, and its
LSE. A second kernel merges the parts of a row in their order. The grid depends on shapes alone: nothing waits for the
host. Chunks do not depend on the batch, so a sequence gets the same bits beside any others. Runs do: with many
sequences a program goes through several chunks without a pause for their first keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.geometry import first_columns, memory_rows
from nsa.ops.kernels import hardware
from nsa.ops.kernels.device_functions import (
    LSE_TO_NATURAL,
    begin_launch,
    load_row_parts,
    load_rows,
    scores,
    store_rows,
)
from nsa.ops.kernels.hardware import INTEGERS, INTERPRETED, LOG2_E, MAX_ROW_BYTES, MAX_WIDTH, early, tile_width
from nsa.ops.kernels.ranges import shape_constants

MOST_ROWS = 64  # heads of a program
SPLITS = 64  # chunks of a long list, unless they would be smaller or larger than these:
LEAST_CHUNK, MOST_CHUNK = 128, 1024  # slots
# Of lists of a sequence and their least chunks from which on chunks are twice as long: half the parts are written and
# merged, and chunks still are enough for a sequence alone.
LEAST_LISTS, LEAST_CHUNKS = 4, 32
LEAST_LATENTS = 256  # slots; the sums of fewer would be more bytes than their rows
PROGRAMS = 4 if INTERPRETED else 264  # two on each multiprocessor of an H100 or H200
COUNTS = ("num_terms", "num_term_keys", "num_parts", "num_compressed", "num_pages", "run", "term_run", "blocks")
BASE_2 = tl.constexpr(LOG2_E)


@triton.jit
def place(LISTS: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr):
    """(batch int64, list, KV head, query head [BM], whether it exists [BM]) of this program.

    LISTS are lists of a sequence: one for each KV head, or one for each query head. HEADS share one.
    """
    tiles: tl.constexpr = (HEADS + BM - 1) // BM
    index = tl.program_id(0) // tiles
    head = tl.program_id(0) % tiles * BM + tl.arange(0, BM)  # [BM]
    return tl.program_id(1).to(tl.int64), index, index * GROUPS // LISTS, index * HEADS + head, head < HEADS


@triton.jit
def store_part(Parts, PartLse, row, ok, part, num_parts, acc, row_max, row_sum, DV: tl.constexpr, DV1: tl.constexpr):
    """Part ``part`` of each row: its output, and its LSE to base 2. Outputs that are empty are not used."""
    at = row * num_parts + part  # [BM]
    tl.store(PartLse + at, row_max + tl.log2(row_sum), mask=ok)
    some = row_sum > 0  # [BM]
    out = acc / tl.where(some, row_sum, 1.0)[:, None]  # [BM, DV1]
    store_rows(Parts, at, ok & some, tl.arange(0, DV1), DV, out)


@triton.jit
def attend(q1, q2, K, V, Pages, LogWeights, Scores, Parts, PartLse, row, row_ok, keep, begin, end, length, key_row,
           row_size, part, num_parts, scale_log2, group, LISTED: tl.constexpr, WEIGHTED: tl.constexpr,
           KEEP: tl.constexpr, SHARED: tl.constexpr, RUNS: tl.constexpr, PAGE: tl.constexpr, LOOK: tl.constexpr,
           CHUNK: tl.constexpr, GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr,
           D2: tl.constexpr, DV1: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
           PRECISION: tl.constexpr):  # fmt: skip
    """Store the parts of slots ``begin .. end - 1``: from ``part`` on one for each CHUNK slots, as in `store_part`.

    Slot s is token s; or with LISTED token ``s % PAGE`` of page ``Pages[s // PAGE]``, which has LogWeights if WEIGHTED.
    Tokens from ``length`` on are not there. KEEP: also store the scores, to base 2, in Scores (rows, row_size) of the
    rows ``keep``.
    SHARED: values are the first D1 columns of the keys, DV1 = D1, and are not loaded again. LOOK: at least the pages
    of these slots; 0: a list has as many pages as ``length``, or is full. RUNS: whether these may be several chunks.
    """
    stop = end
    if not LISTED:
        stop = tl.minimum(end, length)
    elif LOOK > 0:  # lists often have room for more: what follows the last page of these slots is left out
        entry = begin // PAGE + tl.arange(0, LOOK)  # [LOOK]
        listed = tl.load(Pages + entry, mask=entry * PAGE < end, other=-1)  # [LOOK]
        stop = tl.minimum(end, tl.max(tl.where(listed >= 0, (entry + 1) * PAGE, 0), 0))
    else:
        stop = tl.minimum(end, tl.cdiv(length, PAGE) * PAGE)
    acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
    row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
    row_sum = tl.zeros([BM], tl.float32)  # [BM]
    for start in tl.range(begin, stop, BN):
        slot = start + tl.arange(0, BN)  # [BN]
        key = slot
        ok = slot < stop  # [BN]
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
            # A row has whole vectors. So a thread stores one at a time, with the score 0 of what is not there.
            some = (start + tl.arange(0, BN) // 4 * 4) < stop  # [BN]
            tl.store(Scores + row[:, None] * row_size + key[None, :], s, mask=keep[:, None] & some[None, :])
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
        if RUNS:
            after = start + BN - begin
            if (after % CHUNK == 0) | (start + BN >= stop):
                store_part(
                    Parts, PartLse, row, row_ok, part + (after - 1) // CHUNK, num_parts, acc, row_max, row_sum, DV, DV1
                )  # fmt: skip
                acc = tl.zeros([BM, DV1], tl.float32)  # [BM, DV1]
                row_max = tl.full([BM], float("-inf"), tl.float32)  # [BM]
                row_sum = tl.zeros([BM], tl.float32)  # [BM]
    if RUNS:
        for empty in tl.range(tl.cdiv(tl.maximum(stop - begin, 0), CHUNK), tl.cdiv(end - begin, CHUNK)):
            tl.store(PartLse + row * num_parts + part + empty, tl.full([BM], float("-inf"), tl.float32), mask=row_ok)
    else:
        store_part(Parts, PartLse, row, row_ok, part, num_parts, acc, row_max, row_sum, DV, DV1)


@triton.jit
def merged_parts(Parts, PartLse, row, first, count, num_parts, MOST: tl.constexpr, SIDE: tl.constexpr,
                 DV: tl.constexpr, DV1: tl.constexpr):  # fmt: skip
    """(output [DV1], LSE to base 2) of parts ``first .. first + count - 1`` of a row, at most MOST, SIDE at a time."""
    at = row * num_parts + first
    # What a loop assigns to has the shape that it had before: the names for all parts are not those of some.
    every = tl.arange(0, MOST)  # [MOST]
    if SIDE == MOST:  # does not wait for the LSEs
        outs = load_rows(Parts, at + every, every < count, tl.arange(0, DV1), DV)  # [MOST, DV1]
    lses = tl.load(PartLse + at + every, mask=every < count, other=float("-inf"))  # [MOST]
    top = tl.max(lses, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lses - base), 0)
    out = tl.zeros([DV1], tl.float32)  # [DV1]
    if SIDE == MOST:
        outs = tl.where((lses > float("-inf"))[:, None], outs, 0.0)  # [MOST, DV1]
        out += tl.sum(outs * tl.exp2(lses - base)[:, None], 0)
    else:
        some = tl.max(tl.where(lses > float("-inf"), every + 1, 0), 0)  # lists are often full at their beginning alone
        for start in tl.range(0, some, SIDE):
            part = start + tl.arange(0, SIDE)  # [SIDE]
            lse = tl.load(PartLse + at + part, mask=part < count, other=float("-inf"))  # [SIDE]
            x = load_rows(Parts, at + part, part < count, tl.arange(0, DV1), DV)  # [SIDE, DV1]
            x = tl.where((lse > float("-inf"))[:, None], x, 0.0)
            out += tl.sum(x * tl.exp2(lse - base)[:, None], 0)
    return out / tl.where(total == 0, 1.0, total), base + tl.log2(total)


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def split_kernel(Q, K, V, Lengths, Pages, LogWeights, TermK, TermV, TermIndices, TermWeights, Parts, PartLse,
                 num_rows, num_keys, num_pages, num_splits, num_term_keys, num_terms, num_parts, run, term_run,
                 scale_log2, LISTS: tl.constexpr, LISTED: tl.constexpr, WEIGHTED: tl.constexpr, TERMS: tl.constexpr,
                 SHARED: tl.constexpr, RUNS: tl.constexpr, PAGE: tl.constexpr, LOOK: tl.constexpr, CHUNK: tl.constexpr,
                 TERM_CHUNK: tl.constexpr, TERM_LOOK: tl.constexpr, GROUPS: tl.constexpr, HEADS: tl.constexpr,
                 D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV1: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Parts of some heads: of ``run`` chunks of the keys, or with TERMS after all of these of ``term_run`` chunks.

    Q (B, H, D); K, V (B, S, G, D or Dv), of which the sequences are ``num_rows`` tokens apart; Lengths (B,) int32;
    Pages, LogWeights (B, LISTS, num_pages) int32, fp32; TermK, TermV (B, C, G, D or Dv); TermIndices, TermWeights (B,
    LISTS, num_terms); Parts (B, H, num_parts, Dv) fp32; PartLse (B, H, num_parts) fp32; ``num_splits`` parts are those
    of the keys.
    """
    begin_launch(EARLY)
    batch, index, group, head, ok = place(LISTS, GROUPS, HEADS, BM)
    row = batch * (LISTS * HEADS) + head  # [BM]
    q1, q2 = load_row_parts(Q, row, ok, D, D1, D2)  # [BM, D1], [BM, D2]
    first = tl.program_id(2) * run
    if first < num_splits:
        length = tl.load(Lengths + batch)
        begin = first * CHUNK
        end = tl.minimum(first + run, num_splits) * CHUNK
        there = length
        if LISTED:
            end = tl.minimum(end, num_pages * PAGE)
            Pages += (batch * LISTS + index) * num_pages
            if WEIGHTED:
                LogWeights += (batch * LISTS + index) * num_pages
        else:
            there = tl.minimum(length, num_keys)
        attend(
            q1, q2, K, V, Pages, LogWeights, PartLse, Parts, PartLse, row, ok, ok, begin, end, there, batch * num_rows,
            num_keys, first, num_parts, scale_log2, group, LISTED, WEIGHTED, False, SHARED, RUNS, PAGE, LOOK, CHUNK,
            GROUPS, D, DV, D1, D2, DV1, BM, BN, PRECISION,
        )  # fmt: skip
    else:
        if TERMS:
            first = (tl.program_id(2) - tl.cdiv(num_splits, run)) * term_run
            begin = first * TERM_CHUNK
            end = tl.minimum(begin + term_run * TERM_CHUNK, num_terms)
            TermIndices += (batch * LISTS + index) * num_terms
            TermWeights += (batch * LISTS + index) * num_terms
            attend(
                q1, q2, TermK, TermV, TermIndices, TermWeights, PartLse, Parts, PartLse, row, ok, ok, begin, end,
                num_term_keys, batch * num_term_keys, num_term_keys, num_splits + first, num_parts, scale_log2, group,
                True, True, False, False, True, 1, TERM_LOOK, TERM_CHUNK, GROUPS, D, DV, D1, D2, DV1, BM, BN, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*INTEGERS, *COUNTS])
def merge_kernel(Parts, PartLse, Out, Lse, num_parts, MOST: tl.constexpr, SIDE: tl.constexpr, DV: tl.constexpr,
                 DV1: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    """Out (B, H, Dv), and Lse (B, H) fp32 in natural units, of one row. A row that sees nothing gets 0 and -inf."""
    begin_launch(EARLY)
    row = tl.program_id(0).to(tl.int64)
    out, lse = merged_parts(Parts, PartLse, row, 0, num_parts, num_parts, MOST, SIDE, DV, DV1)
    column = tl.arange(0, DV1)  # [DV1]
    tl.store(Out + row * DV + column, out.to(Out.dtype.element_ty), mask=column < DV)
    tl.store(Lse + row, lse * LSE_TO_NATURAL)


@triton.jit
def append_kernel(Rows, Memories, Slots, Index, WIDTHS: tl.constexpr, BLOCK: tl.constexpr,
                  EARLY: tl.constexpr):  # fmt: skip
    """Each of the Rows (B, width) goes to slot ``Index % slots`` of its memory (B, slots, width)."""
    begin_launch(EARLY)
    put_row(Rows, Memories, Slots, tl.load(Index), tl.program_id(0), tl.program_id(1).to(tl.int64), WIDTHS, BLOCK)


@triton.jit
def put_row(Rows, Memories, Slots, index, memory, batch, WIDTHS: tl.constexpr, BLOCK: tl.constexpr):
    """The row of one sequence and one ``memory``: see `append_kernel`."""
    for part in tl.static_range(len(WIDTHS)):
        if memory == part:
            slots = Slots[part]  # a constant if it is 1
            for start in tl.range(0, WIDTHS[part], BLOCK):
                column = start + tl.arange(0, BLOCK)  # [BLOCK]
                ok = column < WIDTHS[part]  # [BLOCK]
                x = tl.load(Rows[part] + batch * WIDTHS[part] + column, mask=ok)  # [BLOCK]
                tl.store(Memories[part] + (batch * slots + index % slots) * WIDTHS[part] + column, x, mask=ok)


def append(memories: list[Tensor], rows: list[Tensor], index: Tensor) -> None:
    """Write rows (B, 1, ...) to slot ``index % slots`` of each memory (B, slots, ...): contiguous; index (1,) int64."""
    if len(rows[0]):
        append_kernel[len(rows), len(rows[0])](
            tuple(rows), tuple(memories), tuple(x.shape[1] for x in memories), index, *widths_of(rows), num_warps=4,
            **early(),
        )  # fmt: skip


def widths_of(rows: list[Tensor]) -> tuple[tuple[int, ...], int]:
    """WIDTHS and BLOCK of `append_kernel`."""
    widths = tuple(x[0, 0].numel() for x in rows)
    return widths, min(1024, triton.next_power_of_2(max(widths)))


def chunk_of(slots: int, least: int) -> int:
    """Slots of a chunk: a function of the shape alone, so that results do not depend on what runs beside."""
    if INTERPRETED:
        return 32
    return min(MOST_CHUNK, max(least, triton.next_power_of_2(triton.cdiv(slots, SPLITS))))


def tile(
    constants: dict[str, int | str], itemsize: int, listed: bool = False, two: bool = False
) -> tuple[dict[str, int], dict[str, int]]:  # fmt: skip
    """(tile constants, launch options): rows for the heads of a list, and as many keys as fit beside them.

    Keys of lists need twice the stages for the same distance: Triton divides them between the list and the keys.

    Args:
        listed: whether keys are listed. two: whether a multiprocessor has two programs at most, as with lists.
    """
    rows = min(MOST_ROWS, tile_width(int(constants["HEADS"])))
    if INTERPRETED:
        return {"BM": rows, "BN": 16}, {}
    bytes_ = max(int(constants["D1"]) + int(constants["D2"]), int(constants["DV1"])) * itemsize
    if bytes_ > MAX_ROW_BYTES:  # latents: their sums take all registers of two warpgroups
        keys = 64 if hardware.architecture() == "sm_90" else 32  # what shared memory holds
        return {"BM": rows, "BN": keys}, {"num_warps": 8, "num_stages": 2}
    options = {"num_warps": 4, "num_stages": 5 if listed else 3 if bytes_ <= 256 else 2}
    if (listed or two) and deep(bytes_ // itemsize, itemsize):
        options["num_stages"] += 2 if listed else 1
        options["maxnreg"] = 240  # else ptxas spills some, so that a third program might fit
    return {"BM": rows, "BN": 64 if bytes_ <= 384 else 32}, options


def deep(columns: int, itemsize: int) -> bool:
    """Whether two programs of a multiprocessor can each have three tiles of 64 keys and values under way."""
    return hardware.capability() >= 90 and itemsize == 2 and columns <= 128


def parts_of(q: Tensor, v_width: int, number: int) -> tuple[Tensor, Tensor]:
    """Room for ``number`` parts of each row: outputs (B, H, number, Dv) and LSEs (B, H, number), fp32."""
    shape = (*q.shape[:2], number)
    return q.new_empty(*shape, v_width, dtype=torch.float32), q.new_empty(shape, dtype=torch.float32)


def merge_options(number: int, v_width: int) -> dict[str, int]:
    """Constants of a kernel that merges ``number`` parts."""
    most = triton.next_power_of_2(max(1, number))
    side = min(most, 4 if INTERPRETED else 32 if v_width <= MAX_WIDTH else 16)
    return {"MOST": most, "SIDE": side, "DV": v_width, "DV1": tile_width(v_width), "num_warps": 8 if most > 16 else 4}


def splits_of(slots: int, lists: int, least: int = LEAST_CHUNK) -> tuple[int, int]:
    """(slots of a chunk, number of chunks) of each of a sequence's lists."""
    chunk = chunk_of(slots, 2 * least if lists >= LEAST_LISTS and slots > (LEAST_CHUNKS - 1) * least else least)
    return chunk, triton.cdiv(slots, chunk)


def look_of(chunk: int, page_size: int) -> int:
    """At least the pages that a run touches."""
    return triton.next_power_of_2(MOST_CHUNK // page_size + (2 if chunk % page_size else 0))


def run_of(most: int, splits: int, rows: int, programs: int = PROGRAMS) -> int:
    """How many of the ``splits`` chunks of a row a program goes through: so many programs for all ``rows`` suffice.

    At most ``most``. Parts are of chunks alone, so a sequence has the same bits whatever the run is.
    """
    return max(1, min(most, triton.cdiv(splits, max(1, programs // rows))))


def attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int,
    log_weights: Tensor | None, terms: tuple[Tensor, ...] | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (B, H, Dv) in q's dtype and lse (B, H) fp32.

    Args:
        q (B, H, D), k (B, S, G, D), v (B, S, G, Dv), lengths (B,) int32, pages (B, N, P) int32, log_weights (B, N, P)
            fp32, terms (keys, values, indices int32, log weights fp32): contiguous, but for k and v from sequence to
            sequence; v may be the first columns of k, at most D1.
    """
    batch, heads, groups = len(q), q.shape[1], k.shape[2]
    least = LEAST_CHUNK if k.shape[3] <= MAX_WIDTH else LEAST_LATENTS
    lists = groups if pages is None and terms is None else (terms[2] if pages is None else pages).shape[1]
    chunk, splits = splits_of(k.shape[1] if pages is None else pages.shape[2] * page_size, lists, least)
    term_chunk, term_splits = (1, 0) if terms is None else splits_of(terms[2].shape[2], lists)
    number = splits + term_splits
    parts = parts_of(q, v.shape[3], number)
    out, lse = q.new_empty(*q.shape[:2], v.shape[3]), q.new_empty(q.shape[:2], dtype=torch.float32)
    constants = shape_constants(q[:, None], k, v) | {"HEADS": heads // lists}
    if shared := first_columns(v, k):
        constants["DV1"] = constants["D1"]
    sizes, options = tile(constants, q.element_size(), pages is not None)
    term_k, term_v, term_indices, term_weights = terms or (k, v, lengths, lengths)
    rows = lists * triton.cdiv(heads // lists, sizes["BM"])
    if q.numel() and number:
        runs = chunk < MOST_CHUNK and not shared  # sums of latents leave no room for what a run needs
        run = run_of(MOST_CHUNK // chunk, splits, rows * batch) if runs else 1
        term_run = run_of(MOST_CHUNK // term_chunk, term_splits, rows * batch)
        programs = triton.cdiv(splits, run) + triton.cdiv(term_splits, term_run)
        split_kernel[rows, batch, programs](
            q, k, v, lengths, lengths if pages is None else pages, lengths if log_weights is None else log_weights,
            term_k, term_v, term_indices, term_weights, *parts, memory_rows(k), k.shape[1],
            0 if pages is None else pages.shape[2], splits, term_k.shape[1],
            0 if terms is None else term_indices.shape[2], number, run, term_run, scale * LOG2_E,
            LISTS=lists, LISTED=pages is not None, WEIGHTED=log_weights is not None, TERMS=terms is not None,
            SHARED=shared, RUNS=runs, PAGE=page_size, LOOK=look_of(chunk, page_size), CHUNK=chunk,
            TERM_CHUNK=term_chunk, TERM_LOOK=look_of(1, 1), **constants, **sizes, **options,
            **early(rows * batch * programs),
        )  # fmt: skip
    if lse.numel():
        merge_kernel[(lse.numel(),)](
            *parts, out, lse, number, **merge_options(number, v.shape[3]), **early()
        )  # fmt: skip
    return out, lse
