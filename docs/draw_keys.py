"""Draws docs/images/keys-per-query.png, a picture of docs/how-nsa-works.md: `python docs/draw_keys.py [FILE]`.

The counts are those from which FLOPs and MFU are computed (`Kind.keys`), with the default sizes of the configuration.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from nsa.layers.kinds import KINDS
from nsa.models import AttentionConfig

LENGTHS = [1024 * 2**i for i in range(8)]  # tokens of a document
COLORS = {"compressed": "#1f5a96", "selected": "#f08a24", "window": "#9467bd"}


def draw(path: Path) -> None:
    """Keys that a query attends to, the mean over a document, against the document's length."""
    config = AttentionConfig()
    keys = {kind.name: [kind.keys(config.of(kind), tokens) for tokens in LENGTHS] for kind in KINDS}
    dense, nsa = ([sum(terms.values()) for terms in keys[name]] for name in ("dense", "nsa"))
    figure, plot = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    plot.plot(LENGTHS, dense, color="grey", linewidth=2, marker="o", label="dense attention")
    plot.plot(LENGTHS, nsa, color="black", linewidth=2.5, marker="o", label="NSA: sum of the three branches")
    for branch, color in COLORS.items():
        plot.plot(LENGTHS, [terms[branch] for terms in keys["nsa"]], "--", color=color, label=f"NSA, {branch} branch")
    for tokens, ours, theirs in zip(LENGTHS, nsa, dense, strict=True):
        away = (0, 10 if ours > theirs else -18)  # from the other curve
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        plot.annotate(
            f"{ours / theirs:.2f}", (tokens, ours), away, textcoords="offset points", ha="center", fontsize=9, bbox=box
        )
    plot.set(xscale="log", yscale="log", xlabel="tokens of the document", ylabel="keys per query (mean)")
    plot.set_xticks(LENGTHS, [f"{tokens // 1024}K" for tokens in LENGTHS])
    plot.set_xticks([], minor=True)
    plot.set_title("Keys that a query attends to (numbers: NSA over dense attention)")
    plot.grid(alpha=0.3)
    plot.set_xlim(left=850)
    plot.legend(fontsize=9, loc="upper left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images/keys-per-query.png")
