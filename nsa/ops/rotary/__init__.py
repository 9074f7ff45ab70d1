"""Rotary position embedding (arXiv 2104.09864), and splitting a joint projection into heads with rotation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.ops.dispatch import autocasts, resolve_backend
from nsa.ops.geometry import ALL_HALF_SPLIT, Heads, RotaryLayout


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None = None,
    *,
    layout: RotaryLayout = ALL_HALF_SPLIT,
    backend: str = "auto",
) -> Tensor:
    """Rotate the heads of x, computed in fp32.

    A pair (a, b) -> (a cos - b sin, b cos + a sin): RoPE (arXiv 2104.09864, Eq. 34).

    Args:
        x: (B, T, H, D). cos, sin: (T, R/2) fp32, for R rotated dims. rows: (T,) int64, the row of the tables for each
            token; None: 0 .. T - 1. layout: which dims are rotated and which are pairs; by default all, (i, i + D/2).
        backend: auto, triton, torch or naive.

    Returns:
        (B, T, H, D) in x's dtype.

    Raises:
        ValueError: shapes that do not belong together, unknown backend.
    """
    heads = Heads(x.shape[2], x.shape[3], "rotate", layout)
    return split_heads(x.flatten(2), [heads], cos, sin, rows=rows, backend=backend)[0]


@autocasts("x")
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
    """The parts of a joint projection, each contiguous, and rotated or mapped by a sigmoid: in one pass over x.

    Args:
        x: (B, T, W), the columns of all parts in order. parts: eight at most.
        cos, sin, rows: as for `apply_rotary`.
        bias: (columns,) of the part with "sigmoid" (one at most), added before the sigmoid; None: no such part.
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
    # Naive and torch are the same here: the reference is fast enough as the fallback.
    outs = []
    for part, columns in zip(parts, x.split([part.columns for part in parts], -1), strict=True):
        if part.how == "sigmoid":
            assert bias is not None
            columns = (columns + bias).sigmoid()
        heads = columns.unflatten(-1, (part.number, part.width))
        outs.append(_rotate(heads, cos, sin, part.layout) if part.how == "rotate" else heads)
    return outs


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout) -> Tensor:
    width, start = layout.turning(x.shape[-1])
    turning = x[..., start : start + width].float()
    interleaved = layout.pairs == "interleaved"
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = first * cos - second * sin, second * cos + first * sin
    out = (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)).to(x.dtype)
    return out if width == x.shape[-1] else torch.cat((x[..., :start], out, x[..., start + width :]), -1)


def _check(
    x: Tensor, parts: Sequence[Heads], cos: Tensor, sin: Tensor, rows: Tensor | None, bias: Tensor | None
) -> None:
    if x.shape[-1] != sum(part.columns for part in parts) or not 1 <= len(parts) <= 8:
        raise ValueError(f"x {tuple(x.shape)} must have the columns of 1 to 8 parts: {[tuple(p) for p in parts]}")
    for part in parts:
        if part.how != "rotate":
            continue
        turning, _ = part.layout.turning(part.width)
        if turning % 2 or part.width % 2 or not 0 < turning <= part.width:
            raise ValueError(f"of heads of {part.width} dims {turning} cannot turn: both must be even")
        if cos.shape[1] != turning // 2 or sin.shape != cos.shape:
            raise ValueError(
                f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be (T, {turning} / 2) for these heads"
            )
    if rows is None and len(cos) != x.shape[1]:
        raise ValueError(f"{x.shape[1]} tokens need as many rows of cos and sin, got {len(cos)}")
    if rows is not None and rows.shape != x.shape[1:2]:
        raise ValueError(f"{x.shape[1]} tokens need as many rows, got {tuple(rows.shape)}")
    gates = [part for part in parts if part.how == "sigmoid"]
    if len(gates) > 1 or (bias is None) == bool(gates) or (bias is not None and len(bias) != gates[0].columns):
        raise ValueError("bias goes with the one part that is 'sigmoid', and has its columns")
