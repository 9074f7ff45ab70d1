"""Adapters to other implementations of native sparse attention, each with our call of the same function.

    fla      flash-linear-attention, from its package (fla-core)
    xunhao   XunhaoLai/native-sparse-attention-triton, a checkout given by --peer-path xunhao=DIR
    sfnsa    mdy666/Scalable-Flash-Native-Sparse-Attention, a checkout given by --peer-path sfnsa=DIR

`calls` returns (theirs, ours) for each stage. The benchmark compares outputs and gradients, then times both. If a
peer's compression differs from the shape's, ours is called with the peer's. If a peer calls the flash-attn package for
the window, torch's FlashAttention-2 replaces it, so the package need not be installed.
"""

import importlib.metadata
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import dense
from benchmarks.attention_inputs import Inputs, Shape
from benchmarks.measure import Call
from nsa import ops

Stage = tuple[str, Call, Call]


def pooled(x: Tensor, length: int, stride: int) -> Tensor:
    """Mean of each block of (B, T, G, D), from the means of its segments."""
    count = x.shape[1] // stride
    means = x[:, : count * stride].unflatten(1, (count, stride)).float().mean(2)
    blocks, per_block = (x.shape[1] - length) // stride + 1, length // stride
    return (sum(means[:, i : i + blocks] for i in range(per_block)) / per_block).to(x.dtype)


def ours(x: Inputs, shape: Shape, cmp: tuple[Tensor, Tensor], slc, win, gates: Tensor, **changes: int) -> Tensor:
    return ops.native_sparse_attention(x.q, cmp, slc, win, gates, **{**shape.sizes, **changes})


class Fla:
    """Blocks of 64 tokens, mean pooled without overlap; groups of 16, 32, .. heads."""

    recordable = True

    def __init__(self, path: Path | None) -> None:
        from fla.ops.nsa import parallel
        from fla.ops.nsa.compression import parallel_nsa_compression

        self.ops, self.compression = parallel, parallel_nsa_compression
        self.version = f"fla-core {importlib.metadata.version('fla-core')}"

    def refuses(self, shape: Shape) -> str | None:
        group = shape.heads // shape.groups
        return None if group >= 16 and group & (group - 1) == 0 else "groups of at least 16 heads, a power of two"

    def calls(self, x: Inputs, shape: Shape, indices: dict[str, Tensor]) -> Iterator[Stage]:
        tokens, size, scale = x.q.shape[1], shape.block_size, shape.width**-0.5
        slc, win = x.pairs[1:]
        k, v = (pooled(t.detach(), size, size).requires_grad_() for t in slc)
        whole = {"length": size, "stride": size}

        yield (
            "compressed (64 / 64)",
            Call(lambda: self.compression(x.q, k, v, tokens, size, scale)[0], (x.q, k, v)),
            Call(lambda: ops.compressed_attention(x.q, k, v, **whole)[0], (x.q, k, v)),
        )
        selecting = {**whole, "block_size": size, "num_blocks": shape.num_blocks}
        with torch.no_grad():
            lse = self.compression(x.q, k, v, tokens, size, scale)[1]
            our_lse = ops.compressed_attention(x.q, k, v, **whole)[1]
        yield (
            "selection (64 / 64)",
            Call(lambda: self.ops.parallel_nsa_topk(x.q, k, tokens, lse, shape.num_blocks, size, scale)),
            Call(lambda: ops.select_blocks(x.q, k, our_lse, **selecting)),
        )
        for regime, chosen in indices.items():
            inputs = (x.q, *slc)
            yield (
                f"selected {regime}",
                Call(
                    lambda c=chosen: self.ops.ParallelNSAFunction.apply(
                        x.q, *slc, c, shape.num_blocks, size, scale, None
                    ),
                    inputs,
                ),
                Call(lambda c=chosen: ops.selected_attention(x.q, *slc, c, block_size=size), inputs),
            )

        def total() -> Tensor:
            gates = x.gates.unbind(-1)
            counts = {"block_counts": shape.num_blocks, "block_size": size, "scale": scale}
            out = self.ops.parallel_nsa(x.q, *slc, gates[0], gates[1], **counts)
            return torch.addcmul(out, dense.flash(x.q, *win, shape.window), gates[2].unsqueeze(-1))

        def same() -> Tensor:
            cmp = tuple(pooled(t, size, size) for t in slc)
            return ours(x, shape, cmp, slc, win, x.gates, **whole)

        inputs = (x.q, *slc, *win, x.gates)
        yield "total", Call(total, inputs), Call(same, inputs)


class Xunhao:
    """Packed sequences (T, heads, width); its selection comes with the compressed attention."""

    recordable = False  # it waits for the GPU, and a failed capture never frees its memory

    def __init__(self, path: Path | None) -> None:
        if path is None:
            raise ImportError("give its checkout: --peer-path xunhao=DIR")
        sys.path.insert(0, str(path))
        from native_sparse_attention.ops.triton import compressed_attention, topk_sparse_attention

        self.compressed = compressed_attention.compressed_attention
        self.selected = topk_sparse_attention.topk_sparse_attention
        self.version = path.name
        warnings.filterwarnings("ignore", message="topk <= 0")

    def refuses(self, shape: Shape) -> str | None:
        return None if shape.width == shape.v_width else "one head width for keys and values"

    def calls(self, x: Inputs, shape: Shape, indices: dict[str, Tensor]) -> Iterator[Stage]:
        cmp, slc, win = x.pairs
        compression = {"length": shape.length, "stride": shape.stride}
        selecting = {**compression, "block_size": shape.block_size, "num_blocks": shape.num_blocks}
        bounds = torch.tensor([0, x.q.shape[1]], dtype=torch.int32, device=x.q.device)
        cmp_bounds = torch.tensor([0, cmp[0].shape[1]], dtype=torch.int32, device=x.q.device)
        sizes = (shape.length, shape.stride, shape.block_size)
        ends = (bounds, cmp_bounds, x.q.shape[1], cmp[0].shape[1], None, 1, 2)

        def compressed(count: int) -> tuple[Tensor, Tensor]:
            return self.compressed(x.q[0], cmp[0][0], cmp[1][0], *sizes, count, *ends)

        def selected(chosen: Tensor) -> Tensor:
            return self.selected(x.q[0], slc[0][0], slc[1][0], chosen, shape.block_size, bounds)[None]

        inputs = (x.q, *cmp)
        yield (
            "compressed",
            Call(lambda: compressed(0)[0][None], inputs),
            Call(lambda: ops.compressed_attention(x.q, *cmp, **compression)[0], inputs),
        )

        def our_choice() -> Tensor:
            _, lse = ops.compressed_attention(x.q, *cmp, **compression)
            return ops.select_blocks(x.q, cmp[0], lse, **selecting)

        yield (
            "compressed + selection",
            Call(lambda: compressed(shape.num_blocks)[1].transpose(0, 1)[None]),
            Call(our_choice),
        )
        inputs = (x.q, *slc)
        for regime, chosen in indices.items():
            theirs = chosen[0].transpose(0, 1).contiguous()
            yield (
                f"selected {regime}",
                Call(lambda c=theirs: selected(c), inputs),
                Call(lambda c=chosen: ops.selected_attention(x.q, *slc, c, block_size=shape.block_size), inputs),
            )

        def total() -> Tensor:
            out, chosen = compressed(shape.num_blocks)
            branches = (out[None], selected(chosen), dense.flash(x.q, *win, shape.window))
            return sum(x.gates[..., i, None] * branch for i, branch in enumerate(branches))

        inputs = (x.q, *cmp, *slc, *win, x.gates)
        yield "total", Call(total, inputs), Call(lambda: ours(x, shape, cmp, slc, win, x.gates), inputs)


class Sfnsa:
    """Packed sequences; its full operator shares keys and values among the branches and pools them by the mean."""

    recordable = False

    def __init__(self, path: Path | None) -> None:
        if path is None:
            raise ImportError("give its checkout: --peer-path sfnsa=DIR")
        _stand_in("pandas")
        _stand_in("pkg_resources", parse_version=lambda text: tuple(int(part) for part in text.split(".")[:2]))
        sys.path.insert(0, str(path))
        import flash_nsa
        from flash_nsa.modules import megatron_level_nsa

        self.nsa, self.version = flash_nsa, path.name
        # Its window calls the flash-attn package. torch's FlashAttention-2 replaces it, with the same window as ours.
        megatron_level_nsa.swa_fwd, megatron_level_nsa.swa_bwd = self._window, self._window_backward

    def refuses(self, shape: Shape) -> str | None:
        return None if shape.width == shape.v_width else "its window needs one head width for keys and values"

    def _window(self, q, k, v, sm_scale=None, out=None, helper=None) -> tuple[Tensor, Tensor]:
        sizes = (None, None, q.shape[0], k.shape[0], 0.0, True, False)
        sides = {"window_size_left": self.nsa.NSAHelper.window_size - 1, "window_size_right": 0}
        out, lse, self.seed, self.unused, _ = torch.ops.aten._flash_attention_forward(
            q[None], k[None], v[None], *sizes, scale=sm_scale, **sides
        )
        return out[0], lse

    def _window_backward(self, q, k, v, out, lse, d_out, sm_scale=None, helper=None) -> tuple[Tensor, ...]:
        sizes = (None, None, q.shape[0], k.shape[0], 0.0, True)
        sides = {"window_size_left": self.nsa.NSAHelper.window_size - 1, "window_size_right": 0}
        gradients = torch.ops.aten._flash_attention_backward(
            d_out[None].contiguous(), q[None], k[None], v[None], out[None], lse, *sizes, self.seed, self.unused,
            scale=sm_scale, **sides,
        )  # fmt: skip
        return tuple(gradient[0] for gradient in gradients)

    def calls(self, x: Inputs, shape: Shape, indices: dict[str, Tensor]) -> Iterator[Stage]:
        cmp, slc, _ = x.pairs
        compression = {"length": shape.length, "stride": shape.stride}
        selecting = {**compression, "block_size": shape.block_size, "num_blocks": shape.num_blocks}
        bounds = torch.tensor([0, x.q.shape[1]], dtype=torch.int32, device=x.q.device)
        scale, blocks = shape.width**-0.5, -(-x.q.shape[1] // shape.block_size)
        config = self.nsa.NSAConfig(
            head_dim=shape.width, num_heads=shape.heads, num_kv_heads=shape.groups, kernel_size=shape.length,
            stride=shape.stride, block_size=shape.block_size, top_n=shape.num_blocks, window_size=shape.window,
        )  # fmt: skip
        core = self.nsa.NSACore(config)
        self.nsa.NSAHelper.init_cu_seqlens(bounds)

        inputs = (x.q, *cmp)
        yield (
            "compressed",
            Call(lambda: self.nsa.compress_attn(x.q[0], cmp[0][0], cmp[1][0], scale)[0][None], inputs),
            Call(lambda: ops.compressed_attention(x.q, *cmp, **compression)[0], inputs),
        )
        with torch.no_grad():
            _, lse = self.nsa.compress_attn(x.q[0], cmp[0][0], cmp[1][0], scale)
            _, our_lse = ops.compressed_attention(x.q, *cmp, **compression)

        def choice() -> Tensor:
            options = {"sm_scale": scale, "maybe_efficient_version": True, "scale_slc_p": True}
            return self.nsa.slc_topk_indices(x.q[0], cmp[0][0], lse, **options)[0].transpose(0, 1)[None]

        yield (
            "selection",
            Call(choice),
            Call(lambda: ops.select_blocks(x.q, cmp[0], our_lse, **selecting)),
        )
        inputs = (x.q, *slc)
        for regime, chosen in indices.items():
            theirs = chosen[0].transpose(0, 1).contiguous()
            theirs = theirs.masked_fill(theirs < 0, blocks)
            yield (
                f"selected {regime}",
                Call(
                    lambda c=theirs: self.nsa.select_attn(x.q[0], slc[0][0], slc[1][0], c, scale)[None],
                    inputs,
                ),
                Call(lambda c=chosen: ops.selected_attention(x.q, *slc, c, block_size=shape.block_size), inputs),
            )
        logits = torch.logit(x.gates.detach().float().clamp(1e-3, 1 - 1e-3)).to(x.q.dtype).requires_grad_()

        def same() -> Tensor:
            pool = tuple(pooled(t, shape.length, shape.stride) for t in slc)
            return ours(x, shape, pool, slc, slc, logits.sigmoid())

        inputs = (x.q, *slc, logits)
        yield (
            "total",
            Call(lambda: core(x.q[0], slc[0][0], slc[1][0], logits[0], bounds)[None], inputs),
            Call(same, inputs),
        )


def _stand_in(name: str, **attributes: object) -> None:
    """An empty module in place of one that a peer imports but does not need here."""
    try:
        __import__(name)
    except ImportError:
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module


KNOWN = {"fla": Fla, "xunhao": Xunhao, "sfnsa": Sfnsa}
