"""Methods that evict, each against loops written from its paper, and what is theirs alone."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, Inputs, half, inputs, run
from torch import Tensor

from nsa.baselines import METHODS, Budget, BudgetError, Method, Session, method_named
from nsa.baselines.importance.observed import column_sums
from nsa.baselines.plan import View

TOKENS, PROMPT, GROUP = 44, 36, HEADS // GROUPS
EVICTING = [kind for kind in METHODS if kind.axes.cache == "evicts"]
evicting = pytest.mark.parametrize("kind", EVICTING, ids=lambda kind: kind.name)
Kept = dict[tuple[int, int], list[int]]  # (sequence, KV head) -> positions


def made(name: str, tokens: int = 16, **settings: Any) -> Method:
    return method_named(name)(budget=Budget(tokens=tokens), **settings)


def stays(session: Session, layer: int = 0) -> Kept:
    """What the cache of a layer holds now."""
    positions = session.caches[layer].positions
    rows, groups = len(positions), positions.shape[2]
    return {(b, g): [p for p in positions[b, :, g].tolist() if p >= 0] for b in range(rows) for g in range(groups)}


def attention(q: Tensor, keys: Iterable[Tensor]) -> Tensor:
    """(n,) probabilities of the keys for a query (D,)."""
    return torch.stack([q @ k * WIDTH**-0.5 for k in keys]).softmax(0)


def outputs(given: Inputs, keys_of: Callable[[int, int, int], list[int]]) -> Tensor:
    """(B, T, H, D) of layer 0, if query i of a KV head attends to the positions ``keys_of(b, g, i)``."""
    q, k, v = given.layers[0]
    out = torch.zeros_like(q)
    for b, i, h in ((b, i, h) for b in range(len(q)) for i in range(q.shape[1]) for h in range(HEADS)):
        kept = keys_of(b, h // GROUP, i)
        out[b, i, h] = attention(q[b, i, h], k[b, kept, h // GROUP]) @ v[b, kept, h // GROUP]
    return out


def best(scores: dict[int, float], count: int) -> list[int]:
    """The keys with the highest values; ties go to the lower key."""
    return sorted(sorted(scores, key=lambda key: (-scores[key], key))[:count])


def same(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


# StreamingLLM and LM-Infinite


@pytest.mark.parametrize("after", [False, True], ids=["before the step", "after the step"])
def test_streaming_llm_rotates_a_rolling_cache_by_its_places(after: bool) -> None:
    """The release's cache: raw keys, evicted one at a time, rotated anew to 0, 1, ... at each step."""
    given = inputs(TOKENS, batch=1, layers=1)
    q, k, v = given.layers[0]
    where = torch.arange(TOKENS)[None]
    raw_q, raw_k = given.turn(q, -where), given.turn(k, -where)
    out, cache = torch.zeros_like(q), []
    for i in range(TOKENS):
        if not after and len(cache) == 16:
            del cache[4]
        cache.append(i)
        places = torch.arange(len(cache))[None]
        keys = given.turn(raw_k[:, cache], places)
        query = given.turn(raw_q[:, i : i + 1], places[:, -1:])
        for h in range(HEADS):
            out[0, i, h] = attention(query[0, 0, h], keys[0, :, h // GROUP]) @ v[0, cache, h // GROUP]
        if after and len(cache) > 16:
            del cache[4]
    (mine,), session = run(made("streaming_llm", evict_after=after), given, prompt=PROMPT)
    same(mine, out)
    assert stays(session)[0, 0] == cache[-16:] == [0, 1, 2, 3, *range(TOKENS - 12, TOKENS)]


def test_lm_infinite_has_a_ceiling_of_distances() -> None:
    given = inputs(TOKENS, batch=1, layers=1)
    q, k, v = given.layers[0]
    window, where = 16 - 10, torch.arange(TOKENS)[None]
    far_q = given.turn(given.turn(q, -where), torch.full_like(where, window))
    still_k = given.turn(k, -where)
    out = torch.zeros_like(q)
    for i in range(TOKENS):
        kept = [j for j in range(i + 1) if j < 10 or i - j < window]
        for h in range(HEADS):
            g = h // GROUP
            scores = [q[0, i, h] @ k[0, j, g] if i - j < window else far_q[0, i, h] @ still_k[0, j, g] for j in kept]
            out[0, i, h] = (torch.stack(scores) * WIDTH**-0.5).softmax(0) @ v[0, kept, g]
    (mine,), session = run(made("lm_infinite"), given, prompt=PROMPT)
    same(mine, out)
    assert stays(session)[0, 1] == [*range(10), *range(TOKENS - window, TOKENS)]


@pytest.mark.parametrize("name", ["streaming_llm", "lm_infinite"])
def test_a_model_without_rotary_embedding_is_refused(name: str) -> None:
    given = inputs(24, layers=1)
    given.turn = None  # type: ignore[assignment]
    with pytest.raises(ValueError, match="must have a rotary embedding"):
        run(made(name), given, prompt=20)


# H2O, TOVA and the norm of keys


@pytest.mark.parametrize("normalise", [False, True], ids=["sums", "means"])
def test_h2o_is_its_streaming_definition(normalise: bool) -> None:
    given = inputs(TOKENS, layers=1)
    q, k, _ = given.layers[0]
    seen_by: dict[tuple[int, int, int], list[int]] = {}
    kept: Kept = {}
    for b, g in ((b, g) for b in range(2) for g in range(GROUPS)):
        cache, mass = [], {}
        for i in range(TOKENS):
            cache.append(i)
            seen_by[b, g, i] = list(cache)
            mass[i] = 0.0
            for h in range(g * GROUP, (g + 1) * GROUP):
                for j, p in zip(cache, attention(q[b, i, h], k[b, cache, g]).tolist(), strict=True):
                    mass[j] += p
            if i >= PROMPT - 1:  # 16 with the next token: 8 recent ones and 7 heavy hitters, 15 / 2 rounded to even
                old = [j for j in cache if j <= i - 8]
                cache = best({j: mass[j] / (i + 1 - j if normalise else 1) for j in old}, 7) + list(range(i - 7, i + 1))
        kept[b, g] = cache
    (mine,), session = run(made("h2o", normalise=normalise), given, prompt=PROMPT)
    assert stays(session) == kept
    same(mine, outputs(given, lambda b, g, i: seen_by[b, g, i]))


def test_h2o_keeps_of_what_it_had_and_the_new_token() -> None:
    """S_t is within S_{t-1} and t. The released evaluation code breaks this: it ranks by later queries, too."""
    given = inputs(TOKENS, layers=1)
    _, session = run(made("h2o"), given, prompt=PROMPT, decode=False)
    before = stays(session)
    for token in range(PROMPT, TOKENS):
        session.attend(0, *(x[:, token : token + 1] for x in given.layers[0]), WIDTH**-0.5)
        now = stays(session)
        assert all(set(now[row]) <= {*before[row], token} for row in now)
        assert {len(positions) for positions in now.values()} == {15}
        before = now


def test_sums_of_columns_by_blocks_are_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.baselines.importance import observed

    q, k, v = inputs(33).layers[0]
    where = torch.arange(33).expand(2, 33)
    view = View(q, k, v, where, where[..., None].expand(2, 33, GROUPS), where[:, -1] + 1, 0.25, 0, 1, True, True)
    whole = view.scores().softmax(-1).sum(2).unflatten(1, (GROUPS, GROUP)).sum(2)
    rows, sizes = observed.row_blocks, []

    def small(view: View) -> Any:
        for block in rows(view, elements=2 * HEADS * 33 * 5):
            sizes.append(len(block))
            yield block

    monkeypatch.setattr(observed, "row_blocks", small)
    same(column_sums(view), whole)
    assert sizes == [5] * 6 + [3]


def test_tova_drops_what_the_last_query_looks_at_least() -> None:
    given = inputs(TOKENS, layers=1)
    q, k, _ = given.layers[0]
    seen_by: dict[tuple[int, int, int], list[int]] = {}
    kept: Kept = {}
    for b in range(2):
        cache: list[int] = []
        for i in range(TOKENS):
            cache = [*cache, i]
            rows = [attention(q[b, i, h], k[b, cache, h // GROUP]) for h in range(HEADS)]
            mass = dict(zip(cache, (sum(rows) / HEADS).tolist(), strict=True))
            for g in range(GROUPS):
                seen_by[b, g, i] = cache
            if i >= PROMPT - 1:
                cache = best(mass, 15)
        kept |= {(b, g): cache for g in range(GROUPS)}
    (mine,), session = run(made("tova"), given, prompt=PROMPT)
    assert stays(session) == kept
    same(mine, outputs(given, lambda b, g, i: seen_by[b, g, i]))


def test_key_norm_keeps_the_shortest_keys_of_each_head() -> None:
    """Its own sequence of evictions: a token that went does not come back, however long the later keys are."""
    given = inputs(TOKENS, layers=1)
    _, k, _ = given.layers[0]
    seen_by: dict[tuple[int, int, int], list[int]] = {}
    kept: Kept = {}
    for b, g in ((b, g) for b in range(2) for g in range(GROUPS)):
        cache: list[int] = []
        for i in range(TOKENS):
            cache = [*cache, i]
            seen_by[b, g, i] = cache
            if i >= PROMPT - 1:
                cache = best({j: -math.sqrt(sum(x * x for x in k[b, j, g].tolist())) for j in cache}, 15)
        kept[b, g] = cache
    (mine,), session = run(made("key_norm"), given, prompt=PROMPT)
    assert stays(session) == kept and TOKENS - 1 not in kept[0, 0]
    same(mine, outputs(given, lambda b, g, i: seen_by[b, g, i]))


# SnapKV, Ada-SnapKV, PyramidKV


def snap_scores(given: Inputs, layer: int, window: int, kernel: int, pooling: str, group: str) -> dict[Any, Any]:
    """(sequence, KV head) -> position -> pooled attention of the last ``window`` queries of the prompt; see the paper's
    listing 1. The window that stays is 8."""
    q, k, _ = given.layers[layer]
    found = {}
    for b, g in ((b, g) for b in range(len(q)) for g in range(GROUPS)):
        heads = []
        for h in range(g * GROUP, (g + 1) * GROUP):
            sums = torch.zeros(PROMPT)
            for i in range(PROMPT - window, PROMPT):
                sums[: i + 1] += attention(q[b, i, h], k[b, : i + 1, g])
            heads.append(sums[: PROMPT - 8])
        joint = torch.stack(heads).amax(0) if group == "max" else sum(heads) / GROUP
        padded = torch.cat([torch.zeros(kernel // 2), joint, torch.zeros(kernel // 2)])
        pool = [padded[j : j + kernel] for j in range(PROMPT - 8)]
        found[b, g] = {j: float(x.mean() if pooling == "avg" else x.max()) for j, x in enumerate(pool)}
    return found


LAST = list(range(PROMPT - 8, PROMPT))


@pytest.mark.parametrize(
    "settings",
    [{"kernel": 5, "pooling": "avg", "group": "mean"}, {"kernel": 7, "pooling": "max", "group": "max"}],
    ids=str,
)
@pytest.mark.parametrize("chunks", [(), (32,)], ids=["whole", "a last chunk of 4"])
def test_snapkv_is_its_definition(settings: dict[str, Any], chunks: tuple[int, ...]) -> None:
    given = inputs(TOKENS, layers=1)
    kept = {row: best(s, 8) + LAST for row, s in snap_scores(given, 0, 12, **settings).items()}
    method = made("snapkv", window=12, **settings)  # half of 16 is the window that stays
    _, session = run(method, given, prompt=PROMPT, chunks=chunks, decode=False)
    assert stays(session) == kept
    (mine,), session = run(method, given, prompt=PROMPT, chunks=chunks)
    after = {row: [*positions, *range(PROMPT, TOKENS)] for row, positions in kept.items()}
    assert stays(session) == after
    seen = [list(range(i + 1)) for i in range(TOKENS)]
    same(mine, outputs(given, lambda b, g, i: seen[i] if i < PROMPT else [j for j in after[b, g] if j <= i]))


def test_of_an_odd_budget_the_window_has_the_smaller_half() -> None:
    """Of 15 tokens 7; the one before them is looked at by nobody."""
    given = inputs(PROMPT, layers=1)
    q, k, _ = given.layers[0]
    q[:, -12:], k[:, PROMPT - 8] = 1.0, -9.0
    _, session = run(made("snapkv", 15, window=12, kernel=1), given, prompt=PROMPT)
    for positions in stays(session).values():
        assert positions[-7:] == LAST[1:] and PROMPT - 8 not in positions and len(positions) == 15


@pytest.mark.parametrize("name", ["snapkv", "tova", "pyramidkv"])
def test_a_prompt_in_chunks_costs_what_it_costs_whole_and_leaves_no_queries_behind(name: str) -> None:
    given = inputs(TOKENS, layers=1)
    sessions = [run(made(name), given, prompt=PROMPT, chunks=chunks)[1] for chunks in ((), (7, 30))]
    one, two = (session.ledger.counts["prefill", 0] for session in sessions)
    assert torch.equal(one.scored, two.scored) and torch.equal(one.reads, two.reads)
    assert not any(session.states[0].rest for session in sessions)


def test_snapkv_of_one_query_without_pooling_is_the_oracle_of_that_query() -> None:
    given = inputs(TOKENS, layers=1)
    q, k, _ = given.layers[0]
    _, session = run(made("snapkv", window=1, kernel=1), given, prompt=PROMPT, decode=False)
    for (b, g), kept in stays(session).items():
        rows = [attention(q[b, PROMPT - 1, h], k[b, :PROMPT, g]) for h in range(g * GROUP, (g + 1) * GROUP)]
        mass = dict(enumerate((sum(rows) / GROUP).tolist()[:-1]))
        assert kept == [*best(mass, 15), PROMPT - 1]


@pytest.mark.parametrize("name", ["ada_snapkv", "ada_snapkv_safeguard"])
@pytest.mark.parametrize("safeguard", [0.0, 0.3, 0.5])
def test_ada_snapkv_is_its_definition(name: str, safeguard: float) -> None:
    given = inputs(TOKENS, layers=1, seed=5)
    given.layers[0][0][:, :, :GROUP] *= 3  # a sharp head and a flat one: they divide the budget unequally
    scores = snap_scores(given, 0, 12, 7, "max", "mean")
    kept: Kept = {}
    for b in range(2):
        pairs = [(-scores[b, g][j], g, j) for g in range(GROUPS) for j in scores[b, g]]
        if name == "ada_snapkv":
            won = [g for _, g, _ in sorted(pairs)[: 8 * GROUPS]]
            counts = [round(won.count(g) * (1 - safeguard) + int(8 * safeguard)) for g in range(GROUPS)]
        else:
            own = [(g, j) for g in range(GROUPS) for j in best(scores[b, g], int(8 * safeguard))]
            rest = sorted(pair for pair in pairs if pair[1:] not in own)[: 8 * GROUPS - len(own)]
            counts = [sum(g == h for h, _ in own) + sum(g == h for _, h, _ in rest) for g in range(GROUPS)]
            assert sum(counts) == 8 * GROUPS and min(counts) >= int(8 * safeguard)
        kept |= {(b, g): best(scores[b, g], counts[g]) + LAST for g in range(GROUPS)}
    _, session = run(made(name, window=12, safeguard=safeguard), given, prompt=PROMPT, decode=False)
    assert stays(session) == kept
    assert len({len(positions) for positions in kept.values()}) > 1, "heads are ragged"


@pytest.mark.parametrize("name", ["ada_snapkv", "ada_snapkv_safeguard"])
def test_a_full_safeguard_is_snapkv(name: str) -> None:
    given = inputs(TOKENS)
    ada = run(made(name, safeguard=1.0), given, prompt=PROMPT)
    snap = run(made("snapkv", kernel=7, pooling="max"), given, prompt=PROMPT)
    for mine, theirs in zip(ada[0], snap[0], strict=True):
        assert torch.equal(mine, theirs)
    assert stays(ada[1]) == stays(snap[1])


@pytest.mark.parametrize("name", ["ada_snapkv", "ada_snapkv_safeguard"])
def test_a_prompt_as_long_as_the_budget_stays_whole(name: str) -> None:
    """Rounded counts would be 7 of the 8 tokens beside the window."""
    _, session = run(made(name), inputs(16, layers=1), prompt=16)
    assert all(positions == list(range(16)) for positions in stays(session).values())


def test_heads_that_compete_keep_no_less_of_the_scores_than_snapkv() -> None:
    """The paper's theorem, at the same scores; with each safeguard the total of the budgets is exact."""
    for seed in range(2):
        given = inputs(TOKENS, seed=seed, layers=2)
        for layer in range(2):
            scores = snap_scores(given, layer, 32, 7, "max", "mean")

            def held(kept: Kept, scores: dict[Any, Any] = scores) -> Tensor:
                sums = [[sum(scores[b, g][j] for j in kept[b, g][:-8]) for g in range(GROUPS)] for b in range(2)]
                return torch.tensor(sums, dtype=torch.float64).sum(1)

            masses = []
            for safeguard in (1.0, 0.5, 0.0):
                method = made("ada_snapkv_safeguard", safeguard=safeguard)
                kept = stays(run(method, given, prompt=PROMPT, decode=False)[1], layer)
                assert all(sum(len(kept[b, g]) for g in range(GROUPS)) == 16 * GROUPS for b in range(2))
                masses.append(held(kept))
            assert (masses[0] <= masses[1] + 1e-6).all() and (masses[1] <= masses[2] + 1e-6).all()


def test_pyramidkv_divides_the_total_exactly() -> None:
    method = made("pyramidkv")
    for mean, number, seen, beta in [
        (100, 32, 4096, 20),
        (7, 3, 100, 20),
        (37, 12, 90, 5),
        (50, 6, 60, 20),
        (9, 1, 99, 3),
    ]:
        layers = replace(method, beta=beta).layers(mean, 8, seen, number)
        assert sum(layers) == mean * number, layers
        assert layers == sorted(layers, reverse=True) and layers[0] <= seen - 8
        assert number == 1 or abs(layers[-1] - max(mean / beta, 2 * mean - (seen - 8))) < 1
    # the release: the step is rounded down, so the layers keep 2 % more than was asked for
    least = 100 // 20
    step = (200 - least - least) // 31
    assert (
        sum(200 - least - step * layer for layer in range(32)) == 3264 and sum(method.layers(100, 8, 4096, 32)) == 3200
    )


def test_pyramidkv_without_a_slope_is_snapkv() -> None:
    given = inputs(TOKENS)
    flat, snap = (run(m, given, prompt=PROMPT)[1] for m in (made("pyramidkv", beta=1), made("snapkv")))
    steep = run(made("pyramidkv"), given, prompt=PROMPT)[1]
    assert all(stays(flat, layer) == stays(snap, layer) for layer in range(3))
    sizes = [len(stays(steep, layer)[0, 0]) - 8 - (TOKENS - PROMPT) for layer in range(3)]
    assert sum(sizes) == 3 * 8 and sizes[0] > sizes[1] > sizes[2]


def test_pyramidkv_of_kvpress() -> None:
    """Its arithmetic at 4,096 tokens and a window of 64; SnapKV if the last layer kept less than the window."""
    method = made("pyramidkv_kvpress", window=64)
    layers = method.layers(2048 - 64, 64, 4096, 32)
    most, least = 2 * 2048 - 2048 / 20, 2048 / 20
    assert [x + 64 for x in layers] == [round(most - layer * (most - least) / 31) for layer in range(32)]
    assert method.layers(1024 - 64, 64, 4096, 32) == [1024 - 64] * 32  # 1024 / 20 is less than 64
    just = method.layers(1280 - 64, 64, 4096, 32)  # and 1280 / 20 is as much
    assert (just[0], just[-1]) == (2 * 1280 - 64 - 64, 0)


# All of them


@evicting
def test_what_was_evicted_never_comes_back_and_memory_stays(kind: type[Method]) -> None:
    """A stream of ten times the cache."""
    given, method = inputs(120, batch=1, layers=1), half(kind, 12)
    _, session = run(method, given, prompt=20, decode=False)
    before, sizes = stays(session), []
    for token in range(20, 120):
        session.attend(0, *(x[:, token : token + 1] for x in given.layers[0]), WIDTH**-0.5)
        now = stays(session)
        assert all(set(now[row]) <= {*before[row], token} for row in now)
        before = now
        sizes.append(session.caches[0].rows._memory[0].shape[1])  # type: ignore[index]
    if "all decoded ones" not in kind.formula:
        assert max(sizes) <= 2 * 64 and len(now[0, 0]) <= 12


@pytest.mark.parametrize(("name", "least"), [("streaming_llm", 5), ("lm_infinite", 11), ("sink_window", 5)])
def test_sinks_and_the_query_itself_are_the_least(name: str, least: int) -> None:
    given = inputs(TOKENS, layers=1)
    assert run(made(name, least), given, prompt=PROMPT)[0][0].isfinite().all()
    with pytest.raises(BudgetError, match=f"{least} tokens are the least"):
        run(made(name, least - 1), given, prompt=PROMPT)


@pytest.mark.parametrize(("name", "least"), [("h2o", 3), ("tova", 2), ("key_norm", 2)])
def test_the_next_token_is_in_the_budget_which_is_a_share_of_what_there_is_then(name: str, least: int) -> None:
    given = inputs(TOKENS, layers=1)
    _, session = run(method_named(name)(budget=Budget(share=0.3)), given, prompt=PROMPT, decode=False)
    for token in range(PROMPT, TOKENS):
        assert {len(positions) for positions in stays(session).values()} == {round(0.3 * (token + 1)) - 1}
        session.attend(0, *(x[:, token : token + 1] for x in given.layers[0]), WIDTH**-0.5)
    _, session = run(made(name, least), given, prompt=PROMPT)
    assert {len(positions) for positions in stays(session).values()} == {least - 1}
    with pytest.raises(BudgetError, match=f"{least} tokens are the least"):
        run(made(name, least - 1), given, prompt=PROMPT)


@pytest.mark.parametrize("name", ["streaming_llm", "lm_infinite"])
def test_a_share_is_of_a_whole_prompt_so_nothing_goes_before_its_end(name: str) -> None:
    given = inputs(40, batch=1, layers=1)
    session = Session(method_named(name)(budget=Budget(share=0.5)), 1, turn=given.turn)
    with session.more_to_come():
        session.attend(0, *given.cut(0, 24)[0], WIDTH**-0.5)
    assert stays(session)[0, 0] == list(range(24))
    session.attend(0, *given.cut(24, 40)[0], WIDTH**-0.5)
    first = 4 if name == "streaming_llm" else 10
    assert stays(session)[0, 0] == [*range(first), *range(40 - (20 - first), 40)]


@evicting
def test_a_batch_leaves_nothing_to_the_next(kind: type[Method]) -> None:
    """The state of PyramidKV's release is kept between samples: only the first was compressed."""
    first, second = inputs(TOKENS, layers=2, seed=3), inputs(TOKENS, layers=2, seed=4)
    alone, _ = run(half(kind), second, prompt=PROMPT)
    session = Session(half(kind), 2, turn=first.turn)
    for given in (first, second):
        session.begin()
        outs = []
        for start, stop in [(0, PROMPT), *((token, token + 1) for token in range(PROMPT, TOKENS))]:
            outs.append([session.attend(i, *x, WIDTH**-0.5) for i, x in enumerate(given.cut(start, stop))])
            session.end_prompt()
    for layer, out in enumerate(alone):
        assert torch.equal(torch.cat([step[layer] for step in outs], 1), out)


@evicting
def test_the_mass_that_was_evicted_is_missed(kind: type[Method]) -> None:
    """The watched mass is a share of the attention to all tokens, not of those that are left."""
    given = inputs(TOKENS, layers=1)
    _, session = run(half(kind), given, prompt=PROMPT, decode=False, watch=["prefill", "decode"])
    q, k, _ = given.layers[0]
    kept = stays(session)
    session.attend(0, *(x[:, PROMPT : PROMPT + 1] for x in given.layers[0]), WIDTH**-0.5)
    if kind.name == "streaming_llm":  # its query's own token counts for the budget
        kept = {row: [*positions[:4], *positions[5:]] for row, positions in kept.items()}
    if kind.name == "lm_infinite":
        kept = {row: [*positions[:10], *positions[11:]] for row, positions in kept.items()}
    mass = torch.zeros(GROUPS)
    for b, h in ((b, h) for b in range(2) for h in range(HEADS)):
        p = attention(q[b, PROMPT, h], k[b, : PROMPT + 1, h // GROUP])
        mass[h // GROUP] += p[[*kept[b, h // GROUP], PROMPT]].sum() / (2 * GROUP)
    torch.testing.assert_close(torch.tensor(session.figures[-1]["kept_mass"]), mass, atol=1e-5, rtol=1e-5)
    first = [
        attention(q[b, PROMPT, h], k[b, : PROMPT + 1, h // GROUP])[:4].sum() for b in range(2) for h in range(HEADS)
    ]
    assert session.figures[-1]["sink_mass"] == pytest.approx(float(sum(first)) / (2 * HEADS), rel=1e-4)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"pooling": "mean"}),
        ("snapkv", {"group": "sum"}),
        ("snapkv", {"window": 0}),
        ("ada_snapkv", {"safeguard": 2.0}),
        ("ada_snapkv", {"kernel": 4}),
        ("pyramidkv", {"beta": 0.5}),
        ("pyramidkv", {"pooling": "mean"}),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=name):
        made(name, **settings)
