"""Times candidate tile sizes of the attention kernels, and writes the winners into nsa/ops/kernels/tiles.json.

    python benchmarks/tune_attention.py [--kernels hopper_forward ...] [--shape A] [--tokens 32768] [--write]

It tunes the rows of the table that the shape's attention uses on this GPU (on Hopper, those of Hopper's kernels if they
support the shape). The winner has the least sum of times over the calls that use a row: compressed keys, the window, or
selected blocks with the regimes "trained" and "alike". dQ is timed for one branch at a time, though training computes
all three at once. The winner replaces the entry for the shape.

Compilation runs in parallel processes first, so that the timing pass finds every kernel in Triton's cache.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.attention_inputs import REGIMES, SHAPES, Shape, block_indices, distinct_blocks, normal
from benchmarks.measure import called_ms, need_gpu
from nsa.ops.compressed import compressed_ranges
from nsa.ops.geometry import Documents, window_ranges
from nsa.ops.kernels import hardware, ranges, selected, selection
from nsa.training.signals import die_with_parent

TABLE = Path(hardware.__file__).with_name("tiles.json")
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def grid(**axes: list[int]) -> list[dict[str, int]]:
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


# The kernels for Hopper, at all head dimensions: tiles that do not fit raise an error.
HOPPER_CANDIDATES = {
    "hopper_forward": [
        *grid(BN=[128], STAGES=[2, 3], QUEUE=[1, 2], num_warps=[4], maxnreg=[168]),
        *grid(BN=[64], STAGES=[3, 4, 5], QUEUE=[1, 2], num_warps=[4], maxnreg=[168]),
    ],
    "hopper_query": grid(BN=[64], STAGES=[2, 3, 4], num_warps=[4], maxnreg=[168]),
    "hopper_selected_forward": [
        *grid(STAGES=[2, 3, 4, 5], QUEUE=[1, 2], PARTS=[3], num_warps=[4], maxnreg=[128]),
        *grid(STAGES=[3, 4, 5, 6], QUEUE=[1, 2], PARTS=[2], num_warps=[4], maxnreg=[168]),
    ],
    "hopper_selected_forward_pairs": grid(STAGES=[3, 4, 5, 6], QUEUE=[1, 2], PARTS=[2], num_warps=[4], maxnreg=[168]),
    "hopper_select": grid(KEYS=[64, 128], STAGES=[2, 3, 4, 5], num_warps=[4], maxnreg=[128]),
    "hopper_range_key": [
        *grid(BM=[64], BN=[64], STAGES=[2, 3], num_warps=[4]),
        *grid(BM=[64], BN=[128], STAGES=[2], num_warps=[8]),
    ],
    "hopper_selected_key": grid(BM=[64], BN=[64], STAGES=[2, 3], num_warps=[4]),
}

CANDIDATES = HOPPER_CANDIDATES | {
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

# For head dimensions above 128, for which accumulators leave fewer registers.
WIDE_CANDIDATES = HOPPER_CANDIDATES | {
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


def operations(shape: Shape, tokens: int) -> dict[str, Callable[[], object]]:
    """Name -> a call of each operation of the attention, on each kind of input that it gets."""
    scale = shape.width**-0.5
    q, d_out = normal(1, tokens, shape.heads, shape.width), normal(1, tokens, shape.heads, shape.v_width, seed=1)
    documents = Documents.of(tokens, 0, None, q.device)
    keys = (tokens - shape.length) // shape.stride + 1
    _, cmp = compressed_ranges(q, q.new_empty(1, keys, 1, 1), shape.length, shape.stride, None, 0)
    calls: dict[str, Callable[[], object]] = {}
    for name, run, count in (("compressed", cmp, keys), ("window", window_ranges(documents, shape.window), tokens)):
        k, v = normal(1, count, shape.groups, shape.width), normal(1, count, shape.groups, shape.v_width)
        runs = run.first.int(), run.last.int()
        out, lse = ranges.forward(q, k, v, *runs, scale)
        args = (q, k, v, d_out, lse, ranges.delta(out, d_out), *runs, scale)
        calls[f"{name} forward"] = partial(ranges.forward, q, k, v, *runs, scale)
        calls[f"{name} dQ"] = partial(ranges.query_gradient, *args)
        calls[f"{name} dK, dV"] = partial(ranges.key_gradients, *args)
        if name == "compressed":
            sizes = (shape.length, shape.stride, shape.block_size, shape.num_blocks, 1, 2, scale)
            calls["selection"] = partial(selection.select, q, k, lse, documents, run, 0, *sizes)
    k, v = normal(1, tokens, shape.groups, shape.width), normal(1, tokens, shape.groups, shape.v_width)
    for regime in REGIMES:
        layout = selected.BlockLayout.of(documents, block_indices(shape, tokens, regime), tokens, shape.block_size)
        out, lse = selected.forward(q, k, v, layout, shape.block_size, scale)
        inputs = (q, k, v, d_out, lse, ranges.delta(out, d_out), layout, shape.block_size, scale)
        calls[f"{regime} forward"] = partial(selected.forward, q, k, v, layout, shape.block_size, scale)
        calls[f"{regime} dQ"] = partial(selected.query_gradient, *inputs)
        calls[f"{regime} dK, dV"] = partial(selected.key_gradients, *inputs)
    return calls


def rows_of(call: Callable[[], object]) -> set[str]:
    """The rows of the tile table that a call uses."""
    with mock.patch.object(hardware, "_entry", wraps=hardware._entry) as entry:
        call()
    return {one.args[1] for one in entry.call_args_list}


def tune(shape: Shape, tokens: int, row: str, calls: dict[str, Callable[[], object]], compile_only: bool) -> list[dict]:
    results = []
    candidates = CANDIDATES if max(shape.width, shape.v_width) <= 128 else WIDE_CANDIDATES
    table = hardware._table()[hardware.architecture()]
    for candidate in candidates[row]:
        saved, table[row] = table[row], [candidate]
        hardware._entry.cache_clear()
        result = {"kernel": row, "shape": shape.name, "tokens": tokens, **candidate}
        try:
            for name, call in calls.items():
                call()
                torch.cuda.synchronize()
                if not compile_only:
                    result[name] = round(called_ms(call), 3)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the tile may not fit
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:90]
        table[row] = saved
        hardware._entry.cache_clear()
        if not compile_only:
            print(json.dumps(result), flush=True)
            results.append(result)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kernels", nargs="+", choices=CANDIDATES, help="rows of the table; all that the shape asks for"
    )
    parser.add_argument("--shape", default="A", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    need_gpu(parser)
    shape = SHAPES[options.shape]
    small = operations(shape, 2048)
    rows_by_call = {name: rows_of(call) for name, call in small.items()}
    used = sorted(set().union(*rows_by_call.values()))
    rows = options.kernels or used
    if unused := sorted(set(rows) - set(used)):
        parser.error(f"shape {shape.name} does not use {', '.join(unused)} on this GPU, but {', '.join(used)}")
    if not options.compile_only:
        same = [sys.executable, __file__, "--shape", shape.name, "--compile-only", "--kernels"]
        for row, worker in [(row, subprocess.Popen([*same, row], preexec_fn=die_with_parent)) for row in rows]:
            if worker.wait():
                print(f"{row}: not compiled ahead", flush=True)
        for regime in REGIMES:
            indices = block_indices(shape, options.tokens, regime)
            print(regime, [round(distinct_blocks(indices, tile), 1) for tile in (1, 2, 4, 8, 16)], flush=True)
    calls = small if options.compile_only else operations(shape, options.tokens)
    results = []
    for row in rows:
        its = {name: call for name, call in calls.items() if row in rows_by_call[name]}
        results += tune(shape, options.tokens, row, its, options.compile_only)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    if options.write:
        write_winners(results, shape)


def counted_ms(result: dict) -> float:
    """The sum of times that decides: of all calls but those with random indices."""
    return sum(time for name, time in result.items() if isinstance(time, float) and not name.startswith("random"))


def write_winners(results: list[dict], shape: Shape) -> None:
    table = json.loads(TABLE.read_text())
    for row in {result["kernel"] for result in results}:
        timed = [result for result in results if result["kernel"] == row and "error" not in result]
        if not timed:
            print(f"{row}: no candidate fits shape {shape.name}, its entry stays")
            continue
        entries = table[hardware.architecture()][row]
        width = max(shape.width, shape.v_width)
        index = next(i for i, entry in enumerate(entries) if width <= entry.get("max_width", hardware.MAX_WIDTH))
        limits = {key: value for key, value in entries[index].items() if key.startswith("max_")}
        best = min(timed, key=counted_ms)
        entries[index] = limits | {key: best[key] for key in best if key.isupper() or key in OPTIONS}
    text = json.dumps(table, indent=2)
    # One entry a line.
    TABLE.write_text(re.sub(r"\{\s+([^{}\[\]]*?)\s+\}", lambda m: "{" + re.sub(r"\s+", " ", m[1]) + "}", text) + "\n")


if __name__ == "__main__":
    main()
