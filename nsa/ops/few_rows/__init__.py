"""Linear projections of a few rows, as in decoding, where the time is that of reading the weights."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from nsa.ops.dispatch import accumulation_dtype, autocasts, resolve_backend
from nsa.ops.swiglu import swiglu

MOST_ROWS = 2  # of x, for the kernel: with more, its products take longer than the weights (docs/log/2026-11.md)
MOST_OUTPUTS = 16384  # for auto: of more, as in an output head, a library reads the weights faster
VECTOR_BYTES = 16


@autocasts("x", "weight", "bias")
def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x W^T + bias, as `torch.nn.functional.linear`.

    The kernel takes at most 2 rows of x, without gradients, and contiguous weights whose rows begin at multiples of 16
    bytes. It sums in fp32, in the same order for any number of rows, and rounds once.

    Args:
        x: (.., K). weight: (N, K), in x's dtype. bias: (N,), in x's dtype.
        backend: auto, triton, torch or naive. auto leaves an output head (N > 16,384) to torch.

    Returns:
        (.., N), in x's dtype.

    Raises:
        ValueError: inconsistent shapes, unknown backend, or ``triton`` for what the kernel cannot do.
    """
    _check(x, weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must have an entry for each row of weight {tuple(weight.shape)}")
    implementation = _implementation(backend, x, weight, *(() if bias is None else (bias,)))
    if implementation == "triton":
        from nsa.ops.kernels import few_rows as kernel

        return kernel.linear(x, weight, bias)
    if implementation == "naive":
        return _exact(x, weight, bias)
    return linear(x, weight, bias)


@autocasts("x", "gate", "up")
def few_rows_swiglu(x: Tensor, gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(x gate^T) * (x up^T): the first half of a SwiGLU MLP (arXiv 2002.05202) in one launch.

    Both products are rounded to x's dtype, then their SwiGLU is computed in fp32 and rounded: as by two projections and
    the kernel of `nsa.ops.swiglu`; torch is these. The kernel takes what that of `few_rows_linear` takes.

    Args:
        x: (.., K). gate, up: (N, K), in x's dtype. backend: as for `few_rows_linear`.

    Returns:
        (.., N), in x's dtype.

    Raises:
        ValueError: inconsistent shapes, unknown backend, or ``triton`` for what the kernel cannot do.
    """
    _check(x, gate)
    if gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    implementation = _implementation(backend, x, gate, up)
    if implementation == "triton":
        from nsa.ops.kernels import few_rows as kernel

        return kernel.swiglu(x, gate, up)
    if implementation == "naive":
        return swiglu(_exact(x, gate), _exact(x, up), backend="naive")
    return swiglu(linear(x, gate), linear(x, up))


def _implementation(backend: str, x: Tensor, *weights: Tensor) -> str:
    """As `resolve_backend`; auto is torch wherever the kernel does not fit, or does not pay."""
    if backend == "auto" and len(weights[0]) > MOST_OUTPUTS:
        return "torch"
    resolved = resolve_backend(backend, x, *weights, heads=False)
    obstacle = _obstacle(x, *weights) if resolved == "triton" else None
    if obstacle and backend == "triton":
        raise ValueError(f"backend='triton': {obstacle}; or use 'auto' or 'torch'")
    return "torch" if obstacle else resolved


def _obstacle(x: Tensor, *weights: Tensor) -> str | None:
    """Why the kernel cannot run on these; None if it can."""
    rows = x.shape[:-1].numel()
    if rows > MOST_ROWS:
        return f"at most {MOST_ROWS} rows of x, got {rows}"
    if x.shape[-1] * x.element_size() % VECTOR_BYTES:
        return f"the columns of x and weights must be a multiple of {VECTOR_BYTES // x.element_size()}"
    if not all(w.is_contiguous() and w.storage_offset() * w.element_size() % VECTOR_BYTES == 0 for w in (x, *weights)):
        return f"x and weights must be contiguous, and begin at multiples of {VECTOR_BYTES} bytes"
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights)):
        return "the kernel has no gradients: use torch.no_grad()"
    return None


def _exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = accumulation_dtype(x)
    y = (x.to(dtype)[..., None, :] * weight.to(dtype)).sum(-1)
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def _check(x: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x (.., K) and weight (N, K) do not belong together: {tuple(x.shape)}, {tuple(weight.shape)}")
