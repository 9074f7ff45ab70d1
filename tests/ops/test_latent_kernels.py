"""The kernels of attention to lists of latents against the definition in float64.

On a GPU if there is one; else they run within tests/ops/test_kernels.py::test_in_the_interpreter, in fp32.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.layers import DeepSeekSparseAttention
from nsa.layers.projections.config import MlaConfig
from nsa.layers.projections.mla import Latent
from nsa.ops.geometry import RotaryLayout, share_gradient
from nsa.ops.kernels import dsa_operators, latent_operators, latents, tokens
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels, normal, packing

# batch, documents, heads, D, Dv, slots. Heads and lists that fill tiles and that do not; several blocks of heads.
CASES = [
    (1, [1], 2, 144, 128, 3),
    (2, [20], 6, 144, 128, 5),
    (1, [9, 1, 0, 12], 20, 136, 128, 40),
    (1, [30], 16, 288, 256, 16),
    pytest.param(1, [18], 3, 576, 512, 9, marks=pytest.mark.skipif(not INTERPRETED, reason="not in fp32 on a GPU")),
]


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 queries."""
    monkeypatch.setattr(tokens, "MOST_QUERIES", 16)


def lists_of(batch: int, documents: list[int], slots: int, seed: int = 0) -> Tensor:
    """(B, T, slots) int32: some tokens of the query's document up to itself, in any order, with holes; some lists are
    empty."""
    of, lists, begin = torch.Generator().manual_seed(seed), torch.full((batch, sum(documents), slots), -1), 0
    for length in documents:
        for b in range(batch):
            for i in range(length):
                chosen = begin + torch.randperm(i + 1, generator=of)[:slots]
                places = torch.randperm(slots, generator=of)[: len(chosen)]
                if torch.rand((), generator=of) > 0.1:
                    lists[b, begin + i, places] = chosen
        begin += length
    return lists.int().to(DEVICE)


def views(row: Tensor, v_width: int) -> tuple[Tensor, Tensor]:
    return row, row[..., :v_width]


def expect_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for index, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=1e-4, atol=3e-5, msg=lambda text, i=index: f"{i}: {text}"
        )


@needs_kernels
@pytest.mark.parametrize(("batch", "documents", "heads", "width", "v_width", "slots"), CASES)
def test_attention(batch, documents, heads, width, v_width, slots) -> None:
    """Output, LSE, and the gradients of q, of the row that keys and values are views of, and of the sink."""
    count = sum(documents)
    lists = lists_of(batch, documents, slots)
    inputs = [normal(batch, count, heads, width), normal(batch, count, 1, width, seed=1), normal(heads, seed=2)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        q, row, sink = given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        found = []
        for options in ({}, {"sink": sink}):
            options |= {"return_lse": True, "backend": backend, "cu_seqlens": packing(documents), "scale": 0.1}
            found += ops.token_sparse_attention(q, *views(row, v_width), lists, **options)
        weights = [torch.arange(x.numel(), device=DEVICE).view_as(x).sin() for x in found]
        total = sum((x.masked_fill(x == -torch.inf, 0) * w).sum() for x, w in zip(found, weights, strict=True))
        results.append([*found, *torch.autograd.grad(total, given)])
    expect_close(*results)


def indexer(batch: int, count: int, heads: int, width: int = 16) -> list[Tensor]:
    """Index queries (B, T, Hi, Di), keys (B, T, Di) and weights (B, T, Hi)."""
    return [
        normal(batch, count, heads, width, seed=5).detach(),
        normal(batch, count, 1, width, seed=6).detach().squeeze(2),
        normal(batch, count, heads, seed=7).detach(),
    ]


def with_loss(given: list[Tensor], v_width: int, lists: Tensor, backend: str, **options: Any) -> list[Tensor]:
    """Output of `token_sparse_attention_kl`, and the gradients of q, row, indexer and weight (the loss)."""
    q, row, *index, weight = given
    out = ops.token_sparse_attention_kl(
        q, *views(row, v_width), lists, *index, weight, backend=backend, scale=0.1, **options
    )
    total = (out * torch.arange(out.numel(), device=DEVICE).view_as(out).sin()).sum()
    return [out, *torch.autograd.grad(total, given)]


@needs_kernels
@pytest.mark.parametrize("index_heads", [1, 21])
@pytest.mark.parametrize(("batch", "documents", "heads", "width", "v_width", "slots"), CASES)
def test_attention_with_the_loss(batch, documents, heads, width, v_width, slots, index_heads) -> None:
    count = sum(documents)
    lists = lists_of(batch, documents, slots, seed=1)
    inputs = [normal(batch, count, heads, width), normal(batch, count, 1, width, seed=1)]
    inputs += [*indexer(batch, count, index_heads), torch.tensor(0.7, device=DEVICE)]
    options = {"cu_seqlens": packing(documents)}
    found = with_loss([x.detach().requires_grad_() for x in inputs], v_width, lists, "triton", **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expect_close(found, with_loss(exact, v_width, lists, "naive", **options))


@needs_kernels
@pytest.mark.parametrize(("batch", "documents", "heads", "width", "v_width", "slots"), CASES)
def test_indexer_kl(batch, documents, heads, width, v_width, slots) -> None:
    """The loss apart, over lists; a target that is joint with something else."""
    count = sum(documents)
    lists = lists_of(batch, documents, slots, seed=2)
    inputs = [*indexer(batch, count, 3), normal(batch, count, heads, width), normal(batch, count, 1, width, seed=1)]
    results = []
    for backend, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        *index, q, k = (x.detach().to(dtype).requires_grad_() for x in inputs)
        _, lse = ops.token_sparse_attention(q.double(), *views(k.double(), v_width), lists, return_lse=True)
        loss = ops.indexer_kl(*index, q, k, (lse + 2.5).to(dtype), token_indices=lists, backend=backend)
        results.append([loss, *torch.autograd.grad(3 * loss, index)])
    expect_close(*results)


@needs_kernels
def test_queries_of_the_last_tokens_of_many() -> None:
    """Fewer queries than keys, as a rank of context parallelism has them; a list of all keys, over several tiles."""
    inputs = [normal(1, 5, 17, 144), normal(1, 90, 1, 144, seed=1)]
    lists = torch.arange(90, device=DEVICE).int().expand(1, 5, -1).clone()
    lists[0, 1, 40:] = -1
    lists[0, 2, :33] = -1
    results = []
    for backend, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        q, row = given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        out = ops.token_sparse_attention(q, *views(row, 128), lists, backend=backend)
        weights = torch.arange(out.numel(), device=DEVICE).view_as(out).sin()
        results.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    expect_close(*results)


@needs_kernels
def test_scores_that_are_far_below_zero() -> None:
    """exp(-lse) overflows: what lies behind a list must not get it as its probability."""
    inputs = [-1 - normal(1, 7, 2, 144).detach().abs(), 1 + normal(1, 7, 1, 144, seed=1).detach().abs()]
    lists = lists_of(1, [7], 5)
    results = []
    for backend, dtype in (("triton", torch.float32), ("naive", torch.float64)):
        q, row = given = [x.to(dtype).requires_grad_() for x in inputs]
        out = ops.token_sparse_attention(q, *views(row, 128), lists, backend=backend, scale=1.0)
        weights = torch.arange(out.numel(), device=DEVICE).view_as(out).sin()
        results.append([out, *torch.autograd.grad((out * weights).sum(), given)])
    assert all(x.isfinite().all() for x in results[0])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@needs_kernels
def test_the_same_bits_twice() -> None:
    lists = lists_of(1, [40], 12)
    inputs = [normal(1, 40, 18, 144), normal(1, 40, 1, 144, seed=1), *indexer(1, 40, 3)]
    inputs = [x.detach().requires_grad_() for x in (*inputs, torch.tensor(1.0, device=DEVICE))]
    once, twice = (with_loss(inputs, 128, lists, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    q, row = inputs[:2]
    out = ops.token_sparse_attention(q, *views(row, 128), lists, backend="triton", scale=0.1)
    total = (out * torch.arange(out.numel(), device=DEVICE).view_as(out).sin()).sum()
    alone = [out, *torch.autograd.grad(total, (q, row))]
    assert all(torch.equal(a, b) for a, b in zip(alone, once, strict=False)), "with the loss and without"


@needs_kernels
def test_which_values_share_the_gradient_of_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only views for autograd, too. Others get a gradient of their own, by the other paths."""
    row = normal(1, 6, 1, 144)
    whole = torch.cat((row, row), -1)
    sibling = row[..., :144]
    assert share_gradient(row[..., :128], row) and share_gradient(row[..., :128], sibling)
    assert share_gradient(whole[..., :128], whole[..., :144])
    assert share_gradient(row.detach()[..., :128], row.detach()), "no gradient at all"
    for other in (
        row.detach()[..., :128],
        row[..., :128].clone(),
        row[..., 16:],
        row.detach()[..., :128].requires_grad_(),
    ):
        assert not share_gradient(other, row)
    with torch.no_grad():
        silent = row[..., :128]
    assert not share_gradient(silent, row)
    monkeypatch.setattr(latent_operators, "attention", None)
    with pytest.raises(TypeError):
        ops.token_sparse_attention(normal(1, 6, 2, 144), *views(row, 128), lists_of(1, [6], 3), backend="triton")
    apart = ops.token_sparse_attention(normal(1, 6, 2, 144), row, silent, lists_of(1, [6], 3))
    assert apart.shape == (1, 6, 2, 128)


@needs_kernels
def test_narrow_latents_take_the_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_operators, "attention", None)
    row = normal(1, 6, 1, 48)
    out = ops.token_sparse_attention(normal(1, 6, 2, 48), *views(row, 32), lists_of(1, [6], 3), backend="triton")
    assert out.shape == (1, 6, 2, 32)


@needs_kernels
def test_nothing_goes_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention, attention with the loss, and the loss apart: none of it calls the operators of other keys."""
    for name in ("token_attention", "token_attention_kl", "indexer_kl"):
        monkeypatch.setattr(dsa_operators, name, None)
    monkeypatch.setattr(latents, "WIDEST", 4 * 144)
    test_attention(1, [9], 2, 144, 128, 4)
    test_attention_with_the_loss(1, [9], 2, 144, 128, 4, 2)
    test_indexer_kl(1, [9], 2, 144, 128, 4)
    # Too wide; values behind the first power of two, and fewer.
    for width, v_width in ((160, 128), (144, 136), (144, 64)):
        with pytest.raises(ValueError, match="head widths"):
            test_attention(1, [9], 2, width, v_width, 4)


@needs_kernels
def test_a_layer_over_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of all weights and the loss that it learned from, in the backward pass of its attention."""
    sizes = MlaConfig(q_lora_rank=16, kv_lora_rank=128, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8)
    layer = DeepSeekSparseAttention(
        32, 3, 3, 24, 8, projection=Latent(32, 3, sizes), topk=6, index_heads=3, index_head_dim=16,
        index_rotary=RotaryLayout(8), kl_weight=0.5,
    ).to(DEVICE)  # fmt: skip
    x = normal(2, 20, 32)
    results = []
    for backend in ("naive", "triton"):
        layer.attend.backend = layer.attend.choose.backend = backend
        for name in ("token_attention", "token_attention_kl", "indexer_kl"):
            monkeypatch.setattr(dsa_operators, name, None)
        layer.zero_grad(set_to_none=True)
        layer.attend.loss.clear()
        (layer(x) ** 2).sum().backward()
        results.append([layer.attend.loss.tally.clone(), *(p.grad for p in layer.parameters())])
    assert results[0][0] > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
def test_autocast_keeps_the_view(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator gets keys and values of one memory in the lower precision."""
    seen: list[bool] = []
    monkeypatch.setattr(ops.token_sparse, "takes_latents", lambda _, q, k, v: seen.append(share_gradient(v, k)))
    row = normal(1, 6, 1, 144)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = ops.token_sparse_attention(normal(1, 6, 2, 144), *views(row, 128), lists_of(1, [6], 3), backend="torch")
    assert seen == [True] and out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out.float().sum(), row)
    assert gradient.dtype == torch.float32 and gradient[..., :128].ne(0).any()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize(
    ("heads", "width", "v_width", "slots"), [(128, 576, 512, 200), (64, 576, 512, 64), (20, 320, 256, 100)]
)
def test_in_bf16(heads: int, width: int, v_width: int, slots: int) -> None:
    """With the loss, against the reference in fp32 on the same rounded inputs; the bits twice."""
    lists = lists_of(2, [300], slots)
    inputs = [normal(2, 300, heads, width), normal(2, 300, 1, width, seed=1), *indexer(2, 300, 16, 64)]
    inputs = [x.detach().bfloat16() for x in inputs] + [torch.tensor(0.7, device=DEVICE)]
    given = [x.requires_grad_() for x in inputs]
    found, again = (with_loss(given, v_width, lists, "triton") for _ in range(2))
    wanted = with_loss([x.detach().float().requires_grad_() for x in inputs], v_width, lists, "naive")
    for ours, twice, theirs in zip(found, again, wanted, strict=True):
        assert torch.equal(ours, twice)
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
