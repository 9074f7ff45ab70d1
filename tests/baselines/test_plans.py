"""What a plan means, against loops in float64: all that it may have, at once, whole and by blocks of queries."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, inputs
from torch import Tensor

from nsa.baselines import Part, Plan, Terms, Turn, View, attend, attention
from nsa.baselines.plan import row_blocks

TOKENS, NARROW, CENTRES, GROUP = 9, 8, 3, HEADS // GROUPS
PLACES = torch.arange(TOKENS).expand(2, TOKENS)


def whole_plan(dice: torch.Generator, view: View, of: int) -> Plan:
    """Keys in two parts, one of them moved; weights; terms; a blend. ``of``: GROUPS, or HEADS, have a choice."""

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice)

    first = numbers(2, of, TOKENS, TOKENS) > 0
    second = ~first & (numbers(2, of, TOKENS, TOKENS) > 0)
    moved = {"query_at": PLACES + 5, "key_at": view.positions // 2}
    parts = Part(first, log_weight=numbers(2, of, TOKENS, TOKENS)), Part(second, **moved)
    terms = Terms(numbers(2, HEADS, TOKENS, CENTRES), numbers(2, GROUPS, CENTRES, NARROW), NARROW)
    terms.scores[:, :, :, 1] = -torch.inf
    return Plan(parts, terms, blend=(numbers(2, HEADS, TOKENS).sigmoid(), numbers(2, TOKENS, GROUPS, NARROW)))


def turned(x: Tensor, by: int, frequencies: Tensor, interleaved: bool) -> Tensor:
    """x (D,) float64; complex numbers turn the first dims, the others stay."""
    width = 2 * len(frequencies)
    pairs = x[:width].view(-1, 2) if interleaved else x[:width].view(2, -1).T
    angles = torch.polar(torch.ones(len(frequencies)).double(), by * frequencies.double())
    made = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * angles)
    return torch.cat([(made if interleaved else made.T).reshape(-1), x[width:]])


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_a_turned_vector_has_its_dims_where_they_were(interleaved: bool) -> None:
    """Scores alone do not say: queries and keys whose dims change places alike have the same products."""
    turn, x = Turn(torch.tensor([1.0, 0.3]), interleaved), torch.randn(2, 3, 2, 6)
    by = torch.randint(-9, 9, (2, 3, 2))
    found = turn(x, by)
    for b, t, n in itertools.product(range(2), range(3), range(2)):
        expected = turned(x[b, t, n].double(), int(by[b, t, n]), turn.frequencies, interleaved)
        torch.testing.assert_close(found[b, t, n].double(), expected, atol=1e-5, rtol=1e-5)


def test_positions_are_exact_in_any_dtype() -> None:
    """Numbers above 256 are not all there in bf16."""
    frequencies, x = torch.tensor([1.0, 0.25]), torch.randn(1, 1, 1, 4, generator=torch.Generator().manual_seed(0))
    found = Turn(frequencies)(x.bfloat16(), torch.tensor([[1001]]))[0, 0, 0]
    expected = turned(x.bfloat16()[0, 0, 0].double(), 1001, frequencies, False)
    torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.01)


def by_loops(view: View, plan: Plan) -> tuple[Tensor, Tensor]:
    q, k, v = (x.double() for x in (view.q, view.k, view.v))
    out, lse = torch.zeros(2, TOKENS, HEADS, NARROW).double(), torch.zeros(2, HEADS, TOKENS).double()
    assert plan.terms is not None and plan.blend is not None and view.turn is not None
    for b, t, h in ((b, t, h) for b in range(2) for t in range(TOKENS) for h in range(HEADS)):
        g, scores, values = h // GROUP, [], []
        for part, s in ((part, s) for part in plan.parts for s in range(t + 1)):
            of = g if part.keep.shape[1] == GROUPS else h
            if not part.keep[b, of, t, s]:
                continue
            query, key = q[b, t, h], k[b, s, g]
            if part.query_at is not None and part.key_at is not None:
                how = view.turn.frequencies, view.turn.interleaved
                query = turned(query, int(part.query_at[b, t]) - t, *how)
                key = turned(key, int(part.key_at[b, s, g]) - s, *how)
            weight = 0.0 if part.log_weight is None else part.log_weight[b, of, t, s].double()
            scores.append(query @ key * view.scale + weight)
            values.append(v[b, s, g])
        scores += plan.terms.scores[b, h, t].double()
        values += plan.terms.values[b, g].double()
        lse[b, h, t] = torch.stack(scores).logsumexp(0)
        share, rest = plan.blend[0][b, h, t].double(), plan.blend[1][b, t, g].double()
        out[b, t, h] = share * (torch.stack(scores).softmax(0) @ torch.stack(values)) + (1 - share) * rest
    return out, lse


@pytest.mark.parametrize("of", [GROUPS, HEADS], ids=["per KV head", "per query head"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_a_plan_means_what_loops_compute(of: int, interleaved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale is not that of the width; values are narrower than keys; six of eight pairs of dims turn."""
    dice, ((q, k, v),) = torch.Generator().manual_seed(of), inputs(TOKENS, layers=1).layers
    slots = PLACES[..., None].expand(-1, -1, GROUPS)
    turn = Turn(torch.tensor([1.0, 0.5, 0.3, 0.1, 0.03, 0.01]), interleaved)
    view = View(q, k, v[..., :NARROW], PLACES, slots, torch.full((2,), TOKENS), 0.17, 0, 1, True, True, turn)
    plan = whole_plan(dice, view, of)
    expected = by_loops(view, plan)
    together = attend(view, plan)

    def few(view: View) -> Iterator[Tensor]:
        return row_blocks(view, elements=2 * HEADS * TOKENS * 4)

    monkeypatch.setattr(attention, "row_blocks", few)
    for found in (together, attend(view, plan)):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, TOKENS, 1), (2, GROUPS, 1, TOKENS), (1, HEADS, TOKENS, 1)], ids=str)
def test_a_weight_may_be_of_queries_or_of_keys_alone(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if it were written out for each pair; also where queries are taken a few at a time."""
    q, k, v = inputs(TOKENS, layers=1).layers[0]
    slots = PLACES[..., None].expand(-1, -1, GROUPS)
    view = View(q, k, v, PLACES, slots, torch.full((2,), TOKENS), WIDTH**-0.5, 0, 1, True, True)
    weight, heads = torch.randn(shape), max(shape[1], GROUPS)
    keep = torch.ones(2, heads, TOKENS, TOKENS, dtype=torch.bool)
    expected = attend(view, Plan((Part(keep, log_weight=weight.expand(2, heads, TOKENS, TOKENS)),)))
    monkeypatch.setattr(attention, "row_blocks", lambda view: torch.arange(TOKENS).split(4))
    for mine, theirs in zip(attend(view, Plan((Part(keep, log_weight=weight),))), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_is_dense_attention_and_what_is_not() -> None:
    """The ledger counts a plan that says so as dense, without a look at its mask."""
    q, k, v = inputs(TOKENS, layers=1).layers[0]
    slots = PLACES[..., None].expand(-1, -1, GROUPS)
    view = View(q, k, v, PLACES, slots, torch.full((2,), TOKENS), WIDTH**-0.5, 0, 1, True, True)
    keep, few = torch.ones(2, GROUPS, 1, TOKENS, dtype=torch.bool), torch.ones(2, GROUPS, 1, TOKENS, dtype=torch.bool)
    few[1, 1, 0, 3] = False
    each = keep.expand(-1, -1, TOKENS, -1).clone()
    early, late = each.clone(), each.clone()
    early[0, 1, 2, 1] = late[0, 1, -1, 1] = False

    def said(part: Part, **changes: Any) -> bool:
        return attention.is_dense(view, replace(Plan((part,)), **changes))

    assert attention.is_dense(view, None) and said(Part(keep)) and said(Part(each))
    assert not said(Part(early)) and not said(Part(late)), "one row of a query suffices"
    assert not said(Part(few)) and not said(Part(keep, log_weight=torch.zeros(1, 1, 1, 1)))
    assert not said(Part(keep, query_at=PLACES)) and not said(Part(keep, key_at=slots))
    assert not said(Part(keep), terms=Terms(q[..., 0].transpose(1, 2)[..., None], v[:, :1].transpose(1, 2), 1))
    assert not said(Part(keep), blend=(q[..., 0].transpose(1, 2), v[:, 0]))
    assert not attention.is_dense(replace(view, seen=view.seen + 1), None), "a token was evicted"
