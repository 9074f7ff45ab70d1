"""What the report says of cells, against loops over their answers: two siblings, two questions, three trainings."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from simulated import cell

from nsa.evaluation import recall
from nsa.evaluation.comparison.reading import alarms, report, statistics
from nsa.evaluation.comparison.reading.analysis import FLOOR, LEVEL, MARGIN, TOLERANCE, Comparison, Point, Table
from nsa.evaluation.comparison.reading.pages import Grid, Section
from nsa.evaluation.comparison.rows import Cell, ResultsError

TASKS = {"mqar": 0.95, "passkey": 0.9, "story_filtering": 0.75}  # dense solves two of them
SEEDS, BUDGETS, SAMPLES = (0, 1, 2), (0.25, 0.1), 60


def aside(made: Cell, loss: float, seed: int) -> Cell:
    """The cell with this share of its right answers lost, and another count."""
    keep = np.random.default_rng(seed).random(len(made.score)) >= loss
    reads = (made.budget or 1.0) * (1.01 if made.task == "mqar" else 1.05)
    counted = made.counted if made.budget is None else {**made.counted, "reads": reads, "resident": 0.3 + seed / 1e4}
    return replace(made, score=made.score * keep, parsed=keep | (made.score == 0), counted=counted)


def simulated() -> list[Cell]:
    made = []
    for number, (task, score) in enumerate(TASKS.items()):
        for aware in (True, False):
            for s in SEEDS:
                usual = {"task": task, "samples": SAMPLES, "train_seed": s, "dense_score": score - 0.04 * (not aware)}
                made.append(cell("dense", **usual))
                for j, (method, budget) in enumerate((m, b) for m in ("quest", "h2o") for b in BUDGETS):
                    loss = (0.0, 0.012, 0.02, 0.15)[j] * (1 + aware)
                    like = replace(cell(method, budget=budget, **usual), score=made[-1 - j].score)
                    made.append(aside(like, loss, 100 * number + 10 * j + s))
                made[-5:] = [replace(c, question_aware=aware) for c in made[-5:]]
    return made


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    return simulated()


@pytest.fixture(scope="module")
def table(cells: list[Cell]) -> Table:
    return Table(cells)


def of(cells: list[Cell], method: str, budget: float | None, task: str, aware: bool) -> list[Cell]:
    found = [
        c for c in cells if (c.method, c.budget, c.task, c.question_aware) == (method, budget, task, aware)
    ]  # fmt: skip
    return sorted(found, key=lambda c: c.train_seed)


def score(cells: list[Cell]) -> float:
    return sum(float(c.score.sum()) for c in cells) / sum(len(c.score) for c in cells)


def by_holm(p: list[float]) -> list[float]:
    """The largest of (m - r) p over all that are not larger, r of them being smaller."""
    ranked = sorted(p)
    return [min(1.0, max((len(p) - r) * q for r, q in enumerate(ranked) if q <= mine)) for mine in p]


def grids(section: Section) -> list[Grid]:
    return [part for part in section.parts if isinstance(part, Grid)]


@pytest.mark.parametrize(("method", "aware"), [(m, a) for m in ("quest", "h2o") for a in (True, False)])
def test_comparisons_of_an_arm_are_one_family(method: str, aware: bool, cells: list[Cell], table: Table) -> None:
    label = f"dense+{method}" + ("" if aware else " (agnostic)")
    expected = {}
    for task, budget in ((t, b) for t in TASKS for b in BUDGETS):
        mine, base = (of(cells, *what, task, aware) for what in ((method, budget), ("dense", None)))
        if score(base) < FLOOR:
            continue
        difference = np.stack(
            [(a.score - b.score).reshape(SAMPLES, -1).sum(1) for a, b in zip(mine, base, strict=True)]
        )
        clusters = statistics.Clusters(difference, np.full(SAMPLES, 4))
        low, high = statistics.interval(statistics.draw_means(clusters))
        expected[task, budget] = (score(mine) - score(base), low, high, statistics.noninferiority_p(clusters, MARGIN))
    assert len(expected) == 4
    adjusted = dict(zip(expected, by_holm([e[3] for e in expected.values()]), strict=True))
    found = [c for c in table.comparisons if c.point.label == label]
    assert len(found) == 4
    for c in found:
        key = c.point.cell.task, c.point.cell.budget
        assert (c.difference, c.low, c.high) == pytest.approx(expected[key][:3])  # type: ignore[index]
        assert c.p == pytest.approx(adjusted[key]) and c.noninferior == (adjusted[key] < LEVEL)  # type: ignore[index]


def test_the_summary_is_of_all_seeds_and_of_tasks_that_count(cells: list[Cell], table: Table) -> None:
    counting = [t for t in TASKS if score(of(cells, "dense", None, t, True)) >= FLOOR]
    assert counting == ["mqar", "passkey"]
    lines = {(line[0], line[1]): line for line in grids(report._summary(table))[0].lines}
    for method, budget, aware in ((m, b, a) for m in ("quest", "h2o") for b in BUDGETS for a in (True, False)):
        line = lines[f"dense+{method}" + ("" if aware else " (agnostic)"), report._percent(budget)]
        mine = {t: of(cells, method, budget, t, aware) for t in TASKS}
        loss = np.mean([score(mine[t]) - score(of(cells, "dense", None, t, aware)) for t in counting])
        kept = np.mean([c.counted["resident"] for t in TASKS for c in mine[t]])
        wrong = np.mean([1 - c.parsed.mean() for t in TASKS for c in mine[t]])
        counted = f"{100 * budget * (1.01 + 2 * 1.05) / 3:.3g} %*"  # two tasks are over 2 % off
        assert line[2:5] == [counted, "reads", f"{100 * kept:.3g} %"]
        assert float(line[5]) == pytest.approx(np.mean([score(mine[t]) for t in counting]), abs=6e-4)
        assert line[6:] == [f"{100 * loss:+.1f}", f"{100 * wrong:.1f} %", "3"]


def test_losses_are_shares_of_the_score_of_dense(cells: list[Cell], table: Table) -> None:
    (grid,) = grids(report._sensitivity(table))
    lines = {(line[0], line[1]): line[2:] for line in grid.lines}
    losses = [
        1 - score(of(cells, "h2o", 0.1, task, True)) / score(of(cells, "dense", None, task, True))
        for task in ("passkey", "mqar")  # of one place, of several
    ]
    assert lines["dense+h2o", "10 %"] == [f"{100 * loss:.0f} %" for loss in losses] + ["-"]


def test_what_was_filtered_is_named(table: Table) -> None:
    (grid,) = grids(report._filtered(table))
    assert {(line[0], line[1]) for line in grid.lines} == {
        ("dense", "story_filtering"), ("dense (agnostic)", "story_filtering")
    }  # fmt: skip


def test_tasks_that_random_tokens_solve_are_named() -> None:
    dense = [cell("dense", task=task) for task in ("mqar", "passkey", "variable_tracking")]
    gaps = (0, 3, 30)  # answers out of 200 that random loses: 0, 1.5 and 15 points
    made = [*dense, *(replace(cell("random", budget=b, task=d.task), score=d.score) for d in dense for b in (0.25,))]
    for d, gap in zip(dense, gaps, strict=True):
        lost = d.score.copy()
        lost[np.flatnonzero(lost)[:gap]] = 0
        made.append(replace(cell("random", budget=0.1, task=d.task), score=lost))
    (said,) = [part for part in report._filtered(Table(made)).parts if "Solved without looking" in str(part)]
    assert "tell no arms apart: mqar at 1,024, passkey at 1,024. They" in str(said)


def test_an_interval_of_one_training_is_of_samples() -> None:
    """Answers of a sample are correlated, and samples may have different numbers of them."""
    score = np.repeat(np.arange(40) % 4 > 0, 4).astype(np.float64)
    even = replace(cell("dense", samples=40), score=score)
    (point,) = Table([even]).points
    n, p, z = 40, 0.75, 1.96  # Wilson's, of 40
    middle, half = (
        (p + z**2 / (2 * n)) / (1 + z**2 / n),
        z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2),
    )
    assert point.interval == pytest.approx((middle - half, middle + half), abs=0.005)
    fewer = np.ones(160, bool)
    fewer[[1, 2, 3, 9]] = False
    uneven = {name: getattr(even, name)[fewer] for name in ("sample", "query", "score", "parsed", "bos")}
    (point,) = Table([replace(even, **uneven)]).points
    means = [uneven["score"][uneven["sample"] == s].mean() for s in range(40)]
    assert point.interval == pytest.approx(recall.interval(np.array(means)[:, None]))


def test_an_interval_of_several_trainings_is_of_scores() -> None:
    """Student's t of one that failed, one in the middle and one that did not is wider than all scores."""
    made = [replace(cell("dense", train_seed=s), score=np.tile([s / 2], 200)) for s in (0, 1, 2)]
    (point,) = Table(made).points
    assert point.interval == (0.0, 1.0)


def test_cells_of_any_order_are_in_the_order_of_their_trainings(cells: list[Cell], table: Table) -> None:
    turned = Table(cells[::-1])
    assert all([c.train_seed for c in p.cells] == [0, 1, 2] and p.cell.train_seed == 0 for p in turned.points)
    one, two = (
        {(c.point.label, c.point.cell.budget, c.point.cell.task): c.p for c in t.comparisons} for t in (table, turned)
    )
    assert one == two


def test_trainings_with_other_questions_are_refused() -> None:
    one, two = cell("dense"), cell("dense", train_seed=1)
    for changes in ({"query": two.query + 1}, {"sample": two.sample + 1}):
        with pytest.raises(ResultsError, match="answered different questions"):
            Table([one, replace(two, **changes)])
        with pytest.raises(ResultsError, match="answered different questions"):
            Table([one, two, replace(two, train_seed=2, **changes)])


def test_the_base_is_the_siblings_own_then_the_nearest_in_size_with_the_same_question_then_the_first() -> None:
    def dense(model: str, parameters: int, aware: bool) -> Cell:
        made = replace(cell("dense", model, parameters=parameters), question_aware=aware)
        return replace(made, trained="dense", arm=f"{model}+dense")

    bases = [dense(m, n, a) for m, n in (("big", 900), ("one", 300), ("two", 300)) for a in (True, False)]
    quest = [replace(b, arm=f"{b.model}+quest", method="quest", budget=0.25, phases=["decode"]) for b in bases]
    own = [replace(cell("own", "nsa", 0.1, parameters=n), question_aware=a) for n in (310, 800) for a in (True, False)]
    table = Table([*bases, *quest, *own[:2]])
    for point in table.select(lambda c: c.method == "quest"):
        base = table.base(point)
        assert base is not None and base.cell.model == point.cell.model
        assert base.cell.question_aware == point.cell.question_aware
    for number, name in ((0, "one"), (2, "big")):
        table = Table([*bases, *own[number : number + 2]])
        for point in table.select(lambda c: c.method == "own"):
            base = table.base(point)
            assert base is not None
            assert (base.cell.model, base.cell.question_aware) == (name, point.cell.question_aware)


def test_what_dense_just_solves_counts_and_a_p_of_just_the_level_proves_nothing() -> None:
    table = Table([cell("dense", dense_score=0.8), cell("quest", budget=0.25)])
    (dense,), (quest,) = (table.select(lambda c, m=m: c.method == m) for m in ("dense", "quest"))
    assert dense.mean == 0.8 and table.informative(table.points) == [dense, quest]
    assert [Comparison(quest, dense, 0, 0, 0, p).noninferior for p in (0.049, 0.05, 0.08)] == [True, False, False]


def test_trainings_that_both_have_are_paired(cells: list[Cell]) -> None:
    """An arm that lacks one of three trainings is compared on the two others."""
    some = [c for c in cells if c.question_aware and c.task == "mqar"]
    some = [c for c in some if c.method == "dense" or (c.method == "h2o" and c.budget == 0.1 and c.train_seed != 1)]
    (found,) = Table(some).comparisons
    mine, base = (of(some, *what, "mqar", True) for what in (("h2o", 0.1), ("dense", None)))
    assert found.difference == pytest.approx(score(mine) - score([base[0], base[2]]))


def test_a_reduction_is_counted_and_a_mean_over_tasks() -> None:
    dense = [cell("dense", task=task, samples=300, queries=1) for task in ("mqar", "passkey")]
    arms = []
    for d, reads in zip(dense, (0.1, 0.12), strict=True):
        like = replace(cell("quest", budget=0.1, task=d.task, samples=300, queries=1), score=d.score)
        arms.append(replace(like, counted={**like.counted, "reads": reads}))
    table = Table([*dense, *arms])
    (found,) = table.reductions()
    assert (found.budget, found.cost, found.tasks) == (0.1, pytest.approx(0.11), 2)
    (grid, _) = grids(report._noninferiority(table))
    assert grid.lines == [["dense+quest", "1,024", "2", "10 %", "11 %", "9.1 x"]]


def lengths(scores: dict[int, dict[str, float]]) -> list[Cell]:
    return [
        cell("dense", task=t, length=n, samples=50, dense_score=s) for n, by in scores.items() for t, s in by.items()
    ]


def test_effective_lengths_leave_out_what_dense_does_not_solve_or_was_not_asked() -> None:
    made = lengths({
        1024: {"mqar": 0.9, "passkey": 0.9, "story_filtering": 0.6, "common_words": 0.9},
        4096: {"mqar": 0.9, "passkey": 0.7, "story_filtering": 0.0},  # 0.8 is 89 % of 0.9
        8192: {"mqar": 0.8, "passkey": 0.7, "story_filtering": 0.6, "common_words": 0.9},  # 0.75 is 83 %
    })  # fmt: skip
    assert Table(made).effective_lengths() == [("dense", None, 4096, 2)]


def needed(points: dict[tuple[int, str, float], float], *, dense: float = 0.9) -> list[Cell]:
    """Cells of quest with these scores, by length, task and budget, and of dense; 1,000 answers each."""
    made = {}
    for (n, task, budget), right in points.items():
        for method, b, share in (("quest", budget, right), ("dense", None, dense)):
            like = cell(method, budget=b, task=task, length=n, samples=1000, queries=1)
            made[method, b, task, n] = replace(like, score=(np.arange(1000) < 1000 * share).astype(np.float64))
    return list(made.values())


def test_required_tokens_are_where_the_mean_over_tasks_reaches_its_target() -> None:
    """At 1,024 tokens between two budgets; at 4,096 the smallest suffices, so nothing is fitted to it."""
    target = (1 - TOLERANCE) * 0.9
    made = needed({
        (1024, "mqar", 0.1): 0.5, (1024, "mqar", 0.4): 0.9, (1024, "passkey", 0.1): 0.7, (1024, "passkey", 0.4): 0.9,
        (1024, "mqar", 0.2): 0.9,  # of one task alone: this budget does not count
        (4096, "mqar", 0.1): 0.85, (4096, "mqar", 0.4): 0.9, (4096, "passkey", 0.1): 0.85, (4096, "passkey", 0.4): 0.9,
        (8192, "mqar", 0.1): 0.5, (8192, "mqar", 0.4): 0.9, (8192, "passkey", 0.1): 0.7, (8192, "passkey", 0.4): 0.9,
    })  # fmt: skip
    made += [replace(c, task="vt") for c in needed({(1024, "mqar", 0.1): 0.1, (1024, "mqar", 0.4): 0.1})]
    (found,) = Table(made).required(200)
    share = 0.1 * (0.4 / 0.1) ** ((target - 0.6) / (0.9 - 0.6))
    assert (found.lengths, found.bounds, found.tasks) == ((1024, 4096, 8192), (False, True, False), ("mqar", "passkey"))
    assert found.tokens == pytest.approx((share * 1024, 0.1 * 4096, share * 8192))
    assert found.law is not None and found.law.beta == pytest.approx(1) and found.law.c == pytest.approx(share)


def test_fronts_leave_out_what_another_arm_beats() -> None:
    """At less or as much, with as good or a better score; oracles and random are not on it."""
    dense = cell("dense")

    def arm(method: str, budget: float, right: int) -> Cell:
        like = cell(method, budget=budget)
        return replace(like, score=(np.arange(200) < right).astype(np.float64))

    made = [dense, arm("quest", 0.1, 150), arm("sparq", 0.1, 140), arm("twilight", 0.25, 150), arm("h2o", 0.25, 160)]
    made += [arm("oracle_topk", 0.05, 190), arm("random", 0.05, 190)]
    made = [replace(c, counted={**c.counted, "resident": 1.0}) for c in made]
    (front,) = grids(report._fronts(Table(made)))
    assert [line[2:] for line in front.lines] == [["dense+quest", "10 %", "0.750"], ["dense+h2o", "25 %", "0.800"]]


def test_marks_and_points_agree(table: Table) -> None:
    assert alarms.marked(table) == {(p.label, p.cell.budget) for p in table.points if p.cell.budget is not None}
    means: list[Callable[[Point], float]] = [lambda p: p.mean, lambda p: score(list(p.cells))]
    assert all(means[0](p) == pytest.approx(means[1](p)) and len(p.cells) == 3 for p in table.points)
