"""Writes docs/performance.md, one page of headlines, and beside each result file a page of its tables.

    python benchmarks/report.py

The results are those of benchmarks/results. Each file has its own hardware, versions and commit, and a page of its own,
so that figures of different machines are never mixed in one table. What the trainer's steps were and what the plan
predicts is benchmarks/results/trainer.md. The headlines are written by benchmarks/headlines.py.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import headlines
from benchmarks.headlines import length, ms, table
from nsa.planning import measured

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "images", ROOT / "docs" / "performance.md"
KINDS = ("performance", "models", "layer", "dense", "steady")
# Aims of the project: ratios of cuDNN's dense attention to the whole operator, with indices like a trained model's.
AIMS = {
    ("A", 65536, "forward"): 5.0,
    ("A", 65536, "backward"): 6.3,
    ("A", 131072, "forward"): 6.0,
    ("A", 32768, "both"): 4.0,
    ("A", 8192, "both"): 1.0,
    ("B", 32768, "both"): 2.3,
    ("E", 32768, "both"): 1.2,
}
SHAPES = {
    "A": "64 query heads, 4 KV heads, width 128",
    "B": "32 / 8, 128",
    "C": "16 / 1, 128",
    "D": "32 / 16, 64",
    "E": "32 / 16, 128",
    "A192": "64 / 4, keys 192, values 128",
    "long": "32 / 2, 128",
    "hN": "4 N / 4, 128: N query heads to a KV head",
}


def regime_of(run: dict) -> str:
    return next((regime for regime in ("trained", "random") if regime in run["total"]), next(iter(run["total"])))


def names_of(runs: list[dict], key: str) -> list[str]:
    """Names under ``key`` in any run, in their order."""
    return list(dict.fromkeys(name for run in runs for name in run[key]))


def section(result: dict, figure: Path) -> Iterator[str]:
    """One result file."""
    commit = f", commit {result['commit'][:12]}" if result.get("commit") else ""
    yield (
        f"{result['device']}, torch {result['torch']}, Triton {result['triton']}, CUDA {result.get('cuda')}, Python "
        f"{result['python']}; {result.get('date', '')}{commit}."
    )
    if measured := result.get("measured_ceiling"):
        yield (
            f"This machine, in the same run: {measured['matmul_tflops']} TFLOP/s in a bf16 product of two 8192 x 8192 "
            f"matrices, {measured['copy_tb_per_s']} TB/s copying."
        )
    commands = result.get("commands", [result["command"]] if "command" in result else [])
    yield from (f"`{command}`" + (" \\" if command != commands[-1] else "") for command in commands)
    if note := result.get("note"):
        yield f"({note})"
    yield ""
    if result.get("runs"):
        yield f"![time and speed-up by length](../../docs/images/{figure.name})\n"
        yield from whole(result["runs"])
        yield from others(result)
        yield from stage_tables(result["runs"])
    yield from correctness(result)
    yield from models(result.get("models", []))
    yield from layers(result.get("layer", []))
    yield from dense(result.get("dense_attention", []))
    yield from steady(result.get("steady"))


def whole(runs: list[dict]) -> Iterator[str]:
    yield "### The whole operator\n"
    yield "Compressed, selection, selected, window and combine; indices like those of a trained model.\n"
    dense = [
        name for name in names_of(runs, "dense") if any(name in run["total"][regime_of(run)]["vs"] for run in runs)
    ]
    header = ["shape, tokens", "forward ms", "backward ms", "both ms", "share of the floor", "peak MB", "saved MB"]
    called = any("called" in row for run in runs for row in run["total"].values())
    if called:
        yield "Times are of CUDA graphs, as the trainer runs; `as called`: both passes asked for by the host.\n"
        header.append("as called ms")
    rows = []
    for run in runs:
        row = run["total"][regime_of(run)]
        share = "{forward:.2f} / {backward:.2f}".format(**row["floor_share"])
        times = [ms(row[direction]) for direction in ("forward", "backward", "both")]
        row_name = f"{run['shape']} {length(run['tokens'])}{_as_called(row)}"
        rows.append([row_name, *times, share, row["peak_mb"], row["saved_mb"]] + [ms(row.get("called"))] * called)
    yield from table(header, rows)
    yield "Times faster than dense attention, forward / backward / both:\n"
    rows = []
    for run in runs:
        against, aims = run["total"][regime_of(run)]["vs"], []
        for direction in ("forward", "backward", "both"):
            if aim := AIMS.get((run["shape"], run["tokens"], direction)):
                aims.append(f"{direction} {aim:g}")
        cells = [
            "{forward:.1f} / {backward:.1f} / **{both:.1f}**".format(**against[n]) if n in against else None
            for n in dense
        ]
        rows.append([f"{run['shape']} {length(run['tokens'])}", *cells, ", ".join(aims) or None])
    yield from table(["shape, tokens", *dense, "aim, over cudnn"], rows)
    yield "By the regime of the indices (forward + backward ms; distinct blocks in tiles of 4 tokens):\n"
    regimes = names_of(runs, "total")
    rows = [
        [f"{run['shape']} {length(run['tokens'])}"]
        + [
            f"{ms(run['total'][r]['both'])} ({run['distinct_blocks'][r][2]})" if r in run["total"] else None
            for r in regimes
        ]
        for run in runs
    ]
    yield from table(["shape, tokens", *regimes], rows)


def _as_called(row: dict) -> str:
    """A mark for what waits for the GPU and so was not timed as a CUDA graph."""
    return "" if row.get("recorded", True) else " (as called)"


def others(result: dict) -> Iterator[str]:
    runs = result["runs"]
    yield "### Dense attention of others\n"
    rows = []
    for run in runs:
        for name, entry in run["dense"].items():
            for kind, row in entry.items():
                label = f"{run['shape']} {length(run['tokens'])} {name} {kind}{_as_called(row)}"
                if "refused" in row:
                    rows.append([label, row["refused"], *[None] * 5])
                    continue
                rates = f"{row['forward_tflops']} / {row['backward_tflops']}"
                differs = f"{row['differs']['output']:.1e} / {row['differs']['gradients']:.1e}"
                times = [ms(row["forward"]), ms(row["backward"])]
                rows.append([label, *times, rates, row.get("peak_mb"), row.get("saved_mb"), differs])
    header = ["", "forward ms", "backward ms", "TFLOP/s", "peak MB", "saved MB", "distance to ours: output / gradients"]
    yield from table(header, rows)
    for name, reason in result.get("missing", {}).items():
        yield f"Not run: {name} ({reason}).\n"
    entries = [(run, name, entry) for run in runs for name, entry in run["peers"].items()]
    if not entries:
        return
    yield "### Native sparse attention of others\n"
    yield "Each beside our call of the same function; `total` on what each one selects itself.\n"
    rows, notes = [], []
    for run, name, entry in entries:
        label = f"{run['shape']} {length(run['tokens'])} {name}"
        for reason in (f"{label} {key}: {entry[key]}" for key in ("refuses", "failed") if key in entry):
            notes.append(reason)
        for stage, row in entry.get("stages", {}).items():
            mine, ratio = row["ours"], row["ratio"]
            pairs = [f"{ms(row[d])} : {ms(mine[d])}" if row[d] else None for d in ("forward", "backward")]
            differs = " / ".join(f"{value:.1e}" for value in row["differs"].values())
            rows.append(
                [f"{label} {stage}{_as_called(row)}", *pairs, f"**{ratio['both']:.2f}**", row.get("peak_mb"), differs]
            )
    header = ["", "forward ms, theirs : ours", "backward ms", "ours is faster by", "their peak MB", "distance"]
    yield from table(header, rows)
    yield "Distance: relative L2 of output / gradients; of a selection, the share of our blocks that is missing.\n"
    versions = {name: entry["version"] for _, name, entry in entries}
    yield "; ".join(f"{name}: {version}" for name, version in versions.items()) + ".\n"
    yield from (f"- {note}" for note in notes)
    yield ""


def stage_tables(runs: list[dict]) -> Iterator[str]:
    if not any(run["stages"] for run in runs):
        return
    yield "### Stage by stage\n"
    yield (
        "Rates count the algorithm's operations and each tensor once; the floor is the longer of both at the ceilings "
        "of benchmarks/measure.py.\n"
    )
    for run in (run for run in runs if run["stages"]):
        keys = ("ms", "tflops", "gb_per_s", "floor_ms", "floor_share")
        rows = [[name, ms(row["ms"]), *(row.get(key) for key in keys[1:])] for name, row in run["stages"].items()]
        yield from table(
            [f"{run['shape']} {length(run['tokens'])}", "ms", "TFLOP/s", "GB/s", "floor ms", "share"], rows
        )


def correctness(result: dict) -> Iterator[str]:
    if result.get("errors"):
        yield "### Correctness\n"
        yield "Relative L2 errors in bf16 on 1024 tokens, float64 as the truth; cuDNN's dense attention for scale.\n"
        keys = ("output", "gradients", "dense_output", "dense_gradients")
        rows = [[shape, *(f"{row[key]:.1e}" for key in keys)] for shape, row in result["errors"].items()]
        yield from table(["shape", "output", "gradients (worst)", "cuDNN output", "cuDNN gradients"], rows)
    if result.get("longest"):
        yield "### The longest sequence\n"
        rows = [
            [f"{row['shape']} {length(row['tokens'])}", row["forward"], row["backward"], row["peak_mb"], row["error"]]
            for row in result["longest"]
        ]
        yield from table(["one layer", "forward ms", "backward ms", "peak MB", "error of the last queries"], rows)


def models(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/models.py: config, attention, tokens, tokens_per_s, mfu, peak_mb."""
    if not rows:
        return
    yield "### Whole models\n"
    if any("samples" in row for row in rows):
        yield "Forward, backward and optimizer step in bf16. Each sample is one document.\n"
        columns = ("samples", "tokens", "accumulate", "dense_attention", "ms", "tokens_per_s", "mfu", "peak_mb")
        cells = [[f"{row['config']} {row['attention']}", *(row.get(name) for name in columns)] for row in rows]
        yield from table(["", *(name.replace("_", " ") for name in columns)], cells)
        return
    yield "Forward, backward and optimizer step in bf16; tokens/s (MFU); NSA over dense in bold. Dense is our Triton"
    yield "kernel with borders, which is 4 to 14 % slower than cuDNN's without (dense-h200-2026-11-28.md).\n"
    lengths = sorted({row["tokens"] for row in rows})
    by = {(row["config"], row["attention"], row["tokens"]): row for row in rows}
    lines = []
    for config in dict.fromkeys(row["config"] for row in rows):
        for kind in dict.fromkeys(row["attention"] for row in rows if row["config"] == config):
            cells: list[object] = []
            for tokens in lengths:
                row, other = by.get((config, kind, tokens)), by.get((config, "dense", tokens))
                if row is None or "tokens_per_s" not in row:
                    cells.append(None)
                    continue
                cell = f"{row['tokens_per_s'] / 1e3:.0f} K ({row['mfu']:.0%})"
                if kind != "dense" and other and "tokens_per_s" in other:
                    cell += f" **{row['tokens_per_s'] / other['tokens_per_s']:.2f}**"
                cells.append(cell)
            lines.append([f"{config} {kind}", *cells])
    yield from table(["", *(length(tokens) for tokens in lengths)], lines)


def dense(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/dense_attention.py."""
    if not rows:
        return
    yield "### Causal attention by every implementation\n"
    yield "Query / KV heads, width. `one`: a document fills the sample; `packed`: documents of 1024 tokens on average."
    yield "Over cuDNN: its time without borders over this one. Repeats: the same bits in two backward passes.\n"
    columns = ("packing", "implementation", "forward_ms", "backward_ms", "over_cudnn", "repeats")
    cells = [[f"{row['shape']}; {length(row['tokens'])}", *(row.get(name) for name in columns)] for row in rows]
    yield from table(["", *(name.replace("_", " ") for name in columns)], cells)


def steady(result: dict | None) -> Iterator[str]:
    """The result of benchmarks/steady.py."""
    if not result:
        return
    yield f"### {result['config']} {result['attention']}: the trainer's pace\n"
    tokens = f"{result['tokens_per_step']:,} tokens"
    yield f"Tokens/s in blocks of {result['block']} steps of {tokens}; the first warms up:\n"
    yield ", ".join(f"{block:,}" for block in result["blocks"]) + "\n"
    yield f"First blocks compared: {result['first']:,}; last: {result['last']:,}; ratio {result['ratio']}.\n"


def layers(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/layer.py: config, attention, tokens, launches, ms, host_ms, gpu_ms."""
    if not rows:
        return
    yield "### One layer, and who waits for whom\n"
    yield "Forward and backward: its time, that of the host to ask for it, that of the kernels by themselves.\n"
    columns = ("tokens", "launches", "ms", "host_ms", "gpu_ms")
    cells = [[f"{row['config']} {row['attention']}", *(row[name] for name in columns)] for row in rows]
    yield from table(["", *(name.replace("_", " ") for name in columns)], cells)


def draw(result: dict, path: Path) -> None:
    """Left: forward + backward of shape A by length (of all shapes, where there is one length), everyone. Right: times
    faster than cuDNN, every shape."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = result["runs"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    one_length = len(runs) > 1 and len({run["tokens"] for run in runs}) == 1
    shape = "A" if any(run["shape"] == "A" for run in runs) else runs[0]["shape"]
    compared = list(runs) if one_length else [run for run in runs if run["shape"] == shape]
    lines: dict[str, list[tuple[int, float]]] = {"ours": []}
    compared.sort(key=lambda run: (run["tokens"], len(run["shape"]), run["shape"]))  # h2 before h12
    for place, run in enumerate(compared):
        x = place if one_length else run["tokens"]
        lines["ours"].append((x, run["total"][regime_of(run)]["both"]))
        for name, entry in run["dense"].items():
            if "both" in entry.get("dense", {}):
                lines.setdefault(f"dense: {name}", []).append((x, entry["dense"]["both"]))
        for name, entry in run["peers"].items():
            if "total" in entry.get("stages", {}):
                # It chooses its own blocks, of random data: our call of the same function stands beside it.
                total = entry["stages"]["total"]
                lines.setdefault(f"sparse: {name}, random data", []).append((x, total["both"]))
                lines.setdefault(f"ours beside {name}", []).append((x, total["ours"]["both"]))
    for name, points in lines.items():
        style = "--" if name.startswith("dense") else ":" if name.startswith("sparse") else "-"
        colour = {"color": "black", "linewidth": 2.5} if name == "ours" else {}
        left.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=name, **colour)
    left.set(yscale="log", ylabel="forward + backward, ms")
    if one_length:
        left.set(title=f"{length(runs[0]['tokens'])} tokens", xlabel="shape")
        left.set_xticks(range(len(runs)), [run["shape"] for run in compared])
    else:
        ticks = sorted({tokens for points in lines.values() for tokens, _ in points})
        left.set(xscale="log", xlabel="tokens", title=f"Shape {shape}")
        left.set_xticks(ticks, [length(tokens) for tokens in ticks])
        left.set_xticks([], minor=True)
    left.grid(alpha=0.3)
    left.legend(fontsize=8)

    bars = [(f"{r['shape']}\n{length(r['tokens'])}", r["total"][regime_of(r)]["vs"].get("cudnn")) for r in runs]
    bars = [(label, against) for label, against in bars if against]
    colours = {"forward": "#4c78a8", "backward": "#f58518", "both": "#333333"}
    for i, (direction, colour) in enumerate(colours.items()):
        places = [place + (i - 1) * 0.27 for place in range(len(bars))]
        right.bar(places, [against[direction] for _, against in bars], 0.27, label=direction, color=colour)
    right.axhline(1, color="gray", linewidth=1)
    right.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=8)
    right.set(ylabel="times faster than cuDNN's dense attention", title="All shapes")
    right.grid(axis="y", alpha=0.3)
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(name: str, result: dict) -> str:
    """The tables of one result file."""
    if runs := result.get("runs"):
        shapes = list(dict.fromkeys(run["shape"] for run in runs))
        runs.sort(key=lambda run: (shapes.index(run["shape"]), run["tokens"]))
        draw(result, IMAGES / f"{Path(name).stem}.png")
    lines = [
        f"# {name}",
        "",
        "Written by `python benchmarks/report.py`. bf16, causal; l 32, d 16, blocks of 64, 16 of them,",
    ]
    lines += ["window 512. Milliseconds are medians.", ""]
    if runs:
        lines += ["Query / KV heads, width:", "", *(f"- {shape} = {words}" for shape, words in SHAPES.items()), ""]
    lines += section(result, IMAGES / f"{Path(name).stem}.png")
    return "\n".join(lines).rstrip() + "\n"


TRAINING = "`benchmarks/training.py`: one GPU, DeepSpeed, bf16; medians of up to 20 steps after the first."
OLDER = (
    "Files of before 2026-11-28 were measured before the step around attention was made faster: the plan is fitted to"
)
OLDER += "\nthe later ones, and says less time than the earlier took."


def main() -> None:
    paths = [path for kind in KINDS for path in sorted(RESULTS.glob(f"{kind}-*.json"))]
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    for path in paths:
        path.with_suffix(".md").write_text(page(path.name, results[path.stem]))
    rows = [row for path in measured.result_files() for row in measured.compare(path)]
    lines = [
        "# Steps, and the plan's prediction",
        "",
        "Written by `python benchmarks/report.py`.",
        "",
        TRAINING,
        OLDER,
        "",
    ]
    lines += [measured.table(rows), "", *measured.error_lines(rows)]
    (RESULTS / "trainer.md").write_text("\n".join(lines) + "\n")
    PAGE.write_text(headlines.page(results))
    print(f"{PAGE}, and {len(results) + 1} pages beside the results")


if __name__ == "__main__":
    main()
