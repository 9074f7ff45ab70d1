"""The operators: pure functions on tensors. Each folder's README has the definition and derivation."""

from nsa.ops.block_sparse import block_sparse_attention
from nsa.ops.block_sparse.choice import (
    attention_mass,
    block_lists,
    pooled_blocks,
    slash_blocks,
    vertical_slash_lines,
)
from nsa.ops.compressed import compressed_attention
from nsa.ops.compression import compress_blocks, pool_blocks
from nsa.ops.cross_entropy import linear_cross_entropy
from nsa.ops.decode import Terms, decode_attention
from nsa.ops.dense import dense_attention
from nsa.ops.entmax import entmax, entmax_attention
from nsa.ops.few_rows import few_rows_linear, few_rows_swiglu
from nsa.ops.geometry import Heads
from nsa.ops.index_topk import index_topk, index_topk_decode
from nsa.ops.indexer_kl import indexer_kl
from nsa.ops.masked import masked_attention
from nsa.ops.native_sparse import native_sparse_attention
from nsa.ops.native_sparse_decode import native_sparse_decode
from nsa.ops.norm import add_rms_norm
from nsa.ops.quest import extend_page_bounds, page_bounds, quest_pages
from nsa.ops.rotary import apply_rotary, split_heads
from nsa.ops.selected import selected_attention
from nsa.ops.selection import select_blocks
from nsa.ops.selection_kl import selection_kl
from nsa.ops.swiglu import swiglu
from nsa.ops.token_sparse import token_sparse_attention
from nsa.ops.token_sparse_kl import token_sparse_attention_kl
from nsa.ops.top_p import KeySketch, extend_key_sketch, sketch_keys, top_p_tokens

__all__ = [
    "Heads",
    "KeySketch",
    "Terms",
    "add_rms_norm",
    "apply_rotary",
    "attention_mass",
    "block_lists",
    "block_sparse_attention",
    "compress_blocks",
    "compressed_attention",
    "decode_attention",
    "dense_attention",
    "entmax",
    "entmax_attention",
    "extend_key_sketch",
    "extend_page_bounds",
    "few_rows_linear",
    "few_rows_swiglu",
    "index_topk",
    "index_topk_decode",
    "indexer_kl",
    "linear_cross_entropy",
    "masked_attention",
    "native_sparse_attention",
    "native_sparse_decode",
    "page_bounds",
    "pool_blocks",
    "pooled_blocks",
    "quest_pages",
    "select_blocks",
    "selected_attention",
    "selection_kl",
    "sketch_keys",
    "slash_blocks",
    "split_heads",
    "swiglu",
    "token_sparse_attention",
    "token_sparse_attention_kl",
    "top_p_tokens",
    "vertical_slash_lines",
]
