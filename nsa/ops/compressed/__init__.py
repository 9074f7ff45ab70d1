"""Attention to compressed blocks: NSA's first branch (arXiv 2502.11089, section 3.3.1)."""

import torch
from torch import Tensor

from nsa.ops.dispatch import autocasts, check_attention, check_compression, resolve_backend, softmax_scale
from nsa.ops.geometry import Documents, Ranges, block_starts, num_compressed, visible_blocks
from nsa.ops.naive import masked_attention
from nsa.ops.tiles import Runs, tiled_attention


@autocasts("q", "k_cmp", "v_cmp")
def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    length: int,
    stride: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of each query to the compressed blocks that end at or before it (NSA Eq. 7 and 8).

    Block i covers tokens stride*i .. stride*i + length - 1 of its document; query t sees it iff the block's last
    token is at or before t.

    Args:
        q: (B, T, H, D). k_cmp: (B, S, G, D). v_cmp: (B, S, G, Dv): the compressed blocks. With ``cu_seqlens`` the
            blocks of each document, concatenated in order; rows beyond the last block are ignored.
        length: tokens of a block (l), a multiple of ``stride`` (d), the tokens between two blocks.
        scale: factor of the scores; None: D ** -0.5.
        cu_seqlens: (N+1,) int32 boundaries of packed documents up to the last query, with B = 1.
        offset: position of the first query (decoding on a cache, a chunk of a sequence).
        backend: auto, triton, torch or naive.

    Returns:
        out (B, T, H, Dv) in q's dtype, lse (B, H, T) fp32; a query that sees no block gives 0
        and -inf.

    Raises:
        ValueError: inconsistent shapes, fewer blocks than the queries can see, unknown backend.
    """
    check_attention(q, k_cmp, v_cmp, cu_seqlens, offset)
    documents, visible = compressed_ranges(q, k_cmp, length, stride, cu_seqlens, offset)
    scale = softmax_scale(scale, q.shape[3])
    implementation = resolve_backend(backend, q, k_cmp, v_cmp)
    if implementation == "naive":
        return masked_attention(q, k_cmp, v_cmp, naive_mask(documents, k_cmp.shape[1], length, stride), scale)
    if implementation == "triton":
        from nsa.ops.kernels import operators

        return operators.range_attention(q, k_cmp, v_cmp, visible, scale)
    return tiled_attention(q, k_cmp, v_cmp, Runs(visible), scale)


def compressed_ranges(
    q: Tensor, k_cmp: Tensor, length: int, stride: int, cu_seqlens: Tensor | None, offset: int
) -> tuple[Documents, Ranges]:
    """The documents of the queries and the range of compressed blocks that each query sees."""
    check_blocks(k_cmp, offset + q.shape[1], length, stride, cu_seqlens)
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    return documents, visible_blocks(documents, length, stride)


def check_blocks(k_cmp: Tensor, tokens: int, length: int, stride: int, cu_seqlens: Tensor | None) -> None:
    """Raise ValueError for sizes that do not belong together, or fewer blocks than ``tokens`` have."""
    check_compression(length, stride)
    needed = num_compressed(tokens, length, stride)
    if cu_seqlens is None and k_cmp.shape[1] < needed:
        raise ValueError(f"{tokens} tokens have {needed} blocks of {length} at {stride}, got {k_cmp.shape[1]}")


def naive_mask(documents: Documents, num_blocks: int, length: int, stride: int) -> Tensor:
    """(T, S) bool: block i is of query t's document and its last token is at or before t."""
    bounds = documents.compressed_bounds(length, stride)
    start, document = block_starts(documents.bounds, bounds, stride, num_blocks)
    exists = torch.arange(num_blocks, device=start.device) < bounds[-1]
    same_document = documents.query_document[:, None] == document
    return exists & same_document & (start + length - 1 <= documents.query_position[:, None])
