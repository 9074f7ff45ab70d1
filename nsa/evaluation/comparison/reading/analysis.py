"""What the report shows, computed from cells: points, differences from dense, sufficient budgets, budget laws."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from nsa.evaluation import recall
from nsa.evaluation.comparison.reading import statistics
from nsa.evaluation.comparison.reading.statistics import Clusters, Law
from nsa.evaluation.comparison.rows import RANDOM, Cell, ResultsError

MARGIN = 0.02  # of non-inferiority, in score
FLOOR = 0.80  # cells count only where dense reaches it
LEVEL = 0.05
TOLERANCE = 0.10  # share of dense's score that a required budget may lose
EFFECTIVE = 0.85  # share of the base that a length must reach


@dataclass(frozen=True)
class Point:
    """One arm at one budget, task and length: its cells by training seed, which have the same questions."""

    cells: tuple[Cell, ...]

    @property
    def cell(self) -> Cell:
        """The first training seed's."""
        return self.cells[0]

    @property
    def label(self) -> str:
        """The arm; "agnostic": the question came after the prompt had been thinned out."""
        return self.cell.arm + ("" if self.cell.question_aware else " (agnostic)")

    @property
    def control(self) -> bool:
        """Whether nobody could use it: oracles look at all keys, random looks at none."""
        return self.cell.method == RANDOM or self.cell.method.startswith("oracle")

    @cached_property
    def mean(self) -> float:
        return float(np.mean([cell.mean for cell in self.cells]))

    @cached_property
    def cost(self) -> float:
        """Counted budget, a share of dense."""
        return float(np.mean([cell.cost for cell in self.cells]))

    @cached_property
    def clusters(self) -> Clusters:
        return statistics.clusters([cell.score for cell in self.cells], self.cell.sample)

    @cached_property
    def interval(self) -> tuple[float, float]:
        """95 %: Wilson's over samples for one training seed, the two-level bootstrap's for several."""
        if len(self.cells) > 1:
            low, high = statistics.interval(statistics.draw_means(self.clusters))
            return max(0.0, low), min(1.0, high)
        counts = self.clusters.counts
        equal = bool((counts == counts[0]).all())
        scores = self.cell.score if equal else self.clusters.sums[0] / counts
        return recall.interval(scores.reshape(len(counts), -1))


@dataclass(frozen=True)
class Comparison:
    """A point against dense, on the same questions. difference, low, high: in score. p: adjusted by Holm's method over
    all comparisons of its arm. noninferior: not worse than dense by `MARGIN`."""

    point: Point
    base: Point
    difference: float
    low: float
    high: float
    p: float

    @property
    def noninferior(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class Reduction:
    """The smallest budget from which on, upwards, an arm is non-inferior on each task that counts. cost: counted, None:
    at no budget that was measured. tasks: how many count."""

    label: str
    length: int
    budget: float | None
    cost: float | None
    tasks: int


@dataclass(frozen=True)
class Required:
    """Tokens that an arm needs at each length to lose at most `TOLERANCE` of dense's score. bounds: where already the
    smallest budget suffices. law: None: fewer than two lengths that are not bounds."""

    label: str
    lengths: tuple[int, ...]
    tokens: tuple[float, ...]
    bounds: tuple[bool, ...]
    law: Law | None
    tasks: tuple[str, ...]


class Table:
    """Cells by what they are asked for.

    Raises:
        ResultsError: training seeds of one arm answered different questions.
    """

    def __init__(self, cells: Iterable[Cell]) -> None:
        grouped: dict[tuple, list[Cell]] = defaultdict(list)
        for cell in cells:
            grouped[cell.arm, cell.budget, cell.task, cell.length, cell.question_aware].append(cell)
        self.points = [Point(tuple(sorted(group, key=lambda c: c.train_seed))) for group in grouped.values()]
        for point in self.points:
            for cell in point.cells[1:]:
                same_questions(point.cell, cell)
        self._bases: dict[tuple, list[Point]] = defaultdict(list)
        for point in self.points:
            if point.cell.reference:
                self._bases[point.cell.task, point.cell.length].append(point)

    def select(self, keep: Callable[[Cell], bool]) -> list[Point]:
        return [point for point in self.points if keep(point.cell)]

    def values(self, name: str) -> list:
        """All values of a field, sorted; None left out."""
        return sorted({value for p in self.points if (value := getattr(p.cell, name)) is not None})

    def arms(self) -> list[tuple[str, list[Point]]]:
        """Points of each arm but the dense runs, by label; they run from the smallest budget up."""
        arms: dict[str, list[Point]] = defaultdict(list)
        for point in self.points:
            if not point.cell.dense:
                arms[point.label].append(point)
        return [(label, sorted(arms[label], key=lambda p: p.cell.budget or p.cost)) for label in sorted(arms)]

    def base(self, point: Point) -> Point | None:
        """The dense run of the sibling itself, if it was trained dense; else of the one nearest in size."""
        cell = point.cell

        def distance(base: Point) -> tuple:
            size = abs(np.log(base.cell.parameters / cell.parameters))
            return base.cell.model != cell.model, round(size, 6), base.cell.question_aware != cell.question_aware

        return min(self._bases[cell.task, cell.length], key=distance, default=None)

    def counts(self, point: Point) -> bool:
        """Whether its dense run reaches `FLOOR`."""
        base = self.base(point)
        return base is not None and base.mean >= FLOOR

    def informative(self, points: Iterable[Point]) -> list[Point]:
        return [point for point in points if self.counts(point)]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Of each point that counts with its dense run."""
        found = []
        for _, points in self.arms():
            drafts = []
            for point in self.informative(points):
                base = self.base(point)
                assert base is not None
                if (difference := paired(point, base)) is not None:
                    p = statistics.noninferiority_p(difference, MARGIN)
                    drafts.append((point, base, difference, p))
            adjusted = statistics.holm([draft[-1] for draft in drafts])
            for (point, base, difference, _), p in zip(drafts, adjusted, strict=True):
                low, high = statistics.interval(statistics.draw_means(difference))
                found.append(Comparison(point, base, difference.mean, low, high, p))
        return found

    def reductions(self) -> list[Reduction]:
        """Of each arm and length that has comparisons."""
        grouped: dict[tuple[str, int], dict[float, list[Comparison]]] = defaultdict(lambda: defaultdict(list))
        for c in self.comparisons:
            grouped[c.point.label, c.point.cell.length][c.point.cell.budget or round(c.point.cost, 4)].append(c)
        found = []
        for (label, length), budgets in sorted(grouped.items()):
            best = cost = None
            for budget in sorted(budgets, reverse=True):
                if not all(c.noninferior for c in budgets[budget]):
                    break
                best, cost = budget, float(np.mean([c.point.cost for c in budgets[budget]]))
            found.append(Reduction(label, length, best, cost, max(map(len, budgets.values()))))
        return found

    def effective_lengths(self) -> list[tuple[str, float | None, int | None, int]]:
        """(arm, budget, effective length, tasks): over the tasks that dense solves at the shortest length."""
        shortest = min(self.values("length"))
        groups: dict[tuple[str, float | None], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        bases: dict[tuple[str, float | None], dict[str, float]] = defaultdict(dict)
        for point in self.points:
            key = (point.label, point.cell.budget)
            groups[key][point.cell.length][point.cell.task] = point.mean
            base = self.base(point)
            if point.cell.length == shortest and base is not None and base.mean >= FLOOR:
                bases[key][point.cell.task] = base.mean
        found = []
        for key, by_length in sorted(groups.items(), key=lambda item: (item[0][0], -(item[0][1] or 1.0))):
            tasks = [task for task in bases[key] if all(task in scores for scores in by_length.values())]
            if tasks:
                lengths = sorted(by_length)
                scores = [float(np.mean([by_length[n][task] for task in tasks])) for n in lengths]
                whole = float(np.mean([bases[key][task] for task in tasks]))
                found.append((*key, statistics.effective_length(lengths, scores, whole, EFFECTIVE), len(tasks)))
        return found

    def required(self, draws: int = 2000) -> list[Required]:
        """Of each arm with two budgets or more, over the tasks that count at each length."""
        found = []
        for label, points in self.arms():
            lengths = sorted({p.cell.length for p in points})
            counting = {(p.cell.task, p.cell.length) for p in self.informative(points)}
            tasks = [t for t in sorted({p.cell.task for p in points}) if all((t, n) in counting for n in lengths)]
            if tasks and all(len({p.cell.budget for p in points if p.cell.length == n} - {None}) > 1 for n in lengths):
                found.append(self._required(label, points, lengths, tasks, draws))
        return found

    def _required(
        self, label: str, points: Sequence[Point], lengths: list[int], tasks: list[str], draws: int
    ) -> Required:
        measured, tokens, bounds, drawn, by_seed = [], [], [], [], []
        for n in lengths:
            budgets: dict[float, list[Point]] = defaultdict(list)
            for point in points:
                if point.cell.length == n and point.cell.task in tasks and point.cell.budget is not None:
                    budgets[point.cell.budget].append(point)
            # A budget counts if all tasks were measured at it. The full budget is dense's own.
            columns = [group for group in budgets.values() if len(group) == len(tasks) and _cost(group) < 1]
            columns.sort(key=_cost)
            if not columns:
                continue
            bases = [base for point in columns[0] if (base := self.base(point)) is not None]
            share, bound = _need(columns, bases, lambda p: np.array([p.mean]))
            measured.append(n)
            tokens.append(float(share[0]) * n)
            bounds.append(bool(bound[0]))
            drawn.append(_need(columns, bases, partial(_sample_draws, draws=draws))[0] * n)
            seeds = min(len(p.cells) for group in (*columns, bases) for p in group)
            by_seed.append(_need(columns, bases, partial(_seed_means, seeds=seeds))[0] * n)
        free = [i for i, bound in enumerate(bounds) if not bound]
        law = None
        if len(free) > 1:
            seeds = min(len(by_seed[i]) for i in free)
            law = statistics.fit_law(
                [measured[i] for i in free],
                np.array([tokens[i] for i in free]),
                np.stack([drawn[i] for i in free], axis=1),
                np.stack([by_seed[i][:seeds] for i in free], axis=1),
            )
        return Required(label, tuple(measured), tuple(tokens), tuple(bounds), law, tuple(tasks))


def _cost(points: Sequence[Point]) -> float:
    return float(np.mean([point.cost for point in points]))


def _need(
    columns: Sequence[Sequence[Point]], bases: Sequence[Point], means: Callable[[Point], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """`statistics.required_share` of budgets (columns) with the same tasks. means: of a point, (N,)."""
    scores = np.stack([np.mean([means(p) for p in group], axis=0) for group in columns], axis=1)
    dense = np.mean([means(p) for p in bases], axis=0)
    return statistics.required_share(np.array([_cost(group) for group in columns]), scores, dense, TOLERANCE)


def _seed_means(point: Point, seeds: int) -> np.ndarray:
    """Means of the first training seeds, (seeds,)."""
    return point.clusters.by_seed[:seeds]


def _sample_draws(point: Point, draws: int) -> np.ndarray:
    """Bootstrap means over samples alone, (draws,): the same samples are drawn for all budgets."""
    w = statistics.weights(len(point.clusters.counts), draws)
    return (w @ point.clusters.sums.mean(0)) / (w @ point.clusters.counts.astype(np.float64))


def same_questions(one: Cell, other: Cell) -> None:
    """Raises ResultsError unless both cells answered the same queries of the same samples."""
    if not (np.array_equal(one.sample, other.sample) and np.array_equal(one.query, other.query)):
        raise ResultsError(
            f"{one.id} and {other.id} answered different questions ({len(one.score)} and {len(other.score)} answers), "
            "so they cannot be paired: run both with the same number of samples"
        )


def paired(point: Point, base: Point) -> Clusters | None:
    """The differences of a point from its base, by training seeds that both have; None: there are none.

    Raises:
        ResultsError: they answered different questions.
    """
    mine = {cell.train_seed: cell for cell in point.cells}
    theirs = {cell.train_seed: cell for cell in base.cells}
    seeds = sorted(mine.keys() & theirs.keys())
    if not seeds:
        return None
    same_questions(mine[seeds[0]], theirs[seeds[0]])
    return statistics.clusters([mine[s].score - theirs[s].score for s in seeds], point.cell.sample)
