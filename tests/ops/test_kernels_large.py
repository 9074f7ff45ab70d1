"""Tensors of more than 2^31 elements, whose offsets exceed int32, against the same computed in parts."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsa import ops
from tests.ops.test_kernels_random import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
SIZES = {"length": 32, "stride": 16, "block_size": 64, "num_blocks": 16, "window": 512}
# Parts divide tiles, lists and splits differently, so sums have another order. They may differ by bf16 rounding only.
ROUNDING = 1e-2
Function = Callable[..., Tensor]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, device=generator.device, generator=generator, dtype=torch.bfloat16).requires_grad_()


def passes(function: Function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    out = function(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]


def equal_by_parts(function: Function, inputs: list[Tensor], d_out: Tensor, axis: int, parts: int) -> None:
    """Compare one call with ``parts`` calls, split along ``axis`` (samples, or KV heads with their query heads)."""
    whole = passes(function, inputs, d_out)
    cut = [[x.detach().chunk(parts, axis)[i].contiguous().requires_grad_() for x in inputs] for i in range(parts)]
    for i, part in enumerate(cut):
        expected = passes(function, part, d_out.chunk(parts, axis)[i].contiguous())
        for name, a, b in zip(("out", *range(len(inputs))), whole, expected, strict=True):
            assert relative_error(a.chunk(parts, axis)[i], b.double()) < ROUNDING, f"{name} of part {i}"


def whole_attention(q: Tensor, *rest: Tensor) -> Tensor:
    *kv, gates = rest
    return ops.native_sparse_attention(q, *zip(kv[::2], kv[1::2], strict=True), gates, **SIZES, backend="triton")


@pytest.mark.parametrize("v_width", [128, 64])  # Hopper's kernels, and the Triton kernels
def test_queries(v_width: int, tokens: int = 2**19 + 24576, device: str = "cuda") -> None:
    """32 heads of 128, split by KV heads."""
    generator = torch.Generator(device).manual_seed(0)
    counts = (tokens // 16 - 1, tokens, tokens)
    kv = [normal(generator, 1, n, 2, width) for n in counts for width in (128, v_width)]
    inputs = [normal(generator, 1, tokens, 32, 128), *kv, normal(generator, 1, tokens, 32, 3)]
    equal_by_parts(whole_attention, inputs, normal(generator, 1, tokens, 32, v_width).detach(), axis=2, parts=2)


@pytest.mark.parametrize("kind", ["selected", "window"])
def test_keys(kind: str, batch: int = 9, tokens: int = 2**17, device: str = "cuda") -> None:
    """16 KV heads of 128 with a query head each, split by samples."""
    generator = torch.Generator(device).manual_seed(0)
    block = torch.arange(tokens, device=device)[:, None] // 64
    chosen = torch.cat([block * 0, block // 3, block // 2, block], 1)
    chosen[:, 1:][chosen[:, 1:] == chosen[:, :-1]] = -1
    chosen = chosen.int()[None, :, None].expand(batch, tokens, 16, 4).contiguous()

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if kind == "window":
            return ops.dense_attention(q, k, v, window=512, backend="triton")
        return ops.selected_attention(q, k, v, chosen[: len(q)], block_size=64, backend="triton")

    inputs = [normal(generator, batch, tokens, 16, 128) for _ in range(3)]
    equal_by_parts(attention, inputs, torch.randn_like(inputs[0]), axis=0, parts=batch)
