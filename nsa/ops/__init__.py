"""The attention operators: pure functions on tensors. See each folder's README for the definition and derivation."""

from nsa.ops.compressed import compressed_attention
from nsa.ops.compression import compress_blocks
from nsa.ops.dense import dense_attention
from nsa.ops.native_sparse import native_sparse_attention
from nsa.ops.selected import selected_attention
from nsa.ops.selection import select_blocks

__all__ = [
    "compress_blocks",
    "compressed_attention",
    "dense_attention",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
]
