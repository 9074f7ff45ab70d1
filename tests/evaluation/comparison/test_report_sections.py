"""What stands in sections of the report: the matrix, alarms, where results come from, and the order of lines."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from simulated import MANIFEST, cell

from nsa.evaluation.comparison.folder import Results
from nsa.evaluation.comparison.reading import alarms, cards, figures, report
from nsa.evaluation.comparison.reading.analysis import Comparison, Reduction, Required, Table
from nsa.evaluation.comparison.reading.pages import Grid, Note
from nsa.evaluation.comparison.reading.statistics import Law
from nsa.evaluation.comparison.rows import Cell


def scored(share: float, method: str, model: str = "dense", budget: float | None = None, **more: Any) -> Cell:
    """A cell of which so many answers of 200 are right. Sibling a was trained sparse."""
    changes = {name: more.pop(name) for name in ("question_aware", "dense_layers") if name in more}
    made = cell(method, "nsa" if model == "a" else model, budget, **more)
    if model == "a":
        changes.update(model="a", arm=f"a+{method}")
    return replace(made, score=(np.arange(200) < round(200 * share)).astype(np.float64), **changes)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, ...]]:
    """What the matrix shows: by sibling and method, in their order."""
    found: dict[str, Any] = {}

    def draw(values: np.ndarray, siblings: list[str], methods: list[str], title: str) -> bytes:
        found.clear()
        found.update(title=title, methods=methods)
        found.update({name: [round(x, 3) for x in line] for name, line in zip(siblings, values.tolist(), strict=True)})
        return b""

    monkeypatch.setattr(figures, "matrix", draw)
    return found


def test_the_matrix_is_of_the_budget_of_most_arms_at_the_longest_length(drawn: dict[str, Any]) -> None:
    """A mean over the tasks that dense solves, of questions in the prompt; the sibling that was trained dense first."""
    long: dict[str, Any] = {"length": 4096}
    made = [
        scored(0.9, "dense", **long), scored(1.0, "dense", task="passkey", **long),
        scored(0.5, "dense", task="story_filtering", **long),
        scored(0.95, "dense", length=1024), scored(0.4, "dense", "a", **long),
        scored(0.7, "own", "a", 0.07, **long), scored(0.2, "sparq", "a", 0.1, **long),
        scored(0.8, "quest", budget=0.1, **long), scored(0.4, "quest", budget=0.1, task="passkey", **long),
        scored(0.1, "quest", budget=0.1, task="story_filtering", **long), scored(0.3, "quest", budget=0.1, length=1024),
        scored(0.1, "quest", budget=0.25, **long), scored(0.2, "quest", budget=0.25, task="passkey", **long),
        scored(0.0, "quest", budget=0.25, length=1024), scored(0.6, "h2o", budget=0.1, **long),
    ]  # fmt: skip
    made += [replace(made[7], question_aware=False, score=np.zeros(200))]
    made += [scored(0.0, "quest", budget=0.25, length=n) for n in range(100, 110)]  # more cells, not more arms
    section = report._matrix(Table(made))
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert drawn == {
        "title": "Score at a budget of 10 %, 4,096 tokens",
        "methods": ["dense", "own", "h2o", "quest", "sparq"],
        "dense": [0.95, nan, 0.6, 0.6, nan],
        "a": [0.4, 0.7, nan, nan, 0.2],
    }
    assert [name for name in drawn if name not in ("title", "methods")] == ["dense", "a"] and len(section.parts) == 1


def test_of_several_such_budgets_the_matrix_has_the_middle_one(drawn: dict[str, Any]) -> None:
    made = [scored(0.9, "dense"), scored(0.9, "dense", "nsa")]
    made += [scored(0.5, "quest", budget=budget) for budget in (0.25, 0.1, 0.05)]
    report._matrix(Table(made))
    assert drawn["title"] == "Score at a budget of 10 %, 1,024 tokens"


def test_one_sibling_and_no_budget_have_no_matrix(drawn: dict[str, Any]) -> None:
    for made in (
        [scored(0.9, "dense"), scored(0.9, "quest", budget=0.1)],
        [scored(0.9, "dense"), scored(0.9, "dense", "nsa")],
        [
            scored(0.1, "dense"),
            scored(0.1, "dense", "nsa"),
            scored(0.1, "quest", budget=0.1),
        ],  # dense does not solve it
    ):
        assert not report._matrix(Table(made)).parts and not drawn


@pytest.mark.parametrize("number", [0, 1, 5, 6])
def test_up_to_five_findings_of_an_alarm_are_notes(number: int) -> None:
    """Of more, five are, and all of them stand in a table."""
    table = Table([scored(0.9, "dense"), scored(0.5, "quest", budget=0.1, dense_layers=[0, 2])])
    findings = [alarms.Finding(f"finding {i}", alarm="unparsable answers") for i in range(number)]
    findings.append(alarms.Finding("nothing to see", rings=False, alarm="not exactly one BOS"))
    parts = report._alarms(table, findings).parts
    notes = [part for part in parts if isinstance(part, Note)]
    expected = [Note(f"unparsable answers: finding {i}", True) for i in range(min(number, 5))]
    assert notes == (expected or [Note("No alarm rings.", False)])
    *folded, table_of_all = [part for part in parts if isinstance(part, Grid)]
    assert [grid.lines for grid in folded] == [[[f"finding {i}"] for i in range(6)]] * (number == 6)
    here = {name: said for name, _, said in table_of_all.lines}
    assert here.pop("unparsable answers") == (f"rings, {number} findings" if number else "silent")
    assert set(here.values()) == {"silent"} and len(here) == len(alarms.ALARMS) - 1
    assert "Not looked at (not exactly one BOS): nothing to see" in parts
    assert parts[-1] == "Layers that stay dense: dense+quest: layers 0, 2."


def test_where_results_come_from_is_counted() -> None:
    cells = [cell("dense", samples=3), cell("quest", budget=0.25, samples=3), cell("h2o", budget=0.25, samples=3)]
    here = {"commit": "aaa", "hardware": "a CPU", "versions": {"torch": "2", "python": "3"}}
    made = dict(zip([one.id for one in cells], [here, {**here, "commit": "bbb"}, here], strict=True))
    results = Results(replace(MANIFEST, planned=5, finished="later"), cells, {"x": "why", "y": "why"}, made)
    (grid,) = report._provenance(results).parts
    assert isinstance(grid, Grid) and [line[0] for line in grid.lines] == [
        "code", "configuration", "2 cells", "1 cell", "began, ended", "cells, answers",
    ]  # fmt: skip
    assert grid.lines[2][1] == "commit aaa, a CPU, python 3, torch 2" and "commit bbb" in grid.lines[3][1]
    assert grid.lines[4][1] == f"{MANIFEST.started}, later" and grid.lines[5][1] == "3 and 36; 2 left out"


def test_the_summary_begins_with_dense_and_falls_with_the_budget() -> None:
    """Siblings that were trained dense come first; each arm's line has its counted budget and its trainings."""
    made = [scored(0.9, "dense", train_seed=seed) for seed in (0, 1)]
    made += [scored(0.9, "dense", "a"), scored(0.6, "own", "a", 0.1)]
    made += [scored(share, "quest", budget=b) for share, b in ((0.5, 0.05), (0.8, 0.25))]
    made.append(replace(scored(0.7, "h2o", budget=0.1), counted={**made[0].counted, "reads": 0.2, "resident": 0.3}))
    (grid, _) = report._summary(Table(made)).parts
    assert isinstance(grid, Grid)
    assert [(line[0], line[1]) for line in grid.lines] == [
        ("dense", "-"), ("dense+h2o", "10 %"), ("dense+quest", "25 %"), ("dense+quest", "5 %"),
        ("a+dense", "-"), ("a+own", "10 %"),
    ]  # fmt: skip
    by_arm = {(line[0], line[1]): line for line in grid.lines}
    assert by_arm["dense+h2o", "10 %"][2:7] == ["20 %*", "reads", "30 %", "0.700", "-20.0"]
    assert by_arm["dense+quest", "25 %"][2:7] == ["25 %", "reads", "100 %", "0.800", "-10.0"]
    assert [line[-1] for line in grid.lines] == ["2", "1", "1", "1", "1", "1"]


def test_kinds_of_tasks_are_in_the_order_of_their_difficulty() -> None:
    made = []
    for task, score in (("passkey", 0.8), ("mqar", 0.6), ("story_filtering", 0.4)):
        made += [scored(1.0, "dense", task=task), scored(score, "quest", budget=0.1, task=task)]
        made += [scored(0.9, "quest", budget=0.25, task=task)]
    made = [replace(one, scope="another") if one.task == "mqar" else one for one in made]
    (grid,) = report._sensitivity(Table(made)).parts
    assert isinstance(grid, Grid) and grid.head == ["arm", "budget", "single", "high", "another"]
    assert grid.lines == [
        ["dense+quest", "25 %", "10 %", "10 %", "10 %"],
        ["dense+quest", "10 %", "20 %", "60 %", "40 %"],
    ]


def test_a_need_below_the_smallest_budget_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "required", lambda needs: drawn.append(needs) or b"")
    law = Law(2.5, 0.5, 0.25, 0.75)
    needs = [
        Required("dense+quest", (1024, 4096), (50.0, 99.6), (True, False), law, ("mqar", "passkey")),
        Required("dense+h2o", (1024,), (70.0,), (False,), None, ("mqar",)),
    ]
    points = Table([cell("quest", budget=0.1), cell("h2o", budget=0.1)]).points
    table: Any = SimpleNamespace(required=lambda: needs, points=points)
    grid = next(part for part in report._required(table).parts if isinstance(part, Grid))
    assert grid.lines == [
        ["dense+quest", "<50 at 1,024, 100 at 4,096", "0.50 [0.25, 0.75]", "2.5", "2"],
        ["dense+h2o", "70 at 1,024", "-", "-", "1"],
    ]
    assert drawn == [{"dense": [("quest", needs[0])]}]


def test_what_is_filtered_is_of_siblings_that_were_trained_dense() -> None:
    """Random tokens solve what they solve as well as dense, if dense solves it; of dense-trained siblings, too."""
    made = []
    for task, share in (("passkey", 0.9), ("mqar", 0.5)):
        made += [scored(share, "dense", task=task), scored(0.3, "dense", "a", task=task)]
        made += [scored(share, "random", budget=0.1, task=task), scored(share, "random", "a", 0.1, task=task)]
    grid, solved = report._filtered(Table(made)).parts
    assert isinstance(grid, Grid) and [line[:4] for line in grid.lines] == [["dense", "mqar", "1,024", "0.500"]]
    assert isinstance(solved, str) and "no arms apart: passkey at 1,024. They were kept." in solved


def test_arms_on_the_front_are_listed_by_length_and_by_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("frontiers", "fronts"):
        monkeypatch.setattr(figures, name, lambda *_: b"")
    made = []
    for length in (4096, 16384, 512):
        made.append(scored(0.95, "dense", length=length))
        made += [scored(b, "quest", budget=b, length=length) for b in (0.5, 0.1, 0.09)]
        made += [scored(0.3, "random", budget=0.05, length=length), scored(0.05, "h2o", budget=0.2, length=length)]
    grid = next(part for part in report._fronts(Table(made)).parts if isinstance(part, Grid))
    expected = [(n, s) for n in ("512", "4,096", "16,384") for s in ("9 %", "10 %", "50 %")]
    assert [(line[1], line[3]) for line in grid.lines] == expected
    assert {line[2] for line in grid.lines} == {"dense+quest"}


def test_comparisons_and_cards_are_told_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    points = Table([scored(0.9, "dense"), scored(0.8, "quest", budget=0.1)]).points
    found = [Comparison(points[1], points[0], -0.1, -0.125, -0.075, p) for p in (0.05, 0.04)]
    table: Any = SimpleNamespace(comparisons=found, reductions=lambda: [Reduction("dense+quest", 1024, 0.1, 0.2, 3)])
    short, whole = [part for part in report._noninferiority(table).parts if isinstance(part, Grid)]
    assert short.lines == [["dense+quest", "1,024", "3", "10 %", "20 %", "5.0 x"]]
    told = ["dense+quest", "10 %", "mqar", "1,024", "-10.0 [-12.5, -7.5]"]
    assert whole.lines == [[*told, "0.05", "not shown"], [*told, "0.04", "non-inferior"]]
    told_by = (("so much", cards.AGREES), ("", cards.ABSENT))
    made = tuple(cards.Card("claim", "source", "form", lambda table, said=said: said) for said in told_by)
    monkeypatch.setattr(cards, "CARDS", made)
    grid = report._cards(table).parts[0]
    assert isinstance(grid, Grid) and grid.lines == [
        ["claim", "source", "form", "so much", "agrees"],
        ["claim", "source", "form", "-", "not measured here"],
    ]


def test_a_line_of_dense_is_the_largest_siblings_and_a_share_of_nothing_counts() -> None:
    """In whichever order the siblings come; a mean over tasks."""
    made = []
    for model, share, parameters in (("small", 0.85, 10), ("large", 0.95, 100)):
        sizes: dict[str, Any] = {"parameters": parameters}
        made += [scored(share, "dense", model, **sizes), scored(0.5, "quest", model, 0.1, **sizes)]
    for order in (made, made[::-1]):
        table = Table(order)
        points = [p for p in table.points if p.cell.method == "quest"]
        assert report._dense_lines(table, points) == {("retrieval", 1024): 0.95}
    counted = [{**made[1].counted, "resident": share} for share in (0.0, 0.5, None)]
    points = Table([replace(made[1], counted=c, train_seed=i) for i, c in enumerate(counted)]).points
    assert report._share(points, "resident") == "25 %"
