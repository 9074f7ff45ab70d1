"""The analysis finds what the simulation put in; the report shows it in one page."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from simulated import MANIFEST, cell, cells, rows_of, write

from nsa.baselines import METHODS
from nsa.evaluation.comparison.folder import ResultsFolder
from nsa.evaluation.comparison.reading import cards, statistics
from nsa.evaluation.comparison.reading.analysis import Table
from nsa.evaluation.comparison.reading.report import write_report
from nsa.evaluation.comparison.rows import Cell, ResultsError


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(cells(("quest", "twilight", "random"), ("dense", "nsa"), samples=20))


def test_the_report_of_a_folder(tmp_path: Path) -> None:
    made = [
        cell(method, model, budget, task, 1024, samples=8, **changes)
        for model in ("dense", "nsa")
        for task in ("mqar", "common_words")
        for method, budget, changes in (
            ("dense", None, {"dense_score": 0.6} if task == "common_words" else {}),
            ("quest", 0.25, {}),
            ("quest", 0.1, {"bos": 2}),
        )
    ]
    write(tmp_path, made)
    said: list[str] = []
    page = write_report(tmp_path, say=said.append).read_text()
    text = (tmp_path / "report.md").read_text()
    assert any("2 BOS tokens" in line for line in said) and "2 BOS tokens" in text
    for title in (
        "Alarms",
        "Summary",
        "What was filtered",
        "Quality against",
        "Reproduction cards",
        "Where this comes",
    ):
        assert f"## {title}" in text and f">{title}" in page
    assert "<script" not in page and not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)  # nothing else is loaded
    pictures = re.findall(r"\(figures/(.*?)\)", text)
    assert len(pictures) == page.count("data:image/png;base64,") > 3
    assert sorted(pictures) == sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert "| dense | common_words | 1,024 | 0.6" in text  # filtered, and said


def test_a_half_written_folder_has_no_report(tmp_path: Path) -> None:
    folder = ResultsFolder(tmp_path, replace(MANIFEST, planned=2))
    folder.write(rows_of(cell("dense", samples=2)))
    with pytest.raises(ResultsError, match="half-written: 1 of 2 cells"):
        write_report(tmp_path)


def test_points_that_dense_does_not_solve_do_not_count(table: Table) -> None:
    left = {(p.cell.task, p.cell.length) for p in table.points} - {
        (p.cell.task, p.cell.length) for p in table.informative(table.points)
    }
    assert left == {("common_words", 4096)}
    assert {(c.point.cell.task, c.point.cell.length) for c in table.comparisons}.isdisjoint(left)


def test_differences_are_those_of_the_scores(table: Table) -> None:
    for c in table.comparisons[:20]:
        assert c.difference == pytest.approx(c.point.cell.score.mean() - c.base.cell.score.mean())
        assert c.low <= c.difference <= c.high and c.base.cell.reference


def test_a_reduction_needs_every_task_and_all_larger_budgets() -> None:
    dense = [cell("dense", task=task, samples=300, queries=1) for task in ("mqar", "passkey")]

    def arm(task: int, budget: float, lost: int):
        score = dense[task].score.copy()
        score[np.flatnonzero(score)[:lost]] = 0
        return replace(cell("quest", budget=budget, task=dense[task].task, samples=300, queries=1), score=score)

    def smallest(*lost: tuple[int, int, float]) -> float | None:
        planted = {(task, budget): n for task, n, budget in lost}
        arms = [arm(t, b, planted.get((t, b), 0)) for t in (0, 1) for b in (0.25, 0.1, 0.05)]
        (found,) = Table([*dense, *arms]).reductions()
        return found.budget

    assert smallest() == 0.05
    assert smallest((1, 60, 0.05)) == 0.1  # one task of two
    assert smallest((0, 60, 0.1)) == 0.25  # the lucky 0.05 does not count
    assert smallest((0, 60, 0.25)) is None


def test_budget_laws_find_the_exponent() -> None:
    """The simulation needs tokens that grow as n^0.5, or n^1."""
    for exponent in (0.5, 1.0):
        budgets, lengths = (0.5, 0.25, 0.12, 0.06, 0.03, 0.015), (1024, 4096, 16384)
        made = [
            cell("oracle_top_k", "dense", b, "passkey", n, 100, exponent=exponent) for b in budgets for n in lengths
        ]
        made += [cell("dense", "dense", None, "passkey", n, 100) for n in lengths]
        (need,) = Table(made).required(500)
        assert need.law is not None and not any(need.bounds)
        assert need.law.low - 0.05 <= exponent <= need.law.high + 0.05
        assert need.law.beta == pytest.approx(exponent, abs=0.12)


def test_effective_length_follows_dense_at_the_shortest() -> None:
    scores = {1024: 0.95, 4096: 0.5}
    made = [cell("dense", length=n, samples=10, dense_score=score) for n, score in scores.items()]
    assert Table(made).effective_lengths() == [("dense", None, 1024, 1)]


def test_arms_with_other_questions_are_refused() -> None:
    table = Table([cell("dense", samples=10), cell("quest", budget=0.25, samples=9)])
    with pytest.raises(ResultsError, match="answered different questions"):
        _ = table.comparisons
    with pytest.raises(ResultsError, match="answered different questions"):
        Table([cell("dense", samples=10), cell("dense", samples=9, train_seed=1)])


def test_a_sibling_is_compared_with_dense_of_its_size() -> None:
    small, large = cell("dense", "small", samples=5, parameters=10), cell("dense", "large", samples=5, parameters=1000)
    table = Table([small, large, cell("own", "nsa", 0.1, samples=5, parameters=900)])
    base = table.base(table.select(lambda c: c.method == "own")[0])
    assert base is not None and base.cell.model == "large"


def test_cards_tell_signs(table: Table) -> None:
    verdicts = {card.claim: card.measure(table) for card in cards.CARDS}
    assert len(verdicts) == len(cards.CARDS) and all(c.source and c.form for c in cards.CARDS)

    def verdict(words: str) -> str:
        (found,) = [v for claim, (_, v) in verdicts.items() if words in claim]
        return found

    assert verdict("Quest with top-p") == cards.AGREES  # so it was simulated
    assert verdict("A random gate") == cards.AGREES
    assert verdict("Trained sparsity beats") == cards.AGREES
    assert verdict("Small blocks") == verdict("ASEntmax reaches") == cards.ABSENT
    pairs = [(p, p) for p in table.select(lambda c: c.method == "quest")[:3]]
    assert cards.contrast(pairs)[1] == cards.UNDECIDED  # no difference at all


def test_cards_of_the_study_tell_signs() -> None:
    def told(words: str, *made: Cell) -> str:
        (card,) = [card for card in cards.CARDS if words in card.claim]
        return card.measure(Table(made))[1]

    dense, oracle = cell("dense", samples=200), cell("oracle_topk", budget=1 / 16, samples=200)
    same, none = replace(oracle, score=dense.score), replace(oracle, score=0 * dense.score)
    assert told("right keys at a sixteenth", dense, same) == cards.AGREES
    assert told("right keys at a sixteenth", dense, none) == cards.DISAGREES
    assert told("right keys at a sixteenth", dense, replace(same, budget=1 / 8)) == cards.ABSENT
    chance = cell("random", budget=1 / 16, samples=200)
    assert told("random choice is no choice", dense, same, replace(chance, score=none.score)) == cards.AGREES
    assert told("random choice is no choice", dense, same, replace(chance, score=dense.score)) == cards.DISAGREES
    own, full = cell("own", "nsa", 0.1, samples=200), cell("dense", "nsa", samples=200)
    better, worse = replace(own, score=dense.score), replace(full, score=none.score)
    assert told("gains nothing by attending", dense, better, worse) == cards.AGREES
    assert told("gains nothing by attending", dense, replace(own, score=none.score), full) == cards.DISAGREES
    quest = replace(cell("quest", budget=1 / 8, samples=200), score=dense.score)
    forgets = [replace(cell(name, budget=1 / 8, samples=200), score=none.score) for name in ("snapkv", "streaming_llm")]
    assert told("What forgets", dense, quest, *forgets) == cards.AGREES
    assert told("What forgets", dense, quest, forgets[0], replace(forgets[1], score=dense.score)) == cards.UNDECIDED


def test_random_is_compared_with_what_looks_at_content_at_the_same_place() -> None:
    """Neither a window with sinks nor another question, task or budget is a rival of it."""
    chance = replace(cell("random", budget=0.25), score=np.zeros(200))
    best = replace(cell("quest", budget=0.25), score=np.ones(200))
    others = [
        *(replace(best, method=name, arm=f"dense+{name}") for name in ("sink_window", "streaming_llm", "lm_infinite")),
        replace(best, question_aware=False), replace(best, budget=0.1), replace(best, length=4096),
        replace(best, task="variable_tracking"), replace(best, model="nsa", trained="nsa", arm="nsa+quest"),
    ]  # fmt: skip
    (card,) = [card for card in cards.CARDS if "A random gate" in card.claim]
    assert card.measure(Table([chance, *others])) == ("", cards.ABSENT)
    told, verdict = card.measure(Table([chance, *others, best]))
    assert told == "+100.0 points [+100.0, +100.0] over 1 pairs of cells" and verdict == cards.AGREES


def test_verdicts_of_several_parts_agree_only_if_all_do() -> None:
    agrees, other, none = ("a", cards.AGREES), ("b", cards.DISAGREES), ("", cards.ABSENT)
    assert cards._all([("x", agrees), ("y", agrees)]) == ("x: a; y: a", cards.AGREES)
    for second in (other, none):
        assert cards._all([("x", agrees), ("y", second)])[1] == cards.UNDECIDED
    assert cards._all([("x", none), ("y", none)]) == none


@pytest.mark.parametrize(
    ("intervals", "verdict"),
    [
        ([(0.3, 0.7), (0.4, 0.9), (0.8, 1.2)], cards.AGREES),
        ([(0.3, 0.7), (0.8, 1.2)], cards.UNDECIDED),
        ([(0.3, 0.7), (0.4, 0.9), (1.1, 1.2)], cards.UNDECIDED),
        ([(1.3, 1.7), (1.1, 1.2), (0.8, 1.2)], cards.DISAGREES),
    ],
)
def test_exponents_agree_if_most_lie_below_one_and_none_above(intervals: list, verdict: str) -> None:
    laws = [SimpleNamespace(label="dense+quest", law=statistics.Law(1, 1, *of)) for of in intervals]
    table = SimpleNamespace(required=lambda: laws, points=Table([cell("quest", budget=0.1)]).points)
    assert cards._budget_law(table)[1] == verdict  # type: ignore[arg-type]


def test_losses_by_scope_are_shares_of_dense_at_the_smallest_budget() -> None:
    made = []
    for task, whole, scores in (("passkey", 200, {0.25: 0, 0.1: 180}), ("mqar", 160, {0.25: 160, 0.1: 120})):
        made.append(replace(cell("dense", task=task), score=(np.arange(200) < whole).astype(np.float64)))
        for budget, right in scores.items():
            made.append(replace(cell("quest", budget=budget, task=task), score=(np.arange(200) < right) * 1.0))
    (card,) = [card for card in cards.CARDS if "A single query tolerates" in card.claim]
    told, verdict = card.measure(Table(made))
    assert told.startswith("single query loses 10 %, the rest 25 %") and verdict == cards.AGREES


def test_points_of_both_questions_are_pairs_of_their_own() -> None:
    made = [cell("dense"), cell("twilight", budget=0.25), cell("quest", budget=0.25)]
    made += [replace(c, question_aware=False) for c in made]
    pairs = cards.between(Table(made), cards.method("twilight"), cards.method("quest"))
    assert pairs[0].endswith("over 2 pairs of cells")


def test_cards_ask_for_methods_that_there_are() -> None:
    names = set(re.findall(r"method\((.*?)\)|at_most\([^,]*, (.*?)\)", inspect.getsource(cards)))
    asked = {word for pair in names for word in re.findall(r'"(\w+)"', " ".join(pair))}
    assert {"quest", "snapkv", "ada_snapkv", "oracle_topk"} <= asked
    assert asked | set(cards.BLIND) <= {method.name for method in METHODS}


def test_trained_sparsity_has_rivals_length_by_length() -> None:
    """What it reads is no fixed share: at 1,024 tokens no method is near, at 4,096 one is."""
    made = [cell("dense", length=n, samples=50) for n in (1024, 4096)]
    made += [cell("quest", budget=0.25, length=n, samples=50) for n in (1024, 4096)]
    made += [cell("own", "nsa", share, length=n, samples=50) for share, n in ((0.8, 1024), (0.25, 4096))]
    (card,) = [card for card in cards.CARDS if "Trained sparsity beats" in card.claim]
    told, _ = card.measure(Table(made))
    assert told.count("minus") == 1 and "minus dense+quest at 0.25, 4,096 tokens" in told


def test_trained_sparsity_is_compared_with_methods_on_dense_of_its_size() -> None:
    made = [cell("dense", samples=50), cell("quest", budget=0.25, samples=50), cell("own", "nsa", 0.25, samples=50)]
    made += [replace(c, model="large", arm=f"large+{c.method}", parameters=100_000_000) for c in made[:2]]
    (card,) = [card for card in cards.CARDS if "Trained sparsity beats" in card.claim]
    assert "minus dense+quest at 0.25" in card.measure(Table(made))[0]
    better = [replace(c, score=np.ones_like(c.score)) if c.arm == "large+quest" else c for c in made]
    assert "minus dense+quest at 0.25" in card.measure(Table(better))[0]


def test_small_blocks_are_told_by_their_settings() -> None:
    made = [
        replace(cell("block_sparse", budget=budget), arm=f"dense+block_sparse_{block}", settings={"block": block})
        for block, budget in ((16, 0.25), (64, 0.25))
    ]
    made[1] = replace(made[1], score=made[1].score * (np.arange(200) % 2))
    (card,) = [card for card in cards.CARDS if "Small blocks" in card.claim]
    assert card.measure(Table(made))[1] == cards.AGREES


def test_several_training_seeds_widen_the_interval() -> None:
    seeds = [cell("dense", samples=30, train_seed=s, dense_score=score) for s, score in enumerate((0.7, 0.9, 0.8))]
    (point,) = Table(seeds).points
    low, high = point.interval
    one, two = statistics.interval(statistics.draw_means(statistics.clusters([seeds[2].score], seeds[2].sample)))
    assert point.mean == pytest.approx(0.8, abs=0.01) and high - low > two - one
