"""Dynamic Memory Sparsification: each KV head learns which of its tokens to forget."""

from nsa.layers.dms.layer import MemorySparseAttention

__all__ = ["MemorySparseAttention"]
