"""Draws docs/images/dsa-stages.png, a picture of docs/dsa.md: `python docs/draw_stages.py [FILE]`.

The values are those of benchmarks/results/dsa-stages-25m-h200-2026-11-29.json.
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
    """The indexer's loss and recall by layer, and the validation losses of the sparse stage and of its dense twin."""
    stages = json.loads(RESULT.read_text())["stages"]
    figure, (loss, recall, validation) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    by_layer(loss, stages, "indexer_kl")
    loss.set(yscale="log", ylabel="nats per token", title="The indexer's loss")
    by_layer(recall, stages, "recall")
    recall.set(ylim=(0, 1), ylabel="share of dense attention", title="Recall of 256 of up to 2,048 tokens")
    for name, label, color in (("dense, on", "dense", "grey"), ("sparse", "DSA", "#1f5a96")):
        validation.plot(*column(stages[name], "validation/loss"), color=color, marker="o", label=label)
    validation.set(xlabel="step after 500 dense steps", ylabel="validation loss", title="The model's loss")
    validation.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/images/dsa-stages.png")
