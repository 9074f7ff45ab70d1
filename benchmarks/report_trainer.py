"""Tables of what the trainer does: its steps, over time, on several GPUs, learning to recall, preparing text."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.markdown import length, table, words


def training(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/training.py."""
    if not rows:
        return
    yield "### Steps of the trainer\n"
    yield words(
        "DeepSpeed, packed texts; the median of up to 20 steps after the first. MFU counts a sample as one document;",
        "dense-equivalent: as if attention were dense. What the plan predicts is in [trainer.md](trainer.md).\n",
    )
    columns = ["tokens", "steps", "first_step_s", "step_ms", "tokens_per_s"]
    columns += ["mfu_sparse", "mfu_dense_equivalent", "peak_gib"]
    cells: list[list[object]] = []
    for row in rows:
        loss = " to ".join(str(value) for value in row.get("loss", [])) or row.get("refused")
        name = " ".join([row["config"], row["attention"], *row["overrides"]])
        cells.append([name, *(row.get(key) for key in columns), loss])
    yield from table(["", *(name.replace("_", " ") for name in columns), "loss"], cells)


def steady(result: dict | None) -> Iterator[str]:
    """The result of benchmarks/steady.py."""
    if not result:
        return
    yield f"### {result['config']} {result['attention']}: the trainer's throughput over time\n"
    tokens = f"{result['tokens_per_step']:,} tokens"
    yield f"Tokens/s in blocks of {result['block']} steps of {tokens}; the first warms up:\n"
    yield words(*(f"{block:,}," for block in result["blocks"])).rstrip(",") + ".\n"
    yield f"First blocks compared: {result['first']:,}; last: {result['last']:,}; ratio {result['ratio']}.\n"


def scaling(rows: list[dict]) -> Iterator[str]:
    """Rows of benchmarks/scaling.py."""
    if not rows:
        return
    yield "### The trainer on several GPUs\n"
    yield words(
        "`data` has as many samples for each GPU (weak scaling), the others the same samples on all GPUs (strong).",
        "Over one: tokens/s over those of one GPU.\n",
    )
    header = ["what", "model, attention", "samples of a step", "GPUs", "step ms", "tokens/s", "MFU", "GiB", "over one"]
    cells: list[list[object]] = []
    for row in rows:
        name = [row["case"], f"{row['config']}, {row['attention']}", f"{row['samples']} x {length(row['tokens'])}"]
        if "refused" in row:
            cells.append([*name, row["gpus"], row["refused"].splitlines()[-1][:60], *[None] * 4])
            continue
        figures = [row["step_ms"], f"{row['tokens_per_s']:,}", f"{row['mfu']:.1%}", f"{row['peak_gib']:.1f}"]
        cells.append([*name, row["gpus"], *figures, row.get("over_one")])
    yield from table(header, cells)


def recall(runs: list[dict]) -> Iterator[str]:
    """Runs of benchmarks/recall.py: where each ended."""
    if not runs:
        return
    yield "### Recall, learned from a mixture\n"
    yield words("Right answers in episodes of so many tokens, at the last measurement of each run.\n")
    names = [name for name in runs[0]["curve"][0] if name not in ("step", "tokens", "seconds", "loss")]
    header = ["attention", "seed", "steps", "million tokens", "seconds", "loss", *names]
    rows = [(run, run["curve"][-1]) for run in runs]
    yield from table(
        header,
        [
            [run["kind"], run["seed"], at["step"], f"{at['tokens'] / 1e6:.1f}", at["seconds"], at["loss"]]
            + [f"{at[name]:.3f}" for name in names]
            for run, at in rows
        ],
    )


def validation(runs: list[dict]) -> Iterator[str]:
    """Validation losses of whole trainings: the lowest and the last."""
    if not runs:
        return
    yield "### Validation loss, nats\n"
    header = ["attention", "seed", "lowest", "at step", "last", "at step"]
    cells: list[list[object]] = []
    for run in runs:
        lowest, last = min(run["curve"], key=lambda at: at["validation_loss"]), run["curve"][-1]
        losses = [f"{at['validation_loss']:.3f}" for at in (lowest, last)]
        cells.append([run["kind"], run["seed"], losses[0], lowest["step"], losses[1], last["step"]])
    yield from table(header, cells)


def draw_validation(runs: list[dict], path: Path) -> None:
    """Validation loss by tokens seen, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    colours = {kind: f"C{number}" for number, kind in enumerate(dict.fromkeys(run["kind"] for run in runs))}
    lowest, first = min(at["validation_loss"] for run in runs for at in run["curve"]), runs[0]["seed"]
    for run in runs:
        x = [at["tokens"] / 1e6 for at in run["curve"]]
        y = [at["validation_loss"] for at in run["curve"]]
        axis.plot(x, y, color=colours[run["kind"]], label=run["kind"] if run["seed"] == first else None)
    axis.set(xlabel="million tokens trained on", ylabel="validation loss, nats", ylim=(lowest - 0.1, lowest + 1.2))
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def preparing(result: dict) -> Iterator[str]:
    """Text to shards, by the length of documents."""
    if not (rows := result.get("prepare")):
        return
    yield "### Preparing text, by bytes of a document\n"
    yield "Memory of the process and its workers, summed: its peak in each tenth of the time.\n"
    keys = ("megabytes", "bytes", "documents", "seconds", "cpu_seconds", "mb_per_s", "peak_mib")
    yield "| " + " | ".join(key.replace("_", " ") for key in keys) + " | MiB by tenths |"
    yield "|--:" * len(keys) + "|---|"
    for row in rows:
        yield "| " + " | ".join(str(row[key]) for key in keys) + f" | {' '.join(map(str, row['memory_mib']))} |"
