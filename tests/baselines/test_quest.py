"""Quest against its definition, and its bound."""

import pytest
import torch
from decoding import Step, attention, decoded
from sessions import HEADS, inputs

from nsa.baselines import Budget, BudgetError
from nsa.baselines.importance import pages
from nsa.baselines.method import State
from nsa.baselines.methods.quest import Quest, QuestEval
from nsa.ops.choose import top

PADDING = torch.tensor([0, 5])


def page_bounds(step: Step, row: int, head: int, page: int) -> list[tuple[float, list[int]]]:
    """Bound and slots of each page, from the first token of the sequence on (Algorithm 1)."""
    view, start = step.view, int(PADDING[row])
    q, k = view.q[row, 0, head], view.k[row, :, head // view.group]
    found = []
    for first in range(start, k.shape[0], page):
        slots = list(range(first, min(first + page, k.shape[0])))
        low, high = k[slots].amin(0), k[slots].amax(0)
        found.append((sum(max(q[d] * low[d], q[d] * high[d]).item() for d in range(len(q))), slots))
    return found


def best(scored: list[tuple[float, list[int]]], count: int) -> set[int]:
    ranked = sorted(range(len(scored)), key=lambda i: (-scored[i][0], i))[:count]
    return {slot for i in ranked for slot in scored[i][1]}


@pytest.mark.parametrize("over_group", ["sum", "max"])
def test_quest_is_its_definition(over_group: str) -> None:
    budget, page = 14, 4
    method = Quest(budget=Budget(tokens=budget), page=page, over_group=over_group)
    steps, _ = decoded(method, inputs(46, layers=1), 40, PADDING)
    for step in steps:
        for row in range(2):
            for group in range(2):
                heads = range(2 * group, 2 * group + 2)
                each = [page_bounds(step, row, head, page) for head in heads]
                join = sum if over_group == "sum" else max
                joined = [(join(p[0] for p in parts), parts[0][1]) for parts in zip(*each, strict=True)]
                current = joined.pop()[1]
                chosen = best(joined, (budget - len(current)) // page) | set(current)
                assert len(chosen) <= budget
                for head in heads:
                    assert set(step.mask[row, head].nonzero()[:, 0].tolist()) == chosen
                    torch.testing.assert_close(
                        step.out[row, head], attention(step, row, head, sorted(chosen)), atol=1e-5, rtol=1e-5
                    )


@pytest.mark.parametrize("over_group", ["sum", "max"])
@pytest.mark.parametrize("seed", range(3))
def test_the_operator_chooses_what_bounds_and_a_sort_do(over_group: str, seed: int) -> None:
    """Pages of sequences that differ in length, and in their number of pages; the bounds are times the scale here."""
    budget, page = Budget(share=0.4), 4
    method, given = Quest(budget=budget, page=page, over_group=over_group), inputs(60, layers=1, seed=seed)
    steps, states = decoded(method, given, 40, torch.tensor([0, 17]))
    low, high = (states[0].rest[name] for name in ("low", "high"))
    view, mask = steps[-1].view, steps[-1].mask
    bounds = view.per_group(pages.upper(view, low, high))
    bounds = bounds.sum(2) if over_group == "sum" else bounds.amax(2)
    current, number = (view.seen - 1)[:, None, None] // page, torch.arange(low.shape[1])
    others = (budget.each(view.seen, least=page) - (view.seen[:, None, None] - current * page)) // page
    chosen = top(bounds.masked_fill(number >= current, -torch.inf), others[..., 0]) | (number == current)
    expected = view.per_head(pages.tokens_of(view, chosen, page))[:, :, 0]
    assert torch.equal(mask, expected & view.per_head(view.visible)[:, :, 0])
    assert len(set(mask.sum(-1).flatten().tolist())) > 1


@pytest.mark.parametrize("budget", [8, 20])
def test_the_evaluation_code_is_its_definition(budget: int) -> None:
    steps, _ = decoded(QuestEval(budget=Budget(tokens=budget), page=4), inputs(46, layers=1), 40, PADDING)
    without_current = 0
    for step in steps:
        for row in range(2):
            for head in range(HEADS):
                chosen = best(page_bounds(step, row, head, 4), max(3, budget // 4))
                assert set(step.mask[row, head].nonzero()[:, 0].tolist()) == chosen
                without_current += step.view.k.shape[1] - 1 not in chosen
    assert without_current, "the current page is not forced"


def test_the_last_page_is_not_lost_at_a_full_budget() -> None:
    """The release takes tokens // 16 pages of ceil(tokens / 16): at 45 tokens one page is lost."""
    for step in decoded(QuestEval(budget=Budget(tokens=100), page=4), inputs(46, layers=1), 40)[0]:
        assert step.mask.all()


def test_no_key_has_a_higher_score_than_its_page_says() -> None:
    for seed in range(10):
        (step, *_), states = decoded(
            Quest(budget=Budget(tokens=8), page=4), inputs(41, layers=1, seed=seed, scale=4.0), 40, PADDING
        )
        low, high = states[0].rest["low"][:, :11], states[0].rest["high"][:, :11]
        bound = pages.tokens_of(step.view, pages.upper(step.view, low, high), 4)
        scores = step.view.scores()
        assert (scores <= bound + 1e-4)[scores > -torch.inf].all()


def test_a_page_of_one_token_is_ranked_by_its_score() -> None:
    for step in decoded(Quest(budget=Budget(tokens=8), page=1), inputs(43, layers=1, groups=4), 40)[0]:
        best = step.view.scores()[:, :, 0, :-1].topk(7).indices
        assert torch.equal(step.mask[..., :-1].nonzero()[:, 2].view(2, HEADS, 7), best.sort().values)
        assert step.mask[..., -1].all()


def test_bounds_kept_are_bounds_computed_anew() -> None:
    """Whole, in chunks, padded; a token changes no page but its own; memory grows by doubling."""
    given = inputs(84, layers=1)
    _, states = decoded(Quest(budget=Budget(tokens=8), page=4), given, 33, PADDING, chunks=(2, 20))
    low, high = states[0].rest["low"], states[0].rest["high"]
    k = given.layers[0][1]
    for row, start in enumerate(PADDING.tolist()):
        for page, slots in enumerate(torch.arange(start, 84).split(4)):
            assert torch.equal(low[row, page], k[row, slots].amin(0))
            assert torch.equal(high[row, page], k[row, slots].amax(0))
    assert low.shape[1] == high.shape[1] == 40, "1, 5, 10, 20 and 40 pages, for 21"


def test_zero_queries_and_empty_pages_give_no_nan() -> None:
    given = inputs(42, layers=1)
    given.layers[0][0].zero_()
    steps, _ = decoded(Quest(budget=Budget(tokens=8), page=4), given, 40, torch.tensor([0, 30]))
    for step in steps:
        assert torch.isfinite(step.out).all()
        view = step.view
        state = State()
        low, high = pages.fold(view, state, 4)  # the current key alone: the pages before it are empty
        assert not pages.upper(view, low, high).isnan().any()


def test_a_budget_of_reads_pays_for_the_bounds() -> None:
    """At 40 tokens, 16 wide: 10 pages x 2 rows are 10 tokens of keys and values."""
    step = decoded(Quest(budget=Budget(tokens=22, counts="reads"), page=4), inputs(40, layers=1), 39)[0][0]
    assert step.mask.sum(-1).eq(12).all()
    assert step.plan.estimate.read == 9 * 2 * 16
    assert step.plan.estimate.pairs == 9 * 2 * 2
    with pytest.raises(BudgetError, match="choosing reads"):
        decoded(Quest(budget=Budget(tokens=12, counts="reads"), page=4), inputs(40, layers=1), 39)
    with pytest.raises(ValueError, match="at least 1 token"):
        Quest(page=0)
    with pytest.raises(ValueError, match="sum or max"):
        Quest(over_group="mean")
