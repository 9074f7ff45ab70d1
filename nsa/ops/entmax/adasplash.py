"""Entmax attention by the package adasplash (arXiv 2604.15180, BSD-3), where it is installed and has the call."""

import importlib
import importlib.util

import torch
from torch import Tensor

WIDTHS = (16, 32, 64, 128, 256)
LEAST = 64  # tokens


def installed() -> bool:
    return importlib.util.find_spec("adasplash") is not None


def on_gpu(*tensors: Tensor) -> bool:
    return all(x.is_cuda for x in tensors)


def obstacle(
    q: Tensor, k: Tensor, v: Tensor, alpha: float, cu_seqlens: Tensor | None, slopes: Tensor | None
) -> str | None:
    """Why the package cannot compute a call; None if it can."""
    if not installed():
        return "its package is not installed (pip install adasplash)"
    if not on_gpu(q, k, v):
        return "it needs a CUDA device"
    if alpha != 1.5:
        return f"it has alpha 1.5 alone, not {alpha}"
    if slopes is not None:
        return "it has no ALiBi slopes"
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        return "it has no packed documents"
    if q.shape[1] != k.shape[1]:
        return "it needs as many queries as keys (no decoding on a cache)"
    if q.shape[3] != v.shape[3] or q.shape[3] not in WIDTHS:
        return f"it has no heads of {q.shape[3]} / {v.shape[3]} (keys as wide as values, {', '.join(map(str, WIDTHS))})"
    if q.shape[1] < LEAST or q.shape[1] & (q.shape[1] - 1):
        return f"it needs a power of two of tokens, at least {LEAST}, not {q.shape[1]}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, T, H, D), causal, with alpha 1.5. The package scales by D ** -0.5 itself."""
    function = importlib.import_module("adasplash").adasplash_v2
    q = q * (scale * q.shape[3] ** 0.5)
    out: Tensor = function(*(x.transpose(1, 2).contiguous() for x in (q.to(v.dtype), k, v)))
    return torch.transpose(out, 1, 2)
