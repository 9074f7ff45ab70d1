"""The results of an evaluation as text and as plots."""

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from nsa.evaluation.bits_per_byte import Curve
from nsa.evaluation.recall import Recall


def curve_table(curves: list[Curve]) -> str:
    """Bits per byte of each curve, in total and by position."""
    lines = ["bits per byte of held-out text, by position in the document"]
    lines.append(f"  {'position':>13}" + "".join(f"  samples of {c.length:>5}" for c in curves))
    longest = max(curves, key=lambda c: c.length)
    for i, start in enumerate(longest.starts):
        stop = longest.starts[i + 1] if i + 1 < len(longest.starts) else longest.length
        cells = [c.by_position[i] if i < len(c.by_position) else math.nan for c in curves]
        lines.append(f"  {start:>6}-{stop - 1:<6}" + "".join("  " + _figure(cell, 16) for cell in cells))
    lines.append(f"  {'all':>13}" + "".join("  " + _figure(c.bits_per_byte, 16) for c in curves))
    return "\n".join(lines)


def recall_header() -> str:
    return f"  {'task':<8} {'length':>7} {'times':>6} {'accuracy':>9} {'95 % interval':>16} {'chance':>8}  answers"


def recall_row(recall: Recall, factor: int, yarn: float) -> str:
    between = f"{recall.low:.1%} - {recall.high:.1%}"
    note = f"  (YaRN {yarn:g})" if yarn > 1 else ""
    return (
        f"  {recall.task:<8} {recall.length:>7} {factor:>5}x {recall.accuracy:>9.1%} {between:>16} "
        f"{recall.chance:>8.1%}  {recall.answers}{note}"
    )


def plot_curves(curves: list[Curve], training_length: int, path: Path) -> None:
    """Bits per byte over position, on a logarithmic axis."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for curve in curves:
        edges = [*curve.starts, curve.length]
        middles = [math.sqrt(max(a, 1) * b) for a, b in itertools.pairwise(edges)]
        label = f"samples of {curve.length} tokens: {curve.bits_per_byte:.3f}"
        axes.plot(middles, curve.by_position, marker="o", markersize=3, label=label)
    axes.axvline(training_length, color="grey", linestyle=":", label="training length")
    axes.set(xscale="log", xlabel="position in the document (tokens)", ylabel="bits per byte")
    axes.set_title("Held-out text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_recall(results: list[Recall], training_length: int, path: Path) -> None:
    """Accuracy with its interval over the length of the episode, one line per task."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for task in dict.fromkeys(r.task for r in results):
        mine = [r for r in results if r.task == task]
        errors = [[r.accuracy - r.low for r in mine], [r.high - r.accuracy for r in mine]]
        lengths, accuracies = [r.length for r in mine], [r.accuracy for r in mine]
        line, *_ = axes.errorbar(lengths, accuracies, errors, marker="o", capsize=3, label=task)
        axes.plot(lengths, [r.chance for r in mine], color=line.get_color(), linestyle="--", linewidth=1)
    axes.plot([], [], color="grey", linestyle="--", linewidth=1, label="chance")
    axes.axvline(training_length, color="grey", linestyle=":", label="training length")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({r.length for r in results}), sorted({str(r.length) for r in results}, key=int))
    axes.set(xlabel="length of the episode (tokens)", ylabel="accuracy", ylim=(-0.02, 1.02))
    axes.set_title("Recall")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _figure(value: float, width: int) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.4f}':>{width}}"
