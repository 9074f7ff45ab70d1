"""Context parallelism: each rank computes the tokens of its chunks, with the keys and values that they attend to.

What works on each token alone (norms, projections, MLP, loss) needs no communication. Attention does. The record of
its kind says for each input which (`nsa.layers.kind.Exchange`):

* Gather: rows, such as keys and values, of all ranks (their gradients are reduce-scattered). The gather overlaps with
  the layer's computation until the rows are read;
* Halo: rows of the last tokens before each chunk (NSA's window);
* Blocks: a rank computes the blocks that end in its chunks, which takes a halo of length - 1 tokens (or more, see
  `nsa.layers.kind.Blocks.before`). Then the blocks of all ranks are gathered: 1 / stride of the tokens (NSA's
  compression).

A chunk's queries are then the last ones of a prefix of the sequence, which the operators support. Documents may be
packed: ``cu_seqlens`` always describes the whole sequence.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa.layers.around import Around
from nsa.layers.kind import Blocks, Borrowed, Exchange, Gather, Halo, Own, Same
from nsa.models import Decoder
from nsa.ops.geometry import Documents, block_ends, cached, clip_borders, derived, num_compressed
from nsa.parallel import collectives
from nsa.parallel.chunks import TOKENS, Chunks
from nsa.parallel.collectives import all_gather
from nsa.parallel.grid import Axis


def split_over_context_ranks(model: Decoder, axis: Axis) -> None:
    """Make the attention of ``model`` work on this rank's tokens alone, which `ComputeOwn` passes to the decoder."""
    if axis.size == 1:
        return
    layer: Any
    shape = model.config.attention_shape
    for layer in model.layers:
        attention = layer.attention
        exchanges = tuple(layer.kind.exchanges(shape, model.attention.of(layer.kind)).values())
        attention.exchange = StartGathers(axis, exchanges)
        attention.attend = AttendOwn(attention.attend, axis, exchanges)
        for exchange in exchanges:
            if isinstance(exchange, Blocks):
                make: Any = attention.get_submodule(exchange.module)
                parent, _, child = exchange.module.rpartition(".")
                setattr(attention.get_submodule(parent), child, MakeBlocks(make, axis, exchange))


class ComputeOwn(Around):
    """A decoder that takes whole samples and returns the losses of this rank's tokens."""

    def __init__(self, inside: nn.Module, axis: Axis) -> None:
        super().__init__(inside)
        self.axis = axis

    def forward(self, input_ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        chunks = Chunks.of_local(input_ids.shape[1] // self.axis.size, self.axis)
        positions = Documents.of(input_ids.shape[1], 0, cu_seqlens, input_ids.device).query_local
        own = {"targets": chunks.mine(targets), "positions": chunks.mine(positions, 0)}
        return self.inside(chunks.mine(input_ids), cu_seqlens=cu_seqlens, **own)


class PendingRows:
    """Rows of the whole sequence (keys and values), while they are being gathered. A call waits for the gather."""

    def __init__(self, rows: tuple[Tensor, ...], axis: Axis, what: str) -> None:
        self.chunks, self.widths = Chunks.of_local(rows[0].shape[1], axis), [x.shape[-1] for x in rows]
        self.recorded = torch.is_grad_enabled()
        self.gather = collectives.Gather(torch.cat(rows, -1), axis, TOKENS, what)
        self.rows: tuple[Tensor, ...] | None = None

    def __call__(self, stop: int) -> tuple[Tensor, ...]:
        """Those of the first ``stop`` tokens."""
        if self.rows is None:
            with torch.set_grad_enabled(self.recorded):  # the first caller may have disabled gradients
                self.rows = self.chunks.in_order(self.gather.end()).split(self.widths, -1)
        return tuple(x[:, :stop] for x in self.rows)


class StartGathers(nn.Module):
    """In the place of `nsa.layers.kind.Local`: starts to gather the inputs that all ranks need."""

    def __init__(self, axis: Axis, exchanges: tuple[Exchange, ...]) -> None:
        super().__init__()
        self.axis, self.exchanges = axis, exchanges

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return tuple(
            PendingRows(x, self.axis, exchange.name) if isinstance(exchange, Gather) else x
            for x, exchange in zip(inputs, self.exchanges, strict=True)
        )


class AttendOwn(Around):
    """A layer's ``attend`` for the queries of this rank's chunks, one chunk after the other."""

    def __init__(self, inside: nn.Module, axis: Axis, exchanges: tuple[Exchange, ...]) -> None:
        super().__init__(inside)
        self.axis, self.exchanges = axis, exchanges

    def forward(self, *inputs: Any, cu_seqlens: Tensor | None = None, offset: int = 0) -> Tensor:
        assert offset == 0, "decoding is not context-parallel"
        chunks = Chunks.of_local(inputs[0].shape[1], self.axis)
        pieces = [self._pieces(x, e, chunks) for x, e in zip(inputs, self.exchanges, strict=True)]
        outs = []
        for (start, stop), *own in zip(chunks.spans, *pieces, strict=True):
            borders = None if cu_seqlens is None else clip_borders(cu_seqlens, 0, stop)
            outs.append(self.inside(*own, cu_seqlens=borders, offset=start))
        return torch.cat(outs, TOKENS)

    def _pieces(self, x: Any, exchange: Exchange, chunks: Chunks) -> list[Any]:
        """One input of ``attend``, for each of the two chunks."""
        if isinstance(exchange, Own):
            return list(chunks.pair(x))
        if isinstance(exchange, Gather | Borrowed):
            return [partial(x, stop) for _, stop in chunks.spans]
        if isinstance(exchange, Same | Blocks):  # `MakeBlocks` has gathered the blocks
            return [x, x]
        assert isinstance(exchange, Halo)
        halo = min(exchange.tokens, chunks.tokens - 1)
        rows = chunks.with_halos(torch.cat(x, -1), halo, exchange.name).split(halo + chunks.size, TOKENS)
        widths = [part.shape[-1] for part in x]
        # A chunk near the start of the sequence has fewer tokens before it.
        return [
            row[:, max(0, halo - start) :].split(widths, -1) for row, (start, _) in zip(rows, chunks.spans, strict=True)
        ]


class MakeBlocks(Around):
    """A module that computes blocks: from this rank's tokens to the blocks of the whole sequence."""

    def __init__(self, inside: nn.Module, axis: Axis, exchange: Blocks) -> None:
        super().__init__(inside)
        self.axis, self.exchange = axis, exchange

    def forward(
        self, raw: tuple[Tensor, ...], tables: tuple[Tensor, ...], cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        chunks, device = Chunks.of_local(raw[0].shape[1], self.axis), raw[0].device
        if cu_seqlens is None:
            cu_seqlens = _one_document(chunks.tokens, device)
        length, stride, before = self.exchange.length, self.exchange.stride, self.exchange.before
        widths, batch = [x.shape[-1] for x in raw], len(raw[0])
        rows = chunks.with_halos(torch.cat(raw, -1), length - 1 + before, self.exchange.halo)
        # The batch becomes additional heads, so the packing below is that of one sequence.
        rows = rows.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]
        others = {}
        if before:
            halves = rows.unflatten(TOKENS, (2, -1))
            rows, earlier = (x.flatten(1, 2) for x in (halves[:, :, before:], halves[:, :, :-before]))
            others = {"earlier": earlier.split(widths, -1)}
        borders, row = derived(cu_seqlens, _block_layout, chunks, length, stride)
        tables = tuple(_behind_halos(table, chunks, length - 1) for table in tables)
        blocks = self.inside(rows.split(widths, -1), tables, borders, **others)
        gathered = all_gather(torch.cat(blocks, -1), self.axis, TOKENS, self.exchange.name)[0, row]
        return gathered.unflatten(1, (batch, -1)).transpose(0, 1).split([x.shape[-1] for x in blocks], -1)


@cached
def _one_document(tokens: int, device: torch.device) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32, device=device)


def _behind_halos(table: Tensor, chunks: Chunks, width: int) -> Tensor:
    """A table (2 x size, ...) of this rank's tokens, laid out as in `Chunks.with_halos`.

    Halos get zeros: no block ends there, and a block needs the row of its last token.
    """
    halo = table.new_zeros(width, table.shape[1])
    return torch.cat((halo, table[: chunks.size], halo, table[chunks.size :]))


def _block_layout(cu_seqlens: Tensor, chunks: Chunks, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Where compression blocks lie.

    Returns:
        borders: (2N + 3,) int32, document boundaries of the rank's chunks with their halos. Each chunk begins with a
            piece too short for a block, so that its blocks start where they do in the whole sequence.
        row: (M,) int64, for each block of the whole sequence its row among the gathered blocks.
    """
    bounds, behind, device = cu_seqlens.to(torch.int64), length - 1, cu_seqlens.device
    pieces = [bounds.new_zeros(1)]
    for half, (start, stop) in enumerate(chunks.spans):
        base = start - behind
        missing = (base - bounds[:-1]).clamp(min=0)
        first = bounds[:-1] + (missing + stride - 1) // stride * stride  # the document's first block in this piece
        first = torch.minimum(first, bounds[1:]).clamp(base, stop) - base
        pieces += [x + half * (behind + chunks.size) for x in (first, bounds.new_full((1,), behind + chunks.size))]
    borders = torch.cat(pieces).to(torch.int32)

    ranks, rows = chunks.axis.size, num_compressed(2 * (behind + chunks.size), length, stride)
    ends = block_ends(Documents.of(chunks.tokens, 0, cu_seqlens, device), length, stride)
    chunk = ends // chunks.size
    before = torch.searchsorted(ends, torch.arange(2 * ranks + 1, device=device) * chunks.size)  # blocks before each
    holder = torch.minimum(chunk, 2 * ranks - 1 - chunk)
    earlier = torch.where(chunk < ranks, 0, before[holder + 1] - before[holder])  # in the holder's first chunk
    row = holder * rows + earlier + torch.arange(len(ends), device=device) - before[chunk]
    return borders, row.clamp(max=ranks * rows - 1)
