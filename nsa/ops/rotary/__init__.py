"""Rotary position embedding (arXiv 2104.09864), and heads cut from a joint projection and rotated on the way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.ops.dispatch import resolve_backend
from nsa.ops.geometry import Heads


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Rotate the heads of x: pairs (i, i + D/2), computed in fp32.

    (a, b) -> (a cos - b sin, b cos + a sin): RoPE (arXiv 2104.09864, Eq. 34) with the halves of a head for its pairs.

    Args:
        x: (B, T, H, D), D even. cos, sin: (T, D/2) fp32. rows: (T,) int64, the tables' row for each token; None: its
            own, 0 .. T - 1. backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, D) in x's dtype.

    Raises:
        ValueError: shapes that do not belong together, unknown backend.
    """
    heads = Heads(x.shape[2], x.shape[3], "rotate")
    return split_heads(x.flatten(2), [heads], cos, sin, rows=rows, backend=backend)[0]


def split_heads(
    x: Tensor,
    parts: Sequence[Heads],
    cos: Tensor,
    sin: Tensor,
    *,
    rows: Tensor | None = None,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """The parts of a joint projection, each contiguous, rotated or squashed where asked for: one pass over x.

    Args:
        x: (B, T, W), W the columns of all parts, which lie one after the other. parts: eight at most.
        cos, sin, rows: as for `apply_rotary`.
        bias: (columns,) of the part with "sigmoid" (one at most), added before; None: no such part.
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, number, width) in x's dtype, of each part.

    Raises:
        ValueError: shapes that do not belong together, unknown backend.
    """
    _check(x, parts, cos, sin, rows, bias)
    implementation = resolve_backend(backend, x, heads=False)
    if implementation == "triton":
        from nsa.ops.kernels import rotary

        return rotary.split_heads(x, list(parts), cos, sin, rows, bias)
    if rows is not None:
        cos, sin = cos[rows], sin[rows]
    # No path between the two: this is the definition, and a fair way to run it.
    outs = []
    for part, columns in zip(parts, x.split([part.columns for part in parts], -1), strict=True):
        if part.how == "sigmoid":
            assert bias is not None
            columns = (columns + bias).sigmoid()
        heads = columns.unflatten(-1, (part.number, part.width))
        outs.append(_rotate(heads, cos, sin) if part.how == "rotate" else heads)
    return outs


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _check(
    x: Tensor, parts: Sequence[Heads], cos: Tensor, sin: Tensor, rows: Tensor | None, bias: Tensor | None
) -> None:
    if x.shape[-1] != sum(part.columns for part in parts) or not 1 <= len(parts) <= 8:
        raise ValueError(f"x {tuple(x.shape)} must have the columns of 1 to 8 parts: {[tuple(p) for p in parts]}")
    for part in parts:
        if part.how == "rotate" and (part.width % 2 or cos.shape[1] != part.width // 2 or sin.shape != cos.shape):
            raise ValueError(
                f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (T, {part.width} / 2) for these heads"
            )
    if rows is None and len(cos) != x.shape[1]:
        raise ValueError(f"{x.shape[1]} tokens need as many rows of cos and sin, got {len(cos)}")
    if rows is not None and rows.shape != x.shape[1:2]:
        raise ValueError(f"{x.shape[1]} tokens need as many rows, got {tuple(rows.shape)}")
    gates = [part for part in parts if part.how == "sigmoid"]
    if len(gates) > 1 or (bias is None) == bool(gates) or (bias is not None and len(bias) != gates[0].columns):
        raise ValueError("bias goes with the one part that is 'sigmoid', and has its columns")
