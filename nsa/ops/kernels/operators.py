"""The kernels as torch operators, with gradients, and with fakes so that `torch.compile` sees no graph break.

Those of attention over ranges and blocks are here, those of DSA in `dsa_operators`, and those without gradients, of
prompts and of decoding, in `inference_operators`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.ops.geometry import BlockSizes, CompressionLayout, Documents, Ranges, compression_layout, visible_blocks
from nsa.ops.kernels import (
    compression,
    ranges,
    selected,
    selection,
    selection_kl,
)
from nsa.ops.kernels import gates as gating
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
    return selection.select(q, k, lse, documents, visible, *sizes, scale)


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


@torch.library.custom_op("nsa::block_attention", mutates_args=())
def _block_attention(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int, block_size: int, num_initial: int,
    num_local: int, window: int, longest: int, scale: float,
) -> Tensor:  # fmt: skip
    sizes = BlockSizes(0, 0, block_size, num_initial, num_local, window)
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    return selection_kl.block_attention(q, k, lse, documents, sizes, longest, scale)


@_block_attention.register_fake
def _block_attention_fake(q, k, lse, cu_seqlens, offset, block_size, num_initial, num_local, window, longest, scale):
    return lse.new_empty(len(q), k.shape[2], -(-longest // block_size), q.shape[1])


def block_attention(
    q: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int, block_size: int, num_initial: int,
    num_local: int, window: int, longest: int, scale: float,
) -> Tensor:  # fmt: skip
    """(B, G, T, M) fp32, as `nsa.ops.selection_kl.block_attention`, a view; lse (B, H, T)."""
    given = q.contiguous(), k.contiguous(), lse.transpose(1, 2).float().contiguous()
    sizes = block_size, num_initial, num_local, window
    return _block_attention(*given, cu_seqlens, offset, *sizes, longest, scale).transpose(2, 3)


@torch.library.custom_op("nsa::selection_kl", mutates_args=())
def _selection_kl(
    q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int,
    positions: Tensor | None, length: int, stride: int, block_size: int, num_initial: int, num_local: int, window: int,
    longest: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sizes = BlockSizes(length, stride, block_size, num_initial, num_local, window)
    return selection_kl.divergence(q, k_cmp, k, lse, cu_seqlens, offset, positions, sizes, longest, scale)


@_selection_kl.register_fake
def _selection_kl_fake(q, k_cmp, k, lse, *rest):
    return lse.new_empty(()), torch.empty_like(k_cmp)


def selection_loss(
    q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int,
    positions: Tensor | None, sizes: tuple[int, ...], longest: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of `nsa.ops.selection_kl` and its gradient with respect to k_cmp; lse (B, H, T)."""
    given = q.contiguous(), k_cmp.contiguous(), k.contiguous(), lse.transpose(1, 2).float().contiguous()
    return _selection_kl(*given, cu_seqlens, offset, positions, *sizes, longest, scale)


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
