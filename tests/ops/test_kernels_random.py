"""The kernels in bf16 on random shapes on a GPU: errors as of dense attention, memory with NaN, determinism."""

import os
import random
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from nsa import ops
from nsa.ops import compressed, dense, selected
from tests.ops.cases import cumulative, few_programs

pytestmark = pytest.mark.gpu
SHAPES = int(os.environ.get("RANDOM_SHAPES", "12"))  # of each family

# Families: (heads, groups, width, v width, length, stride, block size, blocks). Each takes seconds to compile. Within a
# family tokens, documents, batch, window and forced blocks vary, which needs no compilation.
FAMILIES = [
    (16, 1, 128, 128, 32, 16, 64, 16),
    (8, 2, 128, 128, 32, 16, 64, 16),
    (6, 2, 64, 64, 16, 8, 32, 5),
    (2, 2, 64, 64, 32, 32, 32, 8),
    (12, 1, 192, 128, 32, 16, 64, 4),
    (5, 5, 64, 128, 8, 4, 24, 6),
    (32, 1, 128, 128, 32, 8, 64, 16),
    (4, 2, 256, 256, 32, 16, 64, 16),
    (12, 2, 128, 128, 32, 16, 64, 16),
    (4, 2, 128, 128, 32, 16, 64, 16),
    (64, 1, 64, 64, 32, 16, 64, 8),
    (16, 1, 192, 128, 32, 16, 64, 16),
    (4, 2, 192, 128, 32, 16, 64, 16),
    (12, 1, 128, 128, 32, 16, 64, 16),
    (21, 3, 64, 64, 32, 16, 64, 8),
    (9, 3, 128, 128, 32, 16, 64, 16),
    (10, 2, 128, 128, 32, 16, 64, 16),
]


def poison() -> None:
    """Fill the memory of the allocator's next tensors with NaN."""
    torch.full((2**26,), torch.nan, device="cuda")


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def allowed(generator: torch.Generator) -> float:
    """Twice the largest error of torch's dense bf16 attention, outputs and gradients."""
    return 2 * max(dense_error(tokens, generator) for tokens in (64, 256))


def dense_error(tokens: int, generator: torch.Generator) -> float:
    q, k, v, d_out = (torch.randn(1, 4, tokens, 64, device="cuda", generator=generator) for _ in range(4))
    low = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in low]
    d_low = d_out.bfloat16()
    out, expected = (scaled_dot_product_attention(*x, is_causal=True) for x in (low, exact))
    ours = [out, *torch.autograd.grad(out, low, d_low)]
    theirs = [expected, *torch.autograd.grad(expected, exact, d_low.double())]
    return max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True))


class DenseReference(torch.autograd.Function):
    """FlashAttention-2 (arXiv 2307.08691, algorithms 1 and 2) in PyTorch, with any mask and quadratic memory.

    Scores are fp32. Rounded to bf16 are exp(s - max), the output, and in the backward pass exp(s - lse), dS and the
    gradients. delta is computed from the rounded output.
    """

    @classmethod
    def attend(cls, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """As `nsa.ops.naive.masked_attention`."""
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2).float() for x in (k, v))
        mask = mask.expand(q.shape[0], k.shape[2] // group, q.shape[1], k.shape[1]).repeat_interleave(group, dim=1)
        out = cls.apply(*(x.float().transpose(1, 2) for x in (q, k, v)), mask, scale)
        return out.transpose(1, 2).to(q.dtype), out.new_zeros(())

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
        lse = scores.logsumexp(-1, keepdim=True)
        p = (scores - lse.masked_fill(lse == -torch.inf, 0)).exp()
        peak = pad(scores, (0, 1), value=-torch.inf).amax(-1, keepdim=True)  # there may be no keys
        numerator = (scores - peak.masked_fill(peak == -torch.inf, 0)).exp()
        out = rounded(rounded(numerator) @ v / numerator.sum(-1, keepdim=True).clamp(min=1e-30))
        ctx.save_for_backward(q, k, v, p, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p, out = ctx.saved_tensors
        d_out = rounded(d_out)
        ds = rounded(p * (d_out @ v.mT - (out * d_out).sum(-1, keepdim=True)))
        return rounded(ds @ k * ctx.scale), rounded(ds.mT @ q * ctx.scale), rounded(rounded(p).mT @ d_out), None, None


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@pytest.mark.parametrize("family", range(len(FAMILIES)))
def test_random_shapes(family: int) -> None:
    choose, generator = random.Random(family), torch.Generator("cuda").manual_seed(family)
    limit = allowed(generator)
    for _ in range(SHAPES):
        check_random_case(family, choose, generator, limit)
        torch.cuda.empty_cache()  # several workers may share the GPU


def check_random_case(family: int, choose: random.Random, generator: torch.Generator, limit: float) -> None:
    heads, groups, width, v_width, length, stride, block_size, blocks = FAMILIES[family]
    if packed := choose.random() < 0.5:
        documents = [choose.choice([1, 2, 17, 63, 129, 300, 700]) for _ in range(choose.randint(1, 5))]
    else:
        most = 4096 if heads <= 16 else 2000
        documents = [choose.choice([1, 2, 17, 31, 32, 63, 64, 65, 129, 511, 1000, choose.randint(1, most)])]
    tokens, batch = sum(documents), 1 if packed else choose.choice([1, 1, 2])
    keys = max(0, (tokens - length) // stride + 1)
    case = f"{FAMILIES[family]} {documents} batch {batch}"

    def tensor(count: int, heads: int, width: int, batch: int = batch) -> Tensor:
        return torch.randn(batch, count, heads, width, device="cuda", generator=generator).bfloat16()

    packing = {"cu_seqlens": cumulative(documents).cuda() if packed else None}
    window, initial = choose.choice([1, 64, 100, 512]), choose.choice([0, 1])
    compression = {"length": length, "stride": stride}
    selecting = {**compression, "block_size": block_size, "num_blocks": blocks, "num_initial": initial}

    def run(backend: str, indices: Tensor | None, tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = tensors = [x.requires_grad_() for x in tensors]
        if indices is None:
            out = ops.native_sparse_attention(
                q, (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win), gates, **selecting, window=window, **packing,
                backend=backend,
            )  # fmt: skip
        else:
            options = {**packing, "backend": backend}
            branches = (
                ops.compressed_attention(q, k_cmp, v_cmp, **compression, **options)[0],
                ops.selected_attention(q, k_slc, v_slc, indices, block_size=block_size, **options),
                ops.dense_attention(q, k_win, v_win, window=window, **options),
            )
            out = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
        return [out.detach(), *torch.autograd.grad(out, tensors, d_out.to(out.dtype))]

    names = ("out", "q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
    ours_off, theirs_off, sizes = (dict.fromkeys(names, 0.0) for _ in range(3))
    # With few tokens errors do not average out, so such a case is drawn several times.
    for _ in range(max(1, 64 // (batch * tokens))):
        kv = [tensor(n, groups, w) for n in (keys, tokens, tokens) for w in (width, v_width)]
        inputs = [tensor(tokens, heads, width), *kv, torch.sigmoid(tensor(tokens, heads, 3))]
        d_out = tensor(tokens, heads, v_width)
        poison()
        ours = run("triton", None, [x.clone() for x in inputs], d_out)
        with few_programs():
            again = run("triton", None, [x.clone() for x in inputs], d_out)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True)), f"{case}: other bits the second time"
        _, lse = ops.compressed_attention(inputs[0], inputs[1], inputs[2], **compression, **packing)
        indices = ops.select_blocks(inputs[0], inputs[1], lse, **selecting, **packing)
        expected = ops.select_blocks(inputs[0].float(), inputs[1].float(), lse, **selecting, **packing, backend="torch")
        # Importances that nearly tie may swap, since the sums have another order.
        assert (indices != expected).float().mean() < 0.002, f"{case}: other blocks"
        exact = run("naive", indices, [x.double() for x in inputs], d_out)
        # The bf16 error of dense attention in the same case.
        with ExitStack() as patches:
            for module in (compressed, selected, dense):
                patches.enter_context(mock.patch.object(module, "masked_attention", DenseReference.attend))
            reference = run("naive", indices, [x.clone() for x in inputs], d_out)
        for name, a, b, c in zip(names, ours, exact, reference, strict=True):
            # A gradient that is 0 except for rounding (with one key dq = dk = 0) has no relative error.
            noise = 1e-2 if name in ("q", "k_cmp", "k_slc", "k_win") else 0
            sizes[name] += max(b.norm().item(), noise * d_out.float().norm().item(), 1e-30) ** 2
            ours_off[name] += (a.double() - b).norm().item() ** 2
            theirs_off[name] += (c.double() - b).norm().item() ** 2
    for name in names:
        error, theirs = ((off[name] / sizes[name]) ** 0.5 for off in (ours_off, theirs_off))
        most = max(limit, 2 * theirs)
        assert error <= most, f"{case}: {name} is off by {error:.2e}, allowed {most:.2e}"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("heads", "groups", "width"), [(8, 2, 128), (16, 1, 64), (6, 3, 128)])
def test_dense_attention_as_dispatched(heads: int, groups: int, width: int, deterministic: bool) -> None:
    """Dense attention may be computed by cuDNN, deterministic or not. Its errors must be in the same range."""
    generator = torch.Generator("cuda").manual_seed(0)
    limit = allowed(generator)
    for tokens in (65, 1000):
        q, k, v, d_out = (
            torch.randn(2, tokens, h, width, device="cuda", generator=generator).bfloat16()
            for h in (heads, groups, groups, heads)
        )

        def run(backend: str, tensors: list[Tensor], d_out: Tensor) -> list[Tensor]:
            tensors = [x.requires_grad_() for x in tensors]
            out = ops.dense_attention(*tensors, backend=backend)
            return [out.detach(), *torch.autograd.grad(out, tensors, d_out.to(out.dtype))]

        torch.use_deterministic_algorithms(deterministic)
        try:
            ours = run("auto", [x.clone() for x in (q, k, v)], d_out)
        finally:
            torch.use_deterministic_algorithms(False)
        exact = run("naive", [x.double() for x in (q, k, v)], d_out)
        for name, a, b in zip(("out", "q", "k", "v"), ours, exact, strict=True):
            assert relative_error(a, b) < limit, f"{name} at {tokens} tokens"


SAME_BITS = [(64, 4, 128), (32, 8, 128), (32, 16, 128), (64, 4, 192), (48, 4, 128)]


@pytest.mark.parametrize(("heads", "groups", "width"), SAME_BITS)
def test_same_bits_on_every_run(heads: int, groups: int, width: int) -> None:
    """With enough tiles to keep every multiprocessor busy, since a race shows only once in many runs."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(tokens: int, heads: int, width: int = 128) -> Tensor:
        x = torch.randn(1, tokens, heads, width, device="cuda", generator=generator, dtype=torch.bfloat16)
        return x.requires_grad_()

    tokens = 16384
    q, gates = normal(tokens, heads, width), torch.rand(1, tokens, heads, 3, device="cuda", generator=generator)
    gates = gates.bfloat16().requires_grad_()
    pairs = [(normal(n, groups, width), normal(n, groups)) for n in (tokens // 16 - 1, tokens, tokens)]
    inputs = [q, *(x for pair in pairs for x in pair), gates]
    d_out = torch.randn(1, tokens, heads, 128, device="cuda", generator=generator, dtype=torch.bfloat16)
    sizes = {"length": 32, "stride": 16, "block_size": 64, "num_blocks": 16, "window": 512}

    def run() -> list[Tensor]:
        out = ops.native_sparse_attention(q, *pairs, gates, **sizes, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, inputs, d_out)]

    first = run()
    for i in range(40):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True)), f"run {i} differs"
