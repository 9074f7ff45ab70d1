"""The operators around attention: cross-entropy from hidden states, and the residual sum with its norm.

Compares the PyTorch fallbacks with the reference, and on a GPU or in Triton's interpreter the kernels, too.
"""

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nsa import ops
from nsa.ops import cross_entropy as loss
from tests.conftest import HAS_GPU

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNELS = HAS_GPU or INTERPRETED
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
BACKENDS = ["torch", "triton"] if KERNELS else ["torch"]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype).requires_grad_()


def targets_of(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[::3] = loss.IGNORED
    return targets.to(DEVICE)


LOSSES = [(1, 16, 97), (7, 24, 96), (50, 16, 5000), (0, 16, 32)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize(("rows", "width", "columns"), LOSSES)
def test_cross_entropy(rows: int, width: int, columns: int, chunk: int | None, backend: str, monkeypatch) -> None:
    """Against torch's in float64, with kept logits and in chunks. Every row has another factor in the gradient."""
    if chunk:
        monkeypatch.setattr(loss, "KEPT_LOGITS", 0)
        monkeypatch.setattr(loss, "CHUNK_LOGITS", chunk * columns)
    hidden, weight, targets = normal(rows, width), normal(columns, width), targets_of(rows, columns)
    losses = ops.linear_cross_entropy(hidden, weight, targets, backend=backend)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = cross_entropy(wide[0] @ wide[1].T, targets, reduction="none")
    naive = ops.linear_cross_entropy(*wide, targets, backend="naive")
    torch.testing.assert_close(naive, expected)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    assert (losses[targets == loss.IGNORED] == 0).all()
    d_losses = torch.linspace(-1, 2, rows, device=DEVICE)
    ours = torch.autograd.grad(losses, (hidden, weight), d_losses, retain_graph=True)
    again = torch.autograd.grad(losses, (hidden, weight), d_losses)
    theirs = torch.autograd.grad(expected, wide, d_losses.double())
    for a, b, c in zip(ours, again, theirs, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, b)  # logits that the first pass overwrote are recomputed


@pytest.mark.parametrize("backend", ["naive", *BACKENDS])
def test_cross_entropy_is_nan_outside_of_the_vocabulary(backend: str) -> None:
    hidden, weight = normal(3, 16), normal(32, 16)
    losses = ops.linear_cross_entropy(hidden, weight, torch.tensor([0, 32, -1], device=DEVICE), backend=backend)
    assert losses.isnan().tolist() == [False, True, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sharded_vocabulary_equals_the_whole(backend: str) -> None:
    """Sharded as over tensor-parallel ranks. Logits of 1000 and -1000 neither overflow nor underflow."""
    logits, targets = normal(9, 96).detach() * 300, targets_of(9, 96).clamp(min=0)
    parts = [
        loss.statistics(x.contiguous(), targets, 32 * i, backend=backend) for i, x in enumerate(logits.split(32, 1))
    ]
    lse = torch.stack([own for own, _ in parts]).logsumexp(0)
    wanted = torch.stack([there for _, there in parts]).sum(0)
    torch.testing.assert_close(lse - wanted, cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-3)
    wide = logits.double().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(wide, targets, reduction="sum"), wide)
    ones = torch.ones_like(lse)
    found = [
        loss.logit_gradients(x.contiguous(), targets, lse, ones, 32 * i, backend=backend)
        for i, x in enumerate(logits.split(32, 1))
    ]
    torch.testing.assert_close(torch.cat(found, 1).double(), expected, rtol=1e-3, atol=1e-4)


def test_the_loss_keeps_logits_up_to_the_limit(monkeypatch) -> None:
    monkeypatch.setattr(loss, "KEPT_LOGITS", 97 * 49)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 97 * 8)
    seen = []
    original = loss.statistics
    monkeypatch.setattr(
        loss, "statistics", lambda x, *rest, **more: seen.append(x.numel()) or original(x, *rest, **more)
    )
    hidden, weight = normal(50, 16), normal(97, 16)
    losses = ops.linear_cross_entropy(hidden, weight, targets_of(50, 97))
    assert max(seen) == 97 * 8 and losses.grad_fn.logits is None
    losses = ops.linear_cross_entropy(hidden[:49], weight, targets_of(49, 97))
    assert losses.grad_fn.logits is not None


def test_cross_entropy_rejects_inconsistent_shapes() -> None:
    with pytest.raises(ValueError, match=r"hidden \(N, C\)"):
        ops.linear_cross_entropy(normal(3, 16), normal(32, 8), targets_of(3, 32))


NORMS = [
    ((1, 8), False),
    ((2, 17, 24), True),
    ((5, 96), True),
    ((1, 3, 300), False),
    ((700, 16), True),
    ((0, 16), True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("shape", "added"), NORMS)
def test_add_rms_norm(shape: tuple[int, ...], added: bool, backend: str) -> None:
    """Both results have a gradient."""
    x, delta, weight = normal(*shape), normal(*shape) * 2, normal(shape[-1])
    given = [x, weight, *([delta] if added else [])]
    ours = ops.add_rms_norm(x, weight, 1e-3, delta if added else None, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in given]
    expected = ops.add_rms_norm(wide[0], wide[1], 1e-3, wide[2] if added else None, backend="naive")
    d_both = [normal(*shape).detach(), normal(*shape).detach() + 1]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(ours, given, d_both)
    theirs = torch.autograd.grad(expected, wide, [d.double() for d in d_both])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unused_result_of_the_norm(backend: str) -> None:
    x, delta, weight = normal(5, 24), normal(5, 24) + 1, normal(24)
    for used in (0, 1):
        out = ops.add_rms_norm(x, weight, 1e-6, delta, backend=backend)[used]
        expected = ops.add_rms_norm(x, weight, 1e-6, delta, backend="naive")[used]
        ours = torch.autograd.grad(out.sum(), [x, delta, weight], allow_unused=True)
        theirs = torch.autograd.grad(expected.sum(), [x, delta, weight], allow_unused=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_reference_of_the_norm_equals_torch() -> None:
    x, weight = normal(4, 24), normal(24)
    expected = torch.nn.functional.rms_norm(x, (24,), weight, 1e-5)
    torch.testing.assert_close(ops.add_rms_norm(x, weight, 1e-5, backend="naive")[1], expected)


@pytest.mark.gpu
def test_in_16_bits() -> None:
    """In bf16, with the shapes of a real step: the result differs from fp32 by rounding only."""
    hidden, weight = normal(1000, 256, dtype=torch.bfloat16), normal(32768, 256, dtype=torch.bfloat16)
    targets = targets_of(1000, 32768)
    losses = ops.linear_cross_entropy(hidden, weight, targets)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = cross_entropy(wide[0] @ wide[1].T, targets, reduction="none")
    assert (losses.double() - expected)[targets >= 0].norm() < 1e-2 * expected.norm()
    theirs = torch.autograd.grad(expected.sum(), wide)
    for a, b in zip(torch.autograd.grad(losses.sum(), (hidden, weight)), theirs, strict=True):
        assert (a.double() - b).norm() < 3e-2 * b.norm()  # logits of up to 60, rounded to 8 bits
    for width in (384, 768, 2048, 4096, 8192):
        x, delta, scale = (normal(*s, dtype=torch.bfloat16) for s in ((3000, width), (3000, width), (width,)))
        ours = ops.add_rms_norm(x, scale, 1e-6, delta)
        wide = [t.detach().double().requires_grad_() for t in (x, scale, delta)]
        theirs = ops.add_rms_norm(wide[0], wide[1], 1e-6, wide[2], backend="naive")
        d_both = [torch.randn_like(x) for _ in range(2)]
        mine = torch.autograd.grad(ours, (x, scale, delta), d_both)
        expected = torch.autograd.grad(theirs, wide, [d.double() for d in d_both])
        for a, b in zip([*ours, *mine], [*theirs, *expected], strict=True):
            assert (a.double() - b).norm() < 1e-2 * b.norm(), width


@pytest.mark.skipif(not KERNELS, reason="runs within test_kernels.py::test_in_the_interpreter")
@pytest.mark.parametrize("sizes", [[8, 64, 8], [3, 40000, 1, 0, 8], [16384 * 2, 16]])
def test_many_tensors_are_added_in_one_launch(sizes: list[int]) -> None:
    from nsa.ops.kernels.accumulate import Accumulator

    total, parts = torch.ones(sum(sizes) + 9, device=DEVICE), [normal(n).detach() for n in sizes]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    accumulator = Accumulator(total, sizes, offsets)
    accumulator.add([torch.zeros_like(x) for x in parts])
    accumulator.add(parts)
    accumulator.add([x.clone() for x in parts])
    expected = torch.ones_like(total)
    expected[: sum(sizes)] += 2 * torch.cat(parts)
    torch.testing.assert_close(total, expected)
