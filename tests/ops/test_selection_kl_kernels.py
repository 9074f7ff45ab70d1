"""The kernels of `ops.selection_kl` against its definition in float64: on a GPU if there is one, else in Triton's
interpreter (fp32), within tests/ops/test_kernels.py::test_in_the_interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.ops.selection_kl import block_attention
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels
from tests.ops.test_selection_kl import COLUMNS, inputs_of, loss_and_gradient, packing, sizes_of

# Three tf32 products of a GPU are less exact than the interpreter's fp32.
EXACT = 1e-5 if INTERPRETED else 2e-4
CASES = [  # as in test_selection_kl: length, stride, block size, initial, local, window
    (1, [50], 2, 2, 16, (8, 4, 8, 1, 2, 12)),
    (2, [41], 6, 2, 48, (4, 2, 8, 1, 1, 5)),
    (2, [70], 8, 1, 16, (4, 4, 12, 0, 1, 1)),  # blocks of three compressed keys
    (1, [1, 20, 0, 3, 33], 4, 2, 64, (8, 4, 8, 1, 1, 6)),
    (1, [0, 17, 1, 1, 26, 0], 6, 2, 16, (6, 2, 6, 2, 1, 3)),
    # The query's own block is a candidate, but not where no compressed key reaches into it.
    (1, [60], 2, 1, 128, (8, 4, 8, 1, 0, 1)),
    (1, [20, 7, 30], 4, 1, 16, (4, 2, 4, 0, 0, 1)),
    (2, [40], 4, 2, 16, (8, 4, 8, 1, 1, 100)),  # the window sees all
    (1, [30, 9, 12], 4, 2, 16, (8, 4, 8, 1, 1, 20)),  # and all of two documents of three
    (1, [150, 9, 100], 3, 1, 16, (12, 6, 48, 0, 1, 7)),  # tokens of a block: three tiles of keys
    (1, [130], 2, 2, 16, (4, 1, 20, 0, 1, 3)),  # and its compressed keys: two
    (1, [45, 20], 2, 2, 16, (4, 4, 4, 1, 1, 3)),  # a block is a compressed key
    (1, [40], 16, 1, 16, (8, 4, 8, 1, 1, 6)),
]


def given(
    batch: int, documents: list[int], heads: int, groups: int, width: int, sizes: dict[str, int], dtype=torch.float32
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], dict[str, Any]]:
    """Inputs on the device, the same in float64 on the CPU, and options of both but the borders of documents."""
    low = inputs_of(batch, documents, heads, groups, width, sizes, dtype)
    exact, there = [x.detach().double() for x in low], [x.detach().to(DEVICE) for x in low]
    for tensors in (exact, there):
        tensors[1].requires_grad_()
    return tuple(there), tuple(exact), sizes


def agree(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], tolerance: float = EXACT) -> None:
    """The loss, and the gradient on the scale of its largest entry."""
    (loss, gradient), (wanted, slope) = found, expected
    assert loss.dtype == torch.float32
    assert abs(loss.item() - wanted.item()) <= tolerance * wanted.item()
    assert (gradient.cpu() - slope).abs().max() <= tolerance * slope.abs().max()


@needs_kernels
@pytest.mark.parametrize(COLUMNS, CASES)
def test_they_equal_the_definition(batch, documents, heads, groups, width, sizes) -> None:
    there, exact, options = given(batch, documents, heads, groups, width, sizes_of(sizes))
    borders, options = packing(documents, DEVICE), options | {"scale": 0.7 * width**-0.5}
    found, again = (loss_and_gradient(*there, **options, cu_seqlens=borders, backend="triton") for _ in range(2))
    expected = loss_and_gradient(*exact, **options, cu_seqlens=packing(documents), backend="naive")
    agree(found, expected)
    assert (expected[0] > 0) == (options["window"] < 100)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    target = block_attention(*(there[i] for i in (0, 2, 3)), **options, cu_seqlens=borders, backend="triton")
    exactly = block_attention(*(exact[i] for i in (0, 2, 3)), **options, cu_seqlens=packing(documents))
    torch.testing.assert_close(target.cpu().double(), exactly, rtol=EXACT, atol=EXACT / 10)


@needs_kernels
@pytest.mark.parametrize("documents", [[90], [1, 40, 0, 3, 46]])
def test_chunks_of_queries_add_up(documents: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that bound the memory; and those of context-parallel ranks, with the keys up to their end."""
    from nsa.ops.kernels import selection_kl

    there, exact, options = given(1, documents, 4, 2, 16, sizes_of((8, 4, 8, 1, 1, 6)))
    borders = packing(documents, DEVICE)
    expected = loss_and_gradient(*exact, **options, cu_seqlens=packing(documents), backend="naive")
    launches: list[int] = []
    whole = selection_kl._learn

    def learn(q: Tensor, *rest: Any):
        launches.append(q.shape[1])
        return whole(q, *rest)

    monkeypatch.setattr(selection_kl, "_learn", learn)
    monkeypatch.setattr(selection_kl, "MOST_NUMBERS", 2 * -(-max(documents) // 8) * 25)
    agree(loss_and_gradient(*there, **options, cu_seqlens=borders, backend="triton"), expected)
    assert launches == [25, 25, 25, 15]
    q, k_cmp, k, lse = there
    loss, gradient = torch.zeros(()), 0
    for start, stop in ((0, 13), (13, 14), (14, 90)):
        clipped, part = None if borders is None else borders.clamp(max=stop), slice(start, stop)
        found = loss_and_gradient(
            q[:, part], k_cmp, k[:, :stop], lse[..., part], **options, cu_seqlens=clipped, offset=start,
            backend="triton",
        )  # fmt: skip
        loss, gradient = loss.to(DEVICE) + found[0], gradient + found[1]
    agree((loss, gradient), expected)
    target = block_attention(q, k, lse, **options, cu_seqlens=borders, backend="triton")
    if len(documents) == 1:
        part = block_attention(q[:, 30:], k, lse[..., 30:], **options, offset=30, backend="triton")
        torch.testing.assert_close(part, target[:, :, 30:])


@needs_kernels
@pytest.mark.parametrize("chunk", [None, 17], ids=["at once", "in chunks"])
@pytest.mark.parametrize("documents", [[90], [1, 40, 0, 3, 46, 0]])
def test_queries_that_lie_apart_equal_the_definition(
    documents: list[int], chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evenly spaced ones, those that were drawn, and those of some documents alone; with their LSEs by the kernels."""
    from nsa.ops.kernels import selection_kl

    there, exact, options = given(1, documents, 4, 2, 16, sizes_of((8, 4, 8, 1, 1, 6)))
    if chunk:
        monkeypatch.setattr(selection_kl, "MOST_NUMBERS", 2 * -(-max(documents) // 8) * chunk)
    drawn = torch.rand(90, generator=torch.Generator().manual_seed(0)) < 0.4
    for rows in (torch.arange(2, 90, 3), drawn.nonzero()[:, 0], torch.arange(45, 90, 2)):
        found, borders = [], (packing(documents, DEVICE), packing(documents))
        for (q, k_cmp, k, _), cu_seqlens, backend in zip((there, exact), borders, ("triton", "naive"), strict=True):
            here = rows.to(q.device)
            where = {"cu_seqlens": cu_seqlens, "positions": here.int(), "backend": backend}
            _, lse = ops.dense_attention(q[:, here], k, k, **where, return_lse=True)
            lse[..., -1] = -torch.inf  # as of what is no query
            found.append(loss_and_gradient(q[:, here], k_cmp, k, lse, **options, **where))
        agree(*found)
        assert found[1][0] > 0


@needs_kernels
def test_programs_that_share_keys_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.ops.kernels import selection_kl

    documents = [70, 20]
    monkeypatch.setattr(selection_kl, "TILES_PER_SPLIT", 1)
    there, exact, options = given(1, documents, 3, 1, 16, sizes_of((8, 4, 8, 1, 1, 6)))
    found = loss_and_gradient(*there, **options, cu_seqlens=packing(documents, DEVICE), backend="triton")
    agree(found, loss_and_gradient(*exact, **options, cu_seqlens=packing(documents), backend="naive"))


@needs_kernels
def test_queries_without_attention_have_no_target() -> None:
    there, exact, options = given(2, [40], 4, 2, 16, sizes_of((8, 4, 8, 1, 1, 6)))
    for tensors in (there, exact):
        tensors[3][1, :2, 20:] = -torch.inf  # the first KV head of the second sequence
    found = loss_and_gradient(*there, **options, backend="triton")
    agree(found, loss_and_gradient(*exact, **options, backend="naive"))
    target = block_attention(there[0], there[2], there[3], **options, backend="triton")
    assert not target[1, 0, 20:].any() and target[1, 1, 20:].any() and target[0, 0, 20:].any()


@needs_kernels
@pytest.mark.parametrize("sizes", [(8, 4, 8, 1, 1, 6), (16, 1, 16, 0, 1, 6)])
def test_loss_and_gradient_stay_finite(sizes: tuple[int, ...]) -> None:
    """Where the softmax gives nothing to most blocks, and keys of other documents have huge scores."""
    documents, options = [1, 60, 0, 35], sizes_of(sizes)
    q, k_cmp, k, _ = inputs_of(1, documents, 4, 2, 16, options, torch.float32)
    q, borders = 40 * q, packing(documents)
    _, lse = ops.dense_attention(q, k, k, cu_seqlens=borders, return_lse=True)
    there = q.to(DEVICE), k_cmp.detach().to(DEVICE).requires_grad_(), k.to(DEVICE), lse.to(DEVICE)
    found = loss_and_gradient(*there, **options, cu_seqlens=borders.to(DEVICE), backend="triton")
    assert found[0].isfinite() and found[1].isfinite().all() and found[1].any()
    if INTERPRETED:  # a GPU takes numbers below the smallest normal one as 0
        expected = loss_and_gradient(q, k_cmp, k, lse, **options, cu_seqlens=borders, backend="torch")
        agree(found, expected, 1e-3)


@needs_kernels
def test_a_key_that_gives_all_its_strides_to_a_block_of_tiny_importance_has_a_finite_slope() -> None:
    """A block of 16 keys, of which each covers 16 strides; two queries of the third block."""
    from nsa.ops.kernels import selection_kl

    seen, local = (torch.tensor([n, n], dtype=torch.int32, device=DEVICE) for n in (17, 32))
    target = torch.tensor([[1.0, 0.9], [0.0, 0.0]], device=DEVICE)  # (M, T)
    importance = torch.tensor([[2e-38, 1e-38], [1.0, 1.0]], device=DEVICE)
    loss = torch.empty(2, device=DEVICE)
    selection_kl.divergence_kernel[1, 1](
        target, importance, seen, local, loss, 2, 2, 0, 1, 16, RATIO=16, UNITS=16, BLOCKS=2, BT=16
    )
    assert loss.isfinite().all() and (16 * importance).isfinite().all()
    assert importance[0, 0] < -1e37 and importance[0, 1] == pytest.approx(0.9), "below the smallest number: the mass"
    torch.testing.assert_close(importance[1], target[0])


@needs_kernels
def test_what_has_no_key_has_no_loss() -> None:
    options = sizes_of((8, 4, 8, 0, 0, 1))
    for documents in ([3], [7, 7, 7], [8]):
        there, _, _ = given(1, documents, 4, 2, 16, options)
        found = loss_and_gradient(*there, **options, cu_seqlens=packing(documents, DEVICE), backend="triton")
        assert found[0] == 0 and not found[1].any()
    q, k_cmp, k, lse = given(1, [8], 4, 2, 16, options)[0]
    none = loss_and_gradient(q[:, :0], k_cmp, k, lse[..., :0], **options, backend="triton")
    assert none[0] == 0 and not none[1].any()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_plans_know_the_shapes(backend: str) -> None:
    """On the meta device."""
    options = sizes_of((8, 4, 8, 1, 1, 6))
    q, k_cmp, k, lse = (x.detach().to("meta") for x in inputs_of(2, [40], 4, 2, 16, options, torch.float32))
    k_cmp = k_cmp.to(torch.bfloat16).requires_grad_()
    loss = ops.selection_kl(q.bfloat16(), k_cmp, k.bfloat16(), lse, **options, backend=backend)
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, k_cmp)
    assert gradient.shape == k_cmp.shape and gradient.dtype == torch.bfloat16
    assert block_attention(q, k, lse, **options, backend=backend).shape == (2, 2, 40, 5)


@needs_kernels
def test_fakes_are_as_the_operators() -> None:
    from nsa.ops.kernels import operators  # noqa: F401, for torch.ops.nsa

    q, k_cmp, k, lse = (x.detach() for x in given(2, [41], 4, 2, 16, sizes_of((8, 4, 8, 1, 1, 6)))[0])
    lse = lse.transpose(1, 2).contiguous()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.nsa.selection_kl, (q, k_cmp, k, lse, None, 0, None, 8, 4, 8, 1, 1, 6, 41, 0.25), test_utils=checks
    )
    torch.library.opcheck(torch.ops.nsa.block_attention, (q, k, lse, None, 0, 8, 1, 1, 6, 41, 0.25), test_utils=checks)


@needs_kernels
def test_the_layer_takes_them() -> None:
    """With its backend, forward and backward, as with the PyTorch fallback; and so do its figures."""
    from nsa.layers.figure import values
    from nsa.layers.nsa.figures import measure_warm_up
    from nsa.layers.nsa.layer import BlockChoice, GatedBranches

    sizes = {"length": 8, "stride": 4, "block_size": 8, "num_blocks": 4, "num_initial": 1, "num_local": 1}
    q, k_cmp, k, _ = (x.detach() for x in given(1, [60], 4, 2, 16, sizes | {"window": 6})[0])
    found = []
    for backend in ("triton", "torch"):
        attend = GatedBranches(BlockChoice(**sizes, scale=0.25, backend=backend), window=6, phase="warm-up")
        assert attend.diverge.backend == backend
        compressed = k_cmp.clone().requires_grad_()
        inputs = q, (compressed, k_cmp), (k, k), (k, k), torch.zeros(1, 60, 4, 3, device=DEVICE)
        attend(*inputs)
        attend.loss.take().backward()
        found.append(
            [attend.loss.tally, compressed.grad, *map(torch.tensor, values(measure_warm_up(attend, *inputs)).values())]
        )
    torch.testing.assert_close(*found, rtol=10 * EXACT, atol=EXACT / 10)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("documents", "heads", "groups", "width", "sizes"),
    [
        ([700], 8, 4, 64, (32, 16, 64, 1, 2, 100)),
        ([1, 900, 0, 500, 31, 70, 800], 8, 4, 64, (32, 16, 64, 1, 2, 128)),
        ([600, 500], 6, 2, 128, (32, 16, 64, 1, 2, 64)),
        ([900], 16, 1, 128, (16, 8, 128, 0, 1, 64)),
        ([300, 600], 9, 1, 48, (32, 16, 96, 1, 0, 64)),
        ([800], 2, 2, 112, (16, 16, 16, 1, 2, 64)),
    ],
)
def test_on_a_gpu_they_equal_the_definition(documents, heads, groups, width, sizes, dtype) -> None:
    there, exact, options = given(1, documents, heads, groups, width, sizes_of(sizes), dtype)
    borders = packing(documents, DEVICE)
    found, again = (loss_and_gradient(*there, **options, cu_seqlens=borders, backend="triton") for _ in range(2))
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    expected = loss_and_gradient(*exact, **options, cu_seqlens=packing(documents), backend="naive")
    agree(found, expected, 2e-4 if dtype == torch.float32 else 0.02)
    target = block_attention(there[0], there[2], there[3], **options, cu_seqlens=borders, backend="triton")
    exactly = block_attention(exact[0], exact[2], exact[3], **options, cu_seqlens=packing(documents))
    exactly = torch.nn.functional.pad(exactly, (0, target.shape[3] - exactly.shape[3]))  # of the longest document
    torch.testing.assert_close(target.cpu().double(), exactly, rtol=1e-3, atol=1e-5)
