"""What every method must do, whatever it ranks by: the identities run over the whole registry."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, full, half, inputs, run
from torch import Tensor

from nsa.baselines import METHODS, Method, Session, View
from nsa.baselines.attention import attend, kept
from nsa.baselines.methods.dense import Dense
from nsa.baselines.plan import Plan
from nsa.ops.naive import masked_attention

TOKENS, PROMPT = 88, 80
BLIND = ("position", "none", "norm of the key")  # importance that looks at no query
SPARSE = [method for method in METHODS if method is not Dense]
by_name = pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
sparse_by_name = pytest.mark.parametrize("kind", SPARSE, ids=lambda kind: kind.name)


def dense(given: Any) -> list[Tensor]:
    tokens = given.layers[0][0].shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return [masked_attention(q, k, v, mask, WIDTH**-0.5)[0] for q, k, v in given.layers]


class Spy(Session):
    """A session that keeps what was planned."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[tuple[View, Plan | None]] = []
        record = self.ledger.record

        def both(view: View, plan: Plan | None) -> None:
            self.seen.append((view, plan))
            record(view, plan)

        self.ledger.record = both  # type: ignore[method-assign]


@by_name
def test_a_full_budget_is_dense_attention(kind: type[Method]) -> None:
    given = inputs(TOKENS)
    for mine, theirs in zip(run(full(kind), given, prompt=PROMPT)[0], dense(given), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@by_name
def test_the_future_changes_nothing(kind: type[Method]) -> None:
    """Tokens after a query: of the prompt, if the method says that it is causal there; those decoded later, always."""
    given, other = inputs(TOKENS), inputs(TOKENS)
    border = 64 if kind.causal else PROMPT
    for layer, noise in zip(other.layers, inputs(TOKENS, seed=1).layers, strict=True):
        for x, y in zip(layer, noise, strict=True):
            x[:, border + 4 :] = y[:, border + 4 :]
    method = half(kind)
    for one, two in zip(run(method, given, prompt=PROMPT)[0], run(method, other, prompt=PROMPT)[0], strict=True):
        torch.testing.assert_close(one[:, : border + 4], two[:, : border + 4], atol=0, rtol=0)


@sparse_by_name
def test_what_it_says_of_causality_is_true(kind: type[Method]) -> None:
    """A method that says it is not causal in the prompt is seen to look ahead."""
    if kind.causal or "prefill" not in kind.phases:
        pytest.skip("says that it is causal, which test_the_future_changes_nothing looks at")
    method, changed = half(kind), False
    for seed in range(3):
        given, other = inputs(TOKENS, seed=seed), inputs(TOKENS, seed=seed)
        for layer, noise in zip(other.layers, inputs(TOKENS, seed=9).layers, strict=True):
            for x, y in zip(layer, noise, strict=True):
                x[:, 61:] = y[:, 61:] * 3
        pairs = zip(run(method, given, prompt=TOKENS)[0], run(method, other, prompt=TOKENS)[0], strict=True)
        changed |= any(not torch.equal(one[:, :61], two[:, :61]) for one, two in pairs)
    assert changed


@sparse_by_name
def test_chunks_of_a_prompt_are_the_whole_prompt(kind: type[Method]) -> None:
    """Or the method says that they are not."""
    given = inputs(TOKENS)
    whole, _ = run(half(kind), given, prompt=PROMPT)
    parts, _ = run(half(kind), given, prompt=PROMPT, chunks=(32, 48))
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, parts, strict=True))
    assert same or not kind.chunkable


@sparse_by_name
def test_a_padded_row_is_the_row_alone(kind: type[Method]) -> None:
    given, padding = inputs(TOKENS), torch.tensor([0, 13])
    outs, _ = run(half(kind), given, prompt=PROMPT, padding=padding)
    for row, start in enumerate(padding.tolist()):
        alone, _ = run(half(kind), given.row(row, start), prompt=PROMPT - start)
        for mine, theirs in zip(outs, alone, strict=True):
            torch.testing.assert_close(mine[row : row + 1, start:], theirs, atol=1e-5, rtol=1e-5)


@sparse_by_name
def test_the_ledger_is_the_count_of_the_masks(kind: type[Method]) -> None:
    given = inputs(TOKENS)
    session = Spy(half(kind), len(given.layers), turn=given.turn)
    run_in(session, given)
    attended = reads = 0.0
    for view, plan in session.seen:
        if view.prompt:
            continue
        mask = kept(view, plan, torch.arange(view.q.shape[1]))
        attended += float(view.per_head(mask).sum())
        reads += float(view.per_group(view.per_head(mask)).any(2).sum()) * 2 * WIDTH
        if plan is not None:
            reads += plan.estimate.read * len(view.q) * GROUPS
            assert plan.estimate.read >= 0
            if plan.terms is not None:
                attended += float((plan.terms.scores > -torch.inf).sum())
                reads += float(view.per_group(plan.terms.scores > -torch.inf).any(2).sum()) * plan.terms.size
            if plan.blend is not None:
                reads += len(view.q) * GROUPS * WIDTH
    decoded = sum(n + 1 for n in range(PROMPT, TOKENS)) * len(given.layers) * 2
    shares = session.ledger.shares()
    assert shares["attended"] == pytest.approx(attended / (decoded * HEADS))
    assert shares["reads"] == pytest.approx(reads / (decoded * GROUPS * 2 * WIDTH))
    for phase in kind.phases:
        assert {(phase, layer) for layer in range(len(given.layers))} <= session.ledger.ran, "it ran where it says"


def run_in(session: Session, given: Any) -> None:
    for start, stop in [(0, PROMPT), *itertools.pairwise(range(PROMPT, TOKENS + 1))]:
        for layer, (q, k, v) in enumerate(given.cut(start, stop)):
            session.attend(layer, q, k, v, WIDTH**-0.5)
        session.end_prompt()


@sparse_by_name
def test_kept_mass_is_the_share_of_the_sums_of_exponentials(kind: type[Method]) -> None:
    """exp(lse of what is kept - lse of all) is the mass of the keys kept, if nothing stands for other keys."""
    given = inputs(TOKENS)
    session = Spy(half(kind), len(given.layers), turn=given.turn)
    run_in(session, given)
    checked = 0
    for view, plan in session.seen:
        if plan is None or plan.terms is not None or any(p.log_weight is not None for p in plan.parts):
            continue
        if any(part.query_at is not None or part.key_at is not None for part in plan.parts):
            continue
        scores = view.scores()
        mask = view.per_head(kept(view, plan, torch.arange(view.q.shape[1])))
        mass = (scores.softmax(-1) * mask).sum(-1)
        torch.testing.assert_close((attend(view, plan)[1] - scores.logsumexp(-1)).exp(), mass, atol=1e-5, rtol=1e-5)
        assert (mask.any(-1) | (view.query_positions < 0)[:, None]).all(), "every query attends to something"
        checked += 1
    if not checked:
        pytest.skip("all its plans have terms, weights or other positions, or it only evicts")


@sparse_by_name
def test_more_budget_keeps_more_mass(kind: type[Method]) -> None:
    if kind.name == "random":
        pytest.skip("its sets are nested, which says nothing of mass")
    given, masses = inputs(TOKENS), []
    if kind.knob:
        name, low, high = kind.knob
        methods = [replace(half(kind), **{name: low + (high - low) * part}) for part in (0.5, 0.8, 1.0)]
    else:
        methods = [half(kind, tokens) for tokens in (12, 24, 48)]
    for method in methods:
        _, session = run(method, given, prompt=PROMPT, watch=["decode"])
        masses.append(sum(sum(f["kept_mass"]) for f in session.figures))
    assert masses[0] <= masses[1] * 1.001 and masses[1] <= masses[2] * 1.001, masses


@sparse_by_name
def test_the_oracle_keeps_most(kind: type[Method]) -> None:
    """At the same number of keys for each KV head and query no choice has more mass than the oracle's."""
    given = inputs(TOKENS)
    session = Spy(half(kind), len(given.layers), turn=given.turn)
    run_in(session, given)
    for view, plan in session.seen:
        if plan is None or view.prompt:
            continue
        mask = kept(view, plan, torch.arange(view.q.shape[1]))
        mask = view.per_group(view.per_head(mask)).any(2)
        mass = view.per_group(view.scores().softmax(-1).nan_to_num(0)).mean(2)
        best = mass.sort(-1, descending=True).values.cumsum(-1)
        size = mask.sum(-1, keepdim=True)
        bound = best.gather(-1, (size - 1).clamp(min=0)).squeeze(-1) * (size.squeeze(-1) > 0)
        assert ((mass * mask).sum(-1) <= bound + 1e-5).all()


@sparse_by_name
def test_ties_go_the_same_way_each_time(kind: type[Method]) -> None:
    """All keys are equal: what is chosen is the same twice, and for both sequences of a batch."""
    given = inputs(TOKENS)
    for q, k, _ in given.layers:
        q[1], k[:] = q[0], 1.0
    one, two = (Spy(half(kind), len(given.layers), turn=given.turn) for _ in range(2))
    for session in (one, two):
        run_in(session, given)
    for (view, plan), (_, again) in zip(one.seen, two.seen, strict=True):
        rows = torch.arange(view.q.shape[1])
        mask = kept(view, plan, rows)
        assert torch.equal(mask, kept(view, again, rows))
        assert torch.equal(mask[0], mask[1])


@sparse_by_name
def test_a_needle_is_found(kind: type[Method]) -> None:
    """A key that the last queries of the prompt and all later ones point to is attended to at a small budget."""
    if kind.axes.importance in BLIND:
        pytest.skip("looks at no query")
    given, needle = inputs(TOKENS, scale=1.0, layers=3 if kind.alone else 1), 30
    answers = []
    for q, k, v in given.layers:
        q[:, PROMPT - 32 :] = q[:, PROMPT - 32 :] * 0.1 + 4.0
        k[:, needle] = 4.0
        answers.append(v[:, needle].repeat_interleave(HEADS // GROUPS, 1))
    # If layers divide the budget, the last one keeps a small part of it.
    method = half(kind, 64 if kind.axes.allocation.startswith("per layer") else 16)
    for out, answer in zip(run(method, given, prompt=PROMPT)[0], answers, strict=True):
        torch.testing.assert_close(out[:, -1], answer, atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", [m for m in SPARSE if m.axes.importance in BLIND], ids=lambda kind: kind.name)
def test_what_looks_at_no_query_chooses_the_same_for_any(kind: type[Method]) -> None:
    given, other = inputs(TOKENS), inputs(TOKENS)
    for (q, _, _), (noise, _, _) in zip(other.layers, inputs(TOKENS, seed=1).layers, strict=True):
        q[:] = noise
    one, two = (Spy(half(kind), len(x.layers), turn=x.turn) for x in (given, other))
    run_in(one, given)
    run_in(two, other)
    for (view, plan), (again, same) in zip(one.seen, two.seen, strict=True):
        rows = torch.arange(view.q.shape[1])
        assert torch.equal(view.positions, again.positions)
        assert torch.equal(kept(view, plan, rows), kept(again, same, rows))


@sparse_by_name
def test_a_prompt_is_its_tokens_one_at_a_time(kind: type[Method]) -> None:
    if not kind.stepwise:
        pytest.skip("says that it is not")
    given = inputs(TOKENS)
    whole, _ = run(half(kind), given, prompt=TOKENS)
    single, _ = run(half(kind), given, prompt=1)
    for one, two in zip(whole, single, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
