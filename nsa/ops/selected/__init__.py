"""Attention to selected blocks: NSA's second branch (arXiv 2502.11089, section 3.3.2)."""

import torch
from torch import Tensor

from nsa.ops.dispatch import autocasts, check_attention, check_listed, check_positions, resolve_backend, softmax_scale
from nsa.ops.geometry import Documents, block_starts
from nsa.ops.naive import masked_attention
from nsa.ops.tiles import Blocks, tiled_attention


@autocasts("q", "k", "v")
def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Each query of a group attends to the tokens of its listed blocks, at or before itself (NSA Eq. 12).

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. With S > T (decoding on a cache, a
            chunk of a sequence) the queries are the last T of the S positions.
        block_indices: (B, T, G, n) int32 block numbers within the query's document, in any order, each at most once;
            -1 is none. Block j covers tokens block_size*j .. block_size*(j+1) - 1 of the document.
        block_size: tokens of a block (l').
        scale: factor of the scores; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 boundaries of packed documents among the S positions, with B = 1.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, Dv) in q's dtype; a query without blocks gives 0.

    Raises:
        ValueError: inconsistent shapes or types, unknown backend; on a CPU also blocks that are not there.
    """
    check_attention(q, k, v, cu_seqlens)
    expected = (q.shape[0], q.shape[1], k.shape[2])
    if block_indices.dim() != 4 or tuple(block_indices.shape[:3]) != expected:
        raise ValueError(f"block_indices must be {(*expected, 'n')}, got {tuple(block_indices.shape)}")
    if block_size < 1:
        raise ValueError(f"block_size must be positive, got {block_size}")
    check_listed("block_indices", block_indices, -(-k.shape[1] // block_size))
    scale = softmax_scale(scale, q.shape[3])
    documents = Documents.of(q.shape[1], check_positions(q, k), cu_seqlens, q.device)
    implementation = resolve_backend(backend, q, k, v)
    if implementation == "triton":
        from nsa.ops.kernels import operators

        return operators.selected_attention(q, k, v, documents, block_indices, block_size, scale)
    if implementation == "naive":
        mask = naive_mask(documents, block_indices, k.shape[1], block_size)
        return masked_attention(q, k, v, mask, scale)[0]
    return tiled_attention(q, k, v, block_pattern(documents, block_indices, k.shape[1], block_size), scale)[0]


def block_pattern(documents: Documents, block_indices: Tensor, num_keys: int, block_size: int) -> Blocks:
    """The pattern in blocks of the whole packed sequence, from block numbers within documents."""
    bounds = documents.selection_bounds(block_size)
    # Every document may end in a partial block, so this is the maximum for any packing.
    count = num_keys // block_size + len(documents.bounds) - 1
    start, _ = block_starts(documents.bounds, bounds, block_size, count)
    first = bounds[documents.query_document][:, None, None]
    indices = block_indices.to(torch.int64)
    return Blocks(torch.where(indices < 0, -1, indices + first), start, block_size, documents.query_position)


def naive_mask(documents: Documents, block_indices: Tensor, num_keys: int, block_size: int) -> Tensor:
    """(B, G, T, S) bool: key s lies in a block that query t lists, in its document and at or before it."""
    key = torch.arange(num_keys, device=block_indices.device)
    start = documents.bounds[documents.query_document][:, None]
    block_of_key = torch.div(key - start, block_size, rounding_mode="floor")  # (T, S); negative: an earlier document
    listed = (block_of_key[:, None, :, None] == block_indices[:, :, :, None]).any(-1)  # (B, T, G, S)
    seen = (key >= start) & (key <= documents.query_position[:, None])
    return (listed & seen[:, None]).transpose(1, 2)
