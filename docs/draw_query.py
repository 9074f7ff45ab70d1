"""Draws docs/images/one-query.png, the picture of docs/how-nsa-works.md: `python docs/draw_query.py [FILE]`.

The page's own code is run first, and what it computed with `nsa.ops` is drawn: page and picture cannot differ.
"""

import re
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

DOCS = Path(__file__).parent
HEADS = ("#1f5a96", "#8fbce6")
CHOSEN, ALWAYS, OTHER = "#f08a24", "#4f9d4a", "#cfcfcf"
EXAMPLE = 8  # the selection block whose importance is spelled out


def example() -> dict[str, Any]:
    """The variables of the page after its last block of code."""
    page = (DOCS / "how-nsa-works.md").read_text()
    made: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), made)  # noqa: S102 - our own
    return made


def draw(made: dict[str, Any], path: Path) -> None:
    """Five rows over the positions of the tokens, and beside each branch the gates of its heads."""
    t, size = made["t"], made["block_size"]
    figure, axes = plt.subplots(
        5,
        2,
        figsize=(13, 10.5),
        layout="constrained",
        width_ratios=(7, 1),
        height_ratios=(0.8, 1.25, 1.25, 1, 1),
        gridspec_kw={"wspace": 0.03, "hspace": 0.04},
    )
    plots, sides = axes[:, 0], axes[:, 1]
    for plot in plots:
        plot.set_xlim(0, (made["t"] // made["block_size"] + 1) * size)
        plot.set_xticks(range(0, t + size, 2 * size))
        plot.axvline(t, color="black", linewidth=1.3)
        plot.spines[["top", "right"]].set_visible(False)
    _compression_blocks(plots[0], made)
    _compressed(plots[1], made)
    _importance(plots[2], made)
    _tokens(
        plots[3],
        made["p_slc"][0, t],
        f"5   Selected attention: weight of each token in the {len(made['chosen'])} selected blocks",
    )
    for j in made["chosen"]:
        shade = ALWAYS if j in made["always"] else CHOSEN
        plots[3].axvspan(size * j, min(size * (j + 1), t + 1), color=shade, alpha=0.16, linewidth=0, zorder=0)
    _tokens(plots[4], made["p_win"][0, t], f"6   Sliding window: weight of each of the last {made['window']} tokens")
    plots[4].axvspan(t - made["window"] + 1, t + 1, color="#9467bd", alpha=0.14, linewidth=0, zorder=0)
    plots[4].set_xlabel("position of the token in the document")
    _sides(sides, made)
    figure.suptitle(f"One query (position {t}) through Native Sparse Attention", fontsize=15)
    figure.savefig(path, dpi=110)


def _title(plot: Axes, text: str) -> None:
    plot.set_title(text, loc="left", fontsize=11, fontweight="bold")


def _compression_blocks(plot: Axes, made: dict[str, Any]) -> None:
    """Blocks in two lanes, since neighbours overlap; those that end after the query are not seen."""
    length, stride = made["length"], made["stride"]
    _title(plot, f"1   Compression blocks: {length} tokens each, a new one every {stride} tokens (in two lanes)")
    for i in range(made["blocks"]):
        color = "#bcd3ea" if i < made["visible"] else "#eeeeee"
        box = Rectangle((stride * i + 0.8, i % 2), length - 1.6, 0.82, facecolor=color, edgecolor="#5b7fa3")
        plot.add_patch(box)
    plot.set_ylim(-0.15, 2.35)
    plot.set_yticks([])
    plot.text(made["t"] - 5, 2.0, "the query", ha="right", va="center")
    plot.text(made["t"] + 5, 2.0, "not seen", va="center", color="grey")


def _compressed(plot: Axes, made: dict[str, Any]) -> None:
    """Weights of the blocks, one head on top of the other, and the counts of one selection block."""
    _title(plot, "2   Compressed attention: weight of each compression block, at the block's middle")
    stride, size = made["stride"], made["block_size"]
    middle = [stride * i + made["length"] / 2 for i in range(made["visible"])]
    weights = made["p_cmp"][0, made["t"], :, : made["visible"]]
    plot.bar(middle, weights[0], 0.8 * stride, color=HEADS[0])
    plot.bar(middle, weights[1], 0.8 * stride, bottom=weights[0], color=HEADS[1])
    group = weights.sum(0)
    top = float(group.max()) * 1.4
    plot.set_ylim(0, top)
    plot.axvspan(size * EXAMPLE, size * (EXAMPLE + 1), color="#dddddd", alpha=0.6, linewidth=0, zorder=0)
    first = size // stride * EXAMPLE - 1
    for m, times in enumerate(made["count"].int().tolist()):
        plot.text(middle[first + m], 0.87 * top, str(times), ha="center", fontsize=11, fontweight="bold")
    plot.text(middle[first] - 1.3 * stride, 0.87 * top, f"times counted in block {EXAMPLE}:", ha="right", fontsize=10)
    plot.set_ylabel("weight")


def _importance(plot: Axes, made: dict[str, Any]) -> None:
    size = made["block_size"]
    _title(plot, f"3, 4   Importance of the selection blocks ({size} tokens each), and the selection")
    top = float(made["importance"].max()) * 1.35
    for j in range(made["t"] // made["block_size"] + 1):
        value = float(made["importance"][j])
        color = ALWAYS if j in made["always"] else CHOSEN if j in made["best"] else OTHER
        plot.bar(size * (j + 0.5), max(value, top / 200), size - 5, color=color)
        bold = "bold" if j in made["chosen"] else "normal"
        plot.text(size * (j + 0.5), value + 0.025 * top, f"{value:.2f}", ha="center", fontsize=10, fontweight=bold)
    # An arrow from the counted weights to what they add up to.
    plot.annotate(
        f"block {EXAMPLE}: the weights above it,\ncounted 1, 2, 2, 2, 1 times",
        (size * EXAMPLE + 4, 0.82 * float(made["importance"][EXAMPLE])),
        (size * (EXAMPLE - 1.5), 0.8 * top),
        ha="right",
        va="center",
        fontsize=10,
        arrowprops={"arrowstyle": "->"},
    )
    plot.set_ylim(0, top)
    plot.set_xticks(
        [size * (j + 0.5) for j in range(made["t"] // made["block_size"] + 1)],
        [f"block {j}" for j in range(made["t"] // made["block_size"] + 1)],
    )
    plot.tick_params(axis="x", length=0, labelsize=9)
    plot.set_ylabel("importance")


def _tokens(plot: Axes, weights: Any, title: str) -> None:
    """weights (heads, tokens): one head on top of the other."""
    _title(plot, title)
    positions = range(weights.shape[1])
    # With an edge: an area narrower than a pixel would fade.
    below = 0 * weights[0]
    for head, color in enumerate(HEADS):
        above = below + weights[head]
        plot.fill_between(positions, below, above, step="mid", color=color, linewidth=0.5)
        below = above
    plot.set_ylim(0, float(weights.sum(0).max()) * 1.12)
    plot.set_ylabel("weight")


def _sides(sides: Any, made: dict[str, Any]) -> None:
    """Legends, and the gates of each branch; what they are multiplied with is on their left."""
    sides[0].axis("off")
    heads = [Patch(color=color, label=f"query head {head}") for head, color in enumerate(HEADS)]
    sides[0].legend(handles=heads, loc="center", frameon=False, fontsize=10)
    sides[2].axis("off")
    kinds = [
        Patch(color=ALWAYS, label="always selected:\nfirst block, last two"),
        Patch(color=CHOSEN, label="most important\nof the others"),
        Patch(color=OTHER, label="not selected"),
    ]
    sides[2].legend(handles=kinds, loc="center", frameon=False, fontsize=10)
    gates = made["gates"][0, made["t"]]
    for row, branch in ((1, 0), (3, 1), (4, 2)):
        side = sides[row]
        for head, color in enumerate(HEADS):
            gate = float(gates[head, branch])
            side.barh(1 - head, gate, 0.62, color=color)
            side.text(gate + 0.04, 1 - head, f"{gate:.2f}", va="center", fontsize=10)
        side.set_xlim(0, 1.3)
        side.set_ylim(-0.7, 1.7)
        side.set_xticks([0, 1])
        side.set_yticks([])
        side.spines[["top", "right"]].set_visible(False)
        side.set_title("7   times gate" if row == 1 else "plus, times gate", fontsize=11, fontweight="bold")
    sides[4].set_xlabel("= output of each head")


if __name__ == "__main__":
    draw(example(), Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS / "images/one-query.png")
