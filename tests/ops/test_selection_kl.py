"""`ops.selection_kl` against autograd of its definition in float64, against loops, and in the cases at its edges."""

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.ops.geometry import num_compressed
from nsa.ops.selection_kl import block_attention
from tests.ops.cases import cumulative

operator = sys.modules["nsa.ops.selection_kl"]  # the name in nsa.ops is the function
COLUMNS = ("batch", "documents", "heads", "groups", "width", "sizes")
# length, stride, block size, initial, local, window
CASES = [
    (1, [50], 4, 2, 8, (8, 4, 8, 1, 2, 12)),
    (2, [41], 6, 2, 6, (4, 2, 8, 1, 1, 5)),
    (2, [37], 3, 1, 8, (4, 4, 12, 0, 1, 1)),
    (1, [1, 20, 0, 3, 33], 4, 2, 8, (8, 4, 8, 1, 1, 6)),
    (1, [0, 17, 1, 1, 26, 0], 6, 3, 4, (6, 2, 6, 2, 1, 3)),
    (1, [48], 4, 2, 8, (4, 2, 8, 1, 0, 2)),  # the query's own block is a candidate
    (1, [20, 7, 30], 4, 1, 8, (4, 2, 4, 0, 0, 1)),
    (2, [40], 4, 2, 8, (8, 4, 8, 1, 1, 100)),  # the window sees all
    (1, [30, 9, 12], 4, 2, 8, (8, 4, 8, 1, 1, 20)),  # and all of two documents of three
]


def sizes_of(sizes: tuple[int, ...]) -> dict[str, int]:
    names = ("length", "stride", "block_size", "num_initial", "num_local", "window")
    return dict(zip(names, sizes, strict=True))


def packing(documents: list[int], device: str = "cpu") -> Tensor | None:
    return cumulative(documents).to(device) if len(documents) > 1 else None


def inputs_of(
    batch: int, documents: list[int], heads: int, groups: int, width: int, sizes: dict[str, int], dtype=torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k_cmp, k and the LSE of dense attention, on the CPU."""
    tokens, generator = sum(documents), torch.Generator().manual_seed(len(documents) + heads)
    blocks = num_compressed(tokens, sizes["length"], sizes["stride"])
    shapes = ((batch, tokens, heads, width), (batch, blocks, groups, width), (batch, tokens, groups, width))
    q, k_cmp, k = (2 * torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes)
    q, k_cmp, k = (x.to(dtype) for x in (q, k_cmp, k))
    _, lse = ops.dense_attention(
        q.double(), k.double(), k.double(), cu_seqlens=packing(documents), return_lse=True, backend="naive"
    )
    return q, k_cmp.requires_grad_(), k, lse if dtype == torch.float64 else lse.float()


def loss_and_gradient(q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The gradient is that of twice the loss, so that a factor which is forgotten is noticed."""
    loss = ops.selection_kl(q, k_cmp, k, lse, **options)
    (gradient,) = torch.autograd.grad(2 * loss, k_cmp)
    assert loss.shape == () and gradient.shape == k_cmp.shape and gradient.dtype == k_cmp.dtype
    return loss.detach(), gradient


@pytest.mark.parametrize("scores", [None, 1, 700], ids=["one tile", "rows", "small tiles"])
@pytest.mark.parametrize(COLUMNS, CASES)
def test_fallback_equals_the_definition(
    batch, documents, heads, groups, width, sizes, scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scores:
        monkeypatch.setattr(operator, "MAX_SCORES", scores)
    options = sizes_of(sizes)
    inputs = inputs_of(batch, documents, heads, groups, width, options)
    options |= {"cu_seqlens": packing(documents), "scale": 0.7}
    found = loss_and_gradient(*inputs, **options)
    expected = loss_and_gradient(*inputs, **options, backend="naive")
    torch.testing.assert_close(found, expected)
    assert found[0].dtype == torch.float64 and found[0] >= 0
    assert (found[0] > 0) == (options["window"] < 100)


def by_loops(q: Tensor, k_cmp: Tensor, k: Tensor, documents: list[int], sizes: dict[str, int]) -> float:
    """The definition, of each query, KV head, head and block on its own, in Python's numbers. Batch 1."""
    groups, per_group, total = k.shape[2], q.shape[2] // k.shape[2], 0.0
    length, stride, size = (sizes[name] for name in ("length", "stride", "block_size"))

    def product(a: Tensor, b: Tensor) -> float:
        return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / math.sqrt(len(a))

    first_row = 0
    for begin, end in itertools.pairwise(cumulative(documents).tolist()):
        tokens = end - begin
        rows = max(0, (tokens - length) // stride + 1)
        for t, g in itertools.product(range(tokens), range(groups)):
            own = t // size
            target, importance = [0.0] * (own + 1), [0.0] * (own + 1)
            seen = [row for row in range(rows) if row * stride + length - 1 <= t]
            covered = {(row * stride + unit) // size for row in seen for unit in range(0, length, stride)}
            for h in range(g * per_group, (g + 1) * per_group):
                dense = [math.exp(product(q[0, begin + t, h], k[0, begin + s, g])) for s in range(t + 1)]
                for s in range(t + 1):
                    if t - s >= sizes["window"]:
                        target[s // size] += dense[s] / sum(dense) / per_group
                coarse = [math.exp(product(q[0, begin + t, h], k_cmp[0, first_row + row, g])) for row in seen]
                for row, p in zip(seen, coarse, strict=True):
                    for unit in range(0, length, stride):
                        importance[(row * stride + unit) // size] += p / sum(coarse)
            choice = [j for j in range(sizes["num_initial"], own - sizes["num_local"] + 1) if j in covered]
            mass, whole = sum(target[j] for j in choice), sum(importance[j] for j in choice)
            for j in choice:
                if target[j]:
                    total += target[j] * (math.log(target[j] / mass) - math.log(importance[j] / whole))
        first_row += rows
    return total / groups


@pytest.mark.parametrize("sizes", [(4, 2, 4, 1, 1, 3), (2, 2, 4, 0, 0, 1), (4, 2, 6, 0, 2, 2)])
@pytest.mark.parametrize("documents", [[19], [1, 13, 0, 3, 9]])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_it_equals_loops(documents: list[int], sizes: tuple[int, ...], backend: str) -> None:
    options = sizes_of(sizes)
    q, k_cmp, k, lse = inputs_of(1, documents, 4, 2, 4, options)
    found = ops.selection_kl(q, k_cmp, k, lse, **options, cu_seqlens=packing(documents), backend=backend)
    assert found.item() == pytest.approx(by_loops(q, k_cmp.detach(), k, documents, options), rel=1e-10)


@pytest.mark.parametrize("documents", [[50], [1, 20, 0, 3, 26]])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_chunks_of_queries_add_up(documents: list[int], backend: str) -> None:
    """As context-parallel ranks compute them: of the queries of a chunk, with the keys up to its end."""
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = inputs_of(1, documents, 4, 2, 8, options)
    borders = packing(documents)
    whole = loss_and_gradient(q, k_cmp, k, lse, **options, cu_seqlens=borders, backend=backend)
    loss, gradient = 0, 0
    for start, stop in ((0, 13), (13, 14), (14, 50)):
        clipped = None if borders is None else borders.clamp(max=stop)
        part = slice(start, stop)
        found = loss_and_gradient(
            q[:, part], k_cmp, k[:, :stop], lse[..., part], **options, cu_seqlens=clipped, offset=start, backend=backend
        )
        loss, gradient = loss + found[0], gradient + found[1]
    torch.testing.assert_close((loss, gradient), whole)


@pytest.mark.parametrize("scores", [None, 700], ids=["one tile", "small tiles"])
@pytest.mark.parametrize("documents", [[50], [1, 20, 0, 3, 26, 0]])
@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_queries_that_lie_apart_add_up(
    documents: list[int], backend: str, scores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three parts of the queries, evenly spaced and drawn; their LSEs are those of dense attention at these places."""
    if scores:
        monkeypatch.setattr(operator, "MAX_SCORES", scores)
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = inputs_of(1, documents, 4, 2, 8, options)
    options |= {"cu_seqlens": packing(documents), "backend": backend}
    whole = loss_and_gradient(q, k_cmp, k, lse, **options)
    others = torch.tensor([t for t in range(50) if t % 3])
    drawn = torch.rand(len(others), generator=torch.Generator().manual_seed(0)) < 0.5
    loss, gradient = 0, 0
    for rows in (torch.arange(0, 50, 3), others[drawn], others[~drawn]):
        positions = rows.int()
        _, there = ops.dense_attention(
            q[:, rows], k, k, cu_seqlens=options["cu_seqlens"], positions=positions, return_lse=True, backend=backend
        )
        torch.testing.assert_close(there, lse[..., rows])
        found = loss_and_gradient(q[:, rows], k_cmp, k, there, **options, positions=positions)
        loss, gradient = loss + found[0], gradient + found[1]
    assert len(others[drawn]) != len(others[~drawn])
    torch.testing.assert_close((loss, gradient), whole)


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_places_that_are_none_are_refused(backend: str) -> None:
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = inputs_of(1, [50], 4, 2, 8, options)

    def refusal(positions: Tensor) -> str:
        with pytest.raises(ValueError, match="positions must") as raised:
            ops.selection_kl(q[:, :3], k_cmp, k, lse[..., :3], **options, positions=positions, backend=backend)
        with pytest.raises(ValueError, match="positions must") as again:
            ops.dense_attention(q[:, :3], k, k, positions=positions, backend=backend)
        assert str(raised.value) == str(again.value)
        return str(raised.value)

    assert "(3,) int32, got (2,) torch.int32" in refusal(torch.tensor([1, 2]).int())
    assert "(3,) int32, got (3,) torch.int64" in refusal(torch.tensor([1, 2, 3]))
    for places in ([1, 3, 2], [1, 1, 2], [-1, 2, 3], [1, 2, 50]):
        assert "must rise, from 0 to at most 49" in refusal(torch.tensor(places).int())


@pytest.mark.parametrize("backend", ["torch", "naive"])
@pytest.mark.parametrize(
    ("documents", "sizes"),
    [
        ([16], (8, 4, 8, 1, 1, 4)),  # the blocks are forced, all of them
        ([3], (8, 4, 8, 0, 0, 1)),  # no compressed block
        ([7, 7, 7], (8, 4, 8, 0, 0, 1)),  # none, though three documents together would have some
        ([40], (8, 4, 8, 1, 1, 40)),  # the window reaches everything
    ],
)
def test_where_there_is_no_choice_nothing_is_learned(
    documents: list[int], sizes: tuple[int, ...], backend: str
) -> None:
    options = sizes_of(sizes)
    inputs = inputs_of(1, documents, 4, 2, 8, options, torch.float32)
    loss, gradient = loss_and_gradient(*inputs, **options, cu_seqlens=packing(documents), backend=backend)
    assert loss == 0 and not gradient.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("factor", "sizes"), [(1, (8, 4, 8, 1, 1, 6)), (40, (8, 4, 8, 1, 1, 6)), (40, (16, 1, 16, 0, 1, 6))]
)
def test_loss_and_gradient_stay_finite(dtype: torch.dtype, factor: int, sizes: tuple[int, ...]) -> None:
    """Also where the softmax gives nothing to most blocks, and where keys of other documents have huge scores."""
    documents, options = [1, 60, 0, 35], sizes_of(sizes)
    q, k_cmp, k, lse = inputs_of(1, documents, 4, 2, 8, options)
    q = q * factor
    _, lse = ops.dense_attention(q, k, k, cu_seqlens=packing(documents), return_lse=True)
    given = (q.to(dtype), k_cmp.detach().to(dtype).requires_grad_(), k.to(dtype), lse.float())
    loss, gradient = loss_and_gradient(*given, **options, cu_seqlens=packing(documents))
    assert loss.dtype == torch.float32 and loss.isfinite() and gradient.isfinite().all() and gradient.any()
    if factor == 1:
        exact = loss_and_gradient(
            *(x.detach().double().requires_grad_() for x in given), **options, cu_seqlens=packing(documents)
        )
        tolerance = 0.02 if dtype == torch.bfloat16 else 1e-4
        assert loss.item() == pytest.approx(exact[0].item(), rel=tolerance)
        assert (gradient - exact[1]).abs().max() < tolerance * exact[1].abs().max()


def test_many_tiles_are_summed_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of bf16 would lose what each of a hundred tiles adds."""
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = inputs_of(1, [200], 4, 2, 8, options, torch.bfloat16)
    found = []
    for scores in (operator.MAX_SCORES, 1):  # of all queries, and of each
        monkeypatch.setattr(operator, "MAX_SCORES", scores)
        found.append(loss_and_gradient(q, k_cmp, k, lse.float(), **options)[1].float())
    assert (found[0] - found[1]).abs().max() < 0.006 * found[0].abs().max()  # one rounding


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_it_is_zero_where_the_importance_is_the_target(backend: str) -> None:
    """Blocks of one token, which the compressed keys repeat. The window sees the query alone, which is local."""
    q, _, k, lse = inputs_of(1, [9, 0, 22], 1, 1, 8, sizes_of((1, 1, 1, 0, 1, 1)))
    k_cmp = k.clone().requires_grad_()
    options = sizes_of((1, 1, 1, 2, 1, 1)) | {"cu_seqlens": packing([9, 0, 22])}
    loss, gradient = loss_and_gradient(q, k_cmp, k, lse, **options, backend=backend)
    assert loss.abs() < 1e-12 and gradient.abs().max() < 1e-12
    other, _ = loss_and_gradient(q, (2 * k).requires_grad_(), k, lse, **options, backend=backend)
    assert other > 0.1


def test_queries_keys_and_their_lse_have_no_gradient() -> None:
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = (x.detach().requires_grad_() for x in inputs_of(1, [40], 4, 2, 8, options))
    for backend in ("torch", "naive"):
        found = torch.autograd.grad(
            ops.selection_kl(q, k_cmp, k, lse, **options, backend=backend), (q, k, lse, k_cmp), allow_unused=True
        )
        assert found[:3] == (None, None, None) and found[3].any()


@pytest.mark.parametrize("documents", [[50], [1, 20, 0, 3, 26]])
@pytest.mark.parametrize("scores", [None, 1], ids=["one tile", "rows"])
def test_block_attention_is_the_mass_outside_of_window_and_forced_blocks(
    documents: list[int], scores: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each block, and in sum; of all of a document's blocks, and of some queries alone."""
    if scores:
        monkeypatch.setattr(operator, "MAX_SCORES", scores)
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, _, k, lse = inputs_of(1, documents, 4, 2, 8, options)
    found = block_attention(q, k, lse, **options, cu_seqlens=packing(documents))
    assert found.shape == (1, 2, 50, -(-max(documents) // 8))
    for begin, end in itertools.pairwise(cumulative(documents).tolist()):
        for token in range(begin, end):
            local = token - begin
            p = [(q[0, token, h] @ k[0, begin : token + 1, h // 2].T * 8**-0.5).softmax(0) for h in range(4)]
            for group in (0, 1):
                mean = (p[2 * group] + p[2 * group + 1]) / 2
                expected = torch.zeros(found.shape[3], dtype=torch.float64)
                for block in range(1, local // 8):
                    expected[block] = mean[8 * block : min(8 * block + 8, max(0, local - 5))].sum()
                torch.testing.assert_close(found[0, group, token], expected)
    if len(documents) == 1:
        part = block_attention(q[:, 30:], k, lse[..., 30:], **options, offset=30)
        torch.testing.assert_close(part, found[:, :, 30:])


def test_wrong_shapes_are_rejected() -> None:
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = inputs_of(1, [40], 4, 2, 8, options)
    with pytest.raises(ValueError, match="k has 39 tokens, the queries end at 40"):
        ops.selection_kl(q, k_cmp, k[:, 1:], lse, **options)
    with pytest.raises(ValueError, match="the queries end at 41"):
        ops.selection_kl(q, k_cmp, k, lse, **options, offset=1)
    with pytest.raises(ValueError, match=r"lse must be \(1, 4, 40\), got \(1, 40, 4\)"):
        ops.selection_kl(q, k_cmp, k, lse.transpose(1, 2), **options)
    with pytest.raises(ValueError, match="multiple of stride"):
        ops.selection_kl(q, k_cmp, k, lse, **options | {"stride": 3})
    with pytest.raises(ValueError, match="forced blocks"):
        ops.selection_kl(q, k_cmp, k, lse, **options | {"num_local": -1})
    with pytest.raises(ValueError, match="k_cmp has 1 heads, k has 2"):
        ops.selection_kl(q, k_cmp[:, :, 1:], k, lse, **options)
    for wrong in ((q[..., 1:], k_cmp, k), (q, k_cmp[..., 1:], k), (q[:, :, 1:], k_cmp, k), (q, k_cmp, k[..., 1:])):
        with pytest.raises(ValueError, match=r"k|heads"):
            ops.selection_kl(*wrong, lse, **options)
    with pytest.raises(ValueError, match="backend='triton'"):  # float64
        ops.selection_kl(q, k_cmp, k, lse, **options, backend="triton")
    with pytest.raises(ValueError, match=r"from 0 to the number of tokens \(17\)"):  # a kernel would write beyond them
        block_attention(q[:, :17], k, lse[..., :17], **options, cu_seqlens=packing([30, 10]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(COLUMNS, CASES)
def test_on_a_gpu_it_equals_the_definition_in_float64(batch, documents, heads, groups, width, sizes, dtype) -> None:
    options = sizes_of(sizes)
    given = inputs_of(batch, documents, heads, groups, width, options, dtype)
    exact = [x.detach().double() for x in given]
    exact[1].requires_grad_()
    expected = loss_and_gradient(*exact, **options, cu_seqlens=packing(documents), backend="naive")
    there = [x.detach().cuda() for x in given]
    there[1].requires_grad_()
    found, again = (loss_and_gradient(*there, **options, cu_seqlens=packing(documents, "cuda")) for _ in range(2))
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    assert (found[0].cpu() - expected[0]).abs() <= tolerance * expected[0]
    assert (found[1].cpu() - expected[1]).abs().max() <= tolerance * expected[1].abs().max()
