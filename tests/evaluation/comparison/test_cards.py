"""Verdicts of the reproduction cards on cells whose scores are given, card by card."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from simulated import cell

from nsa.evaluation.comparison.reading import cards
from nsa.evaluation.comparison.reading.analysis import Table
from nsa.evaluation.comparison.reading.statistics import Law
from nsa.evaluation.comparison.rows import Cell

YES, NO, OPEN, NONE = cards.AGREES, cards.DISAGREES, cards.UNDECIDED, cards.ABSENT


def scored(share: float, method: str, model: str = "dense", budget: float | None = 0.1, **more: Any) -> Cell:
    """A cell of which so many answers of 1,000 samples are right, the first ones."""
    changes = {name: more.pop(name) for name in ("trained", "settings", "counted", "arm") if name in more}
    made = cell(method, model, None if method == "dense" else budget, samples=1000, queries=1, **more)
    return replace(made, score=(np.arange(1000) < round(1000 * share)).astype(np.float64), **changes)


def told(words: str, *made: Cell) -> tuple[str, str]:
    (card,) = [card for card in cards.CARDS if words in card.claim]
    return card.measure(Table(made))


@pytest.mark.parametrize(
    ("words", "first", "second"),
    [
        ("Ada-SnapKV above", "ada_snapkv", "snapkv"),
        ("Double-P is", "double_p", "quest"),
        ("Quest with top-p", "twilight", "quest"),
    ],
)
def test_two_methods_are_compared_in_this_direction(words: str, first: str, second: str) -> None:
    """At one budget, on siblings that were trained dense."""
    figure, verdict = told(words, scored(0.8, first), scored(0.5, second))
    assert re.fullmatch(r"\+30\.0 points \[\+2\d\.\d, \+3\d\.\d\] over 1 pairs of cells", figure) and verdict == YES
    assert told(words, scored(0.5, first), scored(0.8, second))[1] == NO
    assert told(words, scored(0.8, first, budget=0.25), scored(0.5, second))[1] == NONE
    assert told(words, scored(0.8, first, "nsa"), scored(0.5, second, "nsa"))[1] == NONE


@pytest.mark.parametrize(
    ("words", "first", "second", "extra"),
    [
        ("Quest with top-p", {"method": "twilight"}, {"method": "quest"}, []),
        ("DMS at a compression", {"method": "own", "model": "nsa", "trained": "dms"}, {"method": "dense"}, []),
        (
            "gains nothing by attending", {"method": "own", "model": "nsa"}, {"method": "dense", "model": "nsa"},
            [{"method": "dense"}],
        ),
        ("right keys at a sixteenth", {"method": "oracle_topk", "budget": 1 / 16}, {"method": "dense"}, []),
    ],
)  # fmt: skip
def test_a_loss_below_two_points_is_none(words: str, first: Any, second: Any, extra: list[Any]) -> None:
    """Also if it is surely one: its interval lies below 0."""
    others = [scored(0.95, **one) for one in [second, *extra]]
    assert told(words, scored(0.945, **first), *others)[1] == YES
    assert told(words, scored(0.9, **first), *others)[1] == NO
    assert told(words, scored(0.93, **first), *others)[1] == OPEN


def test_an_interval_with_both_signs_decides_nothing() -> None:
    """Eleven answers are won and nine lost: the mean is above 0."""
    snapkv = scored(0.5, "snapkv")
    score = snapkv.score.copy()
    score[:9], score[500:511] = 0, 1
    ada = replace(scored(0.5, "ada_snapkv"), score=score)
    assert told("Ada-SnapKV above", ada, snapkv)[1] == OPEN
    score[500:560] = 1
    assert told("Ada-SnapKV above", replace(ada, score=score), snapkv)[1] == YES


def test_columns_win_on_retrieval_and_blocks_on_tracking() -> None:
    both = [
        [scored(share, method, task=task) for method, share in (("vertical_slash", one), ("block_sparse", 1 - one))]
        for task, one in (("mqar", 0.7), ("variable_tracking", 0.3))
    ]
    agrees = [point for task in both for point in task]
    figure, verdict = told("Columns and diagonals", *agrees)
    assert verdict == YES and figure.count("+40.0") == 2
    swapped = [replace(one, score=1 - one.score) for one in agrees]
    assert told("Columns and diagonals", *swapped)[1] == NO
    assert told("Columns and diagonals", *both[0], *(replace(c, score=1 - c.score) for c in both[1]))[1] == OPEN


@pytest.mark.parametrize("task", ["passkey", "niah_multikey", "mqar"])
def test_recall_is_these_tasks(task: str) -> None:
    """An informed choice must be 50 points above random ones."""
    words, random = "random choice is no choice", scored(0.2, "random", task=task)
    assert told(words, scored(0.8, "oracle_topk", task=task), random)[1] == YES
    assert told(words, scored(0.5, "oracle_topk", task=task), random)[1] == NO
    large = (scored(0.8, "oracle_topk", task=task, budget=0.25), scored(0.2, "random", task=task, budget=0.25))
    assert told(words, *large)[1] == NONE
    assert told("A random gate", scored(0.5, "quest", task=task), random)[1] == YES
    others = [scored(share, method, task="common_words") for method, share in (("quest", 0.5), ("random", 0.2))]
    assert told("A random gate", *others)[1] == NONE


def test_small_blocks_are_compared_at_each_budget() -> None:
    """The smallest with the largest, in whichever order they come; not at different budgets."""

    def blocks(size: int, share: float, budget: float = 0.1) -> Cell:
        more = {"settings": {"block": size}, "arm": f"dense+block_sparse,block={size}"}
        return scored(share, "block_sparse", budget=budget, **more)

    words = "Small blocks are better"
    made = [blocks(64, 0.4), blocks(16, 0.8), blocks(32, 0.1)]
    for order in (made, made[::-1], made[1:] + made[:1]):
        figure, verdict = told(words, *order)
        assert figure.startswith("+40.0 points") and figure.endswith("over 1 pairs of cells") and verdict == YES
    assert told(words, blocks(64, 0.4), blocks(16, 0.8, 0.25))[1] == NONE
    assert told(words, blocks(16, 0.4), blocks(64, 0.8))[1] == NO


@pytest.mark.parametrize(("reads", "there"), [(0.12, True), (0.126, False), (0.081, True), (0.079, False)])
def test_what_is_at_most_a_quarter_away_is_a_rival_of_trained_sparsity(reads: float, there: bool) -> None:
    """Of those that somebody could use, and that count the same, the best."""
    words, own = "Trained sparsity beats", scored(0.8, "own", "nsa", 0.1)
    quest = scored(0.5, "quest")
    quest = replace(quest, counted={**quest.counted, "reads": reads})
    no_rivals = [scored(0.99, name) for name in ("oracle_topk", "random", "vertical_slash")]
    figure, verdict = told(words, scored(0.95, "dense"), own, quest, scored(0.2, "sparq", budget=0.11), *no_rivals)
    best = "dense+quest at 0.1" if there else "dense+sparq at 0.11"
    assert figure.startswith(f"nsa+own minus {best}, 1,024 tokens: {'+30.0' if there else '+60.0'}") and verdict == YES
    more = scored(0.95, "dense", task="passkey"), scored(0.8, "own", "nsa", 0.1, task="passkey")
    assert told(words, scored(0.95, "dense"), own, quest, *more)[1] == NONE, "a rival is one on all tasks"


def test_losses_by_scope_are_of_tasks_that_dense_solves_at_the_smallest_budget() -> None:
    words = "A single query tolerates"
    made = [scored(1.0, "dense", task=task) for task in ("passkey", "mqar")] + [
        scored(share, "quest", budget=budget, task=task)
        for task, budget, share in (
            ("passkey", 0.1, 0.9),
            ("passkey", 0.25, 0.1),
            ("mqar", 0.1, 0.7),
            ("mqar", 0.25, 1),
        )
    ]
    unsolved = [scored(0.5, "dense", task="story_filtering"), scored(0.5, "quest", task="story_filtering")]
    figure, verdict = told(words, *made, *unsolved, scored(0.0, "random", task="passkey"))
    assert figure.startswith("single query loses 10 %, the rest 30 %") and verdict == YES
    worse = [replace(one, score=0 * one.score) if one.task == "passkey" and one.budget else one for one in made]
    assert told(words, *worse)[1] == NO


def test_an_oracle_is_asked_at_a_sixteenth_where_dense_solves_the_task() -> None:
    words = "right keys at a sixteenth"
    assert told(words, scored(0.95, "dense"), scored(0.95, "oracle_topk", budget=1 / 32))[1] == NONE
    assert told(words, scored(0.5, "dense"), scored(0.5, "oracle_topk", budget=1 / 16))[1] == NONE


def test_entmax_is_asked_to_copy_and_to_sort() -> None:
    words, dense = "alpha-entmax copies", scored(0.5, "dense")
    own = scored(0.8, "own", "nsa", trained="entmax")
    for task in ("copy_wide", "sort"):
        assert told(words, replace(dense, task=task), replace(own, task=task))[1] == YES
        assert told(words, replace(dense, task=task), replace(own, task=task, trained="nsa"))[1] == NONE
    assert told(words, dense, own)[1] == NONE


def test_what_forgets_is_compared_at_an_eighth_or_less() -> None:
    def both(budget: float) -> list[Cell]:
        return [scored(s, name, budget=budget) for name, s in (("quest", 0.8), ("snapkv", 0.5), ("streaming_llm", 0.5))]

    assert told("What forgets", *both(1 / 8))[1] == YES
    assert told("What forgets", *both(1 / 4))[1] == NONE


@pytest.mark.parametrize(
    ("method", "model", "verdict"), [("quest", "dense", YES), ("random", "dense", NONE), ("quest", "nsa", NONE)]
)
def test_exponents_are_of_what_chooses_on_siblings_that_were_trained_dense(
    method: str, model: str, verdict: str
) -> None:
    point = cell(method, model, 0.1)
    need = SimpleNamespace(label=point.arm, law=Law(1, 0.5, 0.3, 0.7))
    table: Any = SimpleNamespace(required=lambda: [need], points=Table([point]).points)
    assert cards._budget_law(table)[1] == verdict
