"""Inputs of `nsa.ops.decode_attention`, for its fallback and its kernels."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa import ops


class Case(NamedTuple):
    """Shapes of a call. pages, terms: of a list; 0: none. per_head: a list for each query head, not KV head."""

    heads: int
    groups: int
    width: int
    v_width: int
    lengths: tuple[int, ...]
    pages: int = 0
    page_size: int = 1
    weighted: bool = False
    terms: int = 0
    per_head: bool = False


CASES = [
    Case(3, 3, 16, 16, (1,)),
    Case(6, 2, 24, 16, (70, 0, 33)),  # three splits of the kernel, the last one partial
    Case(20, 1, 48, 16, (40,)),
    Case(3, 1, 16, 32, (60, 9), pages=37),  # tokens
    Case(6, 1, 16, 16, (45, 3), pages=9, page_size=5, weighted=True),
    Case(4, 2, 16, 16, (33, 20), pages=3, page_size=16, weighted=True, terms=40),
    Case(4, 2, 16, 16, (33, 20), terms=6),
    Case(4, 2, 16, 16, (33, 20), pages=4, page_size=4, terms=3, per_head=True),
]


LATENT_CASES = [  # the values are the first columns of the keys
    Case(6, 1, 24, 16, (70, 0, 33)),
    Case(20, 1, 48, 32, (60, 9), pages=37),
    Case(4, 2, 80, 64, (45, 3), pages=9, page_size=5, weighted=True),
]


def case_of(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, Any]]:
    """(q, k, v, lengths), options. Pages may lie behind a sequence, and memory behind it holds NaN."""
    generator = torch.Generator().manual_seed(sum(case[:4]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(case.lengths), *shape, generator=generator, dtype=dtype)

    def lists(number: int, among: int) -> Tensor:
        rows = case.heads if case.per_head else case.groups
        order = torch.rand(len(case.lengths), rows, max(number, among), generator=generator).argsort(-1)[..., :number]
        holes = torch.rand(order.shape, generator=generator) < 0.2
        return order.masked_fill(holes | (order >= among), -1).int()

    memory = max(case.lengths) + 3
    q, k, v = normal(case.heads, case.width), normal(memory, case.groups, case.width), None
    v = normal(memory, case.groups, case.v_width)
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    absent = torch.arange(memory) >= lengths[:, None]
    k[absent], v[absent] = torch.nan, torch.nan
    options: dict[str, Any] = {}
    if case.pages:
        options = {"pages": lists(case.pages, -(-memory // case.page_size)), "page_size": case.page_size}
    if case.weighted:
        options["log_weights"] = 3 * torch.rand(options["pages"].shape, generator=generator)
    if case.terms:
        means = normal(case.terms + 2, case.groups, case.width), normal(case.terms + 2, case.groups, case.v_width)
        indices = lists(case.terms, case.terms + 2)
        options["terms"] = ops.Terms(*means, indices, 3 * torch.rand(indices.shape, generator=generator))
        options["terms"] = ops.Terms(*(x.to(device) for x in options["terms"]))
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in options.items()}
    return [x.to(device) for x in (q, k, v, lengths)], moved


def listed(keep: Tensor) -> Tensor:
    """The numbers of what is kept (B, N, U) bool, as lists (B, N, U) int32: ascending, then -1."""
    number = torch.arange(keep.shape[-1], device=keep.device).expand(keep.shape)
    ordered = number.masked_fill(~keep, keep.shape[-1]).sort(-1).values
    return ordered.masked_fill(ordered == keep.shape[-1], -1).int()


class SparseCase(NamedTuple):
    """Shapes of a call of `nsa.ops.native_sparse_decode`."""

    heads: int
    groups: int
    width: int
    v_width: int
    lengths: tuple[int, ...]
    window: int
    sizes: tuple[int, int, int, int, int, int]  # length, stride, block size, blocks, initial, local


SPARSE_CASES = [
    SparseCase(4, 2, 16, 16, (70, 3, 41), 9, (4, 2, 8, 4, 1, 2)),
    SparseCase(3, 1, 24, 16, (100, 0), 40, (4, 4, 4, 3, 1, 1)),
    SparseCase(6, 1, 16, 32, (150,), 16, (8, 4, 16, 20, 2, 0)),  # more blocks than there are
    SparseCase(2, 2, 16, 16, (64, 65), 1, (8, 2, 8, 2, 0, 1)),
    SparseCase(4, 2, 16, 16, (300, 180, 299), 70, (4, 4, 4, 18, 1, 1)),  # several programs in all steps
    SparseCase(4, 2, 16, 16, (230, 41), 9, (4, 2, 10, 4, 1, 1)),  # five compressed blocks begin in a selection block
]
# With equal keys all blocks have equal importance; the definition rounds such sums alike in the first cases.
TIES = [(case, False) for case in SPARSE_CASES] + [(case, True) for case in SPARSE_CASES[:3]]


def sparse_case_of(case: SparseCase, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Any], dict[str, int]]:
    """(q, compressed, selected, window, gates, lengths), sizes. Memory that nothing was written to holds NaN."""
    names = ("length", "stride", "block_size", "num_blocks", "num_initial", "num_local")
    sizes = dict(zip(names, case.sizes, strict=True))
    generator = torch.Generator().manual_seed(sum(case[:4]))
    memory, lengths = max(case.lengths) + 5, torch.tensor(case.lengths, dtype=torch.int32)
    seen = torch.where(lengths >= case.sizes[0], (lengths - case.sizes[0]) // case.sizes[1] + 1, 0)

    def pair(slots: int, there: Tensor) -> tuple[Tensor, Tensor]:
        shape = len(lengths), slots, case.groups
        both = [torch.randn(*shape, width, generator=generator, dtype=dtype) for width in (case.width, case.v_width)]
        absent = torch.arange(slots) >= there[:, None]
        for x in both:
            x[absent] = torch.nan
        return both[0].to(device), both[1].to(device)

    q = torch.randn(len(lengths), case.heads, case.width, generator=generator, dtype=dtype)
    gates = torch.rand(len(lengths), case.heads, 3, generator=generator, dtype=dtype)
    pairs = [pair(memory // case.sizes[1] + 1, seen), pair(memory, lengths), pair(case.window, lengths)]
    return [q.to(device), *pairs, gates.to(device), lengths.to(device)], sizes


class QuestCase(NamedTuple):
    """Shapes of a call of `nsa.ops.quest_pages`."""

    heads: int
    groups: int
    width: int
    lengths: tuple[int, ...]
    page_size: int
    topk: int
    num_initial: int = 0
    num_local: int = 1


class IndexCase(NamedTuple):
    """Shapes of a call of `nsa.ops.index_topk_decode`."""

    heads: int
    width: int
    lengths: tuple[int, ...]
    topk: int
    num_initial: int = 0
    num_local: int = 0


INDEX_CASES = [
    IndexCase(3, 8, (50, 1, 0), 5),
    IndexCase(70, 48, (33,), 40),  # more than there are
    IndexCase(3, 8, (28, 20, 9), 7, 1, 1),  # rows that a program holds at once
    IndexCase(4, 16, (90, 41), 6, 1, 2),
]


def index_case_of(case: IndexCase, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], dict[str, int]]:
    """(q_idx, k_idx, weights, lengths), options. Whole numbers make many scores equal; memory behind holds NaN."""
    generator = torch.Generator().manual_seed(sum(case[:2]))
    lengths, memory = torch.tensor(case.lengths, dtype=torch.int32), max(case.lengths) + 4
    shapes = ((case.heads, case.width), (memory, case.width), (case.heads,))
    q, k, weights = (torch.randn(len(lengths), *s, generator=generator, dtype=dtype).round() for s in shapes)
    k[torch.arange(memory) >= lengths[:, None]] = torch.nan
    options = {name: getattr(case, name) for name in ("topk", "num_initial", "num_local")}
    return [x.to(device) for x in (q, k, weights, lengths)], options


QUEST_CASES = [
    QuestCase(4, 2, 16, (70, 1, 0), 4, 5),
    QuestCase(3, 1, 48, (53,), 4, 20),  # more than there are
    QuestCase(5, 1, 16, (53,), 4, 3),
    QuestCase(20, 1, 16, (90, 41), 4, 6, 1, 2),
    QuestCase(71, 1, 16, (290,), 4, 30),
    QuestCase(2, 2, 16, (300,), 2, 3, 0, 0),
]


def quest_case_of(
    case: QuestCase, dtype: torch.dtype, device: str = "cpu", fp8: bool = False
) -> tuple[list[Tensor], dict[str, Any]]:
    """(q, low, high, lengths), options. Pages behind a sequence have no bounds (inf, -inf).

    With an odd number of heads all products are negative.
    """
    generator = torch.Generator().manual_seed(sum(case[:3]))
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    k = torch.randn(len(lengths), max(case.lengths) + 9, case.groups, case.width, generator=generator, dtype=dtype)
    q = torch.randn(len(lengths), case.heads, case.width, generator=generator, dtype=dtype)
    if case.heads % 2:
        q, k = -q.abs(), k.abs()
    options = {name: getattr(case, name) for name in ("page_size", "topk", "num_initial", "num_local")}
    bounds = ops.page_bounds(k, lengths, page_size=case.page_size, fp8=fp8)
    return [x.to(device) for x in (q, *bounds, lengths)], options


class TopPCase(NamedTuple):
    """Shapes of a call of `nsa.ops.top_p_tokens`. pages: of a list; 0: all tokens are candidates."""

    heads: int
    groups: int
    width: int
    lengths: tuple[int, ...]
    p: float
    pages: int = 0
    page_size: int = 1
    ties: bool = False


TOP_P_CASES = [
    TopPCase(4, 2, 16, (70, 1, 0), 0.8),
    TopPCase(3, 1, 48, (90,), 0.5),
    TopPCase(5, 1, 16, (53, 40), 0.9, 9, 4),  # holes, and pages behind a sequence
    TopPCase(70, 1, 16, (33,), 0.6, 20),
    TopPCase(2, 2, 16, (100,), 0.0, 12, 5),
    TopPCase(4, 2, 16, (60, 9), 1.0, 5, 4),
    TopPCase(4, 2, 16, (100, 20), 0.7, ties=True),
    TopPCase(6, 2, 16, (50, 20), 0.3, 11, 4, ties=True),
    TopPCase(4, 2, 16, (41, 14), 0.6, 7, 4),  # rows that a program holds at once
    TopPCase(4, 2, 16, (41, 14), 0.6, 7, 4, ties=True),
]


def top_p_case_of(case: TopPCase, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
    """(q, sketch, lengths), options. With ties there are three keys; memory behind a sequence holds NaN."""
    generator = torch.Generator().manual_seed(sum(case[:3]))
    batch, memory = len(case.lengths), max(case.lengths) + 5
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    q = 2 * torch.randn(batch, case.heads, case.width, generator=generator, dtype=dtype)
    k = torch.randn(batch, memory, case.groups, case.width, generator=generator, dtype=dtype)
    if case.ties:
        k = k[:, torch.arange(memory) % 3]
    k[torch.arange(memory) >= lengths[:, None]] = torch.nan
    options: dict[str, Any] = {"p": case.p}
    if case.pages:
        have = -(-memory // case.page_size)
        order = torch.rand(batch, case.groups, max(have, case.pages), generator=generator).argsort(-1)
        order = order[..., : case.pages].sort(-1).values
        holes = torch.rand(order.shape, generator=generator) < 0.2
        pages = order.masked_fill(holes | (order >= have), -1).int()
        options |= {"pages": pages.to(device), "page_size": case.page_size}
    return [q.to(device), ops.KeySketch(*(x.to(device) for x in ops.sketch_keys(k))), lengths.to(device)], options
