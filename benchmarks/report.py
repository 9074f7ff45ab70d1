"""Writes docs/performance.md, one page of headlines, and beside each result file a page of its tables.

    python benchmarks/report.py

The results are those of benchmarks/results. Each file has its own hardware, versions and commit, and a page of its own,
so that figures of different machines are never mixed in one table. What the trainer's steps were and what the plan
predicts is benchmarks/results/trainer.md. The headlines are written by benchmarks/headlines.py.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import headlines
from benchmarks.headlines import AIMS, NAMES, SHAPES
from benchmarks.markdown import length, ms, table, words
from benchmarks.recall import draw as draw_recall
from benchmarks.report_decode import decode
from benchmarks.report_dsa import dsa
from benchmarks.report_prefill import prefill, prompts
from benchmarks.report_trainer import draw_validation, preparing, recall, scaling, steady, training, validation
from nsa.planning import measured

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "images", ROOT / "docs" / "performance.md"


def regime_of(run: dict) -> str:
    return next((regime for regime in ("trained", "random") if regime in run["total"]), next(iter(run["total"])))


def names_of(runs: list[dict], key: str) -> list[str]:
    """Names under ``key`` in any run, in their order."""
    return list(dict.fromkeys(name for run in runs for name in run[key]))


def section(result: dict, figure: Path) -> Iterator[str]:
    """One result file."""
    cuda = f"CUDA {result['cuda']}, " if "cuda" in result else ""
    machine = f"{result['device']}, torch {result['torch']}, Triton {result['triton']}, {cuda}Python {result['python']}"
    date = f"{result['date']}, " if "date" in result else ""
    yield f"{machine}; {date}commit {result['commit'][:12]}."
    if measured := result.get("measured_ceiling"):
        yield (
            f"This machine, in the same run: {measured['matmul_tflops']} TFLOP/s in a bf16 product of two 8192 x 8192 "
            f"matrices, {measured['copy_tb_per_s']} TB/s copying."
        )
    yield ""
    if shown := list(commands(result)):
        yield "\n".join(["```bash", *shown, "```\n"])
    if note := result.get("note"):
        yield f"Note: {note}.\n"
    if figure.exists():
        yield f"![what was measured](../../docs/images/{figure.name})\n"
    if result.get("runs"):
        yield from whole(result["runs"])
        yield from others(result)
        yield from stage_tables(result["runs"])
    yield from correctness(result)
    yield from models(result.get("models", []))
    yield from layers(result.get("layer", []))
    yield from dense(result.get("dense_attention", []))
    yield from steady(result.get("steady"))
    yield from dsa(result.get("dsa"))
    yield from decode(result.get("decode"))
    yield from prefill(result.get("prefill"))
    yield from prompts(result.get("prompts"))
    yield from training(result.get("training", []))
    yield from scaling(result.get("scaling", []))
    yield from recall(result.get("recall", []))
    yield from validation(result.get("validation", []))
    yield from preparing(result)


def commands(result: dict) -> Iterator[str]:
    """That it was measured by, without where the result was written to."""
    steady = result.get("steady", {}).get("command")
    one = result.get("command", steady)
    for command in result.get("commands", [one] if one else []):
        words = shlex.split(command)
        if words[0].startswith("--"):
            words = ["python", "benchmarks/attention.py", *words]
        if "--out" in words:
            del words[(at := words.index("--out")) : at + 2]
        yield shlex.join(words)


def of_today(result: dict) -> dict:
    """The first result file, of 2026-11-23, as later ones are."""
    for run in result.get("runs", []):
        if "dense" not in run:
            run["dense"], run["peers"] = {"cudnn": {}, "flash": {}}, {}
            for row in run["stages"].values():
                row["floor_share"] = row.pop("floor", None)
            for row in run["total"].values():
                row["vs"] = {name: row[f"vs_{name}"] for name in run["dense"] if f"vs_{name}" in row}
    return result


def whole(runs: list[dict]) -> Iterator[str]:
    yield "### The whole operator\n"
    yield "Compressed, selection, selected, window and combine; indices like those of a trained model.\n"
    dense = [
        name for name in names_of(runs, "dense") if any(name in run["total"][regime_of(run)]["vs"] for run in runs)
    ]
    header = ["shape, tokens", "forward ms", "backward ms", "both ms", "share of the floor", "peak MB", "saved MB"]
    called = any("called" in row for run in runs for row in run["total"].values())
    if called:
        yield "Times are of CUDA graphs, as the trainer runs; `eager`: both passes launched from Python.\n"
        header.append("eager ms")
    rows = []
    for run in runs:
        row = run["total"][regime_of(run)]
        floor = row.get("floor_share")
        share = f"{floor['forward']:.2f} / {floor['backward']:.2f}" if floor else None
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
    yield from table(["shape, tokens", *dense, "target, over cudnn"], rows)
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
    return "" if row.get("recorded", True) else " (eager)"


def others(result: dict) -> Iterator[str]:
    runs, rows = result["runs"], []
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
    if rows:
        yield "### Dense attention of others\n"
        gap = "distance to ours: output / gradients"
        yield from table(["", "forward ms", "backward ms", "TFLOP/s", "peak MB", "saved MB", gap], rows)
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
    yield words(
        "Rates count the algorithm's operations and each tensor once; the floor is the longer of both at the ceilings",
        "of benchmarks/measure.py.\n",
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
            [f"{row['shape']} {length(row['tokens'])}"]
            + [row.get(key) for key in ("forward", "backward", "peak_mb", "error")]
            for row in result["longest"]
        ]
        yield from table(["one layer", "forward ms", "backward ms", "peak MB", "error of the last queries"], rows)


def models(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/models.py: config, attention, tokens, tokens_per_s, mfu, peak_mb."""
    if not rows:
        return
    yield "### Whole models\n"
    if any("dense_attention" in row for row in rows):
        yield from by_implementation(rows)
        return
    yield "Forward, backward and optimizer step in bf16; tokens/s (MFU); NSA over dense in bold.\n"
    yield words(
        "The baseline is dense attention by our own Triton kernel with document boundaries. That kernel takes 4 to 14",
        "% longer than cuDNN without boundaries, and FlashAttention-4 is faster than both",
        "([dense-h200-2026-11-28](dense-h200-2026-11-28.md)): over the fastest dense attention the ratios are smaller.",
        "[models-h200-2026-11-28](models-h200-2026-11-28.md) has those.\n",
    )
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


def by_implementation(rows: list[dict]) -> Iterator[str]:
    """Rows that name what computed dense attention."""
    yield words(
        "Forward, backward and optimizer step in bf16.",
        "Samples are the trainer's, of several documents." if rows[0].get("packed") else "Each sample is one document.",
        "The last column is the time with this dense attention over NSA's in the same case: above 1 NSA is faster.\n",
    )
    columns = ("samples", "tokens", "accumulate", "dense_attention", "ms", "tokens_per_s", "mfu", "peak_mb")
    case = ("config", "samples", "tokens", "accumulate")
    nsa = {tuple(row.get(key) for key in case): row["ms"] for row in rows if row["attention"] == "nsa"}
    cells: list[list[object]] = []
    for row in rows:
        ratio = f"{row['ms'] / nsa[tuple(row.get(key) for key in case)]:.2f}" if row["attention"] == "dense" else None
        cells.append([f"{row['config']} {row['attention']}", *(row.get(name) for name in columns), ratio])
    yield from table(["", *(name.replace("_", " ") for name in columns), "over NSA"], cells)


def dense(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/dense_attention.py."""
    if not rows:
        return
    yield "### Causal attention by every implementation\n"
    yield words(
        "Query / KV heads, head dimension. `triton` is ours, `flash` FlashAttention-2 of torch. `none`: no boundaries,",
        "the baseline; `one`: a document fills the sample; `packed`: documents of 1024 tokens on average. Over cuDNN:",
        "its time without boundaries over this one, both passes. Repeats: two backward passes are bitwise identical.\n",
    )
    columns = ("packing", "implementation", "forward_ms", "backward_ms", "over_cudnn", "repeats")
    cells = [[f"{row['shape']}; {length(row['tokens'])}", *(row.get(name) for name in columns)] for row in rows]
    yield from table(["", *(name.replace("_", " ") for name in columns)], cells)


def layers(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/layer.py: config, attention, tokens, launches, ms, host_ms, gpu_ms."""
    if not rows:
        return
    yield "### One layer, and who waits for whom\n"
    yield "Forward and backward: its time, that of the host to launch it, that of the kernels by themselves.\n"
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
                lines.setdefault(f"dense: {NAMES.get(name, name)}", []).append((x, entry["dense"]["both"]))
        for name, entry in run["peers"].items():
            if "total" in entry.get("stages", {}):
                # It chooses its own blocks, of random data: our call of the same function stands beside it.
                total = entry["stages"]["total"]
                lines.setdefault(f"sparse: {name}, random data", []).append((x, total["both"]))
                lines.setdefault(f"ours beside {name}", []).append((x, total["ours"]["both"]))
    for name, points in lines.items():
        style = "--" if name.startswith("dense") else ":" if name.startswith("sparse") else "-"
        bold = {"color": "black", "linewidth": 2.5} if name == "ours" else {}
        left.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=name, **bold)
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


def draw_steps(result: dict, path: Path) -> None:
    """Left: MFU of whole steps with each attention. Right: NSA over dense attention, and what was aimed at."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = headlines.cases(result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    kinds = {"nsa": ("NSA", "black"), "flash-attn-4": (f"dense, {result['flash_attn_4']}", "#4c78a8")}
    kinds["cudnn"] = ("dense, cuDNN", "#f58518")
    for axes, shown in ((left, list(kinds)), (right, list(kinds)[1:])):
        for i, name in enumerate(shown):
            bars = [(place, by) for place, by in enumerate(found.values()) if name in by]
            places = [place + (i - (len(shown) - 1) / 2) * 0.27 for place, _ in bars]
            label, colour = kinds[name]
            if axes is left:
                heights = [100 * by[name]["mfu"] for _, by in bars]
            else:
                heights = [by[name]["ms"] / by["nsa"]["ms"] for _, by in bars]
                label = label.replace("dense", "NSA over dense")
            drawn = axes.bar(places, heights, 0.27, label=label, color=colour)
            axes.bar_label(drawn, fmt="%.0f" if axes is left else "%.2f", fontsize=8)
        axes.set_xticks(range(len(found)), [headlines.named(case).replace(", ", "\n") for case in found], fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    aims = [(place, headlines.STEP_AIMS.get(case)) for place, case in enumerate(found)]
    wanted = [(place - 0.135, aim) for place, aim in aims if aim]
    right.plot(
        *zip(*wanted, strict=True), "_", color="red", markersize=22, zorder=3, label="target, over the fastest dense"
    )
    right.axhline(1, color="gray", linewidth=1)
    left.set(ylabel="MFU, %", title=f"Whole steps, one {headlines.card(result)}")
    right.set(ylabel="times as fast", title="NSA over dense attention")
    left.set_ylim(top=72)
    left.legend(fontsize=8, loc="upper left")
    right.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def page(name: str, result: dict) -> str:
    """The tables of one result file."""
    figure = IMAGES / f"{Path(name).stem}.png"
    lines = [f"# {name}", "", "Written by `python benchmarks/report.py`.", ""]
    if runs := of_today(result).get("runs"):
        shapes = list(dict.fromkeys(run["shape"] for run in runs))
        runs.sort(key=lambda run: (shapes.index(run["shape"]), run["tokens"]))
        if name.startswith("performance-"):
            draw(result, figure)
        lines += [
            "bf16, batch 1, causal; l 32, d 16, blocks of 64, 16 of them, window 512. Milliseconds are medians, the L2",
            "cache flushed between repeats. Query / KV heads, head dimension:",
            "",
            *(f"- {shape} = {description}" for shape, description in SHAPES.items()),
            "",
        ]
    if any("dense_attention" in row for row in result.get("models", [])):
        draw_steps(result, figure)
    if result.get("recall"):
        draw_recall(result["recall"], figure)
    if result.get("validation"):
        draw_validation(result["validation"], figure)
    lines += section(result, figure)
    return "\n".join(lines).rstrip() + "\n"


OF_THE_PLAN = """# Steps, and the plan's prediction

Written by `python benchmarks/report.py`.

Rows with a predicted peak are the trainer's (`benchmarks/training.py`: one GPU, DeepSpeed, bf16; medians of up to 20
steps after the first) or its throughput over time (`benchmarks/steady.py`); the others are bare models'
(`benchmarks/models.py`). Files of before 2026-11-28 were measured before the step around attention was made faster. The
plan is fitted to the later ones, and says less time than the earlier took. Dense attention was our own Triton kernel in
those.
"""


def main() -> None:
    paths = sorted(path for path in RESULTS.glob("*.json") if "device" in json.loads(path.read_text()))
    results = {path.stem: json.loads(path.read_text()) for path in paths}
    for path in paths:
        path.with_suffix(".md").write_text(page(path.name, results[path.stem]))
    rows = [row for path in measured.result_files() for row in measured.compare(path)]
    lines = [OF_THE_PLAN, measured.table(rows), "", *measured.error_lines(rows)]
    (RESULTS / "trainer.md").write_text("\n".join(lines) + "\n")
    PAGE.write_text(headlines.page(results))
    print(f"{PAGE}, and {len(results) + 1} pages beside the results")


if __name__ == "__main__":
    main()
