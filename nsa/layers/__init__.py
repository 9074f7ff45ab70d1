"""Attention layers: nn.Modules that compose the operators."""

from nsa.layers.dense import DenseAttention
from nsa.layers.native_sparse import NativeSparseAttention

__all__ = ["DenseAttention", "NativeSparseAttention"]
