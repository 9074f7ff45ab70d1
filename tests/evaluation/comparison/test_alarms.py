"""Each alarm rings on a planted fault, and is silent on good results."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import LAYERS, cell

from nsa.evaluation.comparison.reading import alarms
from nsa.evaluation.comparison.reading.alarms import ALARMS
from nsa.evaluation.comparison.reading.analysis import Table
from nsa.evaluation.comparison.rows import Cell

DENSE = cell("dense", dense_score=0.9)
QUEST = [cell("quest", budget=budget) for budget in (1.0, 0.25, 0.1)]
GOOD = [DENSE, *[replace(c, score=np.minimum(c.score, DENSE.score)) for c in QUEST]]
GOOD[1] = replace(GOOD[1], score=DENSE.score)
FOUND = GOOD[3].figures


def ringing(cells) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for finding in alarms.ring(Table(cells)):
        if finding.rings:
            found.setdefault(finding.alarm, []).append(finding.text)
    return found


def planted(index: int, **changes) -> list:
    return [replace(c, **changes) if i == index else c for i, c in enumerate(GOOD)]


def leaky(changes: list[float]) -> list:
    return planted(3, figures={**FOUND, "changes": {"decode": changes}})


def better(cells, index: int, answers: int):
    """The cells, with one that has so many more right answers than it had."""
    score = cells[index].score.copy()
    score[np.flatnonzero(score == 0)[:answers]] = 1
    return [replace(c, score=score) if i == index else c for i, c in enumerate(cells)]


def test_good_results_are_silent_and_nothing_was_left_out() -> None:
    assert alarms.ring(Table(GOOD)) == []


@pytest.mark.parametrize(
    ("cells", "alarm", "words"),
    [
        (better(GOOD, 2, 30), "sparse above dense", "suspect the harness"),
        (better(GOOD, 3, 200), "not monotone in the budget", "the larger budget loses answers"),
        (planted(2, counted={**GOOD[2].counted, "reads": 0.05}), "not monotone in the budget", "counted at 0.050"),
        (planted(1, score=1 - DENSE.score), "full budget unlike dense", "differs from dense in 100.0 %"),
        (planted(2, bos=np.full(200, 2)), "not exactly one BOS", "with 2 BOS tokens"),
        (planted(0, bos=np.zeros(200, np.int64)), "not exactly one BOS", "with 0 BOS tokens"),
        (planted(2, parsed=np.arange(200) >= 20), "unparsable answers", "10.0 % of the answers"),
        (planted(2, ran=False), "the sparse path did not run", "not in each layer and phase"),
        (planted(2, counted={**GOOD[2].counted, "reads": 1.0}), "the sparse path did not run", "counted as dense"),
        (planted(3, counted={**GOOD[3].counted, "attended": 0.0}), "the sparse path did not run", "selection is empty"),
        (leaky([0.25, 3.0]), "reads what its plan leaves out", "change a logit by 0.25 in decoding"),
        (leaky([0.0, 0.0]), "reads what its plan leaves out", "change no logit in decoding"),
        (
            planted(3, figures={**FOUND, "reads": [1.0, 1.0] + [0.1] * (LAYERS - 2)}, dense_layers=[1]),
            "dense layers undisclosed",
            "layers 0 read as much as dense",
        ),
        (
            planted(3, counted={**GOOD[3].counted, "reads": 0.1021}),
            "counted budget off the nominal one",
            "dense+quest at 0.1 was counted at 0.102 reads",
        ),
    ],
)
def test_rings_on_a_planted_fault(cells, alarm: str, words: str) -> None:
    found = ringing(cells)
    assert words in " ".join(found[alarm]), found


def test_every_alarm_was_planted() -> None:
    marks = test_rings_on_a_planted_fault.pytestmark[0].args[1]
    assert {fault[1] for fault in marks} == {alarm.name for alarm in ALARMS}


@pytest.mark.parametrize(
    "cells",
    [
        better(GOOD, 2, 4),  # a few answers are chance
        planted(2, parsed=np.arange(200) >= 10),
        planted(3, counted={**GOOD[3].counted, "reads": 0.1019}),
        planted(3, figures={**FOUND, "reads": [1.0] + [0.1] * (LAYERS - 1)}, dense_layers=[0]),
        planted(1, score=np.where(np.arange(200) < 2, 1 - DENSE.score, DENSE.score)),
        leaky([0.0, 1e-6]),
        planted(2, counted={**GOOD[2].counted, "reads": 0.1 * (1 - 1e-7)}, budget=0.1 * (1 + 1e-3)),
        planted(3, figures={**FOUND, "reads": [1.2] + [0.1] * (LAYERS - 1)}),  # branches beside may honestly read more
    ],
)
def test_silent_within_the_limits(cells) -> None:
    assert ringing(cells) == {}


def test_a_double_bos_rings_twice() -> None:
    """The fault that this project knows from others: dense suffers most from it, so that sparse looks better."""
    rng = np.random.default_rng(0)
    hurt = replace(DENSE, score=DENSE.score * (rng.random(200) < 0.7), bos=np.full(200, 2))
    assert {"sparse above dense", "not exactly one BOS", "full budget unlike dense"} <= ringing(
        [hurt, *GOOD[1:]]
    ).keys()


def test_a_sparse_sibling_may_be_better_but_is_looked_at() -> None:
    own = cell("own", "nsa", 0.1, dense_score=0.9)
    texts = ringing([*GOOD, replace(own, score=np.ones(200))])["sparse above dense"]
    assert len(texts) == 1 and "look at a leak" in texts[0] and "one training seed" in texts[0]
    seeds = [cell("dense", train_seed=s, dense_score=0.9) for s in range(3)]
    gains = [replace(cell("own", "nsa", 0.1, train_seed=s), score=seeds[s].score.copy()) for s in range(3)]
    for gain, answers in zip(gains, (20, 0, 0), strict=True):  # one training seed of three is better: no evidence
        gain.score[np.flatnonzero(gain.score == 0)[:answers]] = 1
    assert "sparse above dense" not in ringing([*seeds, *gains])


def test_a_sparse_sibling_may_lose_by_more_budget() -> None:
    low, high = cell("quest", "nsa", 0.1), cell("quest", "nsa", 0.25)
    assert "not monotone in the budget" not in ringing(
        [DENSE, replace(low, score=high.score), replace(high, score=low.score)]
    )


def test_what_cannot_be_looked_at_is_said() -> None:
    blind = [replace(c, figures={}, bos=np.full(200, -1)) for c in GOOD[2:]]
    blind.append(replace(cell("own", "nsa", 0.1), figures={"reads": [0.1] * LAYERS}))  # has no plan to look at
    findings = {f.alarm: f.text for f in alarms.ring(Table(blind)) if not f.rings}
    assert findings == {
        "sparse above dense": "There is no dense run of a dense-trained sibling to compare with.",
        "full budget unlike dense": "No cell with a budget of 1: quest.",
        "not exactly one BOS": "No BOS was counted for dense.",
        "reads what its plan leaves out": "Nothing was left out, or nobody looked: dense+quest.",
        "dense layers undisclosed": "Reads by layer were not recorded for dense+quest.",
    }


def test_marked_arms() -> None:
    assert alarms.marked(Table(GOOD)) == set()
    assert alarms.marked(Table(planted(3, counted={**GOOD[3].counted, "reads": 0.11}))) == {("dense+quest", 0.1)}


def flipped(cell_: Cell, up: int, down: int = 0) -> Cell:
    """The cell with so many more right answers, and so many more wrong ones, each in a sample of its own."""
    score = DENSE.score.copy().reshape(50, -1)
    free = [s for s in range(50) if 0 < score[s].sum() < score.shape[1]]
    for s in free[:up]:
        score[s, score[s].argmin()] = 1
    for s in free[up : up + down]:
        score[s, score[s].argmax()] = 0
    return replace(cell_, score=score.reshape(-1))


OTHERS = ("sparq", "twilight", "h2o", "snapkv", "block_sparse")


def test_one_of_many_comparisons_must_be_surer_than_one_alone() -> None:
    """8 samples up and 1 down: p is 10 / 512; with five arms that are up by one the family has six."""
    sure, slight = flipped(cell("quest", budget=0.1), 8, 1), [flipped(cell(m, budget=0.1), 1) for m in OTHERS]
    assert set(ringing([DENSE, sure])) == {"sparse above dense"}
    assert ringing([DENSE, sure, *slight]) == {}
    large = [replace(cell(m, budget=0.25), score=DENSE.score) for m in ("quest", *OTHERS)]
    low = replace(DENSE, score=np.ones(200))  # dense is best: only budgets are compared
    assert set(ringing([low, sure, large[0]])) == {"not monotone in the budget"}
    assert ringing([low, sure, *slight, *large]) == {}


def test_p_of_an_arm_that_is_above_counts_both_signs() -> None:
    """7 samples up and 1 down: one-sided p is 9 / 256, below 5 %, but chance may lead either way."""
    assert ringing([DENSE, flipped(cell("quest", budget=0.1), 7, 1)]) == {}
    large = replace(cell("quest", budget=0.25), score=DENSE.score)
    assert ringing([replace(DENSE, score=np.ones(200)), flipped(cell("quest", budget=0.1), 7, 1), large]) == {}


def test_arms_that_are_neither_above_nor_below_are_not_in_the_family() -> None:
    sure, same = (
        flipped(cell("quest", budget=0.1), 8, 1),
        [replace(cell(m, budget=0.1), score=DENSE.score) for m in OTHERS],
    )
    assert set(ringing([DENSE, sure, *same])) == {"sparse above dense"}


def test_one_training_of_a_sparse_sibling_is_as_sure_as_its_samples() -> None:
    """60 samples up of 60: no bootstrap of 10,000 draws could tell."""
    low = replace(cell("dense", samples=60), score=np.zeros(240))
    own = replace(cell("own", "nsa", 0.1, samples=60), score=np.ones(240))
    (text,) = ringing([low, own])["sparse above dense"]
    assert float(text.partition("(p ")[2].partition(" ")[0]) < 1e-9


def test_a_full_budget_with_fewer_answers_than_dense_is_unlike_it() -> None:
    dense, full = cell("dense", "nsa"), cell("quest", "nsa", 1.0, samples=40)
    assert "differs from dense in 100.0 %" in ringing([dense, full])["full budget unlike dense"][0]


def test_at_a_full_budget_nothing_is_left_out_so_no_figures_are_missed() -> None:
    full = replace(GOOD[1], figures={k: v for k, v in GOOD[1].figures.items() if k != "changes"})
    assert alarms.ring(Table([GOOD[0], full])) == []


def test_the_cell_that_is_farthest_off_its_budget_is_named() -> None:
    tasks = {"mqar": 0.104, "passkey": 0.08, "niah_multikey": 0.1}
    made = []
    for task, reads in tasks.items():
        made += [cell("dense", task=task), cell("quest", budget=0.1, task=task)]
        made[-1] = replace(made[-1], score=made[-2].score, counted={**made[-1].counted, "reads": reads})
    (text,) = ringing(made)["counted budget off the nominal one"]
    assert "counted at 0.080 reads (passkey, 1024); 2 of 3 cells differ" in text


def test_budgets_are_compared_with_all_larger_ones_at_the_same_length() -> None:
    """Up by four samples a step says nothing; by eight it does. At another length scores are others."""
    best = replace(DENSE, score=np.ones(200))
    steps = [flipped(cell("quest", budget=b), 4) for b in (0.1,)] + [
        flipped(cell("quest", budget=0.05), 8), replace(cell("quest", budget=0.25), score=DENSE.score)
    ]  # fmt: skip
    assert [text[:17] for text in ringing([best, *steps])["not monotone in the budget"]] == ["dense+quest at 0."]
    assert ringing([best, steps[0], steps[2]]) == {}
    longer = cell("dense", length=4096, dense_score=0.5), cell("quest", budget=0.25, length=4096, dense_score=0.5)
    assert ringing([best, replace(cell("quest", budget=0.1), score=DENSE.score), longer[0],
                    replace(longer[1], score=longer[0].score)]) == {}  # fmt: skip


def test_a_full_budget_is_compared_with_dense_of_its_training_and_question() -> None:
    made = []
    for seed, aware in ((0, True), (1, True), (0, False), (1, False)):
        dense = replace(
            cell("dense", "other", train_seed=seed, dense_score=0.95 - 0.05 * seed - 0.2 * aware), question_aware=aware
        )
        made += [dense, replace(dense, arm="other+quest", method="quest", phases=["decode"], budget=1.0)]
    assert ringing(made) == {}
    for index in (3, 7):
        wrong = [replace(c, score=1 - c.score) if i == index else c for i, c in enumerate(made)]
        assert "full budget unlike dense" in ringing(wrong)


def test_every_training_seed_is_looked_at() -> None:
    second = [replace(c, train_seed=1) for c in GOOD]
    for changes, alarm in (
        ({"bos": np.full(200, 2)}, "not exactly one BOS"),
        ({"parsed": np.zeros(200, bool)}, "unparsable answers"),
        ({"ran": False}, "the sparse path did not run"),
        ({"figures": {**FOUND, "changes": {"prefill": [0.5, 3.0]}}}, "reads what its plan leaves out"),
    ):
        assert alarm in ringing([*GOOD, *second[:3], replace(second[3], **changes)])


def test_counted_below_the_budget_is_off_it_too_in_any_task() -> None:
    off = replace(cell("quest", budget=0.1, task="passkey"), counted={**GOOD[3].counted, "reads": 0.09})
    other = cell("dense", task="passkey", dense_score=0.9)
    fair = [*GOOD, other, replace(off, score=np.minimum(off.score, other.score))]
    assert set(ringing(fair)) == {"counted budget off the nominal one"}
    assert alarms.marked(Table(fair)) == {("dense+quest", 0.1)}


def test_all_hidden_layers_are_named_and_arms_of_the_prompt_have_none() -> None:
    shares = [1.0, 0.1, 1.0] + [0.1] * (LAYERS - 3)
    (text,) = ringing(planted(3, figures={**FOUND, "reads": shares}))["dense layers undisclosed"]
    assert "layers 0, 2 read" in text
    prompt = cell("vertical_slash", budget=0.1)
    prompt = replace(
        prompt, score=np.minimum(prompt.score, DENSE.score), figures={**prompt.figures, "reads": [1.0] * 6}
    )
    assert ringing([*GOOD, prompt]) == {}


def test_a_sparse_sibling_run_with_a_method_is_not_held_against_another_ones_dense_run() -> None:
    better_ = replace(cell("quest", "nsa", 0.1), score=np.ones(200))
    assert ringing([DENSE, better_]) == {}
