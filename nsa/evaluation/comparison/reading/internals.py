"""Sections of the report that need what was seen inside the models: bytes, sinks, and the mass that was kept."""

import numpy as np

from nsa.evaluation.comparison.reading import figures
from nsa.evaluation.comparison.reading.analysis import Point, Table
from nsa.evaluation.comparison.reading.pages import Grid, Picture, Section
from nsa.evaluation.comparison.rows import OWN

BATCHES = (1, 64)  # of the isoCost pictures: weights are read once for all sequences
WEIGHT_BYTES = 2  # bf16
APART = 1.2  # ratio of parameters from which on siblings count as of different size


def iso_cost(table: Table) -> Section:
    """Larger sparse siblings against smaller dense ones, if there are siblings of different sizes."""
    section = Section("isoCost: larger and sparse against smaller and dense")
    sizes = table.values("parameters")
    points = [p for p in table.informative(table.points) if "kv_bytes" in p.cell.figures and p.cell.axis == "reads"]
    if sizes[-1] / sizes[0] < APART:
        section.parts.append("Not shown: all siblings are of one size.")
        return section
    if not points:
        section.parts.append("Not shown: the bytes of the KV cache were not recorded.")
        return section
    longest = max(p.cell.length for p in points)
    points = [p for p in points if p.cell.length == longest]
    for batch in BATCHES:
        arms: dict[tuple[str, str, float | None], list[Point]] = {}
        for p in points:
            if not p.control:
                arms.setdefault(
                    (f"{p.cell.model} ({p.cell.parameters / 1e6:,.3g}M)", p.label, p.cell.budget), []
                ).append(p)
        curves: dict[str, list[tuple[float, float]]] = {}
        for (sibling, _, _), mine in arms.items():
            cost = float(np.mean([_bytes(p, batch) for p in mine]))
            curves.setdefault(sibling, []).append((cost, float(np.mean([p.mean for p in mine]))))
        for sibling, found in curves.items():
            curves[sibling] = [
                (x, y) for x, y in found if not any((a <= x and b > y) or (a < x and b >= y) for a, b in found)
            ]
        caption = (
            f"Batch {batch}, {longest:,} tokens: score over bytes of weights (bf16, shared by the batch) and of the "
            "counted share of the KV cache. Of each sibling the arms that none of its others beats, dense included."
        )
        section.parts.append(Picture(f"isocost-{batch}", figures.iso_cost(curves, batch), caption))
    return section


def internals(table: Table) -> Section:
    """Sink mass by layer of each sibling's dense run, and mass kept by layer and KV head of each method."""
    section = Section("Inside the models")
    sinks: dict[str, list[list[float]]] = {}
    for p in table.points:
        if "sink_mass" in p.cell.figures and (p.cell.dense or p.cell.method == OWN):
            name = p.cell.model if p.cell.dense else f"{p.cell.model} ({p.cell.method})"
            sinks.setdefault(name, []).append(p.cell.figures["sink_mass"])
    if sinks:
        curves = {name: np.mean(masses, axis=0).tolist() for name, masses in sorted(sinks.items())}
        caption = (
            "Attention on the first 4 tokens, mean over tasks and lengths; of a sibling run dense, or as trained (own)."
        )
        section.parts.append(Picture("sinks", figures.sinks(curves), caption))
    kept = [p for p in table.points if "kept_mass" in p.cell.figures and p.cell.budget is not None]
    if not kept:
        return section
    longest = max(p.cell.length for p in kept)
    budgets = sorted({p.cell.budget for p in kept if p.cell.budget is not None and p.cell.budget < 1})
    budget = budgets[len(budgets) // 2] if budgets else 1.0
    for model in sorted({p.cell.model for p in kept}):
        maps: dict[str, list[np.ndarray]] = {}
        for p in kept:
            if (p.cell.model, p.cell.budget, p.cell.length) == (model, budget, longest):
                maps.setdefault(p.cell.method, []).append(np.asarray(p.cell.figures["kept_mass"], np.float64))
        if maps:
            means = {name: np.mean(masses, axis=0) for name, masses in sorted(maps.items())}
            title = f"Sibling {model}, budget {100 * budget:.3g} %, {longest:,} tokens"
            caption = f"{title}: share of dense attention on the keys that were kept, by layer and KV head."
            section.parts.append(Picture(f"kept-{model}", figures.kept_mass(means, title), caption))
            lines = [[name, f"{m.mean():.3f}", f"{m.min():.3f}", _where(m)] for name, m in means.items()]
            head = ["method", "mean mass kept", "least", "where (layer, KV head)"]
            section.parts.append(Grid(head, lines, f"Sibling {model}: mass kept", True))
    return section


def _where(mass: np.ndarray) -> str:
    return ", ".join(str(int(i)) for i in np.unravel_index(mass.argmin(), mass.shape))


def _bytes(point: Point, batch: int) -> float:
    cell = point.cell
    return cell.parameters * WEIGHT_BYTES / batch + point.cost * cell.figures["kv_bytes"]
