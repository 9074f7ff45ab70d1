"""DSA's kernels against the reference: on a GPU if there is one, else in Triton's interpreter (fp32).

Without a GPU they run within tests/ops/test_kernels.py::test_in_the_interpreter.
"""

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.layers import DeepSeekSparseAttention
from nsa.ops.geometry import KnownLengths, RotaryLayout, tell_lengths
from nsa.ops.index_topk.fp8 import rounded_to_fp8, to_fp8
from nsa.ops.kernels import dsa_operators, index_topk, indexer_kl_dense, token_tiles, tokens
from tests.ops.test_entries import case_of
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels, normal, packing

LISTS = [  # batch, documents, heads, groups, D, Dv, tokens of a list
    (1, [1], 2, 1, 16, 16, 3),
    (2, [20], 6, 2, 24, 16, 5),
    (1, [9, 1, 0, 12], 3, 3, 16, 48, 20),
    (1, [9], 20, 1, 48, 16, 16),
]


@pytest.fixture(params=["gathered", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed keys are gathered, in chunks of 16 queries; or tiles of all keys are gone through."""
    take(request.param, monkeypatch)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    take("gathered", monkeypatch)


def take(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MOST_QUERIES", 16)
    for limit in ("PRODUCTS_OF_GATHER", "KEYS_OF_GATHER"):
        monkeypatch.setattr(token_tiles, limit, 0 if way == "gathered" else 1e9)


def indexer(batch: int, count: int, heads: int = 3, width: int = 8, whole: bool = True) -> list[Tensor]:
    """Inputs of the indexer; whole numbers make scores exact, and many of them equal."""
    found = [normal(batch, count, heads, width).detach(), normal(batch, count, 1, width, seed=1).detach().squeeze(2)]
    found.append(normal(batch, count, heads, seed=2).detach())
    return [x.round() for x in found] if whole else found


@needs_kernels
@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize(
    ("documents", "topk", "forced"), [([24], 5, (0, 0)), ([9, 0, 20, 1], 8, (1, 3)), ([20], 30, (2, 0))]
)
def test_topk(documents: list[int], topk: int, forced: tuple[int, int], order: str) -> None:
    batch = 2 if len(documents) == 1 else 1
    inputs, (num_initial, num_local) = indexer(batch, sum(documents)), forced
    options = {"topk": topk, "num_initial": num_initial, "num_local": num_local, "order": order}
    options |= {"cu_seqlens": packing(documents)}
    for ours, theirs in zip(*(ops.index_topk(*inputs, **options, backend=b) for b in ("triton", "naive")), strict=True):
        assert torch.equal(ours, theirs)


@needs_kernels
@pytest.mark.parametrize("forced", [(0, 0), (2, 3), (10, 6)])
@pytest.mark.parametrize("scores", ["rising", "sampled", "unsampled", "equal", "plateau", "negative"])
def test_topk_in_chunks_and_where_the_sample_misleads(
    scores: str, forced: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of three queries. "sampled": only the sampled tokens have high scores, so fewer than k reach the bound.
    "unsampled": all others have, so more reach it than there is room for, and in "equal" and "plateau" many are equal.
    "negative": the heads' weights are."""
    count, topk, sample = 200, 16, 32
    monkeypatch.setattr(index_topk, "SLAB_BYTES", 3 * (4 * count + 8 * 2 * topk))
    monkeypatch.setattr(index_topk, "SMALLEST_ROOM", 8)
    monkeypatch.setattr(index_topk, "SAMPLES", (sample, sample))
    value = torch.zeros(count) if scores == "equal" else torch.arange(count).float()
    if scores == "plateau":
        value = (value % 20).relu_() * (value > 100)
    sampled = torch.arange(sample) // 2 * (count - 2) // (sample // 2) + torch.arange(sample) % 2  # by the third query
    if scores == "sampled":
        value[sampled] += 1000
    elif scores == "unsampled":
        value += 1000
        value[sampled] -= 1000
    q, weights = torch.ones(1, 5, 1, 8, device=DEVICE), torch.ones(1, 5, 1, device=DEVICE)
    if scores == "negative":
        weights = -weights
    k = value.to(DEVICE)[None, :, None].expand(-1, -1, 8).contiguous()
    options = {"topk": topk, "num_initial": forced[0], "num_local": forced[1]}
    found, expected = (ops.index_topk(q, k, weights, **options, backend=backend) for backend in ("triton", "naive"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter rows are divided by their scales as on Hopper, but not rounded: it rounds to fp8 otherwise."""
    if INTERPRETED:
        monkeypatch.setattr(index_topk, "FP8", torch.float32)
        monkeypatch.setattr(index_topk, "multiplies_fp8", lambda q_idx: True)


@needs_kernels
@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no e4m3")
def test_rows_in_fp8(multiplied: None) -> None:
    """Some tokens of two sequences; a row of zeros, a tiny one, one whose largest is 448, and one just above."""
    x = normal(2, 7, 3, 24).detach() * 2.0 ** torch.arange(-10, 11, device=DEVICE).view(7, 3, 1)
    for (place, head), value in {(2, 0): 0.0, (2, 1): 1e-9, (3, 0): 448.0, (3, 1): 450.0}.items():
        x[:, place, head] = value
    weights = normal(2, 7, 3, seed=1).detach()
    values, scales = index_topk._in_fp8(x, weights, 2, 4, 6)
    expected, scale = to_fp8(x[:, 2:6])
    assert torch.equal(scales[:, :4], scale * weights[:, 2:6])
    if INTERPRETED:
        assert torch.equal(values[:, :4], x[:, 2:6] / scale[..., None])
    else:
        assert torch.equal(values[:, :4].float(), expected.float())


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
def test_topk_in_fp8(dtype: torch.dtype, multiplied: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers that e4m3 keeps, with rows of other scales, and of zeros: on Hopper fp8 is multiplied as such."""
    documents, magnitude = ([90, 0, 130], torch.tensor([1.0, 4.0, 0.125, 0.0], device=DEVICE))
    monkeypatch.setattr(index_topk, "SLAB_BYTES", 100 * (4 * 224 + 8 * 64))
    q, k, weights = indexer(1, sum(documents), heads=5, width=32)
    q = (q.clamp(-3, 3) * magnitude[torch.arange(5) % 4, None]).to(dtype)
    k = (k.clamp(-3, 3) * magnitude[torch.arange(sum(documents)) % 4, None]).to(dtype)
    options = {"topk": 20, "num_local": 1, "cu_seqlens": packing(documents)}
    found = ops.index_topk(q, k, weights, **options, fp8=True, backend="triton")
    for expected in (ops.index_topk(q, k, weights, **options, fp8=x, backend="naive") for x in (True, False)):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    rough = [rounded_to_fp8(x + 0.01 * x.sin()) for x in (q, k)]
    both = [ops.index_topk(*rough, weights, **options, fp8=True, backend=b)[1] for b in ("triton", "naive")]
    torch.testing.assert_close(*both, rtol=1e-3, atol=1e-3)


@needs_kernels
def test_topk_of_chunks_of_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five chunks of one tile of queries, whose last is not full."""
    tile, topk = index_topk.score_tiles(torch.empty(0, dtype=torch.float32))[0], 7
    count = 5 * tile - 3
    monkeypatch.setattr(index_topk, "SMALLEST_ROOM", 16)
    monkeypatch.setattr(index_topk, "SLAB_BYTES", 3 * tile * (4 * (count + 8) + 8 * 16) // 2)
    calls, one = [], index_topk._select
    monkeypatch.setattr(index_topk, "_select", lambda *args: [calls.append(args[6:8]), one(*args)])
    inputs = indexer(1, count, heads=2)
    found, expected = (ops.index_topk(*inputs, topk=topk, backend=b) for b in ("triton", "naive"))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert calls == [(i * tile, tile - 3 * (i == 4)) for i in range(5)]


@pytest.mark.gpu
def test_topk_in_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several chunks."""
    inputs = [x.to(DEVICE) for x in indexer(1, 3000, heads=4, width=64, whole=False)]
    monkeypatch.setattr(index_topk, "SLAB_BYTES", 4 * 3000 * 1000)
    expected = ops.index_topk(*inputs, topk=100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.index_topk(*inputs, topk=100)
    for x in found:
        x.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernels
@pytest.mark.parametrize(("batch", "documents", "heads", "groups", "width", "v_width", "slots"), LISTS)
def test_attention(batch, documents, heads, groups, width, v_width, slots, way: None) -> None:
    """Output, LSE and all gradients; lists with holes, and empty ones."""
    count = sum(documents)
    lists, _ = ops.index_topk(*indexer(batch, count), topk=slots, cu_seqlens=packing(documents), backend="naive")
    holes = torch.rand(lists.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.2
    lists = lists.masked_fill(holes, -1)
    inputs = [normal(batch, count, heads, width), normal(batch, count, groups, width, seed=1)]
    inputs.append(normal(batch, count, groups, v_width, seed=2))
    results = []
    for backend in ("triton", "naive"):
        out, lse = ops.token_sparse_attention(*inputs, lists, return_lse=True, backend=backend)
        weights = (torch.arange(x.numel(), device=DEVICE).view_as(x).sin() for x in (out, lse))
        total = sum((x * w).sum() for x, w in zip((out, lse.masked_fill(lse == -torch.inf, 0)), weights, strict=True))
        results.append([out, lse, *torch.autograd.grad(total, inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
def test_parts_of_lists_that_are_longer_than_an_int16_counts() -> None:
    lists = torch.full((1, 1, 2**15 + 40), -1, dtype=torch.int32, device=DEVICE)
    lists[0, 0, 5], lists[0, 0, -1] = 2, 3
    total = torch.zeros(1, 4, 16, device=DEVICE)
    for _tiles, (parts,) in tokens.summed_parts(lists, [total], torch.float32, None):
        parts.view(-1, lists.shape[2], 16)[0] = torch.arange(lists.shape[2], device=DEVICE)[:, None]
    assert total[0, :, 0].tolist() == [0, 0, 5, lists.shape[2] - 1]


@needs_kernels
@pytest.mark.parametrize(("batch", "documents", "heads", "groups", "width", "v_width", "slots"), LISTS)
def test_indexer_kl(batch, documents, heads, groups, width, v_width, slots, way: None) -> None:
    """Loss and gradients over lists with holes; a target that is joint with something else, and no visible token."""
    count = sum(documents)
    index = [x.requires_grad_() for x in indexer(batch, count, whole=False)]
    lists, _ = ops.index_topk(*index, topk=slots, cu_seqlens=packing(documents), backend="naive")
    holes = torch.rand(lists.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.2
    lists = lists.masked_fill(holes, -1)
    q, k = normal(batch, count, heads, width), normal(batch, count, groups, width, seed=1)
    _, lse = ops.token_sparse_attention(q, k, k, lists, return_lse=True, backend="naive")
    results = []
    for backend in ("triton", "naive"):
        loss = ops.indexer_kl(*index, q, k, lse + 2.5, token_indices=lists, backend=backend)
        results.append([loss, *torch.autograd.grad(3 * loss, index)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
def test_tiles_that_nobody_lists_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query lists a few keys just before it and a few at the start; several tiles of queries and of keys, which
    are no square; the loss in chunks of queries."""
    take("tiles", monkeypatch)
    count, queries = 300, 180
    if INTERPRETED:
        count, queries = 120, 90
    monkeypatch.setattr(indexer_kl_dense, "SLAB_BYTES", 4 * count * 2 * (20 if INTERPRETED else 100))
    position = torch.arange(count - queries, count, device=DEVICE)
    near = position[:, None] - torch.arange(0, 12, 3, device=DEVICE)
    lists = torch.cat((torch.arange(2, device=DEVICE).expand(queries, 2), near), 1).int().expand(2, -1, -1).contiguous()
    index = [x.requires_grad_() for x in indexer(2, count, whole=False)]
    index = [index[0][:, -queries:], index[1], index[2][:, -queries:]]
    q, k = normal(2, queries, 4, 16), normal(2, count, 2, 16, seed=1)
    v = normal(2, count, 2, 16, seed=2)
    results = []
    for backend in ("triton", "naive"):
        out, lse = ops.token_sparse_attention(q, k, v, lists, return_lse=True, backend=backend)
        weights = torch.arange(out.numel(), device=DEVICE).view_as(out).sin()
        results.append([out, lse, *torch.autograd.grad((out * weights).sum(), (q, k, v))])
        loss = ops.indexer_kl(*index, q, k, lse, token_indices=lists, backend=backend)
        results[-1] += [loss, *torch.autograd.grad(loss, index)]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
@pytest.mark.parametrize(("batch", "documents", "heads", "groups", "width", "v_width", "slots"), LISTS)
def test_dense_indexer_kl(
    batch, documents, heads, groups, width, v_width, slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients over all that is visible, in chunks of queries; no query has a target in one document."""
    count = sum(documents)
    monkeypatch.setattr(indexer_kl_dense, "SLAB_BYTES", 4 * count * batch * (7 if INTERPRETED else 40))
    index = [x.requires_grad_() for x in indexer(batch, count, whole=False)]
    q, k = normal(batch, count, heads, width), normal(batch, count, groups, width, seed=1)
    _, lse = ops.dense_attention(q, k, k, cu_seqlens=packing(documents), return_lse=True, backend="naive")
    lse = lse.masked_fill(torch.arange(count, device=DEVICE) < documents[0] // 2, -torch.inf)
    results = []
    for backend in ("triton", "naive"):
        loss = ops.indexer_kl(*index, q, k, lse + 2.5, cu_seqlens=packing(documents), backend=backend)
        results.append([loss, *torch.autograd.grad(3 * loss, index)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


def with_loss(attention: list[Tensor], lists: Tensor, index: list[Tensor], weight: float, backend: str) -> list[Tensor]:
    """Output and gradients of `token_sparse_attention_kl`, that of the weight (the loss) last."""
    kl_weight = torch.tensor(weight, device=DEVICE, requires_grad=True)
    out = ops.token_sparse_attention_kl(*attention, lists, *index, kl_weight, backend=backend)
    total = (out * torch.arange(out.numel(), device=DEVICE).view_as(out).sin()).sum()
    return [out, *torch.autograd.grad(total, [*attention, *index, kl_weight])]


@needs_kernels
@pytest.mark.parametrize("index_heads", [1, 3, 21])
@pytest.mark.parametrize(
    ("batch", "documents", "heads", "groups", "width", "v_width", "slots"), [*LISTS, (1, [44], 2, 2, 16, 16, 30)]
)
def test_attention_with_the_loss(
    batch, documents, heads, groups, width, v_width, slots, index_heads, gathered, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All gradients and the loss; index heads in one part and in several; lists with holes.

    The union of the last lists is long enough to be split among programs. With three index heads a program sums the
    parts of one key, else of several.
    """
    monkeypatch.setattr(tokens, "SUMMED", 1 if index_heads == 3 else 512)
    count = sum(documents)
    index = [x.requires_grad_() for x in indexer(batch, count, index_heads, whole=False)]
    lists, _ = ops.index_topk(*index, topk=slots, cu_seqlens=packing(documents), backend="naive")
    holes = torch.rand(lists.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.2
    lists = lists.masked_fill(holes, -1)
    attention = [normal(batch, count, heads, width), normal(batch, count, groups, width, seed=1)]
    attention.append(normal(batch, count, groups, v_width, seed=2))
    results = [with_loss(attention, lists, index, 0.7, backend) for backend in ("triton", "naive")]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
def test_attention_with_the_loss_has_the_same_bits_twice_and_whatever_the_weight(way: None) -> None:
    """The weight scales the indexer's gradients; those of the attention are the same bits with and without a loss."""
    index = [x.requires_grad_() for x in indexer(1, 20, 3, whole=False)]
    lists, _ = ops.index_topk(*index, topk=8)
    attention = [normal(1, 20, h, 16, seed=i) for i, h in enumerate((4, 2, 2))]
    once, twice, none, much = (with_loss(attention, lists, index, weight, "triton") for weight in (1.0, 1.0, 0.0, 1e3))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    for gradients in (none, much):
        assert all(torch.equal(a, b) for a, b in zip([*once[:4], once[7]], [*gradients[:4], gradients[7]], strict=True))
    assert all(x.eq(0).all() for x in none[4:7])
    for ours, theirs in zip(much[4:7], once[4:7], strict=True):
        torch.testing.assert_close(ours, 1e3 * theirs)
    out = ops.token_sparse_attention(*attention, lists, backend="triton")
    total = (out * torch.arange(out.numel(), device=DEVICE).view_as(out).sin()).sum()
    alone = [out, *torch.autograd.grad(total, attention)]
    assert all(torch.equal(a, b) for a, b in zip(alone, once, strict=False))


@needs_kernels
def test_a_layer_learns_in_the_backward_pass(gathered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tally has the loss, once, and no second pass over the keys was made for it."""
    layer = DeepSeekSparseAttention(32, 4, 2, 16, topk=6, index_heads=3, index_head_dim=16,
                                    index_rotary=RotaryLayout(8), kl_weight=0.5)  # fmt: skip
    layer = layer.to(DEVICE)
    x = normal(2, 20, 32)
    results = []
    for backend in ("naive", "triton"):
        layer.attend.backend = layer.attend.choose.backend = backend
        if backend == "triton":
            monkeypatch.setattr(dsa_operators, "indexer_kl", None)
        layer.zero_grad(set_to_none=True)
        layer.attend.loss.clear()
        (layer(x) ** 2).sum().backward()
        results.append([layer.attend.loss.tally.clone(), *(p.grad for p in layer.parameters())])
    assert results[0][0] > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
@pytest.mark.parametrize(("documents", "ratio", "offset"), [([21], 4, 0), ([3], 4, 0), ([9, 1, 0, 4, 17], 3, 10)])
def test_compressed_entries(documents: list[int], ratio: int, offset: int, way: None) -> None:
    """Top-k and both losses over entries, some of which no query sees; and queries that see none."""
    for whole in (True, False):
        case = case_of(documents, ratio, offset, torch.float32, whole, surplus=0 if documents == [3] else 2)
        index = [x.detach().to(DEVICE).requires_grad_() for x in case.index]
        where = case.where | {"cu_seqlens": packing(documents)}
        found, expected = (ops.index_topk(*index, topk=3, **where, backend=name) for name in ("triton", "naive"))
        assert torch.equal(found[0], expected[0]), whole
        torch.testing.assert_close(found[1], expected[1])
    q, k = (x.to(DEVICE) for x in (case.q, case.k))
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), 2.5, device=DEVICE)
    for lists in (None, expected[0]):
        results = []
        for backend in ("triton", "naive"):
            loss = ops.indexer_kl(*index, q, k, lse, token_indices=lists, **where, backend=backend)
            results.append([loss, *torch.autograd.grad(3 * loss, index)])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)
    attended = ops.token_sparse_attention(q, k, k, expected[0], backend="triton", return_lse=True)
    for ours, theirs in zip(attended, ops.token_sparse_attention(q, k, k, expected[0], return_lse=True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


@needs_kernels
@pytest.mark.parametrize(("documents", "longest"), [([40], 40), ([8] * 5, 8), ([1, 0, 30, 9], 30)])
def test_the_kernels_know_the_longest_document(
    documents: list[int], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By it they choose between tiles of all keys and the listed ones."""
    asked: list[int] = []
    monkeypatch.setattr(token_tiles, "pays", lambda *inputs: asked.append(inputs[4]))
    monkeypatch.setattr(token_tiles, "pays_for_loss", lambda *inputs: asked.append(inputs[2]))
    index = [x.requires_grad_() for x in indexer(1, 40, whole=False)]
    borders = torch.tensor([0, *documents]).cumsum(0).int()  # on the host
    if DEVICE == "cuda":
        tell_lengths(borders := borders.cuda(), KnownLengths.of(borders.cpu()))
    lists, _ = ops.index_topk(*index, topk=4, cu_seqlens=borders)
    q, k, v = normal(1, 40, 4, 16), normal(1, 40, 2, 16, seed=1), normal(1, 40, 2, 16, seed=2)
    options = {"cu_seqlens": borders, "backend": "triton"}
    _, lse = ops.token_sparse_attention(q, k, v, lists, **options, return_lse=True)
    ops.indexer_kl(*index, q, k, lse, token_indices=lists, **options)
    ops.token_sparse_attention_kl(q, k, v, lists, *index, torch.ones((), device=DEVICE), **options)
    assert asked == [longest] * 4, "attention, loss, and both in one, which asks twice"


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "heads", "groups", "width", "topk", "tiles", "loss"),
    [
        (4096, 8, 4, 64, 512, True, True),
        (16384, 64, 4, 128, 2048, False, True),
        (65536, 64, 4, 128, 2048, False, False),
    ],
)
def test_what_pays(tokens, heads, groups, width, topk, tiles, loss) -> None:
    """As it was timed (docs/log/2026-11.md)."""
    q, k = (torch.empty(1, tokens, h, width, dtype=torch.bfloat16, device="meta") for h in (heads, groups))
    lists = torch.empty(1, tokens, topk, dtype=torch.int32, device="meta")
    assert token_tiles.pays(q, k, k, lists, tokens) is tiles
    assert token_tiles.pays_for_loss(tokens, lists, tokens) is loss
    assert not token_tiles.pays(q, k, k, lists, 64 * tokens), "documents that are much longer than the lists"


@needs_kernels
def test_gradients_have_the_same_bits_twice(way: None) -> None:
    lists, _ = ops.index_topk(*indexer(1, 20, whole=False), topk=8)
    q, k, v = normal(1, 20, 4, 16), normal(1, 20, 2, 16, seed=1), normal(1, 20, 2, 16, seed=2)

    def gradients() -> tuple[Tensor, ...]:
        out = ops.token_sparse_attention(q, k, v, lists, backend="triton")
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize(("heads", "groups", "width"), [(32, 2, 128), (8, 4, 64)])
def test_in_bf16(heads: int, groups: int, width: int, way: None) -> None:
    """Against the reference in fp32 on the same rounded inputs."""
    lists, _ = ops.index_topk(*indexer(2, 300, whole=False), topk=64)
    sizes = enumerate((heads, groups, groups))
    inputs = [normal(2, 300, h, width, seed=i).detach().bfloat16().requires_grad_() for i, h in sizes]
    exact = [x.detach().float().requires_grad_() for x in inputs]
    out = ops.token_sparse_attention(*inputs, lists, backend="triton")
    expected = ops.token_sparse_attention(*exact, lists, backend="naive")
    weights = normal(*out.shape, seed=9).detach()
    found = [out, *torch.autograd.grad((out.float() * weights).sum(), inputs)]
    wanted = [expected, *torch.autograd.grad((expected * weights).sum(), exact)]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize("index_heads", [16, 64])
def test_the_loss_in_bf16(index_heads: int, way: None) -> None:
    """As above, with the loss attached."""
    index = [normal(2, 300, index_heads, 128, seed=5), normal(2, 300, 1, 128, seed=6).squeeze(2)]
    weights = normal(2, 300, index_heads, seed=7).detach() * (128 * index_heads) ** -0.5
    index = [x.detach().bfloat16().requires_grad_() for x in index]
    attention = [normal(2, 300, h, 128, seed=i).detach().bfloat16().requires_grad_() for i, h in enumerate((32, 2, 2))]
    lists, _ = ops.index_topk(*index, weights, topk=64)
    exact = [[x.detach().float().requires_grad_() for x in some] for some in (attention, index)]
    found = with_loss(attention, lists, [*index, weights.requires_grad_()], 1.0, "triton")
    wanted = with_loss(exact[0], lists, [*exact[1], weights], 1.0, "naive")
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()
