"""Times native sparse attention, by stages and as a whole, against dense attention and other implementations.

    python benchmarks/attention.py [--shapes A B=8192,32768] [--tokens 8192 65536] [--out FILE] [--profile]
        [--dense cudnn flash flex flash-attn flash-attn-4] [--peers fla=8192 sfnsa xunhao] [--peer-path sfnsa=DIR]

Per stage: milliseconds (median, L2 flushed between repeats; in a CUDA graph, as in training, or eager if the call waits
for the GPU), TFLOP/s of the algorithm's operations, GB/s of the bytes that must be moved, and the share of the time
that these would take at the ceilings in benchmarks/measure.py. Totals are of `ops.native_sparse_attention`, whose
selection is computed and then replaced by indices of each regime (benchmarks/attention_inputs.py), with peak and saved
memory, and ratios to each dense implementation. A peer's stage is measured in the same run as our call of the same
function, with the difference of their results.

`ncu --profile-from-start off python benchmarks/attention.py --shapes A=65536 --single-pass` profiles each kernel once.

Correctness: relative L2 errors against the float64 reference on 1024 tokens, with those of cuDNN's dense attention for
comparison. `python benchmarks/report.py` converts the JSON of --out to docs/performance.md.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import dense, measure, peers
from benchmarks.attention_inputs import REGIMES, SHAPES, Inputs, Shape, block_indices, distinct_blocks, normal
from benchmarks.measure import (
    Call,
    Times,
    agreement,
    called_ms,
    forward_backward,
    memory_mb,
    need_gpu,
    time_ms,
)
from nsa import ops
from nsa.ops.kernels import gates as gating
from nsa.ops.kernels import selection
from nsa.training.signals import die_with_parent

BRANCHES = ("compressed", "selected", "window")


def fixed_indices(indices: Tensor):
    """Replace `selection.select` by a function that still runs it, but returns ``indices``."""
    select = selection.select
    return mock.patch.object(selection, "select", lambda *a: (select(*a), indices)[1])


class Report:
    """One shape at one length; `result` is its entry in the JSON."""

    def __init__(self, shape: Shape, tokens: int) -> None:
        self.shape, self.tokens = shape, tokens
        self.flops, self.bytes = shape.flops(tokens), shape.bytes(tokens)
        self.result: dict = {"shape": shape.name, "tokens": tokens, "stages": {}, "dense": {}, "total": {}, "peers": {}}

    def show(self, what: str, row: object) -> None:
        print(f"{self.shape.name:5} {self.tokens:7} {what:36} {row}", flush=True)

    def stage(self, name: str, milliseconds: float, counted_as: str) -> None:
        row = measure.row(milliseconds, self.flops.get(counted_as), self.bytes.get(counted_as))
        self.result["stages"][name] = row
        self.show(name, row)

    def both(self, name: str, call: Call, counted_as: str) -> None:
        times = forward_backward(call)
        for direction, milliseconds in (("forward", times.forward), ("backward", times.backward)):
            self.stage(name.replace("*", direction), milliseconds, f"{counted_as} {direction}")


def stages(report: Report, x: Inputs, indices: dict[str, Tensor]) -> None:
    """Measure every stage alone."""
    shape, tokens = report.shape, report.tokens
    compression = {"length": shape.length, "stride": shape.stride}
    selecting = {**compression, "block_size": shape.block_size, "num_blocks": shape.num_blocks}
    (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = x.pairs

    weights = []
    for width in (shape.width, shape.v_width):
        inner = normal(width, shape.length * width, grad=True), normal(shape.length, width, grad=True)
        weights.append((*inner, normal(width, width, grad=True)))

    def compress() -> Tensor:
        pair = (ops.compress_blocks(t, *w, **compression) for t, w in zip((k_slc, v_slc), weights, strict=True))
        return torch.cat(list(pair), -1)  # one output for both: a copy of T / 16 rows

    report.both("compression *", Call(compress, (k_slc, v_slc, *weights[0], *weights[1])), "compression")
    inputs = (x.q, k_cmp, v_cmp)
    report.both(
        "compressed *",
        Call(lambda: ops.compressed_attention(x.q, k_cmp, v_cmp, **compression)[0], inputs),
        "compressed",
    )
    with torch.no_grad():
        _, lse = ops.compressed_attention(x.q, k_cmp, v_cmp, **compression)
        report.stage("selection", time_ms(lambda: ops.select_blocks(x.q, k_cmp, lse, **selecting))[0], "selection")
    for regime, chosen in indices.items():

        def select(chosen: Tensor = chosen) -> Tensor:
            return ops.selected_attention(x.q, k_slc, v_slc, chosen, block_size=shape.block_size)

        report.both(f"selected * {regime}", Call(select, (x.q, k_slc, v_slc)), "selected")
    windowed = Call(lambda: ops.dense_attention(x.q, k_win, v_win, window=shape.window), (x.q, k_win, v_win))
    report.both("window *", windowed, "window")
    with torch.no_grad():
        outs = [torch.randn(1, tokens, shape.heads, shape.v_width, device="cuda", dtype=x.q.dtype) for _ in range(3)]
        rows = lse.transpose(1, 2).contiguous()
        report.stage("combine forward", time_ms(lambda: gating.combine(x.gates, outs))[0], "combine forward")
        backward, _ = time_ms(lambda: gating.combine_backward(x.gates, outs[0], outs, [rows] * 3))
        report.stage("combine backward", backward, "combine backward")


def against_dense(report: Report, x: Inputs, names: list[str]) -> None:
    """Measure other implementations of dense and windowed attention on the same tensors."""
    (k, v), window = x.pairs[1], report.shape.window
    for name in names:
        function, entry = dense.KNOWN[name], {}
        for kind, size in (("dense", None), ("window", window)):
            call = Call(lambda f=function, s=size: f(x.q, k, v, s), (x.q, k, v))
            ours = Call(lambda s=size: ops.dense_attention(x.q, k, v, window=s, backend="triton"), (x.q, k, v))
            try:
                differs = agreement(call, ours)
                times = forward_backward(call)
            except NotImplementedError:
                continue
            except Exception as error:  # reported as the result
                entry[kind] = {"refused": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
                report.show(f"{name} {kind}", entry[kind])
                continue
            entry[kind] = _times(times) | {"differs": differs}
            if kind == "dense":
                entry[kind] |= memory_mb(call)
            for direction, ms in (("forward", times.forward), ("backward", times.backward)):
                count = report.flops[f"{kind} {direction}"]
                entry[kind][f"{direction}_tflops"] = round(count / ms / 1e9)
            report.show(f"{name} {kind}", entry[kind])
        report.result["dense"][name] = entry
        torch.cuda.empty_cache()


def whole(report: Report, x: Inputs, indices: dict[str, Tensor], profile: bool) -> None:
    """Measure the operator in each regime, with memory and ratios to dense attention."""
    shape = report.shape
    call = Call(lambda: ops.native_sparse_attention(x.q, *x.pairs, x.gates, **shape.sizes), x.all)
    d_out = torch.randn(1, report.tokens, shape.heads, shape.v_width, device="cuda", dtype=x.q.dtype)
    floor = {
        direction: sum(
            measure.row(1.0, report.flops[f"{b} {direction}"], report.bytes[f"{b} {direction}"])["floor_ms"]
            for b in BRANCHES
        )
        for direction in ("forward", "backward")
    }
    floor["forward"] += measure.row(1.0, report.flops["selection"], report.bytes["selection"])["floor_ms"]
    report.result["floor_ms"] = {direction: round(ms, 2) for direction, ms in floor.items()}
    for regime, chosen in indices.items():
        with fixed_indices(chosen):
            times = forward_backward(call)
            row = _times(times) | memory_mb(call)
            row["floor_share"] = {
                "forward": round(floor["forward"] / times.forward, 2),
                "backward": round(floor["backward"] / times.backward, 2),
            }
            row["vs"] = {
                name: {d: round(entry["dense"][d] / row[d], 2) for d in ("forward", "backward", "both")}
                for name, entry in report.result["dense"].items()
                if "both" in entry.get("dense", {})
            }
            row["called"] = round(called_ms(lambda: torch.autograd.grad(call.run(), x.all, d_out)), 3)
            report.result["total"][regime] = row
            report.show(f"total {regime}", row)
            if profile and regime == "trained":
                report.result["kernels"] = kernel_times(lambda: torch.autograd.grad(call.run().sum(), x.all))


def against_peers(
    report: Report, x: Inputs, indices: dict[str, Tensor], adapters: dict[str, object], whole_only: bool
) -> None:
    """Measure other implementations by stages, each against our call of the same function."""
    for name, peer in adapters.items():
        if reason := peer.refuses(report.shape):
            report.result["peers"][name] = {"version": peer.version, "refuses": reason}
            report.show(name, f"refuses: {reason}")
            continue
        entry = report.result["peers"][name] = {"version": peer.version, "stages": {}}
        try:
            for stage, theirs, mine in peer.calls(x, report.shape, indices):
                if whole_only and stage != "total":
                    continue
                times = forward_backward(theirs, peer.recordable)
                row = _times(times) | {"differs": agreement(theirs, mine)}
                if stage == "total":
                    row |= memory_mb(theirs)
                row["ours"] = _times(forward_backward(mine))
                row["ratio"] = {
                    d: round(row[d] / row["ours"][d], 2) for d in ("forward", "backward", "both") if row["ours"][d]
                }
                entry["stages"][stage] = row
                report.show(f"{name} {stage}", row)
                torch.cuda.empty_cache()
        except Exception as error:  # keep its stages so far and continue
            entry["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            report.show(name, entry["failed"])


def _times(times: Times) -> dict[str, float]:
    both = times.forward + times.backward
    row = {"forward": round(times.forward, 3), "backward": round(times.backward, 3), "both": round(both, 3)}
    return row if times.recorded else row | {"recorded": False}


def run(shape: Shape, tokens: int, options: argparse.Namespace, adapters: dict[str, object]) -> dict:
    report, x = Report(shape, tokens), Inputs(shape, tokens)
    indices = {regime: block_indices(shape, tokens, regime) for regime in options.regimes}
    report.result["distinct_blocks"] = {
        regime: [round(distinct_blocks(i, tile), 1) for tile in (1, 2, 4, 8, 16)] for regime, i in indices.items()
    }
    if not options.no_stages:
        stages(report, x, indices)
    against_dense(report, x, [name for name in options.dense if tokens <= options.dense[name]])
    whole(report, x, indices, options.profile)
    chosen = {name: peer for name, peer in adapters.items() if tokens in (options.peers[name] or (tokens,))}
    against_peers(report, x, {r: i for r, i in indices.items() if r != "coherent"}, chosen, options.no_stages)
    return report.result


def single_pass(shape: Shape, tokens: int) -> None:
    """One forward and backward pass on trained-like indices for a profiler, after the kernels are compiled."""
    x = Inputs(shape, tokens)
    with fixed_indices(block_indices(shape, tokens, "trained")):
        for watched in (False, True):
            torch.cuda.synchronize()
            if watched:
                torch.cuda.profiler.start()
            out = ops.native_sparse_attention(x.q, *x.pairs, x.gates, **shape.sizes)
            torch.autograd.grad(out, x.all, torch.ones_like(out))
            torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def compile_side_by_side(names: list[str], options: argparse.Namespace) -> None:
    """Fill Triton's cache with a process for each shape, since compiling in sequence takes longer than measuring."""

    def compile_one(name: str) -> None:
        command = [sys.executable, __file__, "--shapes", f"{name}=2048", "--regimes", *options.regimes, "--dense"]
        command += ["--no-stages"] if options.no_stages else []
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=die_with_parent)
        if done.returncode:
            print(f"{name}: not compiled ahead: {done.stderr.strip().splitlines()[-1:]}", flush=True)

    with ThreadPoolExecutor(max(1, min(len(names), (os.cpu_count() or 2) // 2))) as pool:
        list(pool.map(compile_one, names))


def longest(shape: Shape, tokens: int) -> dict:
    """One forward and backward pass, after a warm-up, with the real selection. The PyTorch fallback checks the last
    queries."""
    x = Inputs(shape, tokens)
    torch.autograd.grad(ops.native_sparse_attention(x.q, *x.pairs, x.gates, **shape.sizes).sum(), x.all)
    torch.cuda.synchronize()
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
    """Relative L2 errors of output and gradients against the float64 reference, and cuDNN's for dense attention."""
    x, result = Inputs(shape, tokens), {}
    exact = [t.detach().double().requires_grad_() for t in x.all]

    def compare(ours: list[Tensor], theirs: list[Tensor]) -> float:
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))

    # The float64 selection would differ if importances nearly tie, so both use the kernel's.
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
    out = dense.cudnn(x.q, k_d := x.pairs[1][0], v_d := x.pairs[1][1])
    expected = ops.dense_attention(q, k_slc, v_slc, **naive)
    result["dense_output"] = compare([out], [expected])
    result["dense_gradients"] = compare(
        list(torch.autograd.grad(out, [x.q, k_d, v_d], d_out)),
        list(torch.autograd.grad(expected, [q, k_slc, v_slc], d_out.double())),
    )
    print(f"{shape.name:5} errors {result}", flush=True)
    return {name: float(f"{error:.3g}") for name, error in result.items()}


def environment() -> dict:
    """Hardware, versions and commit, versions of the dense peers, and the assumed and measured ceilings."""
    ceilings = {"ceiling": measure.CEILING, "measured_ceiling": measure.ceilings()}
    return measure.environment() | {"dense": dense.versions()} | ceilings


def _limits(values: list[str], parser: argparse.ArgumentParser) -> dict[str, tuple[int, ...]]:
    """["fla=8192,32768", "sfnsa"] -> {"fla": (8192, 32768), "sfnsa": ()}."""
    result = {}
    for name, _, numbers in (value.partition("=") for value in values):
        try:
            result[name] = tuple(int(n) for n in numbers.split(",") if n)
        except ValueError:
            parser.error(f"{name}={numbers}: after = come numbers of tokens, as in {name}=8192,32768")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["A"], metavar="NAME[=TOKENS,..]", help=f"of {', '.join(SHAPES)}"
    )
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 65536])
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES), choices=REGIMES)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--longest", nargs="*", type=int, default=[], help="tokens of single passes of shape 'long'")
    parser.add_argument("--profile", action="store_true", help="also list the time of every kernel")
    parser.add_argument("--single-pass", action="store_true", help="no times: one pass of each shape, for ncu")
    parser.add_argument("--no-stages", action="store_true", help="the whole only")
    parser.add_argument("--dense", nargs="*", default=["cudnn", "flash"], metavar="NAME[=MOST_TOKENS]")
    parser.add_argument(
        "--peers", nargs="*", default=[], metavar="NAME[=TOKENS,..]", help=f"of {', '.join(peers.KNOWN)}"
    )
    parser.add_argument("--peer-path", nargs="*", default=[], metavar="NAME=DIR")
    options = parser.parse_args()
    options.dense = {name: (limit or (1 << 40,))[0] for name, limit in _limits(options.dense, parser).items()}
    options.peers, options.shapes = _limits(options.peers, parser), _limits(options.shapes, parser)
    for kind, known in (("shapes", SHAPES), ("dense", dense.KNOWN), ("peers", peers.KNOWN)):
        for name in getattr(options, kind).keys() - known.keys():
            parser.error(f"unknown {name}: {kind} of {', '.join(known)}")
    paths = {name: Path(path).resolve() for name, _, path in (value.partition("=") for value in options.peer_path)}

    need_gpu(parser)
    if options.single_pass:
        for name, lengths in options.shapes.items():
            for tokens in lengths or options.tokens:
                single_pass(SHAPES[name], tokens)
        return
    if len(options.shapes) > 1:
        compile_side_by_side([*options.shapes, *["long"] * bool(options.longest)], options)
    report: dict = environment() | {"command": " ".join(sys.argv[1:]), "missing": {}, "errors": {}, "runs": []}
    print(json.dumps({key: value for key, value in report.items() if value}), flush=True)
    for name in [name for name in options.dense if name not in report["dense"]]:
        report["missing"][name] = "not installed"
        del options.dense[name]
    adapters: dict[str, object] = {}
    for name in options.peers:
        try:
            adapters[name] = peers.KNOWN[name](paths.get(name))
        except Exception as error:
            report["missing"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            print(name, report["missing"][name], flush=True)
    report["errors"] = {name: errors(SHAPES[name]) for name in options.shapes}
    report["longest"] = [longest(SHAPES["long"], tokens) for tokens in options.longest]
    for name, lengths in options.shapes.items():
        for tokens in lengths or options.tokens:
            report["runs"].append(run(SHAPES[name], tokens, options, adapters))
            torch.cuda.empty_cache()
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
