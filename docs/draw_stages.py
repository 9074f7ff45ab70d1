"""Draws docs/images/dsa-stages.png, a picture of docs/dsa.md: `python docs/draw_stages.py [FILE]`.

The values are those of benchmarks/results/dsa-stages-25m-h200-2026-11-29.json, and of a later run with the bound of
recall.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks/results/dsa-stages-25m-h200-2026-11-29.json"
BOUND = ROOT / "benchmarks/results/dsa-stages-25m-h200-2026-11-30.json"


def column(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[Any]]:
    """Steps and values of the rows that have ``key``."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    return [step for step, _ in found], [value for _, value in found]


def by_layer(plot: Any, stages: dict[str, Any], key: str) -> None:
    """A curve for each layer, the indexer's stage and then the sparse one."""
    start = stages["indexer"][-1]["step"]
    for name, offset in (("indexer", 0), ("sparse", start)):
        steps, values = column(stages[name], key)
        for layer in range(len(values[0])):
            color = plt.get_cmap("viridis")(layer / (len(values[0]) - 1))
            label = f"layer {layer}" if name == "indexer" and layer in (0, len(values[0]) - 1) else None
            plot.plot([s + offset for s in steps], [v[layer] for v in values], color=color, label=label)
    plot.axvline(start, color="grey", linestyle=":")
    plot.text(start, 0.98, " sparse", transform=plot.get_xaxis_transform(), va="top", color="grey")
    plot.set_xlabel("step of the indexer's stage, then of the sparse stage")
    plot.legend()


def draw(path: Path) -> None:
    """The indexer's loss and recall by layer, recall beside its bound, and the validation losses of the sparse stage
    and of its dense twin."""
    stages, later = (json.loads(path.read_text())["stages"] for path in (RESULT, BOUND))
    figure, ((loss, recall), (bound, validation)) = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    by_layer(loss, stages, "indexer_kl")
    loss.set(yscale="log", ylabel="nats per token", title="The indexer's loss")
    by_layer(recall, stages, "recall")
    recall.set(ylim=(0, 1), ylabel="share of dense attention", title="Recall of 256 of up to 2,048 tokens")
    last = [row for row in later["indexer"] if "recall" in row][-1]
    layers = range(len(last["recall"]))
    bound.bar(layers, last["recall_bound"], color="#d9d9d9", label="the most that 256 tokens hold")
    bound.bar(layers, last["recall"], color="#1f5a96", width=0.5, label="the indexer's 256")
    bound.set(
        ylim=(0, 1), xlabel="layer", ylabel="share of dense attention", title="Recall after 200 steps, and its bound"
    )
    bound.legend(loc="upper left")
    for name, label, color in (("dense, on", "dense", "grey"), ("sparse", "DSA", "#1f5a96")):
        validation.plot(*column(stages[name], "validation/loss"), color=color, marker="o", label=label)
    validation.set(xlabel="step after 500 dense steps", ylabel="validation loss", title="The model's loss")
    validation.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images/dsa-stages.png")
