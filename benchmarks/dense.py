"""Other implementations of dense (and windowed) attention, as functions (q, k, v, window) of (B, T, heads, width)."""

import functools
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

Attention = Callable[[Tensor, Tensor, Tensor, int | None], Tensor]


def _sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


def cudnn(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    if window is not None:
        raise NotImplementedError("no window")
    return _sdpa(SDPBackend.CUDNN_ATTENTION, q, k, v)


class _TorchFlash(torch.autograd.Function):
    """torch's FlashAttention-2 with a window, which scaled_dot_product_attention does not offer."""

    @staticmethod
    def forward(ctx, q, k, v, window):
        ctx.options = (0.0, True)
        sizes = (None, None, q.shape[1], k.shape[1])
        ctx.window = {"window_size_left": window - 1, "window_size_right": 0}
        out, lse, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *sizes, *ctx.options, False, **ctx.window
        )
        ctx.save_for_backward(q, k, v, out, lse, seed, unused)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, seed, unused = ctx.saved_tensors
        sizes = (None, None, q.shape[1], k.shape[1])
        return *torch.ops.aten._flash_attention_backward(
            d_out.contiguous(), q, k, v, out, lse, *sizes, *ctx.options, seed, unused, **ctx.window
        ), None  # fmt: skip


def flash(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    if window is None:
        width = v.shape[3]
        if width < q.shape[3]:  # which it does not support
            v = pad(v, (0, q.shape[3] - width))
        return _sdpa(SDPBackend.FLASH_ATTENTION, q, k, v)[..., :width]
    return _TorchFlash.apply(q, k, v, window)


@functools.cache
def _compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=4)
def _block_mask(tokens: int, window: int | None, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, query, key):
        causal = query >= key
        return causal if window is None else causal & (query - key < window)

    return create_block_mask(visible, None, None, tokens, tokens, device=device, _compile=True)


def flex(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    mask = _block_mask(q.shape[1], window, q.device)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return _compiled_flex()(*heads_first, block_mask=mask, enable_gqa=True).transpose(1, 2)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    from flash_attn import flash_attn_func

    sides = (-1, -1) if window is None else (window - 1, 0)
    return flash_attn_func(q, k, v, causal=True, window_size=sides)


def flash_attn_4(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    from flash_attn.cute import flash_attn_func

    sides = (None, None) if window is None else (window - 1, 0)
    out = flash_attn_func(q, k, v, causal=True, window_size=sides)
    return out[0] if isinstance(out, tuple) else out


KNOWN: dict[str, Attention] = {
    "cudnn": cudnn,
    "flash": flash,
    "flex": flex,
    "flash-attn": flash_attn,
    "flash-attn-4": flash_attn_4,
}
PACKAGES = {"flash-attn": "flash-attn", "flash-attn-4": "flash-attn-4"}


def versions() -> dict[str, str]:
    """Version of each implementation that can be imported here."""
    names = dict.fromkeys(("cudnn", "flash", "flex"), f"torch {torch.__version__}")
    for name, package in PACKAGES.items():
        try:
            names[name] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.backends.cudnn.is_available():
        names["cudnn"] += f", cuDNN {torch.backends.cudnn.version()}"
    return names
