"""Causal grouped-query attention over all tokens."""

from nsa.layers.dense.layer import DenseAttention

__all__ = ["DenseAttention"]
