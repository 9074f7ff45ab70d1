"""Causal attention by libraries, under the names that a configuration gives them, and which one is fastest where.

    cudnn         cuDNN's, in torch: documents of one length (the usual case: one fills the sample)
    flash         FlashAttention-2, in torch: any packing
    flash-attn-3  FlashAttention-3 (package flash-attn-3): any packing
    flash-attn-4  FlashAttention-4 (package flash-attn-4): any packing

Their gradients are sums whose order changes: two runs differ in the last bits. cuDNN's variable lengths in torch 2.11
read memory that is not theirs where query heads share a KV head, so that they are not offered (docs/log.md).
"""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.ops.packing import KnownLengths

NAMES = ("cudnn", "flash", "flash-attn-3", "flash-attn-4")
MODULES = {"flash-attn-3": "flash_attn_interface", "flash-attn-4": "flash_attn.cute"}


def not_here(name: str) -> str | None:
    """Why a library cannot be used on this machine; None if it can."""
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if name == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"
    if name in MODULES and not _importable(MODULES[name]):
        return f"its package is not installed (no module {MODULES[name]})"
    if name in MODULES and torch.cuda.get_device_capability() < (9, 0):
        return "it needs a Hopper GPU or a newer one"
    return None


@functools.cache
def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def cannot(name: str, width: int, v_width: int, dtype: torch.dtype) -> str | None:
    """Why a library cannot attend with heads of these widths; None if it can."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, not in {dtype}"
    if name == "cudnn":
        fits = width % 8 == v_width % 8 == 0 and (max(width, v_width) <= 128 or (width, v_width) == (192, 128))
        return None if fits else f"it has no heads of {width} / {v_width} (multiples of 8 up to 128, or 192 / 128)"
    if width != v_width or width % 8 or width > 256:
        return f"it has no heads of {width} / {v_width} (keys as wide as values, multiples of 8 up to 256)"
    return None


def serves(name: str, q: Tensor, k: Tensor, v: Tensor, lengths: KnownLengths | None) -> bool:
    """Whether a library that is here can take this call. ``lengths``: of the documents; None: unknown."""
    if not q.is_cuda or q.shape[1] != k.shape[1] or not q.numel() or cannot(name, q.shape[3], v.shape[3], q.dtype):
        return False
    return name != "cudnn" or (lengths is not None and lengths.equal)


def fastest(q: Tensor, k: Tensor, v: Tensor, lengths: KnownLengths | None) -> str:
    """The measured order of this architecture (fastest.json), the first that can: a library, or ``triton``."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return "triton"
    deterministic = torch.are_deterministic_algorithms_enabled()
    if deterministic and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "triton"  # the one whose gradients repeat to the bit
    for name in _order(q.device.index or 0, "equal" if lengths is not None and lengths.equal else "packed"):
        if name == "triton" or (not_here(name) is None and serves(name, q, k, v, lengths)):
            return name
    return "triton"


@functools.cache
def _order(device: int, packing: str) -> list[str]:
    table = json.loads(Path(__file__).with_name("fastest.json").read_text())
    major, minor = torch.cuda.get_device_capability(device)
    return table["order"].get(f"sm_{major}{minor}", table["order"]["other"])[packing]


def in_words(name: str, width: int, v_width: int, dtype: torch.dtype, device: torch.device) -> str:
    """What ``auto`` or a name comes to on a CUDA device."""

    def chosen(packing: str) -> str:
        order = _order(device.index or 0, packing) if name == "auto" else [name]
        for candidate in order:
            obstacle = candidate != "triton" and (not_here(candidate) or cannot(candidate, width, v_width, dtype))
            if not obstacle and (packing == "equal" or candidate != "cudnn"):
                return candidate
        return "triton"

    equal, packed = chosen("equal"), chosen("packed")
    words = equal if equal == packed else f"{equal}, or {packed} where documents differ in length"
    if {equal, packed} <= {"triton"}:
        return words
    return f"{words} (gradients differ in the last bits from run to run; engine.dense_attention=triton repeats them)"


def attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, lengths: KnownLengths
) -> Tensor:
    """(B, T, H, Dv), of a call that the library `serves`."""
    if lengths.equal and cu_seqlens is not None:  # a batch of documents, and no borders
        rows = q.shape[1] // lengths.longest
        q, k, v = (x.unflatten(1, (rows, -1)).squeeze(0) for x in (q, k, v))
        out = attend(name, q, k, v, scale, None, lengths)
        return out.flatten(0, 1).unsqueeze(0)
    if name in ("cudnn", "flash"):
        return _Torch.apply(q, k, v, scale, cu_seqlens, lengths.longest, name)
    return _package(name, q, k, v, scale, cu_seqlens, lengths.longest)


def _package(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, longest: int
) -> Tensor:
    module = importlib.import_module(MODULES[name])
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if cu_seqlens is None:
        out = module.flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out
    options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    options |= {"max_seqlen_q": longest, "max_seqlen_k": longest}
    out = module.flash_attn_varlen_func(q[0], k[0], v[0], **options)
    return (out[0] if isinstance(out, tuple) else out)[None]


class _Torch(torch.autograd.Function):
    """The two that torch brings, called past its own choice, which would refuse them where determinism is asked for."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, longest: int, name: str
    ) -> Tensor:
        sizes = (longest, longest)
        if name == "cudnn":
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out, lse, *_, seed, offset, _ = torch.ops.aten._cudnn_attention_forward(
                *heads_first, None, None, None, *sizes, True, 0.0, True, False, scale=scale
            )
            out = out.transpose(1, 2)
        else:
            q, k, v = ((x if cu_seqlens is None else x[0]) for x in (q, k, v))
            out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
                q, k, v, cu_seqlens, cu_seqlens, *sizes, 0.0, True, False, scale=scale
            )
        ctx.save_for_backward(q, k, v, out, lse, seed, offset, cu_seqlens)
        ctx.name, ctx.sizes, ctx.scale = name, sizes, scale
        return out if cu_seqlens is None else out[None]

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, seed, offset, cu_seqlens = ctx.saved_tensors
        d_out = (d_out if cu_seqlens is None else d_out[0]).contiguous()
        if ctx.name == "cudnn":
            heads_first = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
            gradients = torch.ops.aten._cudnn_attention_backward(
                *heads_first, lse, seed, offset, None, None, None, *ctx.sizes, 0.0, True, scale=ctx.scale
            )
            gradients = [x.transpose(1, 2) for x in gradients]
        else:
            gradients = torch.ops.aten._flash_attention_backward(
                d_out, q, k, v, out, lse, cu_seqlens, cu_seqlens, *ctx.sizes, 0.0, True, seed, offset, scale=ctx.scale
            )
            gradients = [x if cu_seqlens is None else x[None] for x in gradients]
        return *gradients, None, None, None, None
