"""What controls attend to in any case."""

from dataclasses import replace

import pytest
import torch
from views import mask_of, view_of

from nsa.baselines import Budget, BudgetError, plan
from nsa.baselines.importance.draws import draws
from nsa.baselines.method import State
from nsa.baselines.methods.oracle import OracleTopP
from nsa.baselines.methods.random_tokens import RandomTokens
from nsa.baselines.methods.sink_window import SinkWindow


def test_random_tokens_have_the_querys_own_among_them() -> None:
    mask = mask_of(RandomTokens(budget=Budget(tokens=3)), view_of(60))
    assert mask.diagonal(dim1=1, dim2=2).all() and mask[:, 3:].sum(-1).eq(3).all()


@pytest.mark.parametrize("padding", [0, 3])
def test_random_tokens_are_the_highest_draws_whichever_queries_are_looked_at_together(padding, monkeypatch) -> None:
    """With padding, too, and in the second part of a prompt, by a loop over all pairs."""
    view = view_of(23, batch=2)
    places = torch.stack([torch.arange(23), (torch.arange(23) - padding).clamp(min=-1)])
    groups = view.k.shape[2]
    view = replace(view, query_positions=places, positions=places[..., None].expand(-1, -1, groups))
    part = replace(view, q=view.q[:, 9:], query_positions=places[:, 9:])
    monkeypatch.setattr(plan, "row_blocks", lambda view, elements: torch.arange(view.q.shape[1]).split(5))
    for seen in (view, part):
        keep = RandomTokens(budget=Budget(tokens=4), seed=2).prefill_select(seen, State()).parts[0].keep
        drawn = draws(seen, 2)
        for sequence in range(2):
            for query, at in enumerate(seen.query_positions[sequence].tolist()):
                keys = [slot for slot, place in enumerate(places[sequence].tolist()) if 0 <= place <= at]
                order = sorted(keys, key=lambda slot: -int(drawn[sequence, 0, query, slot]) >> 7)
                own = [slot for slot in keys if places[sequence, slot] == at]
                expected = {*own, *[slot for slot in order if slot not in own][: 4 - len(own)]}
                found = keep[sequence, :, query]
                assert set(found[0].nonzero()[:, 0].tolist()) == expected and (found == found[:1]).all()


def test_the_whole_mass_is_all_tokens_even_those_whose_share_is_zero() -> None:
    mask = mask_of(OracleTopP(p=1.0), view_of(40, scale=300.0))
    assert torch.equal(mask, torch.ones_like(mask).tril())


def test_sinks_leave_a_place_for_the_query_itself() -> None:
    mask = mask_of(SinkWindow(budget=Budget(tokens=5), num_sinks=4), view_of(12))
    for query in range(12):
        assert mask[0, query].nonzero()[:, 0].tolist() == sorted({*range(min(4, query + 1)), query})
    with pytest.raises(BudgetError, match="5 tokens are the least"):
        mask_of(SinkWindow(budget=Budget(tokens=4), num_sinks=4), view_of(12))
