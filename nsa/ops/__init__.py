"""The operators: pure functions on tensors. Each folder's README has the definition and derivation."""

from nsa.ops.compressed import compressed_attention
from nsa.ops.compression import compress_blocks
from nsa.ops.cross_entropy import linear_cross_entropy
from nsa.ops.dense import dense_attention
from nsa.ops.geometry import Heads
from nsa.ops.native_sparse import native_sparse_attention
from nsa.ops.norm import add_rms_norm
from nsa.ops.rotary import apply_rotary, split_heads
from nsa.ops.selected import selected_attention
from nsa.ops.selection import select_blocks
from nsa.ops.swiglu import swiglu

__all__ = [
    "Heads",
    "add_rms_norm",
    "apply_rotary",
    "compress_blocks",
    "compressed_attention",
    "dense_attention",
    "linear_cross_entropy",
    "native_sparse_attention",
    "select_blocks",
    "selected_attention",
    "split_heads",
    "swiglu",
]
