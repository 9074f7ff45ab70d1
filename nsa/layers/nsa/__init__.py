"""Native Sparse Attention (arXiv 2502.11089)."""

from nsa.layers.nsa.layer import NativeSparseAttention

__all__ = ["NativeSparseAttention"]
