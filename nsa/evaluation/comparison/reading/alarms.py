"""Alarms: signs that the harness is at fault rather than a method. Harness faults are larger than gaps between methods.

A double BOS once moved a dense model from 49.6 to 66.2, and "sparse beats dense by 20 points" vanished with it.
Each alarm looks at all cells and returns plain sentences. An alarm that cannot look says why: silence is no proof.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from nsa.evaluation.comparison.reading import statistics
from nsa.evaluation.comparison.reading.analysis import LEVEL, Point, Table, paired
from nsa.evaluation.comparison.rows import DENSE, OWN, Cell

NOMINAL = 0.02  # by which counted reads may differ from the nominal budget, of it
UNPARSED = 0.05  # share of answers
FULL = 0.01  # share of answers in which a full budget may differ from dense: rounding turns a few close calls


@dataclass(frozen=True)
class Finding:
    """What an alarm found. rings: False where it only says what it could not look at. alarm: its name."""

    text: str
    rings: bool = True
    alarm: str = ""


@dataclass(frozen=True)
class Alarm:
    name: str
    meaning: str
    look: Callable[[Table], Iterator[Finding]]


def of_those_above(p: float) -> float:
    """A one-sided p, given that the mean is above 0. Only such arms are compared: half of all that differ by chance."""
    return min(1.0, 2 * p)


def sparse_above_dense(table: Table) -> Iterator[Finding]:
    """Of a dense-trained sibling: a part of attention cannot know more than all of it. Of an arm that was trained
    sparse: it may be better, but look at window, compute and data first."""
    drafts = []
    for point in table.points:
        base = table.base(point)
        same = base is not None and base.cell.model == point.cell.model
        if base is None or point.cell.dense or not (same or point.cell.method == OWN):
            continue
        difference = paired(point, base)
        if difference is not None and difference.mean > 0:
            p = statistics.greater_p(difference)
            if not same and len(point.cells) > 1:  # the training seed is the unit
                drawn = statistics.draw_means(difference)
                p = max(p, float((1 + (drawn <= 0).sum()) / (len(drawn) + 1)))
            drafts.append((of_those_above(p), point, difference.mean, same))
    if not any(point.cell.reference for point in table.points):
        yield Finding("There is no dense run of a dense-trained sibling to compare with.", rings=False)
    for p, (_, point, mean, same) in zip(statistics.holm([d[0] for d in drafts]), drafts, strict=True):
        if p < LEVEL:
            why = (
                "A part of attention cannot know more than all of it: suspect the harness (tokens, template, a leak)."
                if same
                else "It was trained so; before it is believed, look at a leak, its window and its compute."
                + (" It has one training seed." if len(point.cells) == 1 else "")
            )
            yield Finding(f"{_name(point)} is {100 * mean:.1f} points above dense (p {p:.1g} by Holm). {why}")


def not_monotone(table: Table) -> Iterator[Finding]:
    """More budget cannot be counted as fewer reads, nor cost a dense-trained sibling answers. A sibling that was
    trained sparse may well lose by attending to more than it ever did."""
    drafts = []
    families: dict[tuple, list[Point]] = {}
    for point in table.points:
        if point.cell.budget is not None:
            cell = point.cell
            families.setdefault((point.label, cell.task, cell.length), []).append(point)
    for points in families.values():
        points.sort(key=lambda p: p.cell.budget or 1)
        for small, large in combinations(points, 2):
            if large.cost < small.cost * (1 - 1e-6):
                yield Finding(
                    f"{_name(large)} was counted at {large.cost:.3f}, less than {small.cost:.3f} of {_name(small)}."
                )
            difference = paired(small, large) if small.cell.trained == DENSE else None
            if difference is not None and difference.mean > 0:
                drafts.append((of_those_above(statistics.greater_p(difference)), small, large, difference.mean))
    for p, (_, small, large, mean) in zip(statistics.holm([d[0] for d in drafts]), drafts, strict=True):
        if p < LEVEL:
            yield Finding(
                f"{_name(small)} is {100 * mean:.1f} points above its budget {large.cell.budget:g} "
                f"(p {p:.1g} by Holm): the larger budget loses answers that the smaller keeps.",
            )


def full_unlike_dense(table: Table) -> Iterator[Finding]:
    """A method at its full budget is dense attention: the same answers."""
    dense = {_question(point): point for point in table.points if point.cell.dense}
    looked: set[str] = set()
    for point in table.points:
        base = dense.get(_question(point))
        if point.cell.budget != 1 or base is None or point.cell.method == OWN:
            continue
        looked.add(point.cell.method)
        theirs = {cell.train_seed: cell for cell in base.cells}
        for cell in point.cells:
            other = theirs.get(cell.train_seed)
            if other is None:
                continue
            share = 1.0 if len(other.score) != len(cell.score) else float((other.score != cell.score).mean())
            if share > FULL:
                yield Finding(f"{_name(point)} differs from dense in {100 * share:.1f} % of its answers.")
    others = {p.cell.method for p in table.points if not p.cell.dense and p.cell.method != OWN} - looked
    if others:
        yield Finding(f"No cell with a budget of 1: {', '.join(sorted(others))}.", rings=False)


def not_one_bos(table: Table) -> Iterator[Finding]:
    """A prompt begins with exactly one token that begins a sequence."""
    unknown: set[str] = set()
    for cell in _cells(table):
        told = cell.bos[cell.bos >= 0]
        if len(told) < len(cell.bos):
            unknown.add(cell.model)
        if (wrong := told[told != 1]).size:
            yield Finding(
                f"{cell.id} has prompts with {' or '.join(map(str, np.unique(wrong)))} BOS tokens "
                f"({wrong.size} of {cell.bos.size} answers): the tokenizer and the template may both add one."
            )  # fmt: skip
    if unknown:
        yield Finding(f"No BOS was counted for {', '.join(sorted(unknown))}.", rings=False)


def unparsable(table: Table) -> Iterator[Finding]:
    """Answers that cannot be parsed count as wrong; many of them say something of the template, not of attention."""
    for cell in _cells(table):
        if cell.unparsed > UNPARSED:
            yield Finding(f"{cell.id}: {100 * cell.unparsed:.1f} % of the answers could not be parsed.")


def sparse_path_did_not_run(table: Table) -> Iterator[Finding]:
    """A method that was not called leaves attention dense, and looks very good."""
    for cell in _cells(table):
        if cell.dense:
            continue
        if not cell.ran:
            yield Finding(f"{cell.id}: not in each layer and phase that it claims ({', '.join(cell.phases)}).")
        elif _dense(cell.cost) and cell.budget is not None and cell.budget < 1:
            yield Finding(f"{cell.id}: it is said to have run, but {cell.axis} were counted as dense.")
        elif cell.counted["attended"] == 0:
            yield Finding(f"{cell.id}: nothing was attended to: the selection is empty.")


def reads_what_is_left_out(table: Table) -> Iterator[Finding]:
    """The model must not notice other values under what a plan leaves out, and must notice them under what it keeps."""
    arms: dict[str, list[Cell]] = {}
    for cell in _cells(table):
        if not cell.dense and cell.method != OWN and cell.budget != 1:
            arms.setdefault(cell.arm, []).append(cell)
    unknown: set[str] = set()
    for arm, cells in arms.items():
        seen = [cell for cell in cells if "changes" in cell.figures]
        if not seen:
            unknown.add(arm)
        for cell in seen:
            for phase, (left_out, attended) in cell.figures["changes"].items():
                where = "the prompt" if phase == "prefill" else "decoding"
                if left_out > 0:
                    yield Finding(
                        f"{cell.id}: values that its plans leave out change a logit by {left_out:.2g} in {where}: more "
                        "is read than is counted."
                    )
                if attended == 0:
                    yield Finding(
                        f"{cell.id}: values that its plans attend to change no logit in {where}: the model's answers "
                        "come from elsewhere."
                    )
    if unknown:
        yield Finding(f"Nothing was left out, or nobody looked: {', '.join(sorted(unknown))}.", rings=False)


def hidden_dense_layers(table: Table) -> Iterator[Finding]:
    """Layers that stay dense while the budget is quoted for the others."""
    unknown: set[str] = set()
    for cell in _cells(table):
        if cell.dense or cell.budget is None or cell.budget >= 1 or cell.axis != "reads":
            continue
        if "reads" not in cell.figures:
            unknown.add(cell.arm)
            continue
        found = {layer for layer, share in enumerate(cell.figures["reads"]) if _dense(share)}
        if hidden := sorted(found - set(cell.dense_layers)):
            yield Finding(f"{cell.id}: layers {', '.join(map(str, hidden))} read as much as dense, and it is not said.")
    if unknown:
        yield Finding(f"Reads by layer were not recorded for {', '.join(sorted(unknown))}.", rings=False)


def _dense(share: float) -> bool:
    """Whether exactly what dense attention spends. Sketches, and branches beside a method, may honestly spend more."""
    return abs(share - 1) < 1e-6


def off_budget(table: Table) -> Iterator[Finding]:
    """Arms of one nominal budget are compared as equals: what is counted must agree with it."""
    for points in _by_arm_and_budget(table).values():
        wrong = [p for p in points if abs(p.cost / (p.cell.budget or 1) - 1) > NOMINAL]
        if wrong:
            worst = max(wrong, key=lambda p: abs(p.cost / (p.cell.budget or 1) - 1))
            yield Finding(
                f"{worst.label} at {worst.cell.budget:g} was counted at {worst.cost:.3f} {worst.cell.axis} "
                f"({worst.cell.task}, {worst.cell.length}); {len(wrong)} of {len(points)} cells differ by over 2 %. "
                "It is marked with * in the tables: compare it by its counted budget.",
            )


ALARMS = (
    Alarm("sparse above dense", "A sparse arm is significantly better than dense.", sparse_above_dense),
    Alarm("not monotone in the budget", "A smaller budget is significantly better than a larger one.", not_monotone),
    Alarm("full budget unlike dense", "A method at its full budget gives other answers than dense.", full_unlike_dense),
    Alarm("not exactly one BOS", "A prompt has no token that begins a sequence, or several.", not_one_bos),
    Alarm("unparsable answers", "More than 5 % of a cell's answers could not be parsed.", unparsable),
    Alarm("the sparse path did not run", "A layer or phase that should be sparse was dense.", sparse_path_did_not_run),
    Alarm("reads what its plan leaves out", "Values that are not attended to change a logit.", reads_what_is_left_out),
    Alarm("dense layers undisclosed", "A layer is dense, and the results do not say so.", hidden_dense_layers),
    Alarm("counted budget off the nominal one", "Counted reads differ from the budget by over 2 %.", off_budget),
)  # fmt: skip


def ring(table: Table) -> list[Finding]:
    """What all alarms find, in their order; those that ring first."""
    found = [replace(finding, alarm=alarm.name) for alarm in ALARMS for finding in alarm.look(table)]
    return sorted(found, key=lambda finding: not finding.rings)


def marked(table: Table) -> set[tuple[str, float]]:
    """(arm, budget) whose counted budget differs by more than 2 % from the nominal one in any cell."""
    return {
        key
        for key, points in _by_arm_and_budget(table).items()
        if any(abs(p.cost / key[1] - 1) > NOMINAL for p in points)
    }


def _by_arm_and_budget(table: Table) -> dict[tuple[str, float], list[Point]]:
    grouped: dict[tuple[str, float], list[Point]] = {}
    for point in table.points:
        if point.cell.budget is not None and not point.cell.dense:
            grouped.setdefault((point.label, point.cell.budget), []).append(point)
    return grouped


def _cells(table: Table) -> Iterator[Cell]:
    for point in table.points:
        yield from point.cells


def _question(point: Point) -> tuple:
    cell = point.cell
    return cell.model, cell.task, cell.length, cell.question_aware


def _name(point: Point) -> str:
    cell = point.cell
    at = "" if cell.budget is None else f" at {cell.budget:g}"
    return f"{point.label}{at} ({cell.task}, {cell.length})"
