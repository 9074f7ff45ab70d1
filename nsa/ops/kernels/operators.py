"""The kernels as torch operators, with gradients, and with fakes so that `torch.compile` sees no graph break."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import differentiable_once
from nsa.ops.geometry import CompressionLayout, Documents, Ranges, compression_layout, first_columns, visible_blocks
from nsa.ops.kernels import (
    block_sparse,
    compression,
    decode,
    mass,
    quest,
    ranges,
    selected,
    selection,
    token_tiles,
    tokens,
    top_p,
)
from nsa.ops.kernels import gates as gating
from nsa.ops.kernels import index_topk as indexer
from nsa.ops.kernels import indexer_kl as list_kl
from nsa.ops.kernels import indexer_kl_dense as dense_kl
from nsa.ops.kernels import indexer_kl_tiles as tiled_kl
from nsa.ops.kernels import native_sparse_decode as sparse_decode
from nsa.ops.kernels.selected import BlockLayout


@torch.library.custom_op("nsa::range_attention", mutates_args=())
def _range_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return ranges.forward(q, k, v, first, last, scale)


@_range_attention.register_fake
def _range_attention_fake(q, k, v, first, last, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nsa::range_attention_backward", mutates_args=())
def _range_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None, first: Tensor,
    last: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = ranges.delta(out, d_out)
    if d_lse is not None:  # of a score with probability p: p (d_p - delta) from the output, and p d_lse
        delta -= d_lse
    return ranges.backward(q, k, v, d_out, lse, delta, first, last, scale)


@_range_attention_backward.register_fake
def _range_attention_backward_fake(q, k, v, out, d_out, lse, d_lse, first, last, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_range(ctx, inputs, output):
    q, k, v, first, last, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # no zeros for lse, whose gradient is rarely used
    ctx.save_for_backward(q, k, v, *output, first, last)


def _differentiate_range(ctx, d_out, d_lse):
    if d_out is None and d_lse is None:
        return (None,) * 6
    q, k, v, out, lse, first, last = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    gradients = _range_attention_backward(q, k, v, out, d_out, lse, d_lse, first, last, ctx.scale)
    return *gradients, None, None, None


_range_attention.register_autograd(_differentiate_range, setup_context=_save_range)


def range_attention(q: Tensor, k: Tensor, v: Tensor, visible: Ranges, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query to its range of keys.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv). visible: the range that each query sees.

    Returns:
        out (B, T, H, Dv) in q's dtype; lse (B, H, T) fp32.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = _range_attention(q, k, v, *ranges.int32_runs(visible), scale)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("nsa::select_blocks", mutates_args=())
def _select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int, length: int, stride: int,
    block_size: int, num_blocks: int, num_initial: int, num_local: int, scale: float,
) -> Tensor:  # fmt: skip
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    visible = visible_blocks(documents, length, stride)
    sizes = (length, stride, block_size, num_blocks, num_initial, num_local)
    return selection.select(q, k, lse, documents, visible, offset, *sizes, scale)


@_select_blocks.register_fake
def _select_blocks_fake(
    q, k, lse, cu_seqlens, offset, length, stride, block_size, num_blocks, num_initial, num_local, scale
):
    return q.new_empty(*q.shape[:2], k.shape[2], num_blocks, dtype=torch.int32)


def select_blocks(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int, length: int, stride: int,
    block_size: int, num_blocks: int, num_initial: int, num_local: int, scale: float,
) -> Tensor:  # fmt: skip
    """(B, T, G, num_blocks) int32, as `nsa.ops.select_blocks`; lse (B, H, T) fp32."""
    q, k, lse = q.contiguous(), k.contiguous(), lse.transpose(1, 2).float().contiguous()
    sizes = (length, stride, block_size, num_blocks, num_initial, num_local)
    return _select_blocks(q, k, lse, cu_seqlens, offset, *sizes, scale)


@torch.library.custom_op("nsa::index_topk", mutates_args=())
def _index_topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, first: Tensor, own: Tensor, topk: int, num_initial: int,
    num_local: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return indexer.topk(q_idx, k_idx, weights, first, own, topk, num_initial, num_local)


@_index_topk.register_fake
def _index_topk_fake(q_idx, k_idx, weights, first, own, topk, num_initial, num_local):
    shape = (*q_idx.shape[:2], topk)
    return q_idx.new_empty(shape, dtype=torch.int32), q_idx.new_empty(shape, dtype=torch.float32)


def index_topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, visible: Ranges, topk: int, num_initial: int, num_local: int
) -> tuple[Tensor, Tensor]:
    """As `nsa.ops.index_topk` with ascending indices. ``visible``: the keys that each query sees."""
    tensors = q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous()
    return _index_topk(*tensors, *_first_and_own(visible), topk, num_initial, num_local)


def _first_and_own(visible: Ranges) -> tuple[Tensor, Tensor]:
    """(T,) int32 each: the first and the last key that a query sees. If it sees none, the last is before the first."""
    return visible.first.int(), (visible.last - 1).int()


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


@torch.library.custom_op("nsa::token_attention", mutates_args=())
def _token_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _listed(q, k, v, lists, longest).forward(q, k, v, lists, scale)


def _listed(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, longest: int) -> ModuleType:
    """The kernels of attention to these lists."""
    return token_tiles if by_tiles(q, k, v, lists, longest) else tokens


def by_tiles(q: Tensor, k: Tensor, v: Tensor, lists: Tensor, longest: int) -> bool:
    """Whether `token_attention` goes by tiles of all keys; else it gathers the listed ones."""
    return token_tiles.pays(q, k, v, lists, longest)


@_token_attention.register_fake
def _token_attention_fake(q, k, v, lists, longest, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nsa::token_attention_backward", mutates_args=())
def _token_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None, lists: Tensor,
    longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    delta = ranges.delta(out, d_out)
    if d_lse is not None:
        delta -= d_lse
    return _listed(q, k, v, lists, longest).backward(q, k, v, lists, d_out, lse, delta, scale)


@_token_attention_backward.register_fake
def _token_attention_backward_fake(q, k, v, out, d_out, lse, d_lse, lists, longest, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_tokens(ctx, inputs, output):
    q, k, v, lists, ctx.longest, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, lists)


def _differentiate_tokens(ctx, d_out, d_lse):
    if d_out is None and d_lse is None:
        return (None,) * 6
    q, k, v, out, lse, lists = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    sizes = ctx.longest, ctx.scale
    return *_token_attention_backward(q, k, v, out, d_out, lse, d_lse, lists, *sizes), None, None, None


_token_attention.register_autograd(_differentiate_tokens, setup_context=_save_tokens)


def token_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of each query to the keys of its list (B, T, slots) int32, -1 for none.

    ``longest``: tokens of the longest document at most. The fastest way depends on it.

    Returns:
        out (B, T, H, Dv) in q's dtype; lse (B, H, T) fp32.
    """
    out, lse = _token_attention(*(x.contiguous() for x in (q, k, v, lists)), longest, scale)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("nsa::token_attention_kl_backward", mutates_args=())
def _token_attention_kl_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, lists: Tensor, q_idx: Tensor,
    k_idx: Tensor, weights: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    delta = ranges.delta(out, d_out)
    return tiled_kl.attention_backward(q, k, v, lists, d_out, lse, delta, scale, q_idx, k_idx, weights)


@_token_attention_kl_backward.register_fake
def _token_attention_kl_backward_fake(q, k, v, out, d_out, lse, lists, q_idx, k_idx, weights, scale):
    index = torch.empty_like(q_idx), torch.empty_like(k_idx), torch.empty_like(weights)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), weights.new_empty(()), *index


class _TokenAttentionKL(torch.autograd.Function):
    """`_token_attention`, in whose backward pass the indexer learns from the attention's probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor,
        kl_weight: Tensor, longest: int, scale: float,
    ) -> Tensor:  # fmt: skip
        out, lse = _token_attention(q, k, v, lists, longest, scale)
        ctx.save_for_backward(q, k, v, lists, q_idx, k_idx, weights, kl_weight, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, lists, q_idx, k_idx, weights, kl_weight, out, lse = ctx.saved_tensors
        index = q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous()
        dq, dk, dv, loss, *d_index = _token_attention_kl_backward(
            q, k, v, out, d_out.contiguous(), lse, lists, *index, ctx.scale
        )
        d_index = [d * kl_weight.to(d.dtype) for d in d_index]
        return dq, dk, dv, None, *d_index[:2], d_index[2].to(weights.dtype), loss.to(kl_weight.dtype), None, None


def token_attention_kl(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor, kl_weight: Tensor,
    longest: int, scale: float,
) -> Tensor:  # fmt: skip
    """The output of `token_attention`, (B, T, H, Dv), with the loss attached: `nsa.ops.token_sparse_attention_kl`.

    Where `by_tiles` does not hold.
    """
    attention = (x.contiguous() for x in (q, k, v, lists))
    return _TokenAttentionKL.apply(*attention, q_idx, k_idx, weights, kl_weight, longest, scale)


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


@torch.library.custom_op("nsa::extend_compressed", mutates_args=("memory",))
def _extend_compressed(
    raw: list[Tensor], inner: list[Tensor], position: list[Tensor], outer: list[Tensor], memory: list[Tensor],
    cos: Tensor, sin: Tensor, index: Tensor, stride: int,
) -> None:  # fmt: skip
    compression.extend(raw, inner, position, outer, memory, cos, sin, index, stride)


@_extend_compressed.register_fake
def _extend_compressed_fake(raw, inner, position, outer, memory, cos, sin, index, stride):
    return None


def extend_compressed(
    raw: list[Tensor], inner: list[Tensor], position: list[Tensor], outer: list[Tensor], memory: list[Tensor],
    cos: Tensor, sin: Tensor, index: Tensor, stride: int,
) -> None:  # fmt: skip
    """As `nsa.ops.compression.extend_compressed`."""
    lists = ([x.contiguous() for x in weights] for weights in (inner, position, outer))
    _extend_compressed(raw, *lists, memory, cos.float().contiguous(), sin.float().contiguous(), index, stride)


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


@torch.library.custom_op("nsa::indexer_kl", mutates_args=())
def _indexer_kl(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor, lists: Tensor | None,
    first: Tensor, own: Tensor, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if lists is None or token_tiles.pays_for_loss(k_idx.shape[1], lists, longest):
        return dense_kl.divergence(q_idx, k_idx, weights, q, k, lse, first, own, scale, lists)
    return list_kl.divergence(q_idx, k_idx, weights, q, k, lse, lists, scale)


@_indexer_kl.register_fake
def _indexer_kl_fake(q_idx, k_idx, weights, q, k, lse, lists, first, own, longest, scale):
    return weights.new_empty(()), torch.empty_like(q_idx), torch.empty_like(k_idx), torch.empty_like(weights)


def indexer_kl(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor, lists: Tensor | None,
    visible: Ranges, longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss over lists (None: over what is visible) and its gradients with respect to q_idx, k_idx and weights.

    ``lse``: (B, H, T). ``longest``: as for `token_attention`.
    """
    return _indexer_kl(
        q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous(), q.contiguous(), k.contiguous(),
        lse.transpose(1, 2).float().contiguous(), None if lists is None else lists.contiguous(),
        *_first_and_own(visible), longest, scale,
    )  # fmt: skip


@torch.library.custom_op("nsa::selected_attention", mutates_args=())
def _selected_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, start: Tensor, end: Tensor, position: Tensor, block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return selected.forward(q, k, v, BlockLayout(blocks, start, end, position), block_size, scale)


@_selected_attention.register_fake
def _selected_attention_fake(q, k, v, blocks, start, end, position, block_size, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nsa::selected_attention_backward", mutates_args=())
def _selected_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, blocks: Tensor, start: Tensor,
    end: Tensor, position: Tensor, block_size: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    layout = BlockLayout(blocks, start, end, position)
    return selected.backward(q, k, v, d_out, lse, ranges.delta(out, d_out), layout, block_size, scale)


@_selected_attention_backward.register_fake
def _selected_attention_backward_fake(q, k, v, out, d_out, lse, blocks, start, end, position, block_size, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_selected(ctx, inputs, output):
    q, k, v, blocks, start, end, position, ctx.block_size, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, blocks, start, end, position)
    ctx.mark_non_differentiable(output[1])


def _differentiate_selected(ctx, d_out, _d_lse):
    q, k, v, out, lse, *layout = ctx.saved_tensors
    gradients = _selected_attention_backward(
        q, k, v, out, d_out.contiguous(), lse, *layout, ctx.block_size, ctx.scale
    )  # fmt: skip
    return *gradients, None, None, None, None, None, None


_selected_attention.register_autograd(_differentiate_selected, setup_context=_save_selected)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, block_indices: Tensor, block_size: int, scale: float
) -> Tensor:
    """(B, T, H, Dv), as `nsa.ops.selected_attention`."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    layout = BlockLayout.of(documents, block_indices, k.shape[1], block_size)
    return _selected_attention(q, k, v, layout.blocks, layout.start, layout.end, layout.position, block_size, scale)[0]


@torch.library.custom_op("nsa::gated_sum", mutates_args=())
def _gated_sum(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, lses: list[Tensor], ranges_: list[Tensor],
    layout: list[Tensor], block_size: int, scale: float,
) -> Tensor:  # fmt: skip
    return gating.combine(gates, [out_cmp, out_slc, out_win])


@_gated_sum.register_fake
def _gated_sum_fake(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, out_cmp, *rest):
    return torch.empty_like(out_cmp)


@torch.library.custom_op("nsa::gates_backward", mutates_args=())
def _gates_backward(
    gates: Tensor, d_out: Tensor, outs: list[Tensor], lses: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return gating.combine_backward(gates, d_out, outs, lses)


@_gates_backward.register_fake
def _gates_backward_fake(gates, d_out, outs, lses):
    lse, delta = (gates.new_empty(3, *gates.shape[:3], dtype=torch.float32) for _ in range(2))
    return lse, delta, torch.empty_like(gates)


@torch.library.custom_op("nsa::branches_backward", mutates_args=())
def _branches_backward(
    d_out: Tensor, q: Tensor, kv: list[Tensor], lse: Tensor, delta: Tensor, ranges_: list[Tensor],
    layout: list[Tensor], block_size: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    """The gradients of q and kv, from lse and delta (3, B, T, H) of `_gates_backward`."""
    k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = kv
    blocks = BlockLayout(*layout)
    cmp = (q, k_cmp, v_cmp, d_out, lse[0], delta[0], *ranges_[:2], scale)
    slc = (q, k_slc, v_slc, d_out, lse[1], delta[1], blocks, block_size, scale)
    win = (q, k_win, v_win, d_out, lse[2], delta[2], *ranges_[2:], scale)
    if k_cmp.numel() and q.numel() and selected.on_hopper(q, k_slc, v_slc, block_size, scale):
        from nsa.ops.kernels.hopper import gradient

        dq = torch.empty_like(q)
        lists = selected.unions(blocks, gradient.tokens_per_tile(q.shape[2] // k_slc.shape[2]), block_size)
        gradient.query_gradient(q, kv, d_out, lse, delta, ranges_, lists, blocks.position, scale, dq)
        del lists
        return [dq, *ranges.key_gradients(*cmp), *selected.key_gradients(*slc), *ranges.key_gradients(*win)]
    dq, dk_cmp, dv_cmp = ranges.backward(*cmp)
    _, dk_slc, dv_slc = selected.backward(*slc, dq)
    _, dk_win, dv_win = ranges.backward(*win, dq)
    return [dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win]


@_branches_backward.register_fake
def _branches_backward_fake(d_out, q, kv, *rest):
    return [torch.empty_like(x) for x in (q, *kv)]


def _save_gated_sum(ctx, inputs, output):
    *tensors, lses, ranges_, layout, ctx.block_size, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *lses, *ranges_, *layout)


def _differentiate_gated_sum(ctx, d_out):
    saved = ctx.saved_tensors  # read once: under activation checkpointing a second read is an error
    q, kv, gates, rest = saved[0], list(saved[1:7]), saved[7], list(saved[11:])
    d_out = d_out.contiguous()
    lse, delta, d_gates = _gates_backward(gates, d_out, list(saved[8:11]), rest[:3])
    del saved
    # Frees the branches' outputs before the gradients are allocated, unless the graph is kept.
    ctx.maybe_clear_saved_tensors()
    gradients = _branches_backward(d_out, q, kv, lse, delta, rest[3:7], rest[7:], ctx.block_size, ctx.scale)
    return *gradients, d_gates, None, None, None, [None] * 3, [None] * 4, [None] * 4, None, None


_gated_sum.register_autograd(_differentiate_gated_sum, setup_context=_save_gated_sum)


def native_sparse_attention(
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    selected_kv: Callable[[], tuple[Tensor, Tensor, Documents]],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    choose: Callable[[Tensor, Tensor, Tensor], Tensor],
    seen: Ranges,
    near: Ranges,
    *,
    block_size: int,
    scale: float,
) -> Tensor:
    """(B, T, H, Dv), as `nsa.ops.native_sparse_attention`.

    The branches run without gradient. The backward pass of their gated sum computes the gradients of all three: it
    passes d_out to the branches without writing a gated copy for each, and adds their dq in place.

    Args:
        selected_kv: returns keys, values and documents of the selected branch. It is called when they are needed.
        seen, near: the ranges that queries see in the compressed branch, and in the window branch.
    """
    q, gates = q.contiguous(), gates.contiguous()
    kv_cmp, kv_win = ((k.contiguous(), v.contiguous()) for k, v in (kv_cmp, kv_win))
    cmp_run, win_run = ranges.int32_runs(seen), ranges.int32_runs(near)
    with torch.no_grad():
        out_cmp, lse_cmp = _range_attention(q, *kv_cmp, *cmp_run, scale)
        indices = choose(q, kv_cmp[0], lse_cmp.transpose(1, 2))
    k_slc, v_slc, documents = selected_kv()
    kv_slc = k_slc.contiguous(), v_slc.contiguous()
    with torch.no_grad():
        blocks = BlockLayout.of(documents, indices, kv_slc[0].shape[1], block_size)
        layout = [blocks.blocks, blocks.start, blocks.end, blocks.position]
        out_slc, lse_slc = _selected_attention(q, *kv_slc, *layout, block_size, scale)
        out_win, lse_win = _range_attention(q, *kv_win, *win_run, scale)
    return _gated_sum(q, *kv_cmp, *kv_slc, *kv_win, gates, out_cmp, out_slc, out_win, [lse_cmp, lse_slc, lse_win],
                      [*cmp_run, *win_run], layout, block_size, scale)  # fmt: skip


@torch.library.custom_op("nsa::compress_blocks", mutates_args=())
def _compress_blocks(
    x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, layout: list[Tensor], length: int, stride: int
) -> tuple[Tensor, Tensor]:
    return compression.forward(x, inner, position, outer, layout[0], length)


@_compress_blocks.register_fake
def _compress_blocks_fake(x, inner, position, outer, layout, length, stride):
    shape = (x.shape[0], layout[0].shape[0], x.shape[2])
    return x.new_empty(*shape, outer.shape[0]), x.new_empty(*shape, outer.shape[1])


@torch.library.custom_op("nsa::compress_blocks_backward", mutates_args=())
def _compress_blocks_backward(
    d_out: Tensor, x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, pre: Tensor, layout: list[Tensor],
    length: int, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return compression.backward(d_out, x, inner, position, outer, pre, CompressionLayout(*layout), length, stride)


@_compress_blocks_backward.register_fake
def _compress_blocks_backward_fake(d_out, x, inner, position, outer, *rest):
    return torch.empty_like(x), torch.empty_like(inner), torch.empty_like(position), torch.empty_like(outer)


def _save_compressed(ctx, inputs, output):
    *tensors, layout, ctx.length, ctx.stride = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1], *layout)
    ctx.mark_non_differentiable(output[1])


def _differentiate_compressed(ctx, d_out, _d_pre):
    saved = ctx.saved_tensors
    tensors, pre, layout = saved[:4], saved[4], list(saved[5:])
    gradients = _compress_blocks_backward(d_out.contiguous(), *tensors, pre, layout, ctx.length, ctx.stride)
    return *gradients, [None] * len(layout), None, None


_compress_blocks.register_autograd(_differentiate_compressed, setup_context=_save_compressed)


def compress_blocks(
    x: Tensor, inner: Tensor, position: Tensor, outer: Tensor, documents: Documents, length: int, stride: int
) -> Tensor:
    """(B, M, G, Dv), as `nsa.ops.compress_blocks`, for at least one block."""
    layout = compression_layout(documents, length, stride)
    tensors = (w.contiguous() for w in (x, inner, position, outer))
    return _compress_blocks(*tensors, list(layout), length, stride)[0]


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
