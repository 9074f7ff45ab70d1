"""Sketch-and-Walk: the sketch's bound, the walk against loops, and what it is known for."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import GROUPS, LAYERS, WIDTH, Inputs, inputs, run
from torch import Tensor
from views import GROUP, SCALE, best, softmax, view_of

from nsa.baselines import Budget, BudgetError, Method, View
from nsa.baselines.attention import kept
from nsa.baselines.importance.blocks import pooled_attention
from nsa.baselines.importance.sketch import hadamard_sketch
from nsa.baselines.method import State
from nsa.baselines.methods.sketch_walk import SketchWalk, SketchWalkDamped

BLOCK, BUDGET = 4, Budget(tokens=16)


@pytest.mark.parametrize("width", [1, 3, 16, 24])
def test_a_sketch_of_all_coordinates_keeps_products(width: int) -> None:
    x, y = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
    sketch = hadamard_sketch(width, 64, 3)
    torch.testing.assert_close((x @ sketch) @ (y @ sketch).T, x @ y.T, atol=1e-5, rtol=1e-5)


def test_products_of_sketches_are_unbiased_and_their_variance_is_bounded() -> None:
    """Over the draws of the sketch: the mean is the product, the variance at most (|x|^2 |y|^2 + <x, y>^2) / k."""
    random = torch.randn(2, 24, generator=torch.Generator().manual_seed(1))
    flat = torch.ones(2, 24)  # without random signs one coordinate would have all of it
    for x, y in (random, flat):
        the_bound_holds(x, y)


def the_bound_holds(x: Tensor, y: Tensor) -> None:
    true, lengths, spreads = float(x @ y), float(x.norm() * y.norm()), []
    for size in (4, 16):
        sketches = torch.stack([hadamard_sketch.__wrapped__(24, size, seed) for seed in range(600)])
        products = ((x @ sketches) * (y @ sketches)).sum(-1)
        spreads.append(float(products.var()))
        assert abs(float(products.mean()) - true) < 4 * (spreads[-1] / 600) ** 0.5
        bound = (lengths**2 + true**2) / size
        assert spreads[-1] < bound
        far = ((products - true).abs() > 1.5 * lengths * size**-0.5).float().mean()
        assert far < 2 / 1.5**2, "Chebyshev's bound, as Johnson and Lindenstrauss need it"
    assert spreads[1] < spreads[0] / 3, "it falls with the size, a little faster: without replacement"


def masks_of(method: Method, given: Inputs, tokens: int) -> list[Tensor]:
    """Of each layer, of the first sequence: (G, T, S)."""
    shared: dict[str, Any] = {}
    masks = []
    for layer, (q, k, v) in enumerate(given.cut(0, tokens)):
        view = replace(view_of(tokens, q=q[:1], k=k[:1], v=v[:1]), layer=layer, num_layers=len(given.layers))
        masks.append(kept(view, method.prefill_select(view, State(shared=shared)), torch.arange(tokens))[0])
    return masks


def by_loops(
    given: Inputs, group: int, tokens: int, size: int, count: int, literal: bool, direct: float
) -> list[Tensor]:
    """The walk of one KV head, literal products in logarithms."""
    sketch = hadamard_sketch(WIDTH, size, 0)
    blocks = [list(range(s, min(s + BLOCK, tokens))) for s in range(0, tokens, BLOCK)]
    num, masks, walk = len(blocks), [], None
    for q, k, _ in given.layers:
        means = [q[0, b][:, group * GROUP : (group + 1) * GROUP].mean((0, 1)) @ sketch for b in blocks]
        keys = [k[0, b, group].mean(0) @ sketch for b in blocks]
        own = [[0.0] * num for _ in blocks]  # logarithms
        for i in range(num):
            row = softmax([float(means[i] @ keys[j]) * SCALE for j in range(i + 1)])
            powers = [8 * math.log(p) for p in row]
            top = max(powers)
            whole = 0.0 if literal else top + math.log(sum(math.exp(p - top) for p in powers))
            own[i] = [p - whole for p in powers]
        if walk is None:
            walk = own
        else:
            ways = [[[walk[i][m] + own[m][j] for m in range(j, i + 1)] for j in range(i + 1)] for i in range(num)]
            product = [[max(w) + math.log(sum(math.exp(x - max(w)) for x in w)) for w in row] for row in ways]
            if direct:
                both = [zip(a, b, strict=True) for a, b in zip(own, product, strict=True)]
                product = [
                    [math.log(direct * math.exp(x) + (1 - direct) * math.exp(y)) for x, y in row] for row in both
                ]
            walk = product
        keep = set()
        for i in range(num):
            scores = [math.inf if j in (0, i) else walk[i][j] for j in range(i + 1)]
            keep |= {(i, j) for j in best(scores, count)}
        rows = range(tokens)
        masks.append(torch.tensor([[j <= i and (i // BLOCK, j // BLOCK) in keep for j in rows] for i in rows]))
    return masks


@pytest.mark.parametrize("tokens", [1, 30, 32])
@pytest.mark.parametrize(
    "settings", [{}, {"normalise": False}, {"sketch": 8}, {"direct": 0.75}], ids=["rows", "literal", "short", "damped"]
)
def test_the_walk_is_its_loops(tokens: int, settings: dict[str, Any]) -> None:
    given = inputs(tokens, batch=1, scale=1.0)
    found = masks_of(SketchWalk(budget=BUDGET, block=BLOCK, **settings), given, tokens)
    literal = not settings.get("normalise", True)
    for group in range(GROUPS):
        wanted = by_loops(given, group, tokens, settings.get("sketch", 16), 4, literal, settings.get("direct", 0.0))
        for layer in range(LAYERS):
            assert torch.equal(found[layer][group], wanted[layer])


@pytest.mark.parametrize("direct", [0.0, 0.75])
def test_rows_of_the_walk_sum_to_one_and_never_look_ahead(direct: float) -> None:
    """After 48 layers, too, where the literal product in fp32 has nothing left to rank by."""
    given = inputs(64, batch=1, layers=48, scale=1.0)
    method = SketchWalk(budget=BUDGET, block=BLOCK, direct=direct)
    session = run(method, given, prompt=64)[1]
    reach = session.states[0].shared["reach"]
    torch.testing.assert_close(reach.sum(-1), torch.ones_like(reach[..., 0]))
    assert torch.equal(reach, reach.tril())
    assert ((reach > 0).sum(-1) >= torch.arange(1, 17).clamp(max=4)).all()

    literal = torch.eye(16)
    for layer in range(48):
        view = view_of(64, q=given.layers[layer][0], k=given.layers[layer][1])
        literal = literal @ (pooled_attention(view, BLOCK)[0][0, 0] ** 8)
    assert ((literal > 0).sum(-1) < torch.arange(1, 17).clamp(max=4)).float().mean() > 0.5, "why rows are normalised"


def test_the_first_step_is_attention_between_means() -> None:
    """With power 1 and a sketch that is exact; the heads of a group are equal, as one mean query stands for them."""
    view = view_of(30)
    view = replace(view, q=view.q[:, :, ::GROUP].repeat_interleave(GROUP, 2))
    state = State()
    SketchWalk(budget=BUDGET, block=BLOCK, power=1.0).prefill_select(view, state)
    torch.testing.assert_close(state.shared["reach"].float(), pooled_attention(view, BLOCK)[0][:, ::GROUP])


@pytest.mark.parametrize("settings", [{}, {"normalise": False}, {"scope": "layer", "direct": 0.5}])
def test_a_decoded_row_is_the_last_of_a_prompt(settings: dict[str, Any]) -> None:
    given = inputs(34, batch=1)
    method = SketchWalk(budget=Budget(tokens=12), block=BLOCK, **settings)
    decoded = run(method, given, prompt=25)[0]
    for tokens in (26, 28, 29, 34):
        whole = run(method, Inputs(given.cut(0, tokens), given.turn), prompt=tokens)[0]
        for one, two in zip(decoded, whole, strict=True):
            torch.testing.assert_close(one[:, tokens - 1], two[:, -1], atol=1e-6, rtol=1e-6)


def test_chunks_of_padded_sequences_choose_as_each_alone_does() -> None:
    """The second chunk begins in another block of each sequence; the first has nothing of the last one."""
    given, padding = inputs(44, batch=3), torch.tensor([0, 13, 23])
    method = SketchWalk(budget=Budget(tokens=12), block=BLOCK)
    outs = run(method, given, prompt=40, chunks=(20,), padding=padding)[0]
    for row, start in enumerate(padding.tolist()):
        alone = run(method, given.row(row, start), prompt=40 - start, chunks=(20 - start,) if start < 20 else ())[0]
        for one, two in zip(outs, alone, strict=True):
            torch.testing.assert_close(one[row : row + 1, start:], two, atol=1e-5, rtol=1e-5)


def test_a_layer_has_one_choice_for_all_heads_if_asked() -> None:
    given = inputs(40, batch=1)
    for scope, same in (("layer", True), ("group", False)):
        masks = masks_of(SketchWalk(budget=BUDGET, block=BLOCK, scope=scope), given, 40)
        assert all(torch.equal(m[0], m[1]) for m in masks) == same


def test_the_walk_alone_may_miss_what_a_layer_looks_at_and_damping_finds_it() -> None:
    """Why the label ``alone`` is False: the product goes on from where earlier layers went, and from nowhere else."""
    given = inputs(64, batch=1, layers=2, scale=1.0)
    for (q, k, _), target in zip(given.layers, (8, 20), strict=True):  # block 2, which is before block 5, and then 5
        q[:, 60:], k[:, target : target + BLOCK] = 0.1 * q[:, 60:] + 4.0, 4.0
    seen = [
        masks_of(m(budget=BUDGET, block=BLOCK), given, 64)[1][:, 60, 22].all() for m in (SketchWalk, SketchWalkDamped)
    ]
    assert [bool(x) for x in seen] == [False, True]


def test_what_a_decoded_token_costs() -> None:
    """A sketch for each block; from the second layer on W; its row of products; nothing of the keys."""
    given = inputs(33, batch=1, layers=2)
    method, shared = SketchWalk(budget=BUDGET, block=BLOCK, sketch=8), {}
    costs, states = [], [State(shared=shared) for _ in range(2)]
    for start, stop in ((0, 32), (32, 33)):
        for layer in range(2):
            q, k, v = (x[:, :stop] for x in given.layers[layer])
            place = torch.arange(start, stop)[None]
            view: View = replace(
                view_of(stop, q=q[:, start:], k=k, v=v, query_positions=place), layer=layer, prompt=start == 0
            )
            plan = method.prefill_select(view, states[layer])
            assert plan is not None
            costs.append(plan.estimate)
    assert [c.read for c in costs[2:]] == [9 * 8, 9 * 8 + 45]
    assert [c.pairs for c in costs[2:]] == [9 * 8 / WIDTH, (9 * 8 + 45) / WIDTH]
    assert [c.resident for c in costs[2:]] == [2 * 9 * 8 + 45] * 2


def test_a_budget_of_reads_pays_for_the_sketches_and_from_the_second_layer_on_for_the_walk() -> None:
    """At 33 tokens 9 sketches of 8 elements, 72 / 32 tokens of keys and values; with 45 steps of the walk 117 / 32."""
    given = inputs(33, layers=2)
    for scope, blocks in (("group", (4, 3)), ("layer", (4, 4))):  # 18 - 2 and 18 - 4 tokens; 18 - 1 and 18 - 2
        method = SketchWalk(budget=Budget(tokens=18, counts="reads"), block=BLOCK, sketch=8, scope=scope)
        _, session = run(method, given, prompt=32)
        for layer, number in enumerate(blocks):
            read = session.ledger.counts["decode", layer].reads / 2 - (72 + 45 * layer) / (1 + (scope == "layer"))
            assert read.tolist() == [((number - 1) * BLOCK + 1) * 2 * WIDTH] * GROUPS, "the last block has one token"


def test_another_seed_is_another_sketch_and_another_choice() -> None:
    given = inputs(64, batch=1, layers=1)
    masks = [masks_of(SketchWalk(budget=BUDGET, block=BLOCK, sketch=4, seed=seed), given, 64)[0] for seed in (0, 1)]
    assert not torch.equal(*masks)


def test_a_budget_below_the_two_blocks_that_are_always_in_is_refused() -> None:
    with pytest.raises(BudgetError, match="8 tokens are the least"):
        run(SketchWalk(budget=Budget(tokens=7), block=BLOCK), inputs(20), prompt=20)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="group or layer"):
        SketchWalk(scope="head")
    with pytest.raises(ValueError, match="literal product"):
        SketchWalk(normalise=False, direct=0.5)
