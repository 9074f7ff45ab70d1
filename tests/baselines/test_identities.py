"""What every method must do, whatever it ranks by: the identities run over the whole registry."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, LAYERS, WIDTH, full, half, inputs, run
from torch import Tensor

from nsa.baselines import METHODS, Budget, Method, Session, View
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
    """The shortest one is shorter than a block, and than any number of last queries that a method looks at."""
    given, padding = inputs(TOKENS, batch=3), torch.tensor([0, 13, 75])
    outs, _ = run(half(kind), given, prompt=PROMPT, padding=padding)
    for row, start in enumerate(padding.tolist()):
        alone, _ = run(half(kind), given.row(row, start), prompt=PROMPT - start)
        for mine, theirs in zip(outs, alone, strict=True):
            torch.testing.assert_close(mine[row : row + 1, start:], theirs, atol=1e-5, rtol=1e-5)


@by_name
@pytest.mark.parametrize("padding", [[0, 0], [0, 13]], ids=["whole", "padded"])
def test_the_ledger_is_the_count_of_the_masks(kind: type[Method], padding: list[int]) -> None:
    """All shares, by a count of each pair; values are narrower than keys."""
    given, narrow = inputs(TOKENS), 8
    given.layers = [(q, k, v[..., :narrow]) for q, k, v in given.layers]
    session, wide, group = Spy(half(kind), LAYERS, turn=given.turn), WIDTH + narrow, HEADS // GROUPS
    session.begin(torch.tensor(padding))
    held = run_in(session, given)
    spent = {phase: dict.fromkeys(("attended", "scored", "reads", "resident"), 0.0) for phase in ("prefill", "decode")}
    for (view, plan), stored in zip(session.seen, held, strict=True):
        of, rows = spent["prefill" if view.prompt else "decode"], len(view.q) * GROUPS
        mask = view.per_head(kept(view, plan, torch.arange(view.q.shape[1])))
        of["attended"] += float(mask.sum())
        of["reads"] += float(view.per_group(mask).any(2).sum()) * wide
        of["resident"] += stored * wide
        if plan is None:
            continue
        assert min(plan.estimate.read, plan.estimate.pairs, plan.estimate.resident) >= 0
        of["reads"] += plan.estimate.read * rows
        of["scored"] += plan.estimate.pairs * rows
        of["resident"] += plan.estimate.resident * rows
        if plan.terms is not None:
            of["attended"] += float((plan.terms.scores > -torch.inf).sum())
            of["reads"] += float(view.per_group(plan.terms.scores > -torch.inf).any(2).sum()) * plan.terms.size
        if plan.blend is not None:
            of["reads"] += rows * narrow
    whole = {"prefill": 0.0, "decode": 0.0}
    for start in padding:
        whole["prefill"] += sum(range(1, PROMPT - start + 1)) * LAYERS
        whole["decode"] += sum(range(PROMPT - start + 1, TOKENS - start + 1)) * LAYERS
    prefill, decode, dense = spent["prefill"], spent["decode"], whole["decode"] * GROUPS
    assert session.ledger.shares() == {
        "reads": pytest.approx(decode["reads"] / (dense * wide)),
        "attended": pytest.approx(decode["attended"] / (dense * group)),
        "scored": pytest.approx(decode["scored"] / (dense * group)),
        "resident": pytest.approx(decode["resident"] / (dense * wide)),
        "prefill": pytest.approx((prefill["attended"] + prefill["scored"]) / (whole["prefill"] * HEADS)),
    }
    by_layer = [session.ledger.shares([layer])["attended"] for layer in range(LAYERS)]
    assert sum(by_layer) / LAYERS == pytest.approx(session.ledger.shares()["attended"])
    for phase in kind.phases:
        assert {(phase, layer) for layer in range(LAYERS)} <= session.ledger.ran, "it ran where it says"


def run_in(session: Session, given: Any) -> list[int]:
    """Prompt and decoding. How many tokens all KV heads of all sequences keep after each call of a layer."""
    held = []
    for start, stop in [(0, PROMPT), *itertools.pairwise(range(PROMPT, TOKENS + 1))]:
        for layer, (q, k, v) in enumerate(given.cut(start, stop)):
            session.attend(layer, q, k, v, WIDTH**-0.5)
            held.append(int((session.caches[layer].positions >= 0).sum()))
        session.end_prompt()
    return held


@sparse_by_name
def test_layers_that_stay_dense_are_dense(kind: type[Method]) -> None:
    """They are counted so, keep all tokens, and no method is said to have run there."""
    given, left = inputs(TOKENS), 1
    outs, session = run(half(kind), given, prompt=PROMPT, dense_layers=[left])
    torch.testing.assert_close(outs[left], dense(given)[left], atol=1e-5, rtol=1e-5)
    shares = session.ledger.shares([left])
    assert shares == {"reads": 1, "attended": 1, "scored": 0, "resident": 1, "prefill": 1}
    assert {layer for _, layer in session.ledger.ran} == {0, 2}


@pytest.mark.parametrize("kind", [m for m in METHODS if "seed" in half(m).settings()], ids=lambda kind: kind.name)
def test_a_seed_and_a_layer_have_draws_of_their_own(kind: type[Method]) -> None:
    """Two layers are given the same, and so are two methods that differ in their seed alone."""
    given = inputs(TOKENS, layers=1)
    given.layers *= 2
    small = {"sketch": 2} if "sketch" in half(kind).settings() else {}  # few of its dims: which ones are drawn
    made = replace(half(kind), **small)
    (one, deeper), (two, _) = (run(replace(made, seed=seed), given, prompt=PROMPT)[0] for seed in (0, 1))
    assert not torch.equal(one, two)
    assert not torch.equal(one, deeper)


# What a comparison that names no setting runs. The files of the methods say which paper or release each is from.
SNAP = {"window": 32, "kernel": 5, "pooling": "avg", "group": "mean"}
ADA = {"window": 32, "kernel": 7, "pooling": "max", "group": "mean", "safeguard": 0.2}
LINES = {"num_queries": 64, "vertical_share": 1000 / 7096, "sinks": 30, "near": 100}
PAGES = {"page": 16, "over_group": "sum", "fp8": False}
DIMS = {"dims": 32, "local": 0.25, "temperature": True, "mean_over": "all"}
CERTIFIED = {"epsilon": 0.1, "delta": 0.1, "bound": "clt", "ranking": "bounds", "num_sinks": 4, "window": 32,
             "page": 16, "least": 64, "base_share": 0.01, "seed": 0}  # fmt: skip
FLEX = {"gamma": 0.95, "tau": 0.1, "block": 128, "min_budget": 1024}
WALK = {"block": 64, "sketch": 64, "power": 8.0, "normalise": True, "scope": "group", "seed": 0}
CHUNKS = {"chunk": 8192, "local": 1024}
SETTINGS: dict[str, dict[str, Any]] = {
    "dense": {}, "oracle_topk": {}, "oracle_topp": {"p": 0.95}, "random": {"seed": 0}, "sink_window": {"num_sinks": 4},
    "streaming_llm": {"num_sinks": 4, "evict_after": False}, "lm_infinite": {"num_global": 10},
    "h2o": {"recent_share": 0.5, "normalise": False}, "tova": {}, "key_norm": {},
    "snapkv": SNAP, "ada_snapkv": ADA, "ada_snapkv_safeguard": ADA,
    "pyramidkv": {**SNAP, "beta": 20.0}, "pyramidkv_kvpress": {**SNAP, "beta": 20.0},
    "quest": PAGES, "quest_eval": PAGES, "sparq": DIMS, "sparq_released": DIMS,
    "twilight": {"base": {"name": "quest", **PAGES}, "p": 0.95, "bits": 4},
    "double_p": {"p1": 0.95, "p2": 0.7, "relative": False, "num_sinks": 4, "recent": 64, "cluster_size": 16,
                 "iterations": 10, "segment": 8192, "refresh": 1024},
    "vattention": CERTIFIED, "vattention_released": CERTIFIED,
    "block_sparse": {"block": 64, "first": 0, "near": 0}, "block_sparse_frontier": {"block": 16, "first": 1, "near": 1},
    "vertical_slash": LINES, "vertical_slash_blocks": {**LINES, "block": 64},
    "minference": {"patterns": (), "block": 64, "num_queries": 64, "sinks": 30, "near": 100},
    "flexprefill": FLEX, "flexprefill_released": FLEX,
    "sketch_walk": {**WALK, "direct": 0.0}, "sketch_walk_damped": {**WALK, "direct": 0.75},
    "dual_chunk": CHUNKS, "qwen_1m": {**LINES, **CHUNKS, "factors": ()},
}  # fmt: skip


def test_settings_are_those_of_the_table() -> None:
    assert {kind.name: kind().settings() for kind in METHODS} == SETTINGS


@pytest.mark.parametrize("name", ["quest", "sparq", "sketch_walk", "vattention", "vattention_released"])
def test_a_budget_of_reads_pays_for_what_is_read_to_choose(name: str) -> None:
    """Keys and values attended to, and what choosing reads of them: together no more than the budget, to a unit."""
    tokens, kind = 60, next(kind for kind in METHODS if kind.name == name)
    method = replace(half(kind), budget=Budget(tokens=tokens, counts="reads"))
    session = Spy(method, 1, turn=inputs(1).turn)
    run_in(session, inputs(TOKENS, layers=1))
    for view, plan in session.seen:
        if view.prompt or plan is None:
            continue
        mask = plan.parts[0].mask(torch.arange(1), view.k.shape[1])  # of vattention without its sample, which is beside
        spent = mask[:, :, 0].sum(-1).double() + plan.estimate.read / (2 * WIDTH)
        if name == "vattention_released":
            spent -= (plan.estimate.read - 2 * WIDTH * -(-int(view.seen[0]) // 4)) / (2 * WIDTH)  # and its base sample
        assert (spent <= tokens + 1).all() and (spent > tokens - 5).all(), spent


# What a query may attend to beside its budget of tokens: the release's rule, or what the method says it keeps.
BESIDE = {"sparq_released": 1, "quest_eval": 4 * HEADS, "vertical_slash_blocks": TOKENS, "dual_chunk": TOKENS}
UNITS = {"quest": 4, "block_sparse": 8, "block_sparse_frontier": 4, "sketch_walk": 4, "sketch_walk_damped": 4}
UNEVEN = ("minference", "qwen_1m", "vertical_slash", "vertical_slash_blocks")  # lines cross, and end before a query


@sparse_by_name
def test_a_query_attends_to_its_budget(kind: type[Method]) -> None:
    """No more, and as much of it as whole units allow, the query's own token included; of the prompt, too."""
    if kind.knob:
        pytest.skip("its budget follows from a threshold")
    tokens, beside = 24, BESIDE.get(kind.name, 0)
    session = Spy(half(kind, tokens), LAYERS, turn=inputs(1).turn)
    run_in(session, inputs(TOKENS))
    found: dict[int, list[Tensor]] = {}  # by number of the decoded query, of each layer
    for view, plan in session.seen:
        counts = kept(view, plan, torch.arange(view.q.shape[1])).sum(-1).double()
        if "prefill" in kind.phases and view.prompt:
            assert counts.max() <= tokens + beside
            if kind.name not in UNEVEN:
                assert (counts[:, :, tokens:] > tokens - UNITS.get(kind.name, 1)).all()
        if "decode" in kind.phases and not view.prompt:
            found.setdefault(int(view.seen[0]) - PROMPT, []).append(counts.mean(1))
    for number, layers in found.items():
        mean = torch.stack(layers).mean(0)
        more = number if "all decoded ones" in kind.formula else beside
        assert (mean <= tokens + more + 1e-9).all() and (
            mean > tokens + more * (beside < 9) - UNITS.get(kind.name, 1)
        ).all(), mean


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
