"""The kernels as torch operators, with shapes for tracing and with gradients: `torch.compile` sees no graph break."""

import torch
from torch import Tensor

from nsa.ops.kernels import ranges


@torch.library.custom_op("nsa::range_attention", mutates_args=())
def _range_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return ranges.forward(q, k, v, first, last, scale)


@_range_attention.register_fake
def _(q, k, v, first, last, scale):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("nsa::range_attention_backward", mutates_args=())
def _range_attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return ranges.backward(q, k, v, d_out, lse, ranges.delta(out, d_out), first, last, scale)


@_range_attention_backward.register_fake
def _(q, k, v, out, d_out, lse, first, last, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_range(ctx, inputs, output):
    q, k, v, first, last, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, first, last)
    ctx.mark_non_differentiable(output[1])


def _differentiate_range(ctx, d_out, _d_lse):
    q, k, v, out, lse, first, last = ctx.saved_tensors
    gradients = _range_attention_backward(q, k, v, out, d_out.contiguous(), lse, first, last, ctx.scale)
    return *gradients, None, None, None


_range_attention.register_autograd(_differentiate_range, setup_context=_save_range)


def range_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of query t to keys ``first[t] .. last[t] - 1``.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv). first, last: (T,), never falling.

    Returns:
        out (B, T, H, Dv) in q's dtype; lse (B, H, T) fp32, not differentiable.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = _range_attention(q, k, v, first.int(), last.int(), scale)
    return out, lse.transpose(1, 2)
