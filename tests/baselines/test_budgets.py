"""How many tokens a budget gives, computed by hand."""

import pytest
import torch

from nsa.baselines import Budget, BudgetError


@pytest.mark.parametrize(("share", "seen", "tokens"), [(0.3, 9, 3), (0.3, 8, 2), (0.9, 4, 4), (0.3, 2, 1), (1.0, 7, 7)])
def test_a_share_of_tokens_is_the_nearest_number_of_them(share: float, seen: int, tokens: int) -> None:
    """2.7, 2.4, 3.6 and 0.6 tokens; all of 7."""
    assert Budget(share=share).of(seen) == tokens


@pytest.mark.parametrize(("overhead", "left"), [(0.0, 20), (2.4, 18), (2.6, 17)])
def test_what_choosing_reads_comes_out_of_a_budget_of_reads_alone(overhead: float, left: int) -> None:
    assert Budget(tokens=20, counts="reads").of(50, overhead=overhead) == left
    assert Budget(tokens=20).of(50, overhead=overhead) == 20
    assert Budget(share=1.0, counts="reads").of(50, overhead=overhead) == 50, "a full budget leaves nothing out"


def test_a_budget_has_no_more_tokens_than_there_are() -> None:
    assert [Budget(tokens=5).of(seen) for seen in (3, 5, 8)] == [3, 5, 5]
    assert Budget(tokens=20, counts="reads").of(7, overhead=4) == 7


def test_the_least_is_asked_for_where_there_are_so_many_tokens() -> None:
    assert Budget(tokens=5).of(50, least=5) == 5
    assert Budget(tokens=4).of(3, least=5) == Budget(tokens=3).of(3, least=5) == 3
    with pytest.raises(BudgetError, match=r"^a budget of 4 tokens cannot be met: 5 tokens are the least$"):
        Budget(tokens=4).of(50, least=5)
    with pytest.raises(BudgetError, match=r"^a budget of 0.1 of 40 tokens cannot be met: 5 tokens are the least$"):
        Budget(share=0.1).of(40, least=5)
    with pytest.raises(BudgetError, match=r"of 6 tokens cannot be met: choosing reads 2 of them, 5 tokens are the lea"):
        Budget(tokens=6, counts="reads").of(50, least=5, overhead=2)


def test_each_sequence_has_its_own_length_and_its_own_overhead() -> None:
    found = Budget(share=0.5, counts="reads").each(torch.tensor([40, 12]), least=2, overhead=0.25)
    assert found.tolist() == [[[20 - 10]], [[6 - 3]]] and found.dtype == torch.int64
    squares = Budget(tokens=20, counts="reads").each(torch.tensor([30, 40]), overhead=lambda n: n * n / 200)
    assert squares.tolist() == [[[20 - 4]], [[20 - 8]]], "4.5 is rounded to even"


def test_a_budget_is_told_as_it_was_given() -> None:
    assert [str(Budget(share=0.25)), str(Budget(tokens=64))] == ["0.25", "64 tokens"]


BAD = [{}, {"share": 0.5, "tokens": 3}, {"share": 0.0}, {"share": 1.1}, {"tokens": 0}, {"tokens": 3, "counts": "k"}]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_budgets_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="budget"):
        Budget(**bad)
