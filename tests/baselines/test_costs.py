"""What choosing costs, of each method, by arithmetic: keys of 16 and values of 8 elements, two heads to a KV head."""

from dataclasses import replace

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, half, inputs
from views import view_of

from nsa.baselines import METHODS, Budget, Ledger, Method, Session, View, method_named
from nsa.baselines.methods.flexprefill import FlexPrefill
from nsa.baselines.plan import Estimate, Plan

PROMPT, NARROW, GROUP = 40, 8, 2
ALL = PROMPT * (PROMPT + 1) // 2  # pairs of the prompt, of one head
LAST_32, LAST_16 = sum(range(9, 41)), sum(range(25, 41))  # of its last queries
KEYS = PROMPT * WIDTH
NOTHING = Estimate()


def both(one: Estimate, other: Estimate) -> Estimate:
    return Estimate(one.read + other.read, one.pairs + other.pairs, one.resident + other.resident)


# (read, pairs, resident) per sequence and KV head, in elements, products and elements.
SNAP = Estimate(LAST_32 * WIDTH, LAST_32 * GROUP)
LINES = Estimate(KEYS, LAST_16 * GROUP)
WALK = Estimate(10 * 16 + KEYS, 10 * 11 / 2, 2 * 10 * 16 + 10 * 11 / 2)  # 10 blocks, sketches of 16: all dims
IN_PROMPT = {
    "h2o": Estimate(ALL * WIDTH, ALL * GROUP, PROMPT),  # all scores once more; a sum for each token
    "tova": Estimate(KEYS, PROMPT * GROUP),  # the last query's
    "key_norm": Estimate(0, PROMPT, PROMPT),
    **dict.fromkeys(("snapkv", "ada_snapkv", "ada_snapkv_safeguard", "pyramidkv", "pyramidkv_kvpress"), SNAP),
    "double_p": Estimate(10 * 28 * WIDTH, 10 * 28 * 7),  # 40 tokens without 4 sinks and 8 recent ones; 7 centroids
    "block_sparse": Estimate(KEYS, 5 * 6 / 2 * GROUP),
    "block_sparse_frontier": Estimate(KEYS, 10 * 11 / 2 * GROUP),
    **dict.fromkeys(("vertical_slash", "vertical_slash_blocks", "minference", "qwen_1m"), LINES),
    # The last 16 queries, and their mean with 3 block means.
    **dict.fromkeys(("flexprefill", "flexprefill_released"), Estimate(KEYS, (LAST_16 + 3) * GROUP)),
    **dict.fromkeys(("sketch_walk", "sketch_walk_damped"), WALK),
}
BOUNDS = 11 * 2 * WIDTH  # of the pages of 4 that 41 tokens have
QUEST = Estimate(10 * 2 * WIDTH, 10 * 2 * GROUP, BOUNDS)  # but for the current page's
DIMS = Estimate(41 * 8, 41 * 8 / WIDTH * GROUP, 41 * WIDTH + NARROW)  # keys once more by dims, and a mean value
IN_DECODING = {
    "h2o": Estimate(resident=16),
    "key_norm": Estimate(0, 1, 16),
    "quest": QUEST,
    "quest_eval": Estimate(BOUNDS, 11 * 2 * GROUP, BOUNDS),
    "sparq": DIMS,
    "sparq_released": DIMS,
    # 13 candidates: the current token and 3 pages; a key of 4 bits with its least and its step
    "twilight": both(QUEST, Estimate(13 * (WIDTH / 4 + 2), 13 * GROUP, 41 * (WIDTH / 4 + 2))),
    "double_p": Estimate(7 * (WIDTH + 1), 7 * GROUP, 7 * (WIDTH + NARROW + 1) + 41),  # and a label for each token
    "vattention": Estimate(BOUNDS, 11 * 2 * GROUP, BOUNDS),
    **dict.fromkeys(("sketch_walk", "sketch_walk_damped"), Estimate(11 * 16, 11, 2 * 11 * 16 + 11 * 12 / 2)),
}


class Planned(Session):
    """Keeps what plans say that choosing has cost."""

    def __init__(self, method: Method) -> None:
        super().__init__(method, 1, turn=inputs(1).turn)
        self.costs: list[Estimate] = []

    def _settle(self, view: View, plan: Plan | None) -> None:
        self.costs.append(NOTHING if plan is None else plan.estimate)
        super()._settle(view, plan)


def costs(method: Method, tokens: int = PROMPT + 1) -> list[Estimate]:
    """Of the prompt and of each decoded token."""
    ((q, k, v),) = inputs(tokens, layers=1).layers
    session, v = Planned(method), v[..., :NARROW]
    for start, stop in [(0, PROMPT), *((n, n + 1) for n in range(PROMPT, tokens))]:
        session.attend(0, q[:, start:stop], k[:, start:stop], v[:, start:stop], WIDTH**-0.5)
        session.end_prompt()
    return session.costs


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_what_choosing_costs(kind: type[Method]) -> None:
    method = half(kind)
    if isinstance(method, FlexPrefill):
        method = replace(method, tau=0.0)  # no head takes blocks
    prompt, decoded = costs(method)
    assert prompt == IN_PROMPT.get(kind.name, NOTHING)
    if kind.name == "vattention_released":
        drawn = decoded.read - BOUNDS  # two for each head, some of them twice
        assert WIDTH < drawn <= 2 * GROUP * WIDTH
        assert decoded == Estimate(BOUNDS + drawn, 11 * 2 * GROUP + 2 * GROUP, BOUNDS)
        return
    assert decoded == IN_DECODING.get(kind.name, NOTHING)


def test_what_an_oracle_and_exact_keys_cost() -> None:
    """Settings beside the usual ones: all keys are scored; 16 bits are the keys themselves; sequences are a mean."""
    small = {"page": 4, "window": 4, "least": 8, "epsilon": 0.5}
    oracle = method_named("vattention")(budget=Budget(tokens=16), ranking="oracle", **small)
    assert costs(oracle)[1] == Estimate(41 * WIDTH, 41 * GROUP)
    certain = replace(oracle, bound="hoeffding")  # its range is the greatest bound of a page
    assert costs(certain)[1] == Estimate(41 * WIDTH + BOUNDS, 41 * GROUP + 11 * 2 * GROUP, BOUNDS)
    exact = replace(half(method_named("twilight")), bits=16)
    assert costs(exact)[1] == both(QUEST, Estimate(13 * WIDTH, 13 * GROUP))
    plain = replace(half(method_named("sparq")), mean_over="")
    assert costs(plain)[1] == replace(DIMS, resident=41 * WIDTH)


def test_clusters_that_are_made_while_decoding_are_paid_for() -> None:
    """Of 8 tokens, once 8 more than the recent ones are in none."""
    found = costs(replace(half(method_named("double_p")), refresh=8), PROMPT + 9)
    plain = costs(half(method_named("double_p")), PROMPT + 9)
    extra = [a.read - b.read for a, b in zip(found, plain, strict=True)]
    # at the 48th token: 8 tokens, 2 centroids, 10 times; from then on two more centroids are looked at
    assert extra == [0] * 8 + [10 * 8 * WIDTH + 2 * (WIDTH + 1), 2 * (WIDTH + 1)]


@pytest.mark.parametrize("lists", [GROUPS, HEADS], ids=["per KV head", "per query head"])
@pytest.mark.parametrize("size", [4, 1], ids=["blocks", "tokens"])
@pytest.mark.parametrize("whole", [True, False])
def test_each_kv_head_has_its_own_counts(lists: int, size: int, whole: bool) -> None:
    """Three sequences, so that no sum over them can be one over KV heads; also after an eviction."""
    tokens, batch, view = 24, 3, view_of(24, batch=3)
    keep = torch.rand(batch, lists, tokens // size, tokens // size) < torch.tensor([0.2, 0.9]).repeat_interleave(
        lists // GROUPS
    ).view(1, -1, 1, 1)
    if not whole:
        view = replace(view, positions=view.positions.masked_fill(view.positions == 5, -1))  # it was evicted
    ledger = Ledger()
    ledger.record(view, Plan.of(keep, unit=size, tile=size))
    mask = keep.repeat_interleave(size, 2).repeat_interleave(size, 3).tril()
    if not whole:
        mask[..., 5] = False
    heads = mask.repeat_interleave(HEADS // lists, 1).unflatten(1, (GROUPS, GROUP)).double()
    counts = ledger.counts["prefill", 0]
    assert counts.attended.tolist() == heads.sum((0, 2, 3, 4)).tolist()
    assert counts.reads.tolist() == (heads.amax(2).sum((0, 2, 3)) * 2 * WIDTH).tolist()
    assert counts.visible.tolist() == [batch * tokens * (tokens + 1) / 2 * GROUP] * GROUPS
