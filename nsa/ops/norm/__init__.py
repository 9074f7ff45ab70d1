"""The residual sum, fused with the norm that follows it."""

import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from nsa.ops.dispatch import resolve_backend


def add_rms_norm(
    x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """h = x + delta, and h / rms(h) * weight over the last dimension (RMSNorm, arXiv 1910.07467).

    A pre-norm layer uses both: h is its residual stream. So one kernel sums the gradients of h, direct and through the
    norm.

    Args:
        x: (.., C). weight: (C,). eps: added to the mean of squares. delta: of x's shape and dtype; None: h is x.
        backend: auto, triton, torch or naive.

    Returns:
        h and the normed h, (.., C) both, in x's dtype; the norm is computed in fp32 and rounded once.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    if weight.shape != x.shape[-1:] or (delta is not None and delta.shape != x.shape):
        shapes = [tuple(x.shape), tuple(weight.shape), None if delta is None else tuple(delta.shape)]
        raise ValueError(f"x (.., C), weight (C,) and delta (.., C) do not belong together: {shapes}")
    given = (x, weight) if delta is None else (x, weight, delta)
    implementation = resolve_backend(backend, *given, heads=False)
    if implementation == "triton":
        from nsa.ops.kernels import norm as kernel

        return kernel.add_rms_norm(x, weight, eps, delta)
    h = x if delta is None else x + delta
    if implementation == "naive":
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        return h, normed.to(x.dtype)
    return h, rms_norm(h, weight.shape, weight, eps)
