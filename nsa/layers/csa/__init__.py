"""Compressed Sparse Attention: attention to entries that each stand for a few tokens, beside a window."""

from nsa.layers.csa.layer import CompressedSparseAttention

__all__ = ["CompressedSparseAttention"]
