"""NSA's learned compression phi: maps each of overlapping blocks of keys (or values) to one vector."""

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.ops.compression import Pooling, Weights


class BlockCompression(nn.Module):
    """phi: R^(l x D) -> R^D, an MLP over a block of l tokens with intra-block position encoding (NSA Eq. 7).

    phi(block) = outer(silu(inner(flatten(block + position)))), shared by the KV heads.

    Args:
        width: D, the head dimension of keys or values.
        length: tokens in a block (l), a multiple of ``stride`` (d), the tokens between the starts of two blocks.
        hidden: width of the hidden layer; None: D.
        backend: implementation of the operator: auto, triton, torch or naive.
    """

    def __init__(
        self, width: int, length: int, stride: int, hidden: int | None = None, *, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.length, self.stride, self.backend = length, stride, backend
        self.position = nn.Parameter(torch.zeros(length, width))
        # Modules give names and initialisation to the weights; the operator uses them.
        self.inner = nn.Linear(length * width, hidden or width, bias=False)
        self.outer = nn.Linear(hidden or width, width, bias=False)
        nn.init.normal_(self.inner.weight, std=(length * width) ** -0.5)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Compress x (B, T, G, D).

        Returns:
            (B, M, G, D), M = (T - l) // d + 1 (0 if T < l). With ``cu_seqlens`` (N+1,) the blocks of each document,
            concatenated in order. There may be fewer than M; the remaining rows are undefined.
        """
        return ops.compress_blocks(
            x,
            self.inner.weight,
            self.position,
            self.outer.weight,
            length=self.length,
            stride=self.stride,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )

    @property
    def weights(self) -> Weights:
        return Weights(self.inner.weight, self.position, self.outer.weight)


class PooledCompression(nn.Module):
    """A mean of the tokens of a block with learned weights in each channel, through a matrix (`nsa.ops.pool_blocks`).

    DeepSeek-V4 compresses like this (arXiv 2606.19348, section 2.3). Shared by the KV heads.

    Args: as for `BlockCompression`.
    """

    def __init__(self, width: int, length: int, stride: int) -> None:
        super().__init__()
        self.length, self.stride = length, stride
        self.position = nn.Parameter(torch.zeros(length, width))
        self.gate = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """As `BlockCompression.forward`."""
        return ops.pool_blocks(x, *self.weights, length=self.length, stride=self.stride, cu_seqlens=cu_seqlens)

    @property
    def weights(self) -> Pooling:
        return Pooling(self.gate.weight, self.position, self.outer.weight)
