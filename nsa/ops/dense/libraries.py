"""Causal attention by libraries, by their names in a configuration, and the fastest one on each GPU.

    cudnn         cuDNN's, in torch: documents of one length (the usual case: one fills the sample)
    flash         FlashAttention-2, in torch: any packing
    flash-attn-3  FlashAttention-3 (package flash-attn-3): any packing
    flash-attn-4  FlashAttention-4 (package flash-attn-4): any packing

Their gradients are not deterministic: two runs differ in the last bits. cuDNN's variable lengths are not offered: in
torch 2.11 they read out of bounds if query heads share a KV head (docs/log/2026-11.md).
"""

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa.ops.dispatch import differentiable_once
from nsa.ops.geometry import KnownLengths

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
    except ModuleNotFoundError:  # its parent package is missing
        return False


def cannot(name: str, width: int, v_width: int, dtype: torch.dtype) -> str | None:
    """Why a library does not support heads of these dimensions; None if it does."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in 16 bits, not in {dtype}"
    if name == "cudnn":
        fits = width % 8 == v_width % 8 == 0 and (max(width, v_width) <= 128 or (width, v_width) == (192, 128))
        return None if fits else f"it has no heads of {width} / {v_width} (multiples of 8 up to 128, or 192 / 128)"
    if width != v_width or width % 8 or width > 256:
        return f"it has no heads of {width} / {v_width} (keys as wide as values, multiples of 8 up to 256)"
    return None


def library_for(name: str, q: Tensor, k: Tensor, v: Tensor, lengths: KnownLengths | None) -> str | None:
    """The library for a call, by ``auto`` or by name; None: our kernels compute it.

    ``lengths``: of the documents; None: unknown.
    """
    if not q.is_cuda or q.shape[1] != k.shape[1] or not q.numel() or torch.compiler.is_compiling():
        return None
    deterministic = torch.are_deterministic_algorithms_enabled()
    if name == "auto" and deterministic and not torch.is_deterministic_algorithms_warn_only_enabled():
        return None  # our gradients are bitwise deterministic
    equal = lengths is not None and lengths.equal
    choice = chosen(name, equal, q.shape[3], v.shape[3], q.dtype, q.device)
    return None if choice == "triton" else choice


@functools.cache
def _order(device: int, packing: str) -> list[str]:
    table = json.loads(Path(__file__).with_name("fastest.json").read_text())
    major, minor = torch.cuda.get_device_capability(device)
    return table["order"].get(f"sm_{major}{minor}", table["order"]["other"])[packing]


def chosen(name: str, equal: bool, width: int, v_width: int, dtype: torch.dtype, device: torch.device) -> str:
    """The implementation, a library or ``triton``, that ``auto`` or a name means on a CUDA device.

    ``equal``: whether all documents are known to have one length.
    """
    order = _order(device.index or 0, "equal" if equal else "packed") if name == "auto" else [name]
    for candidate in order:
        if candidate == "triton":
            break
        if (equal or candidate != "cudnn") and not (not_here(candidate) or cannot(candidate, width, v_width, dtype)):
            return candidate
    return "triton"


def in_words(name: str, width: int, v_width: int, dtype: torch.dtype, device: torch.device) -> str:
    """`chosen` as a text for the log of a run."""
    equal, packed = (chosen(name, one_length, width, v_width, dtype, device) for one_length in (True, False))
    words = equal if equal == packed else f"{equal}, or {packed} where documents differ in length"
    if equal == packed == "triton":
        return words
    return f"{words} (gradients differ in the last bits from run to run; engine.dense_attention=triton repeats them)"


def attend(
    name: str, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None, lengths: KnownLengths
) -> Tensor:
    """(B, T, H, Dv), for a call that the library supports (`library_for`)."""
    if lengths.equal and cu_seqlens is not None:  # a batch of documents needs no boundaries
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
    """The two in torch, called directly: torch's dispatch would reject them if deterministic algorithms are on."""

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
    @differentiable_once
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
