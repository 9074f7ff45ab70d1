"""What controls attend to in any case."""

import pytest
import torch
from views import mask_of, view_of

from nsa.baselines import Budget, BudgetError
from nsa.baselines.methods.oracle import OracleTopP
from nsa.baselines.methods.random_tokens import RandomTokens
from nsa.baselines.methods.sink_window import SinkWindow


def test_random_tokens_have_the_querys_own_among_them() -> None:
    mask = mask_of(RandomTokens(budget=Budget(tokens=3)), view_of(60))
    assert mask.diagonal(dim1=1, dim2=2).all() and mask[:, 3:].sum(-1).eq(3).all()


def test_the_whole_mass_is_all_tokens_even_those_whose_share_is_zero() -> None:
    mask = mask_of(OracleTopP(p=1.0), view_of(40, scale=300.0))
    assert torch.equal(mask, torch.ones_like(mask).tril())


def test_sinks_leave_a_place_for_the_query_itself() -> None:
    mask = mask_of(SinkWindow(budget=Budget(tokens=5), num_sinks=4), view_of(12))
    for query in range(12):
        assert mask[0, query].nonzero()[:, 0].tolist() == sorted({*range(min(4, query + 1)), query})
    with pytest.raises(BudgetError, match="5 tokens are the least"):
        mask_of(SinkWindow(budget=Budget(tokens=4), num_sinks=4), view_of(12))
