"""The pictures of the report, as PNG bytes."""

import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa.evaluation.comparison.reading.analysis import Required
from nsa.evaluation.comparison.rows import OWN, RANDOM

COLOURS = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
MARKERS = "osD^vP*X<>"
SHARES = {
    "reads": "KV bytes read per step of decoding (share of dense)",
    "prefill": "pairs of the prompt attended to and scored (share of dense)",
    "resident": "KV bytes kept (share of dense)",
}


class Curve:
    """Scores over a share of dense, of one method on one sibling. points: (share, score)."""

    def __init__(self, method: str, points: Iterable[tuple[float, float]]) -> None:
        self.method, self.points = method, sorted(points)


Panels = Mapping[tuple[str, int], Sequence[Curve]]  # by group and length


def style(methods: Sequence[str], method: str) -> dict:
    """Colour, marker and line of a method: the same in all pictures of one report. Controls are grey or black."""
    if method == OWN:
        return {"color": "black", "marker": "*", "linestyle": "-", "linewidth": 1.6, "markersize": 9, "zorder": 5}
    if method == RANDOM:
        return {"color": "0.6", "marker": "x", "linestyle": ":"}
    if method.startswith("oracle"):
        index = [m for m in methods if m.startswith("oracle")].index(method)
        return {"color": "0.35", "marker": "+1"[index % 2], "linestyle": ("--", ":")[index % 2]}
    index = [m for m in methods if m not in (OWN, RANDOM) and not m.startswith("oracle")].index(method)
    again = index // len(COLOURS)  # a colour that comes again has another marker, too
    marker, dash = MARKERS[(index + again) % len(MARKERS)], ("-", "--", "-.")[again % 3]
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker, "linestyle": dash}


def fronts(panels: Panels, dense: Mapping[tuple[str, int], float], axis: str, title: str) -> bytes:
    """Score over counted budget: groups of tasks as rows, lengths as columns. dense: the dashed line of each panel."""
    groups, lengths = list(dict.fromkeys(g for g, _ in dense)), sorted({n for _, n in dense})
    methods = sorted({curve.method for curves in panels.values() for curve in curves})
    figure, grid = _grid(len(groups), len(lengths))
    shares = [x for curves in panels.values() for curve in curves for x, _ in curve.points]
    for i, group in enumerate(groups):
        for j, n in enumerate(lengths):
            axes: Axes = grid[i][j]
            for curve in panels.get((group, n), ()):
                x, y = zip(*curve.points, strict=True)
                axes.plot(x, y, label=curve.method, markersize=5, linewidth=1.2, **{**style(methods, curve.method)}) \
                    if curve.method != OWN else axes.plot(x, y, label=curve.method, **style(methods, OWN))  # fmt: skip
            if (group, n) in dense:
                axes.axhline(dense[group, n], color="black", linestyle=(0, (6, 3)), linewidth=1, label="dense")
            else:
                axes.text(0.5, 0.5, "dense is below 80 %", transform=axes.transAxes, ha="center", color="0.4")
            axes.set_title(f"{group}, {n:,} tokens", fontsize=10)
            _share_axis(axes, shares)
            axes.set_ylim(-0.03, 1.03)
            axes.set_ylabel("score")
            axes.set_xlabel(SHARES[axis], fontsize=8)
            axes.label_outer()
    return _finish(figure, grid, title)


def frontiers(
    panels: Mapping[tuple[str, int], Sequence[tuple[float, float, str, bool]]], dense: Mapping[tuple[str, int], float],
    siblings: Sequence[str], axis: str,
) -> bytes:  # fmt: skip
    """All arms of all siblings over counted budget; those that none beats are joined by a step.

    panels: by group and length, (share, score, sibling, whether none beats it).
    """
    groups, lengths = list(dict.fromkeys(g for g, _ in dense)), sorted({n for _, n in dense})
    figure, grid = _grid(len(groups), len(lengths))
    shares = [x for points in panels.values() for x, *_ in points]
    winners = {sibling for points in panels.values() for *_, sibling, best in points if best}
    for (group, n), points in panels.items():
        axes: Axes = grid[groups.index(group)][lengths.index(n)]
        for index, sibling in enumerate(siblings):
            for best in (False, True):
                mine = [(x, y) for x, y, s, b in points if s == sibling and b == best]
                if mine:
                    x, y = zip(*mine, strict=True)
                    look = (
                        {"s": 46, "zorder": 4, "edgecolors": "black", "linewidths": 0.8}
                        if best
                        else {"s": 12, "alpha": 0.45}
                    )
                    label = sibling if best or sibling not in winners else None
                    axes.scatter(x, y, color=COLOURS[index % 10], marker=MARKERS[index % 3], label=label, **look)
        front = sorted((x, y) for x, y, _, best in points if best)
        axes.step(*zip(*front, strict=True), where="post", color="black", linewidth=0.9, zorder=3)
        axes.axhline(dense[group, n], color="black", linestyle=(0, (6, 3)), linewidth=1, label="dense run")
    for i, group in enumerate(groups):
        for j, n in enumerate(lengths):
            axes = grid[i][j]
            axes.set_title(f"{group}, {n:,} tokens", fontsize=10)
            _share_axis(axes, shares)
            axes.set_ylim(-0.03, 1.03)
            axes.set_ylabel("score")
            axes.set_xlabel(SHARES[axis], fontsize=8)
            axes.label_outer()
    return _finish(figure, grid, "Pareto front over all arms\n(large, black rim: beaten by none; small: the others)")


def required(by_sibling: Mapping[str, Sequence[tuple[str, Required]]]) -> bytes:
    """Tokens that are needed over the length, one panel a sibling. by_sibling: (method, what it requires)."""
    methods = sorted({method for entries in by_sibling.values() for method, _ in entries})
    figure, grid = _grid(1, len(by_sibling), height=4.2)
    for axes in grid[0][1:]:
        axes.sharey(grid[0][0])
    lengths = sorted({n for entries in by_sibling.values() for _, r in entries for n in r.lengths})
    for axes, (sibling, entries) in zip(grid[0], by_sibling.items(), strict=True):
        for method, needs in entries:
            look = style(methods, method)
            axes.plot(needs.lengths, needs.tokens, label=method, **{"markersize": 5, "linewidth": 1.2, **look})
            for n, tokens, bound in zip(needs.lengths, needs.tokens, needs.bounds, strict=True):
                if bound:  # the true need is lower
                    axes.annotate(
                        "", (n, tokens * 0.72), (n, tokens), arrowprops={"arrowstyle": "->", "color": look["color"]}
                    )
        axes.plot(lengths, lengths, color="black", linestyle=(0, (6, 3)), linewidth=1, label="dense (exponent 1)")
        low = min(t for _, r in entries for t in r.tokens)
        guide = [low * 0.6 * math.sqrt(n / lengths[0]) for n in lengths]
        axes.plot(lengths, guide, color="0.5", linestyle=":", linewidth=1, label="exponent 0.5 (slope only)")
        axes.set(xscale="log", yscale="log", title=sibling, xlabel="length (tokens)")
        axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("tokens needed")
    return _finish(figure, grid, "Required budget against length")


def matrix(values: np.ndarray, siblings: Sequence[str], methods: Sequence[str], title: str) -> bytes:
    """Scores of siblings (rows) run with methods (columns); NaN: not measured."""
    figure, axes = plt.subplots(figsize=(2.2 + 0.75 * len(methods), 1.9 + 0.5 * len(siblings)), layout="constrained")
    image = axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = "-" if math.isnan(value) else f"{value:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(methods)), methods, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    axes.set_yticks(range(len(siblings)), siblings)
    axes.set(title=title, xlabel="run with", ylabel="trained as")
    figure.colorbar(image, ax=axes, label="score", fraction=0.05)
    return _png(figure)


def sinks(by_sibling: Mapping[str, Sequence[float]]) -> bytes:
    """Attention on the first 4 tokens, by layer."""
    figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for index, (sibling, masses) in enumerate(by_sibling.items()):
        axes.plot(range(len(masses)), masses, marker=MARKERS[index % len(MARKERS)], markersize=4, label=sibling)
    top = 1.08 * max(max(masses) for masses in by_sibling.values())  # room for the marker of the highest
    axes.set(xlabel="layer", ylabel="share of attention", ylim=(0, top or 1), title="Attention on the first 4 tokens")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _png(figure)


def kept_mass(by_method: Mapping[str, np.ndarray], title: str) -> bytes:
    """Share of dense attention on what each method kept: a map (layers, KV heads) for each."""
    columns = min(5, len(by_method))
    rows = math.ceil(len(by_method) / columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(2.1 * columns + 1, 5.0), max(2.5 * rows, 3.2)), layout="constrained", squeeze=False
    )
    for axes in grid.flat:
        axes.set_visible(False)
    for axes, (method, mass) in zip(grid.flat, by_method.items(), strict=False):
        axes.set_visible(True)
        image = axes.imshow(mass, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axes.set_title(f"{method}\nmean {mass.mean():.2f}", fontsize=9)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=4, integer=True))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, integer=True))
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    for axes in list(grid.flat)[max(0, len(by_method) - columns) : len(by_method)]:  # the lowest of each column
        axes.set_xlabel("KV head")
    figure.colorbar(image, ax=grid, label="share of dense attention kept", fraction=0.03)
    figure.suptitle(title, fontsize=11)
    return _png(figure)


def iso_cost(curves: Mapping[str, Sequence[tuple[float, float]]], batch: int) -> bytes:
    """Score over bytes read per token and sequence. curves: by sibling, (bytes, score)."""
    figure, axes = plt.subplots(figsize=(8, 4.4), layout="constrained")
    for index, (label, points) in enumerate(curves.items()):
        x, y = zip(*sorted(points), strict=True)
        look = {
            "color": COLOURS[index % 10],
            "marker": MARKERS[index % 10],
            "linestyle": ("-", "--", ":")[index // 10 % 3],
        }
        axes.plot(np.array(x) / 1e6, y, label=label, markersize=5, linewidth=1.2, **look)
    axes.set(xscale="log", xlabel="megabytes read per token and sequence", ylabel="score", ylim=(-0.03, 1.03))
    axes.set_title(f"Weights and KV cache, batch of {batch}")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return _png(figure)


def _grid(rows: int, columns: int, height: float = 2.7) -> tuple[Figure, np.ndarray]:
    figure, grid = plt.subplots(
        rows, columns, figsize=(3.9 * columns + 2, height * rows + 0.6), layout="constrained", squeeze=False
    )
    return figure, grid


def _share_axis(axes: Axes, shares: Sequence[float]) -> None:
    axes.set_xscale("log")
    low = min([*shares, 0.5]) * 0.85
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1) if t >= low]
    axes.set_xlim(low, max([*shares, 1.0]) * 1.15)  # with sketches some cost more than dense
    axes.set_xticks(ticks, [f"{100 * t:g} %" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _finish(figure: Figure, grid: np.ndarray, title: str) -> bytes:
    """One legend for all panels, beside them; the figure is as high as the legend needs."""
    handles = defaultdict(list)
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles[label].append(handle)
    figure.set_figheight(max(figure.get_figheight(), 0.21 * len(handles) + 0.8))
    figure.legend(
        [h[0] for h in handles.values()], list(handles), loc="outside right center", frameon=False, fontsize=9
    )
    figure.suptitle(title, fontsize=12)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
