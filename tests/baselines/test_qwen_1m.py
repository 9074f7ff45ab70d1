"""Dual chunk attention and Qwen2.5-1M's recipe against loops over positions."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, Inputs, inputs, run
from torch import Tensor
from views import GROUP, SCALE, best, view_of

from nsa.baselines import Budget, Method, View, attend
from nsa.baselines.attention import kept
from nsa.baselines.method import State
from nsa.baselines.methods.dual_chunk import DualChunk, dual_chunk_parts
from nsa.baselines.methods.qwen_1m import Qwen1M
from nsa.baselines.plan import Plan
from nsa.baselines.search import Calibration, found, recall, refined

CHUNK, LOCAL, SIZE = 16, 4, 12
SMALL: dict[str, Any] = {"chunk": CHUNK, "local": LOCAL, "num_queries": 8, "vertical_share": 0.5, "sinks": 1, "near": 2}


def distance(i: int, j: int, critical: bool = False, size: int = SIZE) -> int:
    """Between query i and key j, from the paper: three cases, in positions that start anew with each chunk."""
    a, b, r = i // size, j // size, i % size
    if a == b:
        at = r
    elif a == b + 1:
        at = r + size if critical else min(r + size, CHUNK)
    else:
        at = r + CHUNK if critical else min(size - 1 + size, CHUNK)
    return at - j % size


def logits_by_loops(view: View, critical: bool = False, size: int = SIZE) -> Tensor:
    """(H, T, T): unrotated queries and keys, turned by the distance of each pair."""
    n, turn = view.q.shape[1], view.turn
    assert turn is not None
    q, k = (turn(x, -torch.arange(n)[None])[0] for x in (view.q, view.k))
    logits = torch.full((HEADS, n, n), -torch.inf)
    for i in range(n):
        for j in range(i + 1):
            turned = turn(q[None, None, i], torch.tensor([[distance(i, j, critical, size)]]))[0, 0]
            logits[:, i, j] = (turned.view(GROUPS, GROUP, WIDTH) * k[j][:, None]).sum(-1).flatten() * SCALE
    return logits


@pytest.mark.parametrize(("tokens", "local"), [(13, LOCAL), (45, LOCAL), (45, 10)])
def test_dual_chunk_attention_is_its_loops(tokens: int, local: int) -> None:
    """With a local window of 10 two chunks are shorter than the longest distance."""
    view = view_of(tokens)
    out, lse = attend(view, DualChunk(chunk=CHUNK, local=local).prefill_select(view, State()))
    logits = logits_by_loops(view, size=CHUNK - local)
    values = view.v[0].transpose(0, 1).repeat_interleave(GROUP, 0)
    torch.testing.assert_close(out[0].transpose(0, 1), logits.softmax(-1) @ values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[0], logits.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_up_to_a_chunk_it_is_plain_attention_and_needs_no_turn() -> None:
    view = view_of(SIZE, turn=None)
    one, two = attend(view, Plan(dual_chunk_parts(view, CHUNK, LOCAL))), attend(view, None)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    with pytest.raises(ValueError, match="rotary"):
        attend(longer := view_of(SIZE + 1, turn=None), Plan(dual_chunk_parts(longer, CHUNK, LOCAL)))


@pytest.mark.parametrize("method", [DualChunk(chunk=CHUNK, local=LOCAL), Qwen1M(budget=Budget(tokens=10), **SMALL)])
def test_folded_positions_are_of_the_sequence_and_not_of_padding(method: Method) -> None:
    given, padding = inputs(50, layers=1), torch.tensor([0, 9])
    outs = run(method, given, prompt=44, padding=padding)[0][0]
    alone = run(method, given.row(1, 9), prompt=35)[0][0]
    torch.testing.assert_close(outs[1:, 9:], alone, atol=1e-5, rtol=1e-5)
    if isinstance(method, DualChunk):
        for options in ({"prompt": 44, "chunks": (13, 30)}, {"prompt": 1}):
            torch.testing.assert_close(
                run(method, given.row(1), **options)[0][0], run(method, given.row(1), prompt=44)[0][0]
            )


def test_distances_are_true_near_a_border_and_never_above_a_chunk() -> None:
    view = view_of(100)
    rows = torch.arange(100)
    true = (rows[:, None] - rows)[None].expand(GROUPS, -1, -1)
    for critical in (False, True):
        found_at = torch.full_like(true, -1)
        for number, part in enumerate(dual_chunk_parts(view, CHUNK, LOCAL, critical)):
            on = (part.mask(rows, 100) & view.visible)[0]
            query = view.query_positions if part.query_at is None else part.query_at
            key = view.positions if part.key_at is None else part.key_at
            found_at = torch.where(on, (query[:, None, :, None] - key.transpose(1, 2)[:, :, None])[0], found_at)
            if number < 2:
                near = on if critical else on & (true <= LOCAL)
                assert torch.equal(found_at[near], true[near])
        seen = view.visible[0]
        assert (found_at[seen] >= 0).all(), "all keys are in one part"
        wanted = [[distance(i, j, critical) for j in range(i + 1)] for i in range(100)]
        assert [found_at[0, i, : i + 1].tolist() for i in range(100)] == wanted
        if not critical:
            assert int(found_at.max()) == CHUNK


@pytest.mark.parametrize("tokens", [17, 45])
def test_lines_are_chosen_at_positions_that_grow(tokens: int) -> None:
    view, method = view_of(tokens), Qwen1M(budget=Budget(tokens=10), **SMALL)
    plan = method.prefill_select(view, State())
    mask = kept(view, plan, torch.arange(tokens))[0]
    chances = logits_by_loops(view, critical=True).softmax(-1).view(GROUPS, GROUP, tokens, tokens).sum(1)
    differs = False
    for group in range(GROUPS):
        vertical, slash = [0.0] * tokens, [0.0] * tokens
        for i in range(tokens - 8, tokens):
            for j in range(i + 1):
                vertical[j] += float(chances[group, i, j])
                slash[i - j] += float(chances[group, i, j])
        vertical[0] = slash[0] = slash[1] = torch.inf
        columns, diagonals = set(best(vertical, 5)), set(best(slash, 5))
        rows = range(tokens)
        wanted = torch.tensor([[j <= i and (j in columns or i - j in diagonals) for j in rows] for i in rows])
        assert torch.equal(mask[group], wanted)
        differs |= not wanted.equal(torch.ones_like(wanted).tril())
    assert differs
    logits = logits_by_loops(view).masked_fill(~mask.repeat_interleave(GROUP, 0), -torch.inf)
    values = view.v[0].transpose(0, 1).repeat_interleave(GROUP, 0)
    out = attend(view, plan)[0][0].transpose(0, 1)
    torch.testing.assert_close(out, logits.softmax(-1) @ values, atol=1e-5, rtol=1e-5)


def test_factors_are_of_a_layer_and_of_a_head_and_rounded_up() -> None:
    method = Qwen1M(budget=Budget(tokens=10), factors=((1.0, 1.25), (1.5, 9.0)), **SMALL)
    for layer, sizes in enumerate(([10, 13], [15, 40])):  # 12.5; no more than there are tokens
        assert method.size(view_of(40, layer=layer, num_layers=2)).tolist() == [sizes]


def test_each_chunk_of_a_prompt_chooses_anew_and_decoding_is_dual_chunk_attention() -> None:
    given, method = inputs(60, batch=1), Qwen1M(budget=Budget(tokens=10), **SMALL)
    whole = run(method, given, prompt=48)[0][0]
    parts = run(method, given, prompt=48, chunks=(24,))[0][0]
    first = run(method, Inputs(given.cut(0, 24), given.turn), prompt=24)[0][0]
    assert torch.equal(parts[:, :24], first) and not torch.allclose(parts, whole, atol=1e-3)
    dense = run(DualChunk(chunk=CHUNK, local=LOCAL), given, prompt=48)[0][0]
    torch.testing.assert_close(parts[:, 48:], dense[:, 48:])


def test_refinement_grows_the_budgets_of_heads_that_keep_too_little() -> None:
    """One KV head looks at its own token and needs nothing more; the other one is spread."""
    given = inputs(60, batch=1, layers=2, scale=0.3)
    for q, k, _ in given.layers:
        q[:, :, :GROUP] = 8 * k[:, :, :1]
    method = Qwen1M(budget=Budget(tokens=10), **SMALL)
    calibration = Calibration(
        find=partial(refined, method=method, threshold=0.8), under=DualChunk(chunk=CHUNK, local=LOCAL)
    )
    factors = found(run(calibration, given, prompt=60)[1])
    assert [layer[0] for layer in factors] == [1.0, 1.0] and all(layer[1] > 1 for layer in factors)
    better = replace(method, factors=factors)
    for layer, (q, k, v) in enumerate(given.layers):
        view = view_of(60, q=q, k=k, v=v, layer=layer, num_layers=2)
        whole = attend(view, Plan(dual_chunk_parts(view, CHUNK, LOCAL)))[1]
        before, after = (
            recall(view, attend(view, m.prefill_select(view, State()))[1], whole) for m in (method, better)
        )
        assert before[1] < 0.8 and (after >= 0.8).all()
        assert (better.size(view) <= 60).all()
    assert refined(view, method, threshold=1.0)[1] >= 6, "it ends when a head has all"


def padded(*lengths: int, **changes: Any) -> View:
    """Random sequences of these lengths, padded on the left."""
    longest, seen = max(lengths), torch.tensor(lengths)
    place = (torch.arange(longest) - (longest - seen)[:, None]).clamp(min=-1)
    slots = place[..., None].expand(-1, -1, GROUPS)
    view = view_of(longest, batch=len(lengths), scale=0.3)
    return replace(view, query_positions=place, positions=slots, seen=seen, **changes)


def test_the_mass_that_is_kept_is_a_mean_over_all_queries_without_padding() -> None:
    view, dice = padded(2, 5), torch.Generator().manual_seed(0)
    lse = torch.randn(2, HEADS, 5, generator=dice)
    whole = lse + torch.rand(2, HEADS, 5, generator=dice)
    shares = (lse - whole).exp()
    queries = [(0, 3), (0, 4), *((1, t) for t in range(5))]
    for group, kept_mass in enumerate(recall(view, lse, whole).tolist()):
        heads = range(group * GROUP, (group + 1) * GROUP)
        assert kept_mass == pytest.approx(sum(float(shares[b, h, t]) for b, t in queries for h in heads) / (7 * GROUP))


def test_refinement_goes_on_until_the_longest_sequence_keeps_enough() -> None:
    """The shorter one has all its tokens long before."""
    view, method = padded(14, 60), Qwen1M(budget=Budget(tokens=10), **SMALL)
    factors = refined(view, method, threshold=0.95)
    trial = replace(method, factors=(factors,))
    assert trial.size(view)[0].tolist() == [14, 14]
    whole = attend(view, Plan(dual_chunk_parts(view, CHUNK, LOCAL)))[1]
    assert (recall(view, attend(view, trial.prefill_select(view, State()))[1], whole) >= 0.95).all()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="local"):
        DualChunk(chunk=8, local=8)
    assert DualChunk(chunk=8, local=0).local == Qwen1M(chunk=8, local=0).local == 0, "no distance over a border"
    with pytest.raises(ValueError, match="at least 1"):
        Qwen1M(factors=((0.5,),))
    with pytest.raises(ValueError, match="threshold"):
        refined(view_of(8), Qwen1M(), threshold=0.0)
    with pytest.raises(ValueError, match="factors are of 2 layers"):
        Qwen1M(budget=Budget(tokens=4), factors=((1, 1), (1, 1))).prefill_select(view_of(20), State())
