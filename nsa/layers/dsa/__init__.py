"""DeepSeek Sparse Attention: a lightning indexer selects the tokens of each query."""

from nsa.layers.dsa.layer import DeepSeekSparseAttention

__all__ = ["DeepSeekSparseAttention"]
