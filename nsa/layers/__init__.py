"""Attention layers: nn.Modules that compose the operators, one folder for each kind."""

from nsa.layers.dense import DenseAttention
from nsa.layers.dms import MemorySparseAttention
from nsa.layers.dsa import DeepSeekSparseAttention
from nsa.layers.nsa import NativeSparseAttention

__all__ = ["DeepSeekSparseAttention", "DenseAttention", "MemorySparseAttention", "NativeSparseAttention"]
