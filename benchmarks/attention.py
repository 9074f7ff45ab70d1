"""Times every stage of native sparse attention, forward and backward, beside dense attention in the same run.

    python benchmarks/attention.py [--shapes A B] [--tokens 8192 32768] [--out FILE] [--profile]

Per stage: milliseconds (median, L2 flushed between repeats), TFLOP/s of the algorithm's operations, and the share of
the time that those would take at 700 TFLOP/s. Totals are of `ops.native_sparse_attention` itself with the selection
computed and then replaced by indices of each regime (benchmarks/attention_inputs.py), as ratios to torch's cuDNN and
flash attention. Correctness on a short sequence stands beside: relative L2 errors against float64, and those of cuDNN's
dense attention in bf16 for scale.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.attention_inputs import REGIMES, SHAPES, Shape, block_indices, distinct_blocks, normal
from nsa import ops
from nsa.ops.kernels import gates as gating
from nsa.ops.kernels import selection

CEILING = 700e12  # what a bf16 matrix product of random data reaches on an H200
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def time_ms(call) -> float:
    return do_bench(call, warmup=15, rep=80, return_mode="median")


def forward_backward(function, inputs: list[Tensor]) -> tuple[float, float]:
    """Milliseconds of the forward pass and of the backward pass alone."""
    out = function()
    d_out = torch.randn_like(out)
    backward = time_ms(lambda: torch.autograd.grad(out, inputs, d_out, retain_graph=True))
    return time_ms(function), backward


def dense(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel([DENSE[backend]]):
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)


class Inputs:
    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
        blocks = (tokens - shape.length) // shape.stride + 1
        self.q = normal(1, tokens, shape.heads, shape.width, dtype=dtype, grad=True)
        self.gates = torch.rand(1, tokens, shape.heads, 3, device="cuda").to(dtype).requires_grad_()
        self.pairs = [
            tuple(
                normal(1, count, shape.groups, width, seed=2 * i + j, dtype=dtype, grad=True)
                for j, width in enumerate((shape.width, shape.v_width), start=1)
            )
            for i, count in enumerate((blocks, tokens, tokens))
        ]

    @property
    def all(self) -> list[Tensor]:
        return [self.q, *(x for pair in self.pairs for x in pair), self.gates]


def fixed_indices(indices: Tensor):
    """`selection.select`, which still does its work, returning ``indices``."""
    select = selection.select
    return mock.patch.object(selection, "select", lambda *a: (select(*a), indices)[1])


def measure(shape: Shape, tokens: int, profile: bool) -> dict:
    x = Inputs(shape, tokens)
    compression = {"length": shape.length, "stride": shape.stride}
    selecting = {**compression, "block_size": shape.block_size, "num_blocks": shape.num_blocks}
    flops = shape.flops(tokens)
    result: dict = {"shape": shape.name, "tokens": tokens, "stages": {}, "total": {}}

    def stage(name: str, milliseconds: float, count: float | None) -> None:
        row = {"ms": round(milliseconds, 3)}
        if count:
            row |= {
                "tflops": round(count / milliseconds / 1e9),
                "floor": round(count / CEILING * 1e3 / milliseconds, 2),
            }
        result["stages"][name] = row
        print(f"{shape.name:5} {tokens:7} {name:32} {row}", flush=True)

    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = x.pairs
    for name, call, inputs in (
        ("compressed", lambda: ops.compressed_attention(x.q, k_cmp, v_cmp, **compression)[0], [x.q, k_cmp, v_cmp]),
        ("window", lambda: ops.dense_attention(x.q, k_win, v_win, window=shape.window), [x.q, k_win, v_win]),
    ):
        forward, backward = forward_backward(call, inputs)
        stage(f"{name} forward", forward, flops[f"{name} forward"])
        stage(f"{name} backward", backward, flops[f"{name} backward"])
    with torch.no_grad():
        _, lse = ops.compressed_attention(x.q, k_cmp, v_cmp, **compression)
        stage("selection", time_ms(lambda: ops.select_blocks(x.q, k_cmp, lse, **selecting)), flops["selection"])
    indices = {regime: block_indices(shape, tokens, regime) for regime in REGIMES}
    result["distinct_blocks"] = {
        regime: [round(distinct_blocks(i, tile), 1) for tile in (1, 2, 4, 8, 16)] for regime, i in indices.items()
    }
    for regime, chosen in indices.items():

        def call(chosen: Tensor = chosen) -> Tensor:
            return ops.selected_attention(x.q, k_slc, v_slc, chosen, block_size=shape.block_size)

        forward, backward = forward_backward(call, [x.q, k_slc, v_slc])
        stage(f"selected forward {regime}", forward, flops["selected forward"])
        stage(f"selected backward {regime}", backward, flops["selected backward"])
    with torch.no_grad():
        outs = [torch.randn(1, tokens, shape.heads, shape.v_width, device="cuda", dtype=x.q.dtype) for _ in range(3)]
        rows = lse.transpose(1, 2).contiguous()
        stage("combine forward", time_ms(lambda: gating.combine(x.gates, outs)), None)
        stage("combine backward", time_ms(lambda: gating.combine_backward(x.gates, outs[0], outs, [rows] * 3)), None)
        outs = rows = None  # type: ignore[assignment]

    reference = {}
    for backend in DENSE:
        try:
            reference[backend] = forward_backward(lambda b=backend: dense(b, x.q, k_slc, v_slc), [x.q, k_slc, v_slc])
        except RuntimeError as error:
            print(f"dense {backend}: {str(error).splitlines()[0]}")
            continue
        for direction, ms in zip(("forward", "backward"), reference[backend], strict=True):
            stage(f"dense {backend} {direction}", ms, flops[f"dense {direction}"])

    def whole() -> Tensor:
        return ops.native_sparse_attention(x.q, *x.pairs, x.gates, **shape.sizes)

    for regime, chosen in indices.items():
        with fixed_indices(chosen):
            forward, backward = forward_backward(whole, x.all)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = whole()
            saved = torch.cuda.memory_allocated() - before
            torch.autograd.grad(out, x.all, torch.ones_like(out))
            peak = torch.cuda.max_memory_allocated() - before
            del out
            row: dict = {"forward": forward, "backward": backward, "both": forward + backward}
            row = {name: round(ms, 2) for name, ms in row.items()} | {"peak_mb": peak >> 20, "saved_mb": saved >> 20}
            for backend, (dense_forward, dense_backward) in reference.items():
                row[f"vs_{backend}"] = {
                    "forward": round(dense_forward / forward, 2),
                    "backward": round(dense_backward / backward, 2),
                    "both": round((dense_forward + dense_backward) / (forward + backward), 2),
                }
            result["total"][regime] = row
            print(f"{shape.name:5} {tokens:7} total {regime:26} {row}", flush=True)
            if profile and regime == "trained":
                result["kernels"] = kernel_times(lambda: torch.autograd.grad(whole().sum(), x.all))
    return result


def longest(shape: Shape, tokens: int) -> dict:
    """One forward and backward pass at the selection's own choice; the last queries checked by the portable path."""
    x = Inputs(shape, tokens)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    out = ops.native_sparse_attention(x.q, *x.pairs, x.gates, **shape.sizes)
    middle.record()
    gradients = torch.autograd.grad(out, x.all, torch.ones_like(out))
    end.record()
    torch.cuda.synchronize()
    row = {
        "shape": shape.name,
        "tokens": tokens,
        "forward": round(start.elapsed_time(middle), 1),
        "backward": round(middle.elapsed_time(end), 1),
        "peak_mb": (torch.cuda.max_memory_allocated() - before) >> 20,
        "finite": all(bool(g.isfinite().all()) for g in gradients),
    }
    with torch.no_grad():
        tail = (x.q[:, -4:], *x.pairs, x.gates[:, -4:])
        expected = ops.native_sparse_attention(*tail, **shape.sizes, offset=tokens - 4, backend="torch")
        row["error"] = float(f"{((out[:, -4:] - expected).norm() / expected.norm()).item():.2e}")
    print("longest", row, flush=True)
    return row


def kernel_times(call) -> dict[str, float]:
    """Milliseconds by kernel of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    times = {event.key[:60]: event.self_device_time_total / 1e3 for event in profile.key_averages()}
    times = dict(sorted(((name, round(ms, 3)) for name, ms in times.items() if ms > 0.02), key=lambda item: -item[1]))
    for name, ms in times.items():
        print(f"    {ms:9.3f} ms  {name}", flush=True)
    return times


def errors(shape: Shape, tokens: int = 1024) -> dict:
    """Relative L2 errors of output and gradients against the float64 definition; cuDNN's dense ones for scale."""
    x, result = Inputs(shape, tokens), {}
    exact = [t.detach().double().requires_grad_() for t in x.all]

    def compare(ours: list[Tensor], theirs: list[Tensor]) -> float:
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))

    # The float64 selection would differ where importances nearly tie: both take the kernel's.
    out = ops.native_sparse_attention(x.q, *x.pairs, x.gates, **shape.sizes)
    with torch.no_grad():
        compression = {"length": shape.length, "stride": shape.stride}
        _, lse = ops.compressed_attention(x.q, *x.pairs[0], **compression)
        selecting = {**compression, "block_size": shape.block_size, "num_blocks": shape.num_blocks}
        chosen = ops.select_blocks(x.q, x.pairs[0][0], lse, **selecting)
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = exact
    naive = {"backend": "naive"}
    branches = (
        ops.compressed_attention(q, k_cmp, v_cmp, **compression, **naive)[0],
        ops.selected_attention(q, k_slc, v_slc, chosen, block_size=shape.block_size, **naive),
        ops.dense_attention(q, k_win, v_win, window=shape.window, **naive),
    )
    expected = sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
    d_out = torch.randn_like(out)
    result["output"] = compare([out], [expected])
    result["gradients"] = compare(
        list(torch.autograd.grad(out, x.all, d_out)), list(torch.autograd.grad(expected, exact, d_out.double()))
    )
    out = dense("cudnn", x.q, k_d := x.pairs[1][0], v_d := x.pairs[1][1])
    expected = ops.dense_attention(q, k_slc, v_slc, **naive)
    result["dense_output"] = compare([out], [expected])
    result["dense_gradients"] = compare(
        list(torch.autograd.grad(out, [x.q, k_d, v_d], d_out)),
        list(torch.autograd.grad(expected, [q, k_slc, v_slc], d_out.double())),
    )
    print(f"{shape.name:5} errors {result}", flush=True)
    return {name: float(f"{error:.3g}") for name, error in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["A"], choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 65536])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--longest", nargs="*", type=int, default=[], help="tokens of single passes of shape 'long'")
    parser.add_argument("--profile", action="store_true", help="also list the time of every kernel")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    report = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or None,
        "errors": {name: errors(SHAPES[name]) for name in options.shapes},
        "runs": [],
        "longest": [longest(SHAPES["long"], tokens) for tokens in options.longest],
    }
    for name in options.shapes:
        for tokens in options.tokens:
            report["runs"].append(measure(SHAPES[name], tokens, options.profile))
            torch.cuda.empty_cache()
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
