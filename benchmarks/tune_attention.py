"""Times candidate tile sizes of the attention kernels, and writes the winners into nsa/ops/kernels/tiles.json.

    python benchmarks/tune_attention.py [--kernels range_forward ...] [--shape A] [--tokens 32768] [--write]

The winner has the least sum of times over what a kernel serves (compressed and window, or the index regimes without
the random one); it replaces the first entry of the table that serves the shape.

Compilation runs in parallel processes first, so that the timing pass finds every kernel in Triton's cache.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.attention_inputs import REGIMES, SHAPES, Shape, block_indices, distinct_blocks, normal
from nsa.ops.compressed import compressed_ranges
from nsa.ops.dense import window_ranges
from nsa.ops.kernels import launch, ranges, selected, selection
from nsa.ops.packing import Documents

TABLE = Path(launch.__file__).with_name("tiles.json")
OPTIONS = ("num_warps", "num_stages")


def grid(**axes: list[int]) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


CANDIDATES = {
    "range_forward": [
        *grid(BM=[128, 64], BN=[64], num_warps=[4], num_stages=[2]),
        *grid(BM=[64], BN=[64], num_warps=[4], num_stages=[1, 3]),
        *grid(BM=[128], BN=[64], num_warps=[8], num_stages=[2], maxnreg=[128]),
        *grid(BM=[128], BN=[128], num_warps=[8], num_stages=[2]),
    ],
    "range_query": [
        *grid(BM=[128], BN=[64], num_warps=[8], num_stages=[3]),
        *grid(BM=[64], BN=[64], num_warps=[4], num_stages=[2]),
        *grid(BM=[64], BN=[64], num_warps=[4], num_stages=[1], maxnreg=[168]),
    ],
    "range_key": [
        *grid(BM=[64], BN=[128], num_warps=[8], num_stages=[2, 3]),
        *grid(BM=[64], BN=[64], num_warps=[4], num_stages=[2]),
        *grid(BM=[32], BN=[64], num_warps=[4], num_stages=[3]),
    ],
    "select": [
        *grid(BQ=[64], KEYS=[64, 128], num_warps=[4], num_stages=[2, 3]),
        *grid(BQ=[64], KEYS=[64], num_warps=[4], num_stages=[2], maxnreg=[128]),
        *grid(BQ=[64], KEYS=[64], num_warps=[4], num_stages=[3], maxnreg=[168]),
        *grid(BQ=[128], KEYS=[64], num_warps=[8], num_stages=[3], maxnreg=[128]),
    ],
    "selected_forward": [
        *grid(BM=[64], num_warps=[4], num_stages=[1, 2]),
        *grid(BM=[64], num_warps=[4], num_stages=[1], maxnreg=[128]),
        *grid(BM=[128], num_warps=[8], num_stages=[1], maxnreg=[128]),
    ],
    "selected_query": [
        *grid(BM=[64], num_warps=[4], num_stages=[2]),
        *grid(BM=[64], num_warps=[4], num_stages=[1], maxnreg=[168]),
    ],
    "selected_key": [
        *grid(BM=[64], num_warps=[4], num_stages=[2, 3]),
        *grid(BM=[32], num_warps=[4], num_stages=[4]),
    ],
}

# For head widths above 128, where accumulators leave fewer registers.
WIDE_CANDIDATES = {
    "range_forward": [
        *grid(BM=[128], BN=[64], num_warps=[8], num_stages=[1, 2]),
        *grid(BM=[64], BN=[64], num_warps=[4], num_stages=[1, 2]),
    ],
    "range_query": [
        *grid(BM=[64], BN=[64], num_warps=[4], num_stages=[1, 2]),
        *grid(BM=[128], BN=[64], num_warps=[8], num_stages=[1, 2]),
    ],
    "range_key": [
        *grid(BM=[32, 64], BN=[128], num_warps=[8], num_stages=[2]),
        *grid(BM=[32, 64], BN=[64], num_warps=[4], num_stages=[2]),
    ],
    "select": grid(BQ=[64], KEYS=[64, 128], num_warps=[4], num_stages=[2, 3]),
    "selected_forward": grid(BM=[64], num_warps=[4], num_stages=[1, 2]),
    "selected_query": grid(BM=[64], num_warps=[4], num_stages=[1, 2]),
    "selected_key": grid(BM=[32, 64], num_warps=[4], num_stages=[2, 3]),
}


def stages(shape: Shape, tokens: int, kernel: str) -> dict[str, object]:
    """Name -> a call that runs ``kernel`` once, on each kind of input that it serves."""
    scale = shape.width**-0.5
    q, d_out = normal(1, tokens, shape.heads, shape.width), normal(1, tokens, shape.heads, shape.v_width, seed=1)
    calls: dict[str, object] = {}
    if kernel.startswith("range") or kernel == "select":
        keys = (tokens - shape.length) // shape.stride + 1
        documents, cmp = compressed_ranges(q, q.new_empty(1, keys, 1, 1), shape.length, shape.stride, None, 0)
        win = window_ranges(Documents.of(tokens, 0, None, q.device), shape.window)
        for name, run, count in (("compressed", cmp, keys), ("window", win, tokens)):
            k, v = normal(1, count, shape.groups, shape.width), normal(1, count, shape.groups, shape.v_width)
            first, last = run.first.int(), run.last.int()
            out, lse = ranges.forward(q, k, v, first, last, scale)
            if kernel == "select":
                if name == "compressed":
                    sizes = (shape.length, shape.stride, shape.block_size, shape.num_blocks, 1, 2, scale)
                    args = (q, k, lse, documents, cmp, 0, *sizes)
                    calls[name] = lambda args=args: selection.select(*args)
            elif kernel == "range_forward":
                calls[name] = lambda args=(q, k, v, first, last, scale): ranges.forward(*args)
            else:
                args = (q, k, v, d_out, lse, ranges.delta(out, d_out), first, last, scale)
                function = ranges.query_gradient if kernel == "range_query" else ranges.key_gradients
                calls[name] = lambda args=args, function=function: function(*args)
        return calls
    k, v = normal(1, tokens, shape.groups, shape.width), normal(1, tokens, shape.groups, shape.v_width)
    documents = Documents.of(tokens, 0, None, q.device)
    for regime in REGIMES:
        indices = block_indices(shape, tokens, regime)
        layout = selected.BlockLayout.of(documents, indices, tokens, shape.block_size)
        out, lse = selected.forward(q, k, v, layout, shape.block_size, scale)
        if kernel == "selected_forward":
            calls[regime] = lambda args=(q, k, v, layout, shape.block_size, scale): selected.forward(*args)
        else:
            args = (q, k, v, d_out, lse, ranges.delta(out, d_out), layout, shape.block_size, scale)
            function = selected.query_gradient if kernel == "selected_query" else selected.key_gradients
            calls[regime] = lambda args=args, function=function: function(*args)
    return calls


def tune(shape: Shape, tokens: int, kernel: str, compile_only: bool) -> list[dict]:
    rows = []
    candidates = CANDIDATES if max(shape.width, shape.v_width) <= 128 else WIDE_CANDIDATES
    for candidate in candidates[kernel]:
        table = launch._table()[launch.architecture()]
        saved, table[kernel] = table[kernel], [candidate]
        launch._entry.cache_clear()
        row = {"kernel": kernel, "shape": shape.name, "tokens": tokens, **candidate}
        try:
            for name, call in stages(shape, 2048 if compile_only else tokens, kernel).items():
                call()
                torch.cuda.synchronize()
                if not compile_only:
                    row[name] = round(do_bench(call, warmup=10, rep=50, return_mode="median"), 3)
        except Exception as error:  # a tile that does not fit is an answer
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        table[kernel] = saved
        launch._entry.cache_clear()
        if not compile_only:
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels", nargs="+", default=list(CANDIDATES))
    parser.add_argument("--shape", default="A", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    if not options.compile_only:
        same = ["--shape", options.shape, "--compile-only"]
        workers = [
            subprocess.Popen([sys.executable, __file__, *same, "--kernels", kernel]) for kernel in options.kernels
        ]
        for worker in workers:
            worker.wait()
        for regime in REGIMES:
            indices = block_indices(SHAPES[options.shape], options.tokens, regime)
            print(regime, [round(distinct_blocks(indices, tile), 1) for tile in (1, 2, 4, 8, 16)], flush=True)
    rows = []
    for kernel in options.kernels:
        rows += tune(SHAPES[options.shape], options.tokens, kernel, options.compile_only)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))
    if options.write:
        write_winners(rows, SHAPES[options.shape])


def write_winners(rows: list[dict], shape: Shape) -> None:
    table = json.loads(TABLE.read_text())
    for kernel in {row["kernel"] for row in rows}:
        timed = [row for row in rows if row["kernel"] == kernel and "error" not in row]
        best = min(
            timed, key=lambda row: sum(row.get(name, 0) for name in ("compressed", "window", "coherent", "trained"))
        )
        entries = table[launch.architecture()][kernel]
        width = max(shape.width, shape.v_width)
        index = next(i for i, entry in enumerate(entries) if width <= entry.get("max_width", launch.MAX_WIDTH))
        limits = {key: value for key, value in entries[index].items() if key.startswith("max_")}
        sizes = {key: value for key, value in best.items() if key.isupper() or key in ("maxnreg", *OPTIONS)}
        entries[index] = limits | sizes
    text = json.dumps(table, indent=2)
    # One entry a line.
    TABLE.write_text(re.sub(r"\{\s+([^{}\[\]]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n")


if __name__ == "__main__":
    main()
