"""A prompt by the library's attention with a mask: it gives what the plans of all methods mean."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import inputs, run
from torch import Tensor
from views import view_of

from nsa import ops
from nsa.baselines import Budget, Method, Part, Plan, ledger, masked, prompt
from nsa.baselines.attention import attend, kept
from nsa.baselines.method import State
from nsa.baselines.methods import METHODS, oracle
from nsa.baselines.methods.oracle import OracleTopK, OracleTopP
from nsa.baselines.plan import Terms, View, of_few_heads

CHOOSE = [
    method
    for method in (kind(budget=Budget(share=0.4), **kind.small) for kind in METHODS if "prefill" in kind.phases)
    if method.name not in ("sketch_walk", "sketch_walk_damped")  # these need what the layers before them left
]


def expect_the_same(view: View, plan: Plan | None) -> None:
    assert masked.can_mask(view, plan)
    torch.testing.assert_close(masked.attend_masked(view, plan), attend(view, plan)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", CHOOSE, ids=lambda method: method.name)
def test_plans_mean_the_same(method: Method) -> None:
    for tokens, batch in ((65, 1), (33, 2)):
        view = view_of(tokens, batch=batch)
        expect_the_same(view, method.prefill_select(view, State()))


def test_rows_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(30, batch=2)
    view = replace(view, scale=3 * view.scale)
    keep = torch.rand(2, view.q.shape[2], 30, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    monkeypatch.setattr(masked, "PAIRS", 7 * keep[:, :, 0].numel())
    expect_the_same(view, Plan.of(keep))
    expect_the_same(view, None)


def test_what_sees_nothing_gives_0() -> None:
    """Padding, and a query whose plan keeps no key."""
    view = view_of(20, batch=2)
    places = torch.arange(20)[None] - torch.tensor([[0], [6]])
    places = places.clamp(min=-1)
    view = replace(view, query_positions=places, positions=places[..., None].expand(-1, -1, view.k.shape[2]))
    expect_the_same(view, None)
    keep = torch.ones(2, 1, 20, 20, dtype=torch.bool).expand(-1, view.k.shape[2], -1, -1).clone()
    keep[0, 0, 7] = False
    expect_the_same(view, Plan.of(keep))
    out = masked.attend_masked(view, Plan.of(keep))
    assert not out[1, :6].any() and not out[0, 7, : view.group].any() and out[0, 7, view.group :].any()


def test_keys_and_queries_may_be_elsewhere() -> None:
    """Each part has its own positions; a key of several parts counts once."""
    view = view_of(24)
    keep, place = torch.ones(1, view.k.shape[2], 24, 24, dtype=torch.bool), torch.arange(24)[None]
    keys = (place + 5)[..., None].expand(-1, -1, view.k.shape[2])
    part = Part(keep, query_at=place + place % 3, key_at=keys - keys % 2)
    expect_the_same(view, Plan((part,)))
    plain = masked.attend_masked(view, None)
    assert (masked.attend_masked(view, Plan((part,))) - plain).abs().max() > 0.01
    made = torch.Generator().manual_seed(0)
    first, second = (torch.rand(1, heads, 24, 24, generator=made) < 0.4 for heads in (view.q.shape[2], view.k.shape[2]))
    first[:, 1, 5] = second[:, 0, 5] = False  # sees nothing
    first[:, 2, 6] = False  # one of both
    both = (replace(part, keep=first), replace(part, keep=second))
    expect_the_same(view, Plan(both))
    third = Part(second & ~first[:, :: view.group] & ~first[:, 1 :: view.group])
    expect_the_same(view, Plan((replace(part, keep=first), third)))


def test_heads_that_keep_the_same_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and counts are those of masks that are written out for each head; heads of one mask may still differ."""
    view = view_of(21, batch=2)
    groups, made = view.k.shape[2], torch.Generator().manual_seed(1)
    one, other = (torch.rand(2, 1, 21, 21, generator=made) < 0.4 for _ in range(2))
    other &= ~one  # a key has one position
    place = (torch.arange(21) * 2)[None].expand(2, -1)

    def plan_of(*masks: Tensor) -> Plan:
        first, *rest = masks
        return Plan((Part(first), *(Part(mask, query_at=place) for mask in rest)))

    def counted(plan: Plan) -> tuple[list[float], list[float]]:
        found = ledger._count(view, plan)
        return found.attended.tolist(), found.reads.tolist()

    wide = one.expand(-1, groups, -1, -1), other.expand(-1, groups, -1, -1)
    for masks in (wide[:1], wide):
        shared, written = plan_of(*masks), plan_of(*(mask.clone() for mask in masks))
        assert of_few_heads(view, shared)[0].positions.shape[2] == 1 and of_few_heads(view, written)[0] is view
        counts = counted(shared)
        assert counts == counted(written) and len(counts[0]) == groups
        expect_the_same(view, shared)
        with monkeypatch.context() as patch:
            patch.setattr(ledger, "row_blocks", lambda view, elements: torch.arange(21).split(5))
            assert counted(shared) == counted(written) == counts
    pairs = prompt.pairs_of(view, plan_of(wide[0]))
    assert pairs is not None and torch.equal(pairs, one.tril().sum((2, 3)).expand(-1, groups).double())
    mixed = plan_of(wide[0], wide[1].clone())
    assert of_few_heads(view, mixed) == (view, mixed), "a head may differ"
    places = torch.arange(21).expand(2, 21).clone()
    places[1] = (places[1] - 4).clamp(min=-1)
    padded = replace(view, query_positions=places, positions=places[..., None].expand(-1, -1, groups))
    assert of_few_heads(padded, plan_of(*wide))[0] is padded
    expect_the_same(padded, plan_of(*wide))


def test_what_a_mask_cannot_say() -> None:
    view = view_of(16)
    keep, heads = torch.ones(1, view.k.shape[2], 16, 16, dtype=torch.bool), view.q.shape[2]
    assert not masked.can_mask(view, Plan((Part(keep, log_weight=torch.zeros(1, 1, 16, 16)),)))
    terms = Terms(torch.zeros(1, heads, 16, 2), torch.zeros(1, view.k.shape[2], 2, view.v.shape[3]), 1)
    assert not masked.can_mask(view, Plan((Part(keep),), terms=terms))
    assert not masked.can_mask(view, Plan((Part(keep),), blend=(torch.ones(1, heads, 16), view.v[:, 0])))
    assert not masked.can_mask(replace(view, prompt=False), Plan.of(keep))
    assert not masked.can_mask(replace(view, v=view.v.bfloat16()), None)


@pytest.mark.parametrize("name", ["oracle_topk", "random", "vertical_slash", "h2o", "dense"])
def test_a_session_answers_a_prompt_by_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or in chunks, with padding or without, but not where attention is watched."""
    (kind,) = (kind for kind in METHODS if kind.name == name)
    method, given, called = kind(budget=Budget(share=0.5), **kind.small), inputs(52, layers=2), []
    real = masked.attend_masked

    def noted(view: View, plan: Plan | None) -> Any:
        called.append(view.layer)
        return real(view, plan)

    watched = {"watch": ["prefill"]}
    cases = ({}, {"chunks": [13, 40]}, {"padding": torch.tensor([0, 5])}, watched)
    for options, layers in zip(cases, ([0, 1], [0, 1] * 3, [0, 1], []), strict=True):
        expected, before = run(method, given, prompt=48, **options)  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setattr(prompt, "on_gpu", lambda view: True)
            patch.setattr("nsa.baselines.session.attend_masked", noted)
            found, session = run(method, given, prompt=48, **options)  # type: ignore[arg-type]
        assert called == layers
        called.clear()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert session.ledger.shares() == before.ledger.shares()


@pytest.mark.parametrize("method", [OracleTopK(budget=Budget(share=0.3)), OracleTopP(p=0.7)], ids=lambda x: x.name)
def test_oracles_choose_the_same_by_an_operator(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of queries, whose masses end with them; not with padding, nor for a part of a prompt."""
    calls: list[tuple[int, ...]] = []
    real = ops.attention_mass

    def noted(q: torch.Tensor, k: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((q.shape[1], k.shape[1]))
        return real(q, k, **options)

    monkeypatch.setattr(ops, "attention_mass", noted)
    view = view_of(30, batch=2)
    view = replace(view, scale=4 * view.scale)
    padded = replace(view, query_positions=(view.query_positions - 3).clamp(min=-1))
    late = replace(view, q=view.q[:, 8:], query_positions=view.query_positions[:, 8:])
    for one, blocks in ((view, [(12, 12), (12, 24), (6, 30)]), (padded, []), (late, [])):
        expected = method.prefill_select(one, State())
        assert not calls
        with monkeypatch.context() as patch:
            patch.setattr(prompt, "on_gpu", lambda view: True)
            patch.setattr(oracle, "MASSES", 12 * view.q[:, 0, :, 0].numel() * 30)
            found = method.prefill_select(one, State())
        assert calls == blocks
        calls.clear()
        assert expected is not None and found is not None
        masks = [kept(one, plan, torch.arange(one.q.shape[1])) for plan in (found, expected)]
        assert torch.equal(*masks) and found.estimate == expected.estimate


def test_pairs_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are counted in blocks of rows. Keys after a query do not count, whatever the mask says."""
    monkeypatch.setattr(prompt, "MASKED", 7 * 2 * 2 * 30)
    view = view_of(30, batch=2)
    keep = torch.rand(2, view.k.shape[2], 30, 30, generator=torch.Generator().manual_seed(0)) < 0.5
    expected = (keep & torch.ones(30, 30, dtype=torch.bool).tril()).double().sum((2, 3))
    assert torch.equal(prompt.pairs_of(view, Plan.of(keep)), expected)  # type: ignore[arg-type]
    for plan in (
        Plan.of(keep.repeat_interleave(view.group, 1)),
        Plan((Part(keep), Part(keep))),
        Plan.of(keep[:, :, :1]),
        Plan.of(keep[..., :8], unit=4),
    ):
        assert prompt.pairs_of(view, plan) is None
    assert prompt.pairs_of(replace(view, positions=view.positions.clone().fill_(-1)), Plan.of(keep)) is None


def test_a_dense_prompt_has_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    view = view_of(24)
    monkeypatch.delattr(ops, "masked_attention")
    expect_the_same(view, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_on_a_gpu(tokens: int, dtype: torch.dtype) -> None:
    """Lengths that are no multiple of a tile, a query that sees nothing, and heads with their own lists."""
    view = view_of(tokens, batch=2)
    tensors = {name: getattr(view, name).cuda() for name in ("query_positions", "positions", "seen")}
    view = replace(view, **tensors, **{name: getattr(view, name).to("cuda", dtype) for name in ("q", "k", "v")})
    keep = torch.rand(2, view.q.shape[2], tokens, tokens, generator=torch.Generator().manual_seed(0)).cuda() < 0.3
    keep[0, :, tokens // 2] = False
    for plan in (None, Plan.of(keep)):
        found, expected = masked.attend_masked(view, plan), attend(view, plan)[0]
        torch.testing.assert_close(found, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)
