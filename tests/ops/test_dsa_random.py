"""DSA's kernels on random shapes in fp32 against the definitions, values and gradients.

With a GPU: SHAPES cases of each family. In Triton's interpreter (TRITON_INTERPRET=1): those in FEW. Within a family
only sizes vary that no kernel is compiled for: tokens, documents, batch, lists, forced tokens.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.ops.kernels import index_topk, indexer_kl_dense, token_tiles, tokens
from nsa.ops.kernels.hardware import MAX_WIDTH
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels, packing

# heads, groups, D, Dv, index heads, index width. Tiles have eight queries, two, and one. The last has latents.
FAMILIES = [(4, 2, 16, 32, 2, 16), (6, 1, 48, 16, 5, 24), (20, 1, 16, 16, 3, 8), (20, 1, 144, 128, 2, 16)]
SHAPES, FEW = 350, (0, 7)
MOST_TOKENS = 40 if INTERPRETED else 200


def documents_of(choose: random.Random) -> tuple[int, list[int]]:
    """(batch, lengths of documents); several documents lie in one sequence."""
    count = choose.randint(1, MOST_TOKENS)
    if choose.random() < 0.5:
        return choose.randint(1, 2), [count]
    lengths: list[int] = []
    while sum(lengths) < count:
        lengths.append(1 if choose.random() < 0.4 else choose.randint(0, count - sum(lengths)))
    return 1, lengths


def quarters(*shape: int, of: torch.Generator) -> Tensor:
    """Multiples of 1/4: products are exact, so many scores are equal, and every ReLU has the same sign."""
    return ((torch.randn(*shape, generator=of) * 4).round() / 4).to(DEVICE)


@contextmanager
def memory_of_nan(backend: str) -> Iterator[None]:
    """New tensors of the kernels hold NaN, not the zeros that memory often has."""
    torch.use_deterministic_algorithms(backend == "triton", warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def topk_of(index: list[Tensor], backend: str, **options: Any) -> tuple[Tensor, Tensor]:
    with memory_of_nan(backend):
        return ops.index_topk(*index, **options, backend=backend)


def check_case(number: int, family: tuple[int, ...], patch: Callable[..., None]) -> None:
    choose, of = random.Random(number), torch.Generator().manual_seed(number)
    heads, groups, width, v_width, index_heads, index_width = family
    batch, documents = documents_of(choose)
    count, packed = sum(documents), packing(documents)
    topk = choose.choice([1, choose.randint(1, 32), choose.randint(1, 64)])
    num_initial = choose.randint(0, min(topk, 3)) if choose.random() < 0.5 else 0
    num_local = choose.randint(0, min(topk - num_initial, 9)) if choose.random() < 0.5 else 0
    rows = choose.choice([1, 7, 64, 200, 1000])  # queries of a slab
    patch(index_topk, "SLAB_BYTES", (4 * (count + 8) + 8 * index_topk._most(topk)) * batch * rows)
    patch(indexer_kl_dense, "SLAB_BYTES", 4 * count * batch * max(rows, 7))
    patch(tokens, "MOST_QUERIES", 16)
    for limit in ("PRODUCTS_OF_GATHER", "KEYS_OF_GATHER"):  # tiles of all keys, or listed keys are gathered
        patch(token_tiles, limit, 1e9 if number % 2 else 0)
    index = [quarters(batch, count, index_heads, index_width, of=of), quarters(batch, count, index_width, of=of)]
    index.append(quarters(batch, count, index_heads, of=of))
    options: dict[str, Any] = {"topk": topk, "num_initial": num_initial, "num_local": num_local, "cu_seqlens": packed}
    found, lists = (topk_of(index, backend, **options) for backend in ("triton", "naive"))
    assert torch.equal(found[0], lists[0]), "tokens"
    assert torch.equal(found[1], lists[1]), "scores"
    holes = torch.rand(lists[0].shape, generator=of).to(DEVICE) < choose.choice([0.0, 0.2, 1.0])
    listed = lists[0].masked_fill(holes, -1)
    if choose.random() < 0.3:  # in any order
        listed = listed.flip(2).contiguous()
    q, k, v = (
        torch.randn(batch, count, *shape, generator=of).to(DEVICE).requires_grad_()
        for shape in ((heads, width), (groups, width), (groups, v_width))
    )
    latent = width > MAX_WIDTH // 2  # wider than other kernels take in fp32; the values are a view of the keys
    v = k[..., :v_width] if latent else v
    attention = (q, k) if latent else (q, k, v)
    d_out = torch.randn(batch, count, heads, v_width, generator=of).to(DEVICE)
    d_lse = torch.randn(batch, heads, count, generator=of).to(DEVICE)
    results = []
    for backend in ("triton", "naive"):
        with memory_of_nan(backend):
            out, lse = ops.token_sparse_attention(q, k, v, listed, return_lse=True, backend=backend)
            total = (out * d_out).sum() + (lse.masked_fill(lse == -torch.inf, 0) * d_lse).sum()
            results.append([out, lse, *torch.autograd.grad(total, attention)])
    compare("attention", *results)
    lse = results[1][1].detach() + choose.choice([0.0, 2.5])
    trained = q_idx, k_idx, w = [x.requires_grad_() for x in index]
    results = []
    for backend in ("triton", "naive"):
        weight = torch.tensor(0.5, device=DEVICE, requires_grad=True)
        with memory_of_nan(backend):
            out = ops.token_sparse_attention_kl(q, k, v, listed, q_idx, k_idx, w, weight, backend=backend)
            results.append([out, *torch.autograd.grad((out * d_out).sum(), (*attention, *trained, weight))])
    compare("attention with the loss", *results)
    for where in (listed,) if latent else (listed, None):
        if where is None:
            _, lse = ops.dense_attention(q, k, v, cu_seqlens=packed, return_lse=True, backend="naive")
        results = []
        for backend in ("triton", "naive"):
            with memory_of_nan(backend):
                options = {"token_indices": where, "cu_seqlens": packed, "backend": backend}
                loss = ops.indexer_kl(q_idx, k_idx, w, q, k, lse.detach(), **options)
                results.append([loss, *torch.autograd.grad(loss, trained)])
        compare("loss over all" if where is None else "loss over lists", *results)


def compare(what: str, ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=5e-5, msg=lambda text: f"{what}: {text}")


@needs_kernels
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_few(family: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in FEW:
        check_case(number, family, monkeypatch.setattr)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="takes hours in the interpreter")
@pytest.mark.time_limit(600)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_many(family: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(SHAPES):
        try:
            check_case(number, family, monkeypatch.setattr)
        except Exception as error:
            error.add_note(f"case {number}")
            raise
