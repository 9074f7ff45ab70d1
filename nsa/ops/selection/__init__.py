"""NSA's selection of the blocks of a query, from the compressed probabilities (arXiv 2502.11089, Eq. 9-11)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from nsa.ops.compressed import compressed_ranges
from nsa.ops.compressed import naive_mask as compressed_mask
from nsa.ops.dispatch import (
    accumulation_dtype,
    autocasts,
    check_attention,
    check_compression,
    resolve_backend,
    softmax_scale,
)
from nsa.ops.geometry import Documents, Ranges, block_starts
from nsa.ops.tiles import LOG2_E, Runs


@torch.no_grad()
@autocasts("q", "k_cmp")
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    length: int,
    stride: int,
    block_size: int,
    num_blocks: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    """The ``num_blocks`` most important selection blocks of each query and KV head.

    The importance of selection block j is a sum over the group's heads and the compressed blocks: the compressed
    probability times the number of stride units that the compressed block shares with j. This is Eq. 9 in its 0-based
    form (for 32/16/64 the weights are 1, 2, 2, 2, 1 on compressed blocks 4j-1 .. 4j+3), summed as in Eq. 10.

    Args:
        q: (B, T, H, D). k_cmp: (B, S, G, D), as for `compressed_attention`. lse: (B, H, T), its second result.
        length, stride: of the compressed blocks. block_size: tokens of a selection block, a multiple of ``stride``,
            at least ``length``.
        num_blocks: blocks per query. Among them are always the ``num_initial`` first of the document and the
            ``num_local`` most recent ones (the query's own included).
        scale, cu_seqlens, offset: as for `compressed_attention`.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, G, num_blocks) int32 block numbers within the query's document, ascending, padded with -1. Ties go to the
        lower number. Only blocks that start at or before the query are selected. Not differentiable.

    Raises:
        ValueError: more forced blocks than ``num_blocks``, inconsistent shapes, unknown backend.
    """
    check_attention(q, k_cmp, k_cmp, cu_seqlens, offset)
    check_selection(length, stride, block_size, num_blocks, num_initial, num_local)
    documents, visible = compressed_ranges(q, k_cmp, length, stride, cu_seqlens, offset)
    sizes = (length, stride, block_size, softmax_scale(scale, q.shape[3]))
    implementation = resolve_backend(backend, q, k_cmp)
    if implementation == "triton":
        from nsa.ops.kernels import operators

        return operators.select_blocks(
            q, k_cmp, lse, cu_seqlens, offset, *sizes[:3], num_blocks, num_initial, num_local, sizes[3]
        )

    if implementation == "naive":
        tiles = iter([(slice(0, q.shape[1]), naive_importance(q, k_cmp, lse, documents, *sizes))])
    else:
        tiles = _importance_tiles(q, k_cmp, lse, documents, visible, *sizes)
    local, forced = documents.query_local, (num_initial, num_local)
    return torch.cat([pick_blocks(i, local[rows], block_size, num_blocks, *forced) for rows, i in tiles], dim=1)


def check_selection(
    length: int, stride: int, block_size: int, num_blocks: int, num_initial: int, num_local: int
) -> None:
    """Raise ValueError unless the block sizes fit the compression, and there are enough blocks for the forced ones."""
    check_compression(length, stride, block_size)
    if num_blocks < 1 or num_initial < 0 or num_local < 0 or num_initial + num_local > num_blocks:
        raise ValueError(
            f"num_initial ({num_initial}) + num_local ({num_local}) forced blocks must fit num_blocks ({num_blocks})"
        )


def naive_importance(
    q: Tensor, k_cmp: Tensor, lse: Tensor, documents: Documents, length: int, stride: int, block_size: int, scale: float
) -> Tensor:
    """(B, G, T, M) importance of block m of each query's own document, directly by its definition."""
    groups, dtype = k_cmp.shape[2], accumulation_dtype(q)
    mask = compressed_mask(documents, k_cmp.shape[1], length, stride)
    keys = k_cmp.to(dtype).repeat_interleave(q.shape[2] // groups, dim=2)
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), keys) * scale
    probabilities = (scores - lse[..., None]).exp().where(mask, 0).unflatten(1, (groups, -1)).sum(2)

    start, document = block_starts(
        documents.bounds, documents.compressed_bounds(length, stride), stride, k_cmp.shape[1]
    )
    start = start - documents.bounds[document]
    most = int(documents.lengths.max() + block_size - 1) // block_size
    units = start[:, None] + stride * torch.arange(length // stride, device=q.device)
    overlap = (units[..., None] // block_size == torch.arange(most, device=q.device)).sum(1)  # (S, M)
    return probabilities @ overlap.to(dtype)


def pick_blocks(
    importance: Tensor, query_local: Tensor, block_size: int, num_blocks: int, num_initial: int, num_local: int
) -> Tensor:
    """Top ``num_blocks`` of (B, G, T, M) importance with forced blocks, ties to the lower number (NSA Eq. 11).

    Returns:
        (B, T, G, num_blocks) int32, ascending, then -1.
    """
    block = torch.arange(importance.shape[3], device=importance.device)
    own = (query_local // block_size)[:, None]
    forced = (block < num_initial) | (block > own - num_local)
    score = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    score, chosen = score.sort(dim=-1, descending=True, stable=True)
    none = importance.shape[3]
    chosen = chosen.masked_fill(score == -torch.inf, none)[..., :num_blocks].sort(dim=-1).values
    chosen = torch.nn.functional.pad(chosen, (0, num_blocks - chosen.shape[3]), value=none)
    return chosen.masked_fill(chosen == none, -1).to(torch.int32).transpose(1, 2).contiguous()


def _importance_tiles(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    documents: Documents,
    visible: Ranges,
    length: int,
    stride: int,
    block_size: int,
    scale: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (queries, their importance (B, G, t, M)) by tiles, with M large enough for the tile's last query."""
    groups, dtype = k_cmp.shape[2], accumulation_dtype(q)
    queries = q.to(dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4) * (scale * LOG2_E)  # (B, G, h, T, D)
    keys = k_cmp.to(dtype).transpose(1, 2)
    # exp2(s - 0) is masked below; exp2(s - -inf) would be inf.
    lse = lse.masked_fill(lse == -torch.inf, 0).unflatten(1, (groups, -1)) * LOG2_E
    weights = overlap_weights(length, stride, block_size, queries)
    first_block = documents.compressed_bounds(length, stride)[documents.query_document]
    for tile in Runs(visible).tiles(q.shape[1], k_cmp.shape[1], q.shape[0] * q.shape[2]):
        assert isinstance(tile.keys, slice)
        rows = slice(tile.start, tile.stop)
        scores = queries[:, :, :, rows] @ keys[:, :, None, tile.keys].mT
        p = scores.sub_(lse[:, :, :, rows, None]).exp2_().sum(2).masked_fill_(~tile.mask, 0)  # (B, G, t, U)
        # Selection block j sums over the compressed blocks from j*per_block - lead on, of its document.
        most = int(documents.query_local[rows].max()) // block_size + 1
        lead = length // stride - 1
        source = torch.arange(most, device=q.device)[:, None] * (block_size // stride) - lead
        source = source + torch.arange(len(weights), device=q.device)  # (M, W)
        column = (first_block[rows] - tile.keys.start)[:, None] + source.flatten()  # (t, M * W)
        # An additional zero column stands for blocks that do not exist.
        p = torch.nn.functional.pad(p, (0, 1))
        missing = (source.flatten() < 0) | (column < 0) | (column >= p.shape[3])
        column = column.masked_fill(missing, p.shape[3] - 1)
        weighed = p.gather(3, column.expand(*p.shape[:2], -1, -1)).unflatten(3, source.shape) * weights
        yield rows, weighed.sum(-1)


def overlap_weights(length: int, stride: int, block_size: int, like: Tensor) -> Tensor:
    """Stride units that compressed block p j - lead + m shares with selection block j, p = block_size/stride.

    (p + lead,) in the dtype and on the device of ``like``, made there: a CUDA graph cannot capture a copy from the
    host. lead = length/stride - 1; 1, 2, 2, 2, 1 for 32/16/64.
    """
    units, per_block = length // stride, block_size // stride
    m = torch.arange(per_block + units - 1, device=like.device)
    return (m.clamp(max=per_block - 1) - (m - units + 1).clamp(min=0) + 1).to(like.dtype)
