"""Causal attention by libraries: their selection, unsupported shapes, and their results against the reference."""

import json
from pathlib import Path

import pytest
import torch

from nsa import ops
from nsa.ops import geometry
from nsa.ops.dense import libraries
from nsa.ops.geometry import KnownLengths, known_lengths, tell_lengths
from nsa.training.engine import dense_attention_of
from tests.conftest import HAS_GPU
from tests.training.tiny import tiny_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


def borders(*lengths: int, device: torch.device = CPU) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def test_known_lengths() -> None:
    assert KnownLengths.of(borders(8)) == KnownLengths(8, True)
    assert KnownLengths.of(borders(8, 8, 8)) == KnownLengths(8, True)
    assert KnownLengths.of(borders(8, 0, 0)) == KnownLengths(8, True), "borders that are filled up"
    assert KnownLengths.of(borders(7, 9)) == KnownLengths(9, False)
    assert KnownLengths.of(borders(0)) == KnownLengths(0, False)
    assert known_lengths(borders(4, 4)) == KnownLengths(4, True), "the host can look"


def test_given_lengths_are_valid_until_the_boundaries_change(monkeypatch) -> None:
    """On a device the values are not read; the meta device stands for one."""
    there = borders(4, 4).to("meta")
    assert known_lengths(there) is None
    tell_lengths(there, KnownLengths(4, True))
    assert known_lengths(there) == KnownLengths(4, True)
    there.copy_(borders(3, 5).to("meta"))
    assert known_lengths(there) is None
    before = len(geometry._recorded_lengths)
    del there
    assert len(geometry._recorded_lengths) < before, "nothing is kept of boundaries that are gone"


@pytest.mark.parametrize(
    ("name", "widths", "dtype", "reason"),
    [
        ("cudnn", (64, 64), torch.float32, "16 bits"),
        ("cudnn", (256, 256), BF16, "no heads of 256 / 256"),
        ("cudnn", (60, 60), BF16, "multiples of 8"),
        ("flash", (192, 128), BF16, "as wide as values"),
        ("flash-attn-4", (264, 264), BF16, "up to 256"),
    ],
)
def test_shapes_that_a_library_does_not_support(
    name: str, widths: tuple[int, int], dtype: torch.dtype, reason: str
) -> None:
    assert reason in str(libraries.cannot(name, *widths, dtype))


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128)])
def test_cudnn_supports_the_usual_shapes(widths: tuple[int, int]) -> None:
    assert libraries.cannot("cudnn", *widths, BF16) is None


def test_the_table_names_existing_libraries() -> None:
    table = json.loads(Path(libraries.__file__).with_name("fastest.json").read_text())
    for order in table["order"].values():
        assert set(order) == {"equal", "packed"}
        for names in order.values():
            assert set(names) <= {"triton", *libraries.NAMES} and names[-1] == "triton"
            assert len(set(names)) == len(names)


@pytest.mark.skipif(HAS_GPU, reason="of a machine without a GPU")
def test_a_missing_library_is_rejected_at_the_start(tmp_path) -> None:
    for name in (*libraries.NAMES, "triton"):
        config = tiny_config(tmp_path, f"engine.dense_attention={name}")
        with pytest.raises(ValueError, match=rf"engine.dense_attention={name}: there is no CUDA.* can be auto$"):
            dense_attention_of(config, CPU)
        if name != "triton":
            x = torch.zeros(1, 8, 2, 16)
            with pytest.raises(ValueError, match=f"backend='{name}': there is no CUDA device"):
                ops.dense_attention(x, x, x, backend=name)
    assert dense_attention_of(tiny_config(tmp_path), CPU) == "torch"
    assert dense_attention_of(tiny_config(tmp_path, "attention.kind=nsa", "engine.dense_attention=cudnn"), CPU) is None


def test_an_unsupported_shape_is_rejected_with_alternatives(tmp_path, monkeypatch) -> None:
    """As on a Hopper GPU without FlashAttention's packages."""
    monkeypatch.setattr(
        libraries, "not_here", lambda name: "its package is not installed" if name[-1] in "34" else None
    )
    wide = ["model.head_dim=64", "model.v_head_dim=32", "engine.precision=bf16"]
    with pytest.raises(ValueError, match=r"flash: it has no heads of 64 / 32 .* can be auto, triton, cudnn$"):
        dense_attention_of(tiny_config(tmp_path, *wide, "engine.dense_attention=flash"), GPU)
    with pytest.raises(ValueError, match=r"cudnn: it computes in 16 bits.* can be auto, triton$"):
        dense_attention_of(tiny_config(tmp_path, "engine.precision=fp32", "engine.dense_attention=cudnn"), GPU)
    with pytest.raises(ValueError, match=r"flash-attn-4: its package is not installed.* cudnn"):
        dense_attention_of(tiny_config(tmp_path, *wide, "engine.dense_attention=flash-attn-4"), GPU)


@pytest.mark.parametrize(
    ("here", "name", "words"),
    [
        ((), "auto", "cudnn, or triton where documents differ in length (gradients differ"),
        (("flash-attn-4",), "auto", "flash-attn-4 (gradients differ"),
        (("flash-attn-4",), "flash-attn-4", "flash-attn-4 (gradients differ"),
        ((), "triton", "triton"),
        ((), "flash", "flash (gradients differ"),
    ],
)
def test_the_implementation_is_described_at_the_start(here, name: str, words: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(libraries, "not_here", lambda n: None if n in ("cudnn", "flash", *here) else "not installed")
    monkeypatch.setattr(libraries.torch.cuda, "get_device_capability", lambda device: (9, 0))
    libraries._order.cache_clear()
    config = tiny_config(tmp_path, "model.head_dim=64", "engine.precision=bf16", f"engine.dense_attention={name}")
    assert str(dense_attention_of(config, GPU)).startswith(words)
    libraries._order.cache_clear()


@pytest.mark.parametrize("packed", [False, True])
def test_flash_is_called_with_the_signature_of_this_torch(packed: bool) -> None:
    """On the meta device, without a GPU, since torch's private operators change between releases."""
    inputs = [torch.empty(1, 96, n, 64, device="meta", dtype=BF16, requires_grad=True) for n in (8, 2, 2)]
    cu_seqlens = torch.empty(4, device="meta", dtype=torch.int32) if packed else None
    out = libraries.attend("flash", *inputs, 0.1, cu_seqlens, KnownLengths(96, not packed))
    assert out.shape == (1, 96, 8, 64)
    gradients = torch.autograd.grad(out, inputs, torch.empty_like(out))
    assert [g.shape for g in gradients] == [x.shape for x in inputs]


def test_cudnn_is_called_with_the_signature_of_this_torch() -> None:
    """It has no meta kernel, so its arguments and results are compared with a fixed signature."""
    forward, backward = (
        getattr(torch.ops.aten, f"_cudnn_attention_{way}").default._schema for way in ("forward", "backward")
    )
    sizes = ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    options = ["compute_log_sumexp", "dropout_p", "is_causal", "return_debug_mask", "scale"]
    assert [a.name for a in forward.arguments] == ["query", "key", "value", "attn_bias", *sizes, *options]
    seeds = ["philox_seed", "philox_offset"]
    assert [r.name for r in forward.returns] == ["output", "logsumexp", *sizes, *seeds, "debug_attn_mask"]
    given = ["grad_out", "query", "key", "value", "out", "logsumexp", *seeds, "attn_bias"]
    assert [a.name for a in backward.arguments] == [*given, *sizes, "dropout_p", "is_causal", "scale"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", libraries.NAMES)
@pytest.mark.parametrize("lengths", [[96], [32, 32, 32], [1, 50, 45], [40, 56, 0, 0, 0], [0, 96, 0]])
def test_libraries_equal_the_reference(name: str, lengths: list[int]) -> None:
    """Our kernels compute the calls that a library does not support, and always the window."""
    if obstacle := libraries.not_here(name):
        pytest.skip(obstacle)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 96, n, 64, device="cuda", dtype=BF16, requires_grad=True) for n in (8, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    cu_seqlens = borders(*lengths, device=GPU)
    tell_lengths(cu_seqlens, KnownLengths.of(cu_seqlens.cpu()))
    for window in (None, 7):
        out = ops.dense_attention(*inputs, cu_seqlens=cu_seqlens, window=window, backend=name)
        expected = ops.dense_attention(*exact, cu_seqlens=cu_seqlens, window=window, backend="naive")
        d_out = torch.randn_like(out)
        ours, theirs = torch.autograd.grad(out, inputs, d_out), torch.autograd.grad(expected, exact, d_out.double())
        for a, b in zip((out, *ours), (expected, *theirs), strict=True):
            assert (a.double() - b).norm() < 1e-2 * b.norm()


@pytest.mark.gpu
def test_strict_determinism_takes_our_kernels() -> None:
    q, k, v = (torch.randn(1, 512, n, 64, device="cuda", dtype=BF16) for n in (8, 1, 1))
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert libraries.library_for("auto", q, k, v, KnownLengths(512, True)) is not None or not on_hopper
    torch.use_deterministic_algorithms(True)
    try:
        assert libraries.library_for("auto", q, k, v, KnownLengths(512, True)) is None
    finally:
        torch.use_deterministic_algorithms(False)
