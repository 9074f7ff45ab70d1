"""Projections of a few rows against their definition in float64: fallback and reference; on a GPU or in Triton's
interpreter the kernel, too (without a GPU within tests/ops/test_kernels.py::test_in_the_interpreter)."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from nsa import ops
from nsa.models import Decoder, DecodingSteps
from tests.models.test_decoder import small
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels

BACKENDS = ["torch", "naive", pytest.param("triton", marks=needs_kernels)]
CASES = [  # leading sizes of x, outputs, columns
    ((1,), 1, 8),
    ((1, 1), 37, 24),
    ((2, 1), 64, 1032),  # a vector more than half a tile
    ((2,), 5, 2048),
    ((), 19, 72),
    ((2, 1), 6, 2056),  # a tile and a vector of 16 bits, two tiles and one of fp32
    ((1, 2), 5, 10000),  # two tiles of fp32, the last one not full
    ((0, 1), 6, 16),
]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


@pytest.fixture
def many_programs(monkeypatch) -> None:
    """Small sizes are cut like large ones: several weight rows for each program."""
    pytest.importorskip("triton")
    from nsa.ops.kernels import few_rows

    monkeypatch.setattr(few_rows, "PROGRAMS", 1)


def eighths(*shape: int, seed: int = 0) -> Tensor:
    """Up to 8. Sums of products are exact in fp32, in any order; in 16 bits a sum of 8 products is not."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randint(-64, 65, shape, generator=generator).to(DEVICE, torch.float64) / 8


def rounding(dtype: torch.dtype, backend: str) -> float:
    """Relative error of one result: one rounding. PyTorch may round more often."""
    return torch.finfo(dtype).eps * (0.5 if backend == "triton" else 2)


def of_parts(dtype: torch.dtype, backend: str, columns: int) -> float:
    """Error of a product: a library may add parts of the size of the result (22 is a product's) in 16 bits."""
    return torch.finfo(dtype).eps * 22 * columns**0.5 * (backend == "torch")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("lead", "outputs", "columns"), CASES)
def test_linear(lead, outputs: int, columns: int, biased: bool, dtype, backend: str, many_programs) -> None:
    """Sums of up to 10,000, of which 16 bits hold the first 8 or 11."""
    given = eighths(*lead, columns), eighths(outputs, columns), eighths(outputs) * 64 if biased else None
    found = ops.few_rows_linear(*(None if t is None else t.to(dtype) for t in given), backend=backend)
    expected = linear(*given)
    assert found.dtype == dtype and found.shape == expected.shape
    if backend == "triton":
        assert torch.equal(found, expected.to(dtype))
    allowed = rounding(dtype, backend) * expected.abs() + of_parts(dtype, backend, columns)
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lead", "outputs", "columns"), CASES)
def test_swiglu(lead, outputs: int, columns: int, dtype, backend: str, many_programs) -> None:
    """Gate and up are rounded to 16 bits before."""
    x, gate, up = eighths(*lead, columns), eighths(outputs, columns), eighths(outputs, columns, seed=12345)
    scale = 2.0 ** -round(math.log2(16 * columns**0.5))
    gate *= scale
    found = ops.few_rows_swiglu(x.to(dtype), gate.to(dtype), up.to(dtype), backend=backend)
    g, u = (linear(x, w).to(dtype).double() for w in (gate, up))
    expected = silu(g) * u
    assert found.dtype == dtype and found.shape == expected.shape
    allowed = (rounding(dtype, backend) + 2e-6) * expected.abs() + torch.finfo(dtype).smallest_normal / 512
    allowed += 2 * of_parts(dtype, backend, columns) * (silu(g).abs() + scale * u.abs())
    assert ((found.double() - expected).abs() <= allowed).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [2048, 10000])
def test_a_row_has_the_same_bits_beside_others(columns: int, dtype, many_programs) -> None:
    """And each time; also where a program takes another number of weight rows."""
    from nsa.ops.kernels import few_rows

    x, weight, up = normal(2, columns, dtype=dtype), normal(9, columns, dtype=dtype), normal(9, columns, dtype=dtype)
    calls: list[Callable[[Tensor, slice], Tensor]] = [
        lambda x, part: ops.few_rows_linear(x, weight[part], backend="triton"),
        lambda x, part: ops.few_rows_swiglu(x, weight[part], up[part], backend="triton"),
    ]
    for call in calls:
        whole = call(x, slice(None))
        assert torch.equal(call(x, slice(None)), whole)
        for rows in (slice(0, 1), slice(1, 2)):
            assert torch.equal(call(x[rows], slice(None)), whole[rows])
        few_rows.PROGRAMS = 1024  # undone with the fixture
        assert torch.equal(call(x, slice(None)), whole)
        few_rows.PROGRAMS = 1
        if columns * x.element_size() % 16 == 0:
            assert torch.equal(call(x, slice(3, None)), whole[:, 3:])


@needs_kernels
def test_nothing_beside_the_inputs_is_read_or_written(many_programs) -> None:
    """Around all of them lies NaN."""
    columns, outputs, rows = 1032, 5, 2
    around = torch.full((4 * outputs + 2 * rows, columns), torch.nan, device=DEVICE)
    x, weight = around[rows : 2 * rows], around[3 * rows : 3 * rows + outputs]
    x.copy_(eighths(rows, columns))
    weight.copy_(eighths(outputs, columns))
    expected = linear(x.double(), weight.double()).float()
    assert torch.equal(ops.few_rows_linear(x, weight, backend="triton"), expected)
    swish = silu(expected) * expected
    torch.testing.assert_close(ops.few_rows_swiglu(x, weight, weight, backend="triton"), swish)


@needs_kernels
def test_what_the_kernel_cannot_do_is_named() -> None:
    weight = normal(8, 16)
    for message, x, w in (
        ("at most 2 rows", normal(3, 16), weight),
        ("multiple of 4", normal(1, 15), normal(8, 15)),
        ("contiguous", normal(1, 8), normal(8, 8).T),
        ("multiples of 16 bytes", normal(1, 16), normal(8 * 16 + 1)[1:].view(8, 16)),
        ("no gradients", normal(1, 16).requires_grad_(), weight),
        ("share one of", normal(1, 16), weight.double()),
    ):
        with pytest.raises(ValueError, match=message):
            ops.few_rows_linear(x, w, backend="triton")
        with pytest.raises(ValueError, match=message):
            ops.few_rows_swiglu(x, w, w, backend="triton")
        if w.dtype == x.dtype:
            expected = linear(x, w)
            torch.testing.assert_close(ops.few_rows_linear(x, w), expected)
            torch.testing.assert_close(ops.few_rows_swiglu(x, w, w), silu(expected) * expected)
    with torch.no_grad():
        ops.few_rows_linear(normal(1, 16).requires_grad_(), weight, backend="triton")


def test_mistakes_are_named() -> None:
    x, weight = normal(2, 16), normal(8, 16)
    with pytest.raises(ValueError, match="do not belong together"):
        ops.few_rows_linear(x, normal(8, 12))
    with pytest.raises(ValueError, match="an entry for each row"):
        ops.few_rows_linear(x, weight, normal(16))
    with pytest.raises(ValueError, match="must have one shape"):
        ops.few_rows_swiglu(x, weight, normal(4, 16))
    with pytest.raises(ValueError, match="backend must be"):
        ops.few_rows_linear(x, weight, backend="cublas")


def test_what_auto_takes(monkeypatch) -> None:
    """The kernel where it pays and can: not for a head, many rows, or gradients."""
    from nsa.ops import few_rows

    monkeypatch.setattr(few_rows, "resolve_backend", lambda backend, *rest, **more: backend.replace("auto", "triton"))
    most, row = few_rows.MOST_OUTPUTS, normal(1, 16)
    for x, outputs, expected in (
        (row, most, "triton"),
        (row, most + 1, "torch"),
        (normal(2, 1, 16), 8, "triton"),
        (normal(3, 16), 8, "torch"),
        (normal(1, 16).requires_grad_(), 8, "torch"),
    ):
        assert few_rows._implementation("auto", x, normal(outputs, 16)) == expected
    assert few_rows._implementation("triton", row, normal(most + 1, 16)) == "triton"
    assert few_rows._implementation("torch", row, normal(8, 16)) == "torch"


@needs_kernels
@pytest.mark.parametrize(("kind", "bias"), [("dense", True), ("nsa", False)])
def test_steps_of_a_decoder(kind: str, bias: bool, monkeypatch, many_programs) -> None:
    """The projections of a step: four launches for each layer, and no other. On a GPU a step is a graph's replay."""
    from nsa.ops.kernels import few_rows

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "head_dim": 16, "v_head_dim": 16, "num_layers": 2}
    model, attention = small(kind, **shape, **({"qkv_bias": True} if bias else {}))
    attention = attention.model_copy(update={"nsa": attention.nsa.model_copy(update={"compress_hidden": 16})})
    decoder = Decoder(model, attention).to(DEVICE).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    calls = []
    original = few_rows._launch
    monkeypatch.setattr(few_rows, "_launch", lambda *args: calls.append(args[1].shape) or original(*args))
    with torch.no_grad():
        ids = torch.randint(0, 97, (2, 20), device=DEVICE)
        expected = decoder(ids)
        steps = DecodingSteps(decoder, ids[:, :18], 20, products="triton")
        del calls[:]
        for token in range(18, 20):
            torch.testing.assert_close(steps.step(ids[:, token]), expected[:, token], rtol=1e-4, atol=1e-4)
    if DEVICE == "cpu":
        assert len(calls) == 2 * 2 * 4 and calls[1:4] == [(32, 64), (40, 32), (32, 40)]


@needs_kernels
def test_too_many_sequences_for_the_kernel() -> None:
    decoder, ids = Decoder(*small("dense")).to(DEVICE).eval(), torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="at most 2 rows of x, got 3"):
        DecodingSteps(decoder, ids, 6, products="triton").step(ids[:, 0])
    assert INTERPRETED or DecodingSteps(decoder, ids, 6).step(ids[:, 0]).shape == (3, 97)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("outputs", "columns"), [(2912, 2048), (2048, 8192), (4096, 14336), (1024, 28672)])
def test_in_bf16_on_shapes_of_models(outputs: int, columns: int, rows: int) -> None:
    """As exact as cuBLAS, and the same bits in each of many launches."""
    x, weight = normal(rows, columns, dtype=torch.bfloat16), normal(outputs, columns, dtype=torch.bfloat16)
    up = weight.flip(0)
    expected = linear(x.double(), weight.double())
    first = ops.few_rows_linear(x, weight, backend="triton")
    theirs = linear(x, weight)
    assert (first.double() - expected).norm() <= 1.05 * (theirs.double() - expected).norm()
    both = ops.few_rows_swiglu(x, weight, up, backend="triton")
    g, u = (product.bfloat16().double() for product in (expected, expected.flip(-1)))
    assert (both.double() - silu(g) * u).norm() < 6e-3 * (silu(g) * u).norm()
    for _ in range(50):
        assert torch.equal(ops.few_rows_linear(x, weight, backend="triton"), first)
        assert torch.equal(ops.few_rows_swiglu(x, weight, up, backend="triton"), both)
