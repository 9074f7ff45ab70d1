"""Positions of documents, compression blocks, selection blocks and heads in a packed batch, and the keys of a query.

All of it is index arithmetic on the device. Shapes depend on the number of tokens and documents only, not on the
documents' lengths, so nothing waits for the GPU. Unpacked input is the case of one document.
"""

import functools
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Function = TypeVar("_Function", bound=Callable)
_Result = TypeVar("_Result")


def cached(function: _Function, kept: int | None = 16) -> _Function:
    """Cache the results of the last ``kept`` calls (None: of all calls).

    Every layer needs the same index tensors, and building small tensors takes the host longer than attention to 8K
    tokens takes the GPU. They are never inference tensors, even in inference mode: training could not save those for
    its backward pass.
    """

    @functools.lru_cache(maxsize=kept)
    @functools.wraps(function)
    def build(*args: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args)
        with torch.inference_mode(False):
            return function(*args)

    return cast(_Function, build)


def num_compressed(num_tokens: int, length: int, stride: int) -> int:
    """Number of whole compression blocks in ``num_tokens`` tokens (NSA, arXiv 2502.11089, Eq. 7).

    This is also an upper bound if the tokens are packed documents.
    """
    return (num_tokens - length) // stride + 1 if num_tokens >= length else 0


@dataclass(frozen=True, eq=False)  # compared and cached by identity, since equality of tensors is not a bool
class Documents:
    """The documents of a (packed) batch, and the document of each query.

    Attributes (all int64, on the device of the batch):
        bounds: (N+1,) first token of each document, and the number of tokens.
        query_position: (T,) the query's token index in the key sequence.
        query_document: (T,) the query's document.
    """

    bounds: Tensor
    query_position: Tensor
    query_document: Tensor

    @classmethod
    def of(cls, num_queries: int, offset: int, cu_seqlens: Tensor | None, device: torch.device) -> "Documents":
        """Queries ``offset .. offset + num_queries - 1`` of one sequence, or of packed documents."""
        if cu_seqlens is None:
            return _one_document(num_queries, offset, device)
        return derived(cu_seqlens, _packed_documents, num_queries, offset)

    @classmethod
    def at(cls, positions: Tensor, num_keys: int, cu_seqlens: Tensor | None) -> "Documents":
        """Queries at ``positions`` (T,) int32, rising, among ``num_keys`` tokens of one sequence, or packed."""
        whole = cls.of(num_keys, 0, cu_seqlens, positions.device)
        return derived(positions, _documents_at, whole)

    @property
    def query_bounds(self) -> Tensor:
        """(N+1,) int64: which of the queries is the first one of each document; T for documents behind them."""
        return torch.searchsorted(self.query_position, self.bounds)

    @property
    def lengths(self) -> Tensor:
        """(N,) number of tokens of each document."""
        return self.bounds[1:] - self.bounds[:-1]

    @property
    def query_local(self) -> Tensor:
        """(T,) the query's position within its document."""
        return self.query_position - self.bounds[self.query_document]

    def compressed_bounds(self, length: int, stride: int) -> Tensor:
        """(N+1,) first compression block of each document, among the blocks of all documents in order."""
        return _cumulate(torch.where(self.lengths >= length, (self.lengths - length) // stride + 1, 0))

    def selection_bounds(self, block_size: int) -> Tensor:
        """(N+1,) first selection block of each document, as above. The last block of a document may be partial."""
        return _cumulate((self.lengths + block_size - 1) // block_size)


@cached
def _one_document(num_queries: int, offset: int, device: torch.device) -> Documents:
    position = torch.arange(offset, offset + num_queries, device=device)
    bounds = torch.tensor([0, offset + num_queries], device=device)
    return Documents(bounds, position, torch.zeros_like(position))


_known_packings: MutableMapping[Tensor, tuple[int, dict[Any, Any]]] = WeakTensorKeyDictionary()


def derived(cu_seqlens: Tensor, function: Callable[..., _Result], *args: Any) -> _Result:
    """``function(cu_seqlens, *args)``, cached: all layers of a step pass the same tensor. ``args`` are hashable.

    What the function returns must not hold the tensor, which would then live for ever.
    """
    if torch.compiler.is_compiling() or cu_seqlens.is_inference():
        return function(cu_seqlens, *args)
    # The version changes if the tensor is written to.
    version, known = _known_packings.get(cu_seqlens, (None, {}))
    if version != cu_seqlens._version:
        known = {}
        _known_packings[cu_seqlens] = (cu_seqlens._version, known)
    key = (function, *args)
    if key not in known:
        known[key] = function(cu_seqlens, *args)
    return known[key]


def memory_rows(x: Tensor) -> int:
    """How many tokens lie between the beginnings of two sequences of x (B, S, G, D) in memory; -1: no whole number."""
    row = x.shape[2] * x.shape[3]
    if len(x) < 2 or not row:
        return x.shape[1]
    return x.stride(0) // row if x.stride(0) % row == 0 else -1


def first_columns(v: Tensor, k: Tensor) -> bool:
    """Whether v (B, S, G, Dv) is a view of the first columns of k (B, S, G, D), Dv < D: both are one memory."""
    # What has other strides needs no address, which tensors that are only traced do not have.
    return v.shape[3] < k.shape[3] and v.stride() == k.stride() and v.data_ptr() == k.data_ptr()


def share_gradient(v: Tensor, k: Tensor) -> bool:
    """Whether v is `first_columns` of k for autograd, too: both are views of one tensor, or neither has a gradient.

    Then the gradient of v may be added to that of k's first columns: what both are views of gets the same sum.
    """
    if not first_columns(v, k):
        return False
    if not (torch.is_grad_enabled() and (v.requires_grad or k.requires_grad)):
        return True
    v_base, k_base = (x if x._base is None else x._base for x in (v, k))
    known = all(x._base is None or x.grad_fn is not None for x in (v, k))  # not so for views made without gradients
    return known and v.requires_grad and k.requires_grad and v_base is k_base


@dataclass(frozen=True)
class KnownLengths:
    """What the host knows of the lengths of the documents of a batch.

    Attributes:
        longest: tokens of the longest document, or an upper bound. equal: whether all nonempty documents have this
            length.
    """

    longest: int
    equal: bool

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "KnownLengths":
        """From document boundaries (N+1,) on the host."""
        lengths = cu_seqlens[1:] - cu_seqlens[:-1]
        longest = int(lengths.max())
        return cls(longest, longest > 0 and bool(((lengths == longest) | (lengths == 0)).all()))


_recorded_lengths: MutableMapping[Tensor, tuple[int, KnownLengths]] = WeakTensorKeyDictionary()


def tell_lengths(cu_seqlens: Tensor, lengths: KnownLengths) -> None:
    """Record what the host knows of document boundaries on a device, since reading them would wait for the device.

    It is valid until the tensor is written to.
    """
    _recorded_lengths[cu_seqlens] = cu_seqlens._version, lengths


def known_lengths(cu_seqlens: Tensor) -> KnownLengths | None:
    """What `tell_lengths` recorded, or what boundaries on the host say; None: nothing is known."""
    if cu_seqlens.device.type == "cpu":
        return KnownLengths.of(cu_seqlens)
    if cu_seqlens.is_inference() or torch.compiler.is_compiling():
        return None
    version, lengths = _recorded_lengths.get(cu_seqlens, (None, None))
    return lengths if version == cu_seqlens._version else None


def longest_document(cu_seqlens: Tensor | None, num_keys: int) -> int:
    """Tokens of the longest document, or an upper bound, as far as the host knows."""
    lengths = None if cu_seqlens is None else known_lengths(cu_seqlens)
    return num_keys if lengths is None else min(lengths.longest, num_keys)


def clip_borders(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    """Boundaries (N+1,) int32 of the documents within tokens ``start .. stop - 1``. Documents outside become empty."""
    return derived(cu_seqlens, _clip_borders, start, stop)


def _clip_borders(cu_seqlens: Tensor, start: int, stop: int) -> Tensor:
    return cu_seqlens.clamp(start, stop) - start


def _packed_documents(cu_seqlens: Tensor, num_queries: int, offset: int) -> Documents:
    bounds = cu_seqlens.to(torch.int64)
    position = torch.arange(offset, offset + num_queries, device=cu_seqlens.device)
    # right=True skips empty documents: a token lies in the last document that starts at or before it.
    return Documents(bounds, position, torch.searchsorted(bounds[1:].contiguous(), position, right=True))


def _documents_at(positions: Tensor, whole: Documents) -> Documents:
    position = positions.to(torch.int64)
    return Documents(whole.bounds, position, whole.query_document[position])


def _cumulate(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def block_starts(bounds: Tensor, block_bounds: Tensor, stride: int, count: int) -> tuple[Tensor, Tensor]:
    """First token and document of ``count`` blocks, which start every ``stride`` tokens in each document.

    Args:
        bounds: (N+1,) first token of each document.
        block_bounds: (N+1,) first block of each document. ``count`` may exceed its last entry; rows beyond it are
            undefined.

    Returns:
        (count,) first token and (count,) document, both int64.
    """
    block = torch.arange(count, device=bounds.device)
    document = torch.searchsorted(block_bounds[1:].contiguous(), block, right=True).clamp(max=len(bounds) - 2)
    return bounds[document] + (block - block_bounds[document]) * stride, document


@dataclass(frozen=True, eq=False)
class Ranges:
    """Query t sees keys ``first[t] .. last[t]-1``. Both are (T,) int64 and nondecreasing, as for causal masks."""

    first: Tensor
    last: Tensor


@cached
def window_ranges(documents: Documents, reach: int) -> Ranges:
    """The keys that each query sees: its own and the ``reach`` - 1 keys before it, within its document."""
    first = torch.maximum(documents.bounds[documents.query_document], documents.query_position - reach + 1)
    return Ranges(first, documents.query_position + 1)


@cached
def visible_blocks(documents: Documents, length: int, stride: int) -> Ranges:
    """The range of compressed blocks that end at or before each query, within its document."""
    first = documents.compressed_bounds(length, stride)[documents.query_document]
    seen = torch.where(documents.query_local >= length - 1, (documents.query_local - length + 1) // stride + 1, 0)
    return Ranges(first, first + seen)


class BlockSizes(NamedTuple):
    """Sizes in tokens and blocks, as for `nsa.ops.native_sparse_attention`, of the loss that teaches the selection."""

    length: int
    stride: int
    block_size: int
    num_initial: int
    num_local: int
    window: int


class CompressionLayout(NamedTuple):
    """Positions of blocks and segments (a segment is the ``stride`` tokens from one block to the next); all int32.

    Attributes:
        start: (M,) first token of each block; -1 for rows without a block (documents may have fewer than M in total).
        block_segment: (M,) first segment of each block; -1 likewise.
        segment_token: (N,) first token of each segment of each document; T for rows without a segment.
        segment_end: (N,) token after its last token. The last segment of a document may be short.
        segment_block: (N,) the block that begins with the segment, if its document has it.
        block_first, block_last: (N,) range of the blocks of the segment's document.
    """

    start: Tensor
    block_segment: Tensor
    segment_token: Tensor
    segment_end: Tensor
    segment_block: Tensor
    block_first: Tensor
    block_last: Tensor


@cached
def compression_layout(documents: Documents, length: int, stride: int) -> CompressionLayout:
    """The layout of compression blocks in (packed) documents. It is cached, for all layers."""
    bounds, tokens = documents.bounds, len(documents.query_position)
    block_bounds = documents.compressed_bounds(length, stride)
    start, document = block_starts(bounds, block_bounds, stride, num_compressed(tokens, length, stride))
    exists = torch.arange(len(start), device=start.device) < block_bounds[-1]
    segment_bounds = documents.selection_bounds(stride)
    segment = segment_bounds[document] + (start - bounds[document]) // stride
    # Every document may end in a short segment, so this is the maximum for any packing.
    token, owner = block_starts(bounds, segment_bounds, stride, tokens // stride + len(bounds) - 1)
    token = token.clamp(max=tokens)
    first, last = block_bounds[owner], block_bounds[owner + 1]
    end = torch.minimum(token + stride, bounds[owner + 1])
    block = first + (token - bounds[owner]) // stride
    columns = (start.where(exists, -1), segment.where(exists, -1), token, end, block, first, last)
    return CompressionLayout(*(column.int() for column in columns))


@cached
def block_ends(documents: Documents, length: int, stride: int) -> Tensor:
    """(M,) int64 last token of each compression block; the last token of all for rows without a block."""
    tokens = len(documents.query_position)
    start, _ = block_starts(
        documents.bounds, documents.compressed_bounds(length, stride), stride, num_compressed(tokens, length, stride)
    )
    return (start + length - 1).clamp(max=tokens - 1)


class RotaryLayout(NamedTuple):
    """Which dims of a head are rotated, and which of them are pairs.

    Attributes:
        width: number of rotated dims, R, even; None: all of the head.
        place: whether they are the first or the last dims of the head.
        pairs: which of them are a pair: (i, i + R/2) ("half-split") or (2i, 2i + 1) ("interleaved").
    """

    width: int | None = None
    place: Literal["first", "last"] = "first"
    pairs: Literal["half-split", "interleaved"] = "half-split"

    def turning(self, width: int) -> tuple[int, int]:
        """R and the first rotated dim, for a head of ``width`` dims."""
        turning = width if self.width is None else self.width
        return turning, 0 if self.place == "first" else width - turning


ALL_HALF_SPLIT = RotaryLayout()


class Heads(NamedTuple):
    """``number`` heads of ``width`` columns, which are copied, rotated, or mapped to sigmoid(x + bias)."""

    number: int
    width: int
    how: Literal["copy", "rotate", "sigmoid"] = "copy"
    layout: RotaryLayout = ALL_HALF_SPLIT

    @property
    def columns(self) -> int:
        return self.number * self.width
