"""Attention where a mask says which keys each query attends to. For inference."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsa.ops import naive
from nsa.ops.dispatch import autocasts, check_attention, check_positions, resolve_backend, softmax_scale

BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the others take no mask, or not everywhere


@overload
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None, return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float | None = None, return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@torch.no_grad()
@autocasts("q", "k", "v")
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Each query attends to the keys of its mask, at or before the query. Not differentiable.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). v: (B, S, G, Dv); G divides H. With S > T the queries are the last T of the S
            positions.
        mask: (B, N, T, S) bool. N is 1 (all heads share it), G (all heads of a KV head) or H. Keys after the query are
            left out whatever it says.
        scale: factor of the scores; None: D ** -0.5.
        return_lse: also return the log-sum-exp of the scores; without kernels this takes memory for all scores.
        backend: auto, triton, torch or naive. The kernels want elements of 16 bits, and D = Dv <= 128.

    Returns:
        out (B, T, H, Dv) in q's dtype; with return_lse also lse (B, H, T) fp32 (float64 for float64). A query that sees
        nothing gives 0 and -inf.

    Raises:
        ValueError: inconsistent shapes or dtypes, unknown backend, or one that cannot take these.
    """
    check_attention(q, k, v, None)
    offset = check_positions(q, k)
    if mask.dim() != 4 or mask.dtype != torch.bool or mask.shape[1] not in (1, k.shape[2], q.shape[2]):
        raise ValueError(f"mask must be (B, 1, G or H, T, S) bool, got {tuple(mask.shape)} {mask.dtype}")
    if (len(mask), *mask.shape[2:]) != (len(q), q.shape[1], k.shape[1]):
        raise ValueError(f"mask {tuple(mask.shape)} must have {len(q)} x {q.shape[1]} queries of {k.shape[1]} keys")
    scale = softmax_scale(scale, q.shape[3])
    if _by_kernels(backend, q, k, v):
        from nsa.ops.kernels import inference_operators as operators

        out, lse = operators.masked_attention(q, k, v, mask, scale)
        return (out, lse) if return_lse else out
    mask = mask.tril(offset)
    if mask.shape[1] not in (1, k.shape[2]):  # each query head has its own
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    if backend == "naive" or return_lse:
        out, lse = naive.masked_attention(q, k, v, mask, scale)
        return (out, lse) if return_lse else out
    return _by_library(q, k, v, mask, scale)


def _by_kernels(backend: str, q: Tensor, k: Tensor, v: Tensor) -> bool:
    if resolve_backend(backend, q, k, v) != "triton":
        return False
    from nsa.ops.kernels.token_tiles import takes

    if takes(q, v):
        return True
    if backend == "triton":
        raise ValueError(
            f"backend='triton': heads must have equal widths up to 128 and elements of 16 bits, got {q.shape[3]} and "
            f"{v.shape[3]} of {q.dtype}; or use 'auto' or 'torch'"
        )
    return False


def _by_library(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    heads = q.shape[2]
    keys, values = (x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1) for x in (k, v))
    mask = mask.repeat_interleave(heads // mask.shape[1], 1)
    nothing = ~mask.any(-1, keepdim=True)  # a softmax over nothing is NaN in some versions
    with sdpa_kernel(BACKENDS):
        out = scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask | nothing, scale=scale)
    return out.masked_fill_(nothing, 0).transpose(1, 2).to(q.dtype)
