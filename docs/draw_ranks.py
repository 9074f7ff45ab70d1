"""Draws docs/images/rank-order.png, a picture of docs/parallelism.md: `python docs/draw_ranks.py [FILE]`."""

import sys
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from nsa.parallel.grid import NAMES

SIZES = {"tensor": 4, "context": 2, "data": 8}  # the example of the page
GPUS = 8  # of a node
COLORS = ("#bcd3ea", "#f7cfa6")  # of the two context ranks


def draw(path: Path) -> None:
    """64 ranks in the order of `nsa.parallel.grid`, a replica and node in each row."""
    places = list(product(*(range(SIZES.get(name, 1)) for name in NAMES)))
    columns = SIZES["tensor"] * SIZES["context"]
    figure, plot = plt.subplots(figsize=(9, 5.6), layout="constrained")
    for rank, place in enumerate(places):
        at = dict(zip(NAMES, place, strict=True))
        row, column = rank // columns, rank % columns
        color = COLORS[at["context"]]
        plot.add_patch(Rectangle((column + 0.04, row + 0.1), 0.92, 0.8, facecolor=color, edgecolor="#555555"))
        plot.text(column + 0.5, row + 0.5, f"rank {rank}", ha="center", va="center", fontsize=10)
        if at["data"] == 0:
            plot.text(column + 0.5, -0.12, f"tensor {at['tensor']}", ha="center", fontsize=10)
    for row in range(len(places) // columns):
        plot.text(-0.1, row + 0.5, f"data {row}\nnode {row * columns // GPUS}", ha="right", va="center", fontsize=9)
    for context in range(SIZES["context"]):
        ends = [SIZES["tensor"] * place for place in (context, context + 1)]
        plot.annotate("", (ends[0], -0.55), (ends[1], -0.55), arrowprops={"arrowstyle": "<->"})
        text = f"context {context}: one half of the tokens of each sample"
        plot.text(sum(ends) / 2, -0.7, text, ha="center", fontsize=10)
    plot.set(xlim=(-0.9, columns + 0.1), ylim=(len(places) / columns + 0.1, -1.1))
    plot.axis("off")
    plot.set_title("64 ranks as tensor 4 x context 2 x data 8: a row is one replica, which computes its own samples")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images/rank-order.png")
