"""DSA's kernels as torch operators, as in `nsa.ops.kernels.operators`: top-k, attention to lists, and the loss."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import differentiable_once
from nsa.ops.geometry import Ranges
from nsa.ops.index_topk.fp8 import rounded_to_fp8
from nsa.ops.kernels import index_topk as indexer
from nsa.ops.kernels import indexer_kl as list_kl
from nsa.ops.kernels import indexer_kl_dense as dense_kl
from nsa.ops.kernels import indexer_kl_tiles as tiled_kl
from nsa.ops.kernels import (
    ranges,
    token_tiles,
    tokens,
)


@torch.library.custom_op("nsa::index_topk", mutates_args=())
def _index_topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, first: Tensor, own: Tensor, ahead: int, topk: int, num_initial: int,
    num_local: int, fp8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return indexer.topk(q_idx, k_idx, weights, first, own, ahead, topk, num_initial, num_local, fp8)


@_index_topk.register_fake
def _index_topk_fake(q_idx, k_idx, weights, first, own, ahead, topk, num_initial, num_local, fp8):
    shape = (*q_idx.shape[:2], topk)
    return q_idx.new_empty(shape, dtype=torch.int32), q_idx.new_empty(shape, dtype=torch.float32)


def index_topk(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, visible: Ranges, ahead: int, topk: int, num_initial: int,
    num_local: int, fp8: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `nsa.ops.index_topk` with ascending indices.

    ``visible``: the keys that each query sees; query t none behind t + ``ahead``, which spares a wait for them.
    """
    multiplies = fp8 and indexer.multiplies_fp8(q_idx)
    if fp8 and not multiplies:
        q_idx, k_idx = rounded_to_fp8(q_idx), rounded_to_fp8(k_idx)
    tensors = q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous()
    return _index_topk(*tensors, *_first_and_own(visible), ahead, topk, num_initial, num_local, multiplies)


def _first_and_own(visible: Ranges) -> tuple[Tensor, Tensor]:
    """(T,) int32 each: the first and the last key that a query sees. If it sees none, the last is before the first."""
    return visible.first.int(), (visible.last - 1).int()


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
