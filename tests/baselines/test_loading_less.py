"""What methods that choose while decoding have in common: their memory goes with the sequences, whatever the dtype."""

import pytest
import torch
from decoding import decoded
from sessions import WIDTH, half, inputs

from nsa.baselines import Budget, Method, Session
from nsa.baselines.methods.double_p import DoubleP
from nsa.baselines.methods.quest import Quest
from nsa.baselines.methods.sparq import SparQ
from nsa.baselines.methods.twilight import Twilight
from nsa.baselines.methods.vattention import VAttention
from nsa.baselines.methods.vattention_released import VAttentionReleased

KINDS = [Quest, SparQ, Twilight, DoubleP, VAttention, VAttentionReleased]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


@by_kind
def test_sequences_that_change_places_go_on_as_they_were(kind: type[Method]) -> None:
    """Beams: the copy's memory is its own, so the sequences that stay behind are not changed by it."""
    given, order = inputs(46, layers=1), torch.tensor([1, 0, 1])
    session = Session(half(kind), 1, turn=given.turn)
    session.begin(torch.tensor([0, 5]))

    def step(which: Session, token: int, rows: torch.Tensor) -> torch.Tensor:
        ((q, k, v),) = given.cut(token, token + 1)
        return which.attend(0, q[rows], k[rows], v[rows], WIDTH**-0.5)

    ((q, k, v),) = given.cut(0, 42)
    session.attend(0, q, k, v, WIDTH**-0.5)
    session.end_prompt()
    other = session.take(order)
    both = torch.tensor([0, 1])
    copies = [step(other, token, order) for token in range(42, 46)]
    for token, copy in zip(range(42, 46), copies, strict=True):
        torch.testing.assert_close(copy, step(session, token, both)[order], atol=1e-5, rtol=1e-5)


@by_kind
def test_bfloat16_chooses_and_attends(kind: type[Method]) -> None:
    given = inputs(44, layers=1)
    given.layers = [tuple(x.bfloat16() for x in layer) for layer in given.layers]
    for step in decoded(half(kind), given, 40)[0]:
        assert step.out.dtype == torch.bfloat16 and step.out.isfinite().all() and not step.mask.all()


def test_heads_that_are_copies_agree_whatever_the_rule() -> None:
    """Sum, maximum and union over a group are one, if its heads are one."""
    given = inputs(44, layers=1)
    q = given.layers[0][0]
    q[:, :, 1::2] = q[:, :, 0::2]
    one, two = (decoded(Quest(budget=Budget(tokens=14), page=4, over_group=o), given, 40)[0] for o in ("sum", "max"))
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(one, two, strict=True))
    for step in decoded(Twilight(budget=Budget(tokens=20), base=Quest(page=4), p=0.8), given, 40)[0]:
        assert torch.equal(step.mask[:, 0::2], step.mask[:, 1::2])
