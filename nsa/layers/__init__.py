"""Attention layers: nn.Modules that compose the operators, one folder for each kind."""

from nsa.layers.dense import DenseAttention
from nsa.layers.dsa import DeepSeekSparseAttention
from nsa.layers.entmax import EntmaxAttention
from nsa.layers.nsa import NativeSparseAttention

__all__ = ["DeepSeekSparseAttention", "DenseAttention", "EntmaxAttention", "NativeSparseAttention"]
