"""NSA's learned compression phi: overlapping blocks of keys (or values) to one vector each."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from nsa.ops.packing import Documents, block_starts, num_compressed


class OverlappingLinear(nn.Module):
    """A linear map of flattened blocks of ``length`` tokens at ``stride``, without laying out the overlap.

    A block is length/stride segments of ``stride`` tokens, so its product with the weight is the sum of the products
    of its segments with their columns: each token is read once, by one matrix product over disjoint segments.
    """

    def __init__(self, width: int, out_features: int, length: int, stride: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, length * width))
        nn.init.normal_(self.weight, std=(length * width) ** -0.5)
        self.segments_per_block = length // stride

    def forward(self, segments: Tensor, first: Tensor, position: Tensor) -> Tensor:
        """segments (B, N, G, stride * width), first (M,) segment of each block, position (length, width), which is
        added to every block -> (B, M, G, out_features)."""
        bias = linear(position.flatten().to(segments.dtype), self.weight)
        weight = self.weight.unflatten(1, (self.segments_per_block, -1)).transpose(0, 1)  # (r, out, stride * width)
        products = linear(segments, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])  # (B, N, G, r, out)
        out = bias
        for r in range(self.segments_per_block):
            out = out + products[:, first + r, :, r]
        return out


class BlockCompression(nn.Module):
    """phi: R^(l x D) -> R^D, an MLP over a block of l tokens with intra-block position encoding (NSA Eq. 7).

    phi(block) = outer(silu(inner(flatten(block + position)))), shared by the KV heads.

    Args:
        width: D, of the key or value heads.
        length: tokens in a block (l), a multiple of ``stride`` (d), the tokens between two blocks.
        hidden: width of the hidden layer; None: D.
    """

    def __init__(self, width: int, length: int, stride: int, hidden: int | None = None) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.position = nn.Parameter(torch.zeros(length, width))
        self.inner = OverlappingLinear(width, hidden or width, length, stride)
        self.outer = nn.Linear(hidden or width, width, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Compress x (B, T, G, D).

        Returns:
            (B, M, G, D), M = (T - l) // d + 1 (0 if T < l). With ``cu_seqlens`` (N+1,) the blocks of each document,
            concatenated in order; there may be fewer than M, the rows beyond them mean nothing.
        """
        batch, tokens, groups, width = x.shape
        blocks = num_compressed(tokens, self.length, self.stride)
        if not blocks:
            return x.new_zeros(batch, 0, groups, width)
        if cu_seqlens is None:
            count = tokens // self.stride
            segments = x[:, : count * self.stride].unflatten(1, (count, self.stride))
            first = torch.arange(blocks, device=x.device)
        else:
            documents = Documents.of(tokens, 0, cu_seqlens, x.device)
            start, first = _packed_segments(documents, tokens, blocks, self.length, self.stride)
            segments = x[:, start[:, None] + torch.arange(self.stride, device=x.device)]
        return self.outer(silu(self.inner(segments.transpose(2, 3).flatten(3), first, self.position)))


def _packed_segments(documents: Documents, tokens: int, blocks: int, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """First token of each whole segment of each document, and first segment of each compression block."""
    segment_bounds = documents.compressed_bounds(stride, stride)
    start, _ = block_starts(documents.bounds, segment_bounds, stride, tokens // stride)
    block_bounds = documents.compressed_bounds(length, stride)
    first, _ = block_starts(segment_bounds, block_bounds, 1, blocks)
    # Rows beyond the last segment or block are never seen; keep them inside the tensors.
    return start.clamp(max=tokens - stride), first.clamp(max=tokens // stride - length // stride)


def compressed_ends(tokens: int, cu_seqlens: Tensor | None, length: int, stride: int, device: torch.device) -> Tensor:
    """(M,) int64 token at which each compression block ends, in the order of `BlockCompression`'s rows."""
    documents = Documents.of(tokens, 0, cu_seqlens, device)
    blocks = num_compressed(tokens, length, stride)
    start, _ = block_starts(documents.bounds, documents.compressed_bounds(length, stride), stride, blocks)
    return (start + length - 1).clamp(max=tokens - 1)
