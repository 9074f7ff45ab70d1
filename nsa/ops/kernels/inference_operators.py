"""Kernels without gradients as torch operators: prompts whose blocks are chosen, and decoding."""

import torch
from torch import Tensor

from nsa.ops.geometry import first_columns
from nsa.ops.kernels import (
    block_sparse,
    compression,
    decode,
    mass,
    quest,
    token_tiles,
    top_p,
)
from nsa.ops.kernels import index_topk as indexer
from nsa.ops.kernels import native_sparse_decode as sparse_decode


@torch.library.custom_op("nsa::index_topk_decode", mutates_args=())
def _index_topk_decode(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, lengths: Tensor, topk: int, num_initial: int, num_local: int
) -> Tensor:  # fmt: skip
    return indexer.topk_decode(q_idx, k_idx, weights, lengths, topk, num_initial, num_local)


@_index_topk_decode.register_fake
def _index_topk_decode_fake(q_idx, k_idx, weights, lengths, topk, num_initial, num_local):
    return q_idx.new_empty(len(q_idx), topk, dtype=torch.int32)


def index_topk_decode(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, lengths: Tensor, topk: int, num_initial: int, num_local: int
) -> Tensor:  # fmt: skip
    """As `nsa.ops.index_topk_decode`."""
    tensors = q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous()
    return _index_topk_decode(*tensors, lengths, topk, num_initial, num_local)


@torch.library.custom_op("nsa::decode_attention", mutates_args=())
def _decode_attention(
    q: Tensor, k: Tensor, v: Tensor | None, v_width: int, lengths: Tensor, pages: Tensor | None, page_size: int,
    log_weights: Tensor | None, terms: list[Tensor], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    v = k[..., :v_width] if v is None else v
    return decode.attention(q, k, v, lengths, pages, page_size, log_weights, tuple(terms) or None, scale)


@_decode_attention.register_fake
def _decode_attention_fake(q, k, v, v_width, lengths, pages, page_size, log_weights, terms, scale):
    return q.new_empty(*q.shape[:2], v_width), q.new_empty(q.shape[:2], dtype=torch.float32)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int,
    log_weights: Tensor | None, terms: tuple[Tensor, ...] | None, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `nsa.ops.decode_attention`. A view of k is passed as None, so that no compiler makes a copy of it."""
    pages = None if pages is None else pages.contiguous()
    log_weights = None if log_weights is None else log_weights.float().contiguous()
    more = [] if terms is None else [x.contiguous() for x in (*terms[:3], terms[3].float())]
    own = None if first_columns(v, k) else v
    return _decode_attention(q.contiguous(), k, own, v.shape[3], lengths, pages, page_size, log_weights, more, scale)


@torch.library.custom_op("nsa::append_rows", mutates_args=("memories",))
def _append_rows(memories: list[Tensor], rows: list[Tensor], index: Tensor) -> None:
    decode.append(memories, rows, index)


@_append_rows.register_fake
def _append_rows_fake(memories, rows, index):
    return None


def append_rows(memories: list[Tensor], rows: list[Tensor], index: Tensor) -> None:
    """As `nsa.ops.decode.append_rows`."""
    _append_rows(memories, [x.contiguous() for x in rows], index)


@torch.library.custom_op("nsa::extend_compressed", mutates_args=("memories", "compressed"))
def _extend_compressed(
    memories: list[Tensor], rows: list[Tensor], inner: list[Tensor], position: list[Tensor], outer: list[Tensor],
    compressed: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor, stride: int,
) -> None:  # fmt: skip
    compression.extend(memories, rows, inner, position, outer, compressed, cos, sin, index, stride)


@_extend_compressed.register_fake
def _extend_compressed_fake(memories, rows, inner, position, outer, compressed, cos, sin, index, stride):
    return None


def extend_compressed(
    memories: list[Tensor], rows: list[Tensor], inner: list[Tensor], position: list[Tensor], outer: list[Tensor],
    compressed: list[Tensor], cos: Tensor, sin: Tensor, index: Tensor, stride: int,
) -> None:  # fmt: skip
    """As `nsa.ops.compression.extend_compressed`."""
    lists = ([x.contiguous() for x in given] for given in (rows, inner, position, outer))
    tables = cos.float().contiguous(), sin.float().contiguous()
    _extend_compressed(memories, *lists, compressed, *tables, index, stride)


@torch.library.custom_op("nsa::native_sparse_decode", mutates_args=())
def _native_sparse_decode(
    q: Tensor, kv: list[Tensor], gates: Tensor, lengths: Tensor, length: int, stride: int, block_size: int,
    num_blocks: int, num_initial: int, num_local: int, scale: float,
) -> Tensor:  # fmt: skip
    sizes = length, stride, block_size, num_blocks, num_initial, num_local
    return sparse_decode.attention(q, kv, gates, lengths, *sizes, scale)[0]


@_native_sparse_decode.register_fake
def _native_sparse_decode_fake(q, kv, *rest):
    return q.new_empty(*q.shape[:2], kv[1].shape[3])


def native_sparse_decode(q: Tensor, kv: list[Tensor], gates: Tensor, lengths: Tensor, *sizes: float) -> Tensor:
    """As `nsa.ops.native_sparse_decode`; sizes: length to num_local, scale."""
    return _native_sparse_decode(q.contiguous(), kv, gates.contiguous(), lengths, *sizes)


@torch.library.custom_op("nsa::quest_pages", mutates_args=())
def _quest_pages(
    q: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page_size: int, topk: int, num_initial: int,
    num_local: int, over_group: str,
) -> Tensor:  # fmt: skip
    return quest.pages(q, low, high, lengths, page_size, topk, num_initial, num_local, over_group)


@_quest_pages.register_fake
def _quest_pages_fake(q, low, high, lengths, page_size, topk, num_initial, num_local, over_group):
    return q.new_empty(len(q), low.shape[2], topk, dtype=torch.int32)


def quest_pages(
    q: Tensor, low: Tensor, high: Tensor, lengths: Tensor, page_size: int, topk: int, num_initial: int,
    num_local: int, over_group: str,
) -> Tensor:  # fmt: skip
    """As `nsa.ops.quest_pages`."""
    return _quest_pages(q.contiguous(), low, high, lengths, page_size, topk, num_initial, num_local, over_group)


@torch.library.custom_op("nsa::top_p_tokens", mutates_args=())
def _top_p_tokens(
    q: Tensor, codes: Tensor, ranges: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int, p: float,
    scale: float,
) -> Tensor:  # fmt: skip
    return top_p.choose(q, codes, ranges, lengths, pages, page_size, p, scale)


@_top_p_tokens.register_fake
def _top_p_tokens_fake(q, codes, ranges, lengths, pages, page_size, p, scale):
    slots = codes.shape[1] if pages is None else pages.shape[2] * page_size
    return q.new_empty(len(q), codes.shape[2], slots, dtype=torch.int32)


def top_p_tokens(
    q: Tensor, codes: Tensor, ranges: Tensor, lengths: Tensor, pages: Tensor | None, page_size: int, p: float,
    scale: float,
) -> Tensor:  # fmt: skip
    """As `nsa.ops.top_p_tokens`."""
    pages = None if pages is None else pages.contiguous()
    return _top_p_tokens(q.contiguous(), codes, ranges, lengths, pages, page_size, p, scale)


@torch.library.custom_op("nsa::block_sparse_attention", mutates_args=())
def _block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, columns: Tensor | None, tile_size: int,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return block_sparse.forward(q, k, v, blocks, counts, columns, tile_size, block_size, scale)


@_block_sparse_attention.register_fake
def _block_sparse_attention_fake(q, k, v, *rest):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, counts: Tensor, columns: Tensor | None, tile_size: int,
    block_size: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `nsa.ops.block_sparse_attention` with ``return_lse``."""
    columns = None if columns is None else columns.contiguous()
    given = [x.contiguous() for x in (q, k, v, blocks, counts)]
    out, lse = _block_sparse_attention(*given, columns, tile_size, block_size, scale)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("nsa::masked_attention", mutates_args=())
def _masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return token_tiles.forward_masked(q, k, v, mask, scale)


@_masked_attention.register_fake
def _masked_attention_fake(q, k, v, mask, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.masked_attention` with ``return_lse``."""
    batch, lists = mask.shape[:2]
    if lists == 1:
        out, lse = _masked_attention(*(x.contiguous() for x in (q, k, v, mask[:, 0])), scale)
        return out, lse.transpose(1, 2)
    # Heads that share a mask are a sequence of their own.
    q = q.unflatten(2, (lists, -1)).transpose(1, 2).flatten(0, 1).contiguous()  # (B N, T, H / N, D)
    k, v = (
        x.repeat_interleave(lists // x.shape[2], 2).transpose(1, 2).flatten(0, 1)[:, :, None].contiguous()
        for x in (k, v)
    )  # (B N, S, 1, D), (B N, S, 1, Dv)
    out, lse = _masked_attention(q, k, v, mask.flatten(0, 1).contiguous(), scale)
    out, lse = (x.unflatten(0, (batch, lists)).transpose(1, 2).flatten(2, 3) for x in (out, lse))
    return out, lse.transpose(1, 2)


@torch.library.custom_op("nsa::block_lists", mutates_args=())
def _block_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    return block_sparse.lists_of(keep)


@_block_lists.register_fake
def _block_lists_fake(keep):
    return keep.new_empty(keep.shape, dtype=torch.int32), keep.new_empty(keep.shape[:3], dtype=torch.int32)


def block_lists(keep: Tensor) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.block_lists`."""
    return _block_lists(keep.contiguous())


@torch.library.custom_op("nsa::means_of_blocks", mutates_args=())
def _means(x: Tensor, block_size: int) -> Tensor:
    return mass.means(x, block_size)


@_means.register_fake
def _means_fake(x, block_size):
    return x.new_empty(len(x), -(-x.shape[1] // block_size), *x.shape[2:], dtype=torch.float32)


def means(x: Tensor, block_size: int) -> Tensor:
    """As `nsa.ops.kernels.mass.means`."""
    return _means(x.contiguous(), block_size)


@torch.library.custom_op("nsa::group_probabilities", mutates_args=())
def _probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return mass.probabilities(q, k, scale)


@_probabilities.register_fake
def _probabilities_fake(q, k, scale):
    return q.new_empty(len(q), k.shape[2], q.shape[1], k.shape[1], dtype=torch.float32)


def probabilities(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """As `nsa.ops.kernels.mass.probabilities`."""
    return _probabilities(q.contiguous(), k.contiguous(), scale)


@torch.library.custom_op("nsa::mass_along_lines", mutates_args=())
def lines(found: Tensor) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.kernels.mass.lines`."""
    return mass.lines(found)


@lines.register_fake
def _lines_fake(found):
    return found.new_empty(*found.shape[:2], found.shape[3]), found.new_empty(*found.shape[:2], found.shape[3])


@torch.library.custom_op("nsa::top_of_rows", mutates_args=())
def top_of_rows(scores: Tensor, last: Tensor, topk: int, num_initial: int, num_local: int) -> Tensor:
    """(B, N, R, topk) int32, ascending, then -1: of the entries up to ``last`` (R,) of each row of scores (B, N, R, S).

    scores: fp32, contiguous. The first num_initial and the last num_local of these entries are in.
    """
    indices = scores.new_full((*scores.shape[:3], topk), -1, dtype=torch.int32)
    if indices.numel():
        ends = last.int().expand(scores.shape[:3]).flatten()
        seen = torch.stack([torch.zeros_like(ends), ends])
        indexer.choose_rows(scores.flatten(0, 2), seen, indices.flatten(0, 2), topk, num_initial, num_local)
    return indices


@top_of_rows.register_fake
def _top_of_rows_fake(scores, last, topk, num_initial, num_local):
    return scores.new_empty(*scores.shape[:3], topk, dtype=torch.int32)
