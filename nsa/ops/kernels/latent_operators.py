"""The kernels of latents as torch operators, as in `nsa.ops.kernels.dsa_operators`."""

from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import differentiable_once
from nsa.ops.kernels import latents, ranges
from nsa.ops.kernels.indexer_kl_tiles import ListLearner


@torch.library.custom_op("nsa::latent_attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v_width: int, lists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return latents.forward(q, k, v_width, lists, scale)


@_attention.register_fake
def _attention_fake(q, k, v_width, lists, scale):
    return q.new_empty(*q.shape[:3], v_width), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nsa::latent_attention_backward", mutates_args=())
def _attention_backward(
    q: Tensor, k: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | None, lists: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    delta = ranges.delta(out, d_out)
    if d_lse is not None:
        delta -= d_lse
    return latents.backward(q, k, out.shape[3], lists, d_out, lse, delta, scale)


@_attention_backward.register_fake
def _attention_backward_fake(q, k, out, d_out, lse, d_lse, lists, scale):
    return torch.empty_like(q), torch.empty_like(k)


def _save(ctx, inputs, output):
    q, k, _, lists, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, *output, lists)


def _differentiate(ctx, d_out, d_lse):
    if d_out is None and d_lse is None:
        return (None,) * 5
    q, k, out, lse, lists = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    dq, dk = _attention_backward(q, k, out, d_out, lse, d_lse, lists, ctx.scale)
    return dq, dk, None, None, None


_attention.register_autograd(_differentiate, setup_context=_save)


def attention(q: Tensor, k: Tensor, v_width: int, lists: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query to the keys k (B, S, 1, D) of its list (B, T, slots) int32, -1 for none.

    The values are the first ``v_width`` columns of k, whose gradient is that of both.

    Returns:
        out (B, T, H, v_width) in q's dtype; lse (B, H, T) fp32.
    """
    out, lse = _attention(q.contiguous(), k.contiguous(), v_width, lists.contiguous(), scale)
    return out, lse.transpose(1, 2)


@torch.library.custom_op("nsa::latent_attention_kl_backward", mutates_args=())
def _attention_kl_backward(
    q: Tensor, k: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, lists: Tensor, q_idx: Tensor, k_idx: Tensor,
    weights: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    learner = _learner(q, q_idx, k_idx, weights)
    delta = ranges.delta(out, d_out)
    gradients = latents.backward(q, k, out.shape[3], lists, d_out, lse, delta, scale, learner)
    return *gradients, *_learned(learner)


@_attention_kl_backward.register_fake
def _attention_kl_backward_fake(q, k, out, d_out, lse, lists, q_idx, k_idx, weights, scale):
    return torch.empty_like(q), torch.empty_like(k), *_learned_fake(q_idx, k_idx, weights)


def _learner(q: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor) -> ListLearner:
    precision = str(ranges.shape_constants(q, q[:, :, :1], q)["PRECISION"])
    return ListLearner(q_idx, k_idx, weights, latents.head_blocks(q), precision)


def _learned(learner: ListLearner) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to q_idx, k_idx and weights."""
    return learner.loss.sum(), learner.d_query, learner.total.to(learner.d_query.dtype), learner.d_weights


def _learned_fake(q_idx: Tensor, k_idx: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return weights.new_empty(()), torch.empty_like(q_idx), torch.empty_like(k_idx), torch.empty_like(weights)


class _AttentionKL(torch.autograd.Function):
    """`_attention`, in whose backward pass the indexer learns from the attention's probabilities."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, lists: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor,
        kl_weight: Tensor, v_width: int, scale: float,
    ) -> Tensor:  # fmt: skip
        out, lse = _attention(q, k, v_width, lists, scale)
        ctx.save_for_backward(q, k, lists, q_idx, k_idx, weights, kl_weight, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, lists, q_idx, k_idx, weights, kl_weight, out, lse = ctx.saved_tensors
        index = q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous()
        dq, dk, loss, *d_index = _attention_kl_backward(
            q, k, out, d_out.contiguous(), lse, lists, *index, ctx.scale
        )  # fmt: skip
        d_index = [d * kl_weight.to(d.dtype) for d in d_index]
        return dq, dk, None, *d_index[:2], d_index[2].to(weights.dtype), loss.to(kl_weight.dtype), None, None


def attention_kl(
    q: Tensor, k: Tensor, v_width: int, lists: Tensor, q_idx: Tensor, k_idx: Tensor, weights: Tensor,
    kl_weight: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """The output of `attention`, (B, T, H, v_width), with the loss attached: `nsa.ops.token_sparse_attention_kl`."""
    tensors = q.contiguous(), k.contiguous(), lists.contiguous()
    return _AttentionKL.apply(*tensors, q_idx, k_idx, weights, kl_weight, v_width, scale)


@torch.library.custom_op("nsa::latent_indexer_kl", mutates_args=())
def _indexer_kl(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor, lists: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    learner = _learner(q, q_idx, k_idx, weights)
    latents.learn(q, k, lists, lse, scale, learner)
    return _learned(learner)


@_indexer_kl.register_fake
def _indexer_kl_fake(q_idx, k_idx, weights, q, k, lse, lists, scale):
    return _learned_fake(q_idx, k_idx, weights)


def indexer_kl(
    q_idx: Tensor, k_idx: Tensor, weights: Tensor, q: Tensor, k: Tensor, lse: Tensor, lists: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `nsa.ops.kernels.dsa_operators.indexer_kl`, over lists of latents."""
    return _indexer_kl(
        q_idx.contiguous(), k_idx.contiguous(), weights.float().contiguous(), q.contiguous(), k.contiguous(),
        lse.transpose(1, 2).float().contiguous(), lists.contiguous(), scale,
    )  # fmt: skip
