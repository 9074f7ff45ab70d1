"""Attention layers: nn.Modules that compose the operators, one folder for each kind."""

from nsa.layers.csa import CompressedSparseAttention
from nsa.layers.dense import DenseAttention
from nsa.layers.dms import MemorySparseAttention
from nsa.layers.dsa import DeepSeekSparseAttention
from nsa.layers.entmax import EntmaxAttention
from nsa.layers.index_sets import record_index_sets, replay_index_sets
from nsa.layers.nsa import NativeSparseAttention

__all__ = [
    "CompressedSparseAttention",
    "DeepSeekSparseAttention",
    "DenseAttention",
    "EntmaxAttention",
    "MemorySparseAttention",
    "NativeSparseAttention",
    "record_index_sets",
    "replay_index_sets",
]
