"""Context parallelism: each rank computes the tokens of its chunks, with the keys and values that they see.

What is on its own per token (norms, projections, MLP, loss) needs nothing. Attention does:

* dense: keys and values of all ranks are gathered (their gradients are summed and scattered back);
* NSA, compressed: a rank compresses the blocks that end in its chunks, after a halo of length - 1 tokens; then the
  compressed keys and values are gathered: 1 / stride of the whole;
* NSA, selected: gathered whole, per KV head: any query may select any block. The gather is under way while blocks are
  compressed, attended to and selected;
* NSA, window: a halo of window - 1 tokens before each chunk.

A chunk's queries are then the last ones of a prefix of the sequence, which the operators know. Documents may be
packed: ``cu_seqlens`` always describes the whole sequence.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa.layers import NativeSparseAttention
from nsa.layers.native_sparse import KeyValueCompression, Pair
from nsa.models import Decoder
from nsa.ops.compression import block_ends
from nsa.ops.packing import Documents, cached, clip_borders, derived, num_compressed
from nsa.parallel.chunks import TOKENS, Chunks
from nsa.parallel.collectives import Gather, all_gather
from nsa.parallel.grid import Axis


def split_over_context_ranks(model: Decoder, axis: Axis) -> None:
    """Let ``model`` take whole samples and compute this rank's tokens of them."""
    if axis.size == 1:
        return
    model.forward = partial(_compute_own_tokens, model.forward, axis)  # type: ignore[method-assign]
    for layer in model.layers:
        attention: Any = layer.attention
        if isinstance(attention, NativeSparseAttention):
            attention.project = partial(_project, attention.project, axis)  # type: ignore[method-assign]
            attention.compress.forward = partial(_compress, attention.compress, axis)  # type: ignore[method-assign]
            attention.attend = ContextBranches(attention.attend, axis)  # type: ignore[assignment]
        else:
            attention.attend = ContextAttention(attention.attend, axis)


def _compute_own_tokens(
    forward: Any, axis: Axis, input_ids: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`nsa.models.Decoder.forward` from whole samples to the losses of this rank's tokens."""
    chunks = Chunks.of_local(input_ids.shape[1] // axis.size, axis)
    positions = Documents.of(input_ids.shape[1], 0, cu_seqlens, input_ids.device).query_local
    own = {"targets": chunks.mine(targets), "positions": chunks.mine(positions, 0)}
    return forward(chunks.mine(input_ids), cu_seqlens=cu_seqlens, **own)


class ContextAttention(nn.Module):
    """`nsa.layers.dense.CausalAttention` for the queries of this rank's chunks."""

    def __init__(self, attend: nn.Module, axis: Axis) -> None:
        super().__init__()
        self.attend, self.axis = attend, axis

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        chunks = Chunks.of_local(q.shape[1], self.axis)
        k, v = _whole((k, v), chunks, "keys")
        outs = []
        for queries, (_, stop) in zip(chunks.pair(q), chunks.spans, strict=True):
            borders = None if cu_seqlens is None else clip_borders(cu_seqlens, 0, stop)
            outs.append(self.attend(queries, k[:, :stop], v[:, :stop], borders))
        return torch.cat(outs, TOKENS)


class Arriving:
    """Keys and values of the whole sequence, while those of other ranks are on their way. Called, it waits for them."""

    def __init__(self, kv: Pair, axis: Axis, what: str) -> None:
        self.chunks, self.widths = Chunks.of_local(kv[0].shape[1], axis), [x.shape[-1] for x in kv]
        self.recorded = torch.is_grad_enabled()
        self.gather = Gather(torch.cat(kv, -1), axis, TOKENS, what)
        self.pair: Pair | None = None

    def __call__(self, stop: int) -> Pair:
        """Of the first ``stop`` tokens."""
        if self.pair is None:
            with torch.set_grad_enabled(self.recorded):  # whoever asks first
                k, v = self.chunks.in_order(self.gather.end()).split(self.widths, -1)
            self.pair = k, v
        return self.pair[0][:, :stop], self.pair[1][:, :stop]


def _project(project: Any, axis: Axis, x: Tensor, rotary: Pair) -> tuple[Any, ...]:
    """`NativeSparseAttention.project`; the selected branch's keys and values set out to the other ranks."""
    q, kv_cmp, kv_slc, kv_win, gates = project(x, rotary)
    return q, kv_cmp, Arriving(kv_slc, axis, "selected"), kv_win, gates


class ContextBranches(nn.Module):
    """`nsa.layers.native_sparse.GatedBranches` for the queries of this rank's chunks; ``kv_cmp`` is gathered before."""

    def __init__(self, attend: Any, axis: Axis) -> None:
        super().__init__()
        self.attend, self.axis = attend, axis

    def forward(
        self, q: Tensor, kv_cmp: Pair, kv_slc: Arriving, kv_win: Pair, gates: Tensor,
        cu_seqlens: Tensor | None = None, offset: int = 0,
    ) -> Tensor:  # fmt: skip
        assert offset == 0, "decoding is not context-parallel"
        chunks, halo = Chunks.of_local(q.shape[1], self.axis), min(self.attend.window, q.shape[1] * self.axis.size) - 1
        windows = chunks.with_halos(torch.cat(kv_win, -1), halo, "window").split(halo + chunks.size, TOKENS)
        outs = []
        for queries, gate, near, (start, stop) in zip(
            chunks.pair(q), chunks.pair(gates), windows, chunks.spans, strict=True
        ):
            near = near[:, max(0, halo - start) :]  # the sequence has no more tokens
            outs.append(
                self.attend(
                    queries,
                    kv_cmp,
                    partial(kv_slc, stop),
                    near.split([x.shape[-1] for x in kv_win], -1),
                    gate,
                    None if cu_seqlens is None else clip_borders(cu_seqlens, 0, stop),
                    start,
                )
            )
        return torch.cat(outs, TOKENS)


def _whole(kv: Pair, chunks: Chunks, what: str) -> Pair:
    """Keys and values of the whole sequence, by one gather."""
    k, v = chunks.whole(torch.cat(kv, -1), what).split((kv[0].shape[-1], kv[1].shape[-1]), -1)
    return k, v


def _compress(
    compress: KeyValueCompression, axis: Axis, raw: Pair, rotary: Pair, cu_seqlens: Tensor | None = None, ahead: int = 0
) -> Pair:
    """`KeyValueCompression.forward` from this rank's tokens to the blocks of the whole sequence."""
    assert ahead == 0, "decoding is not context-parallel"
    chunks, device = Chunks.of_local(raw[0].shape[1], axis), raw[0].device
    if cu_seqlens is None:
        cu_seqlens = _one_document(chunks.tokens, device)
    length, stride = compress.length, compress.stride
    widths = raw[0].shape[-1], raw[1].shape[-1]
    rows = chunks.with_halos(torch.cat(raw, -1), length - 1, "compression")
    # A batch is more heads: so the packing below is that of one row.
    k, v = rows.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None].split(widths, -1)
    borders, row = derived(cu_seqlens, _block_layout, chunks, length, stride)
    cos, sin = (_behind_halos(table, chunks, length - 1) for table in rotary)
    blocks = type(compress).forward(compress, (k, v), (cos, sin), borders)
    gathered = all_gather(torch.cat(blocks, -1), axis, TOKENS, "compressed")[0, row]
    k, v = gathered.unflatten(1, (len(rows), -1)).transpose(0, 1).split(widths, -1)
    return k, v


@cached
def _one_document(tokens: int, device: torch.device) -> Tensor:
    return torch.tensor([0, tokens], dtype=torch.int32, device=device)


def _behind_halos(table: Tensor, chunks: Chunks, width: int) -> Tensor:
    """Rotary table (2 x size, D / 2) of this rank's tokens as one of `Chunks.with_halos`; no block ends in a halo."""
    halo = table.new_zeros(width, table.shape[1])
    return torch.cat((halo, table[: chunks.size], halo, table[chunks.size :]))


def _block_layout(cu_seqlens: Tensor, chunks: Chunks, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Where compression blocks lie.

    Returns:
        borders: (2N + 3,) int32, of the rank's chunks behind their halos, such that blocks start where they do in the
            whole sequence: in each chunk a piece too short for a block, then the documents.
        row: (M,) int64, for each block of the whole sequence its row among the gathered ones.
    """
    bounds, behind, device = cu_seqlens.to(torch.int64), length - 1, cu_seqlens.device
    pieces = [bounds.new_zeros(1)]
    for half, (start, stop) in enumerate(chunks.spans):
        base = start - behind
        missing = (base - bounds[:-1]).clamp(min=0)
        first = bounds[:-1] + (missing + stride - 1) // stride * stride  # the document's first block in sight
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
