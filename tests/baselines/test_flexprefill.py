"""FlexPrefill against loops, written from the paper's algorithms and, as released, from what the code does."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, inputs
from torch import Tensor
from views import GROUP, SCALE, best, mask_of, softmax, view_of

from nsa.baselines import View
from nsa.baselines.attention import kept
from nsa.baselines.importance.agreement import divergence, mean_query_attention
from nsa.baselines.importance.lines import last_rows
from nsa.baselines.method import State
from nsa.baselines.methods.flexprefill import FlexPrefill
from nsa.baselines.methods.flexprefill_released import FlexPrefillReleased

BLOCK = 8
SMALL: dict[str, Any] = {"block": BLOCK, "min_budget": 5, "gamma": 0.7}


class Loops:
    """What query heads ``heads`` of one KV head look at: means over them."""

    def __init__(self, view: View, heads: list[int]) -> None:
        q, k = view.q[0, :, heads], view.k[0, :, heads[0] // GROUP]
        self.n = n = len(k)
        self.blocks = [range(s, min(s + BLOCK, n)) for s in range(0, n, BLOCK)]
        self.vertical, self.slash = [0.0] * n, [0.0] * n
        probe = range(max(0, n - BLOCK), n)
        means = [k[list(b)].mean(0) for b in self.blocks]
        self.by_means = [0.0] * len(means)
        self.map = [[0.0] * len(means) for _ in means]
        for head in range(len(heads)):
            for i in probe:
                for j, p in enumerate(softmax([float(q[i, head] @ k[j]) * SCALE for j in range(i + 1)])):
                    self.vertical[j] += p / len(probe) / len(heads)
                    self.slash[i - j] += p / len(probe) / len(heads)
            query = q[list(probe), head].mean(0)
            for j, p in enumerate(softmax([float(query @ m) * SCALE for m in means])):
                self.by_means[j] += p / len(heads)
            for i, b in enumerate(self.blocks):
                query = q[list(b), head].mean(0)
                for j, p in enumerate(softmax([float(query @ m) * SCALE for m in means[: i + 1]])):
                    self.map[i][j] += p / len(heads)

    @property
    def distance(self) -> float:
        total = 0.0
        for number, block in enumerate(self.blocks):
            a, b = self.by_means[number], sum(self.vertical[j] for j in block)
            total += sum(0.5 * x * math.log(x / ((a + b) / 2)) for x in (a, b) if x > 0)
        return math.sqrt(max(0.0, total))


def fewest(mass: list[float], gamma: float) -> list[int]:
    order, total = best(mass, len(mass)), 0.0
    for count, i in enumerate(order):
        total += mass[i]
        if total >= gamma * sum(mass):
            return order[: count + 1]
    return order


def by_paper(view: View, group: int, tau: float) -> Tensor:
    see = Loops(view, list(range(group * GROUP, (group + 1) * GROUP)))
    n, num = see.n, len(see.blocks)
    if see.distance >= tau:
        columns = set(fewest(see.vertical, 0.7)) | set(best(see.vertical, 5))
        diagonals = set(fewest(see.slash, 0.7)) | set(best(see.slash, 5)) | {0}
        return torch.tensor([[j <= i and (j in columns or i - j in diagonals) for j in range(n)] for i in range(n)])
    flat = fewest([p for row in see.map for p in row], 0.7)
    keep = (
        {(i // num, i % num) for i in flat}
        | {(i, i) for i in range(num)}
        | {(i, best(see.map[i], 1)[0]) for i in range(num)}
    )
    return torch.tensor([[j <= i and (i // BLOCK, j // BLOCK) in keep for j in range(n)] for i in range(n)])


def cases() -> list[View]:
    """Random heads, and heads whose keys are alike within a block, so that means tell the truth."""
    alike = inputs(48, batch=1, layers=1, scale=1.0, seed=3)
    q, k, _ = alike.layers[0]
    q[:], k[:] = q[:, torch.arange(48) // BLOCK * BLOCK], k[:, torch.arange(48) // BLOCK * BLOCK]
    return [view_of(50), view_of(48, seed=1), view_of(48, q=q, k=k)]


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("tau", [0.0, 0.1, 1.0])
def test_flexprefill_is_its_loops(case: int, tau: float) -> None:
    view = cases()[case]
    found = mask_of(FlexPrefill(tau=tau, **SMALL), view)
    for group in range(GROUPS):
        assert torch.equal(found[group], by_paper(view, group, tau))


def by_release(view: View, head: int, tau: float, least: int) -> Tensor:
    """128 is written into the release, whatever the block is: so few tokens always count one block."""
    see = Loops(view, [head])
    n, num = see.n, len(see.blocks)

    def count(mass: list[float]) -> int:
        ordered, total, covered = sorted(mass, reverse=True), 0.0, 1
        for p in ordered:
            total += p
            covered += total <= 0.7
        return min(num, max(least, covered // 128 + 1))

    vertical = [sum(see.vertical[j] for j in block) for block in see.blocks]
    far = see.slash[::-1]  # the release's order, and its blocks: from the farthest on
    slash = [sum(far[s : s + BLOCK]) for s in range(0, n, BLOCK)]
    vertical[0] = slash[-1] = math.inf
    aware = see.distance < tau
    columns = set(best(vertical, least if aware else count(see.vertical)))
    diagonals = {num - 1 - s for s in best(slash, least if aware else count(see.slash))}
    keep = {(i, j) for i in range(num) for j in range(i + 1) if j in columns or i - j in diagonals}
    if aware:
        flat, total = [p for row in see.map for p in row], 0.0
        for i in best(flat, num * num):
            total += flat[i]
            if total <= 0.7 * num:
                keep.add((i // num, i % num))
    return torch.tensor([[j <= i and (i // BLOCK, j // BLOCK) in keep for j in range(n)] for i in range(n)])


@pytest.mark.parametrize("case", range(3))
@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("least", [1, 3])
def test_the_released_one_is_its_loops(case: int, tau: float, least: int) -> None:
    view = cases()[case]
    found = mask_of(FlexPrefillReleased(tau=tau, **{**SMALL, "min_budget": least * BLOCK - 3}), view)
    assert len(found) == HEADS
    for head in range(HEADS):
        assert torch.equal(found[head], by_release(view, head, tau, least))


def test_both_branches_are_taken() -> None:
    """Where keys are alike within a block the divergence is 0; elsewhere it is not."""
    views = cases()
    for view, low in zip(views, (False, False, True), strict=True):
        for group in range(GROUPS):
            distance = Loops(view, list(range(group * GROUP, (group + 1) * GROUP))).distance
            assert (distance < 0.1) == low, distance


@pytest.mark.parametrize("case", range(3))
def test_the_divergence_is_the_root_of_jensen_and_shannons(case: int) -> None:
    """Of each query head alone, and of the means over the heads of a KV head."""
    view = cases()[case]
    rows = last_rows(view, BLOCK)
    means, mass = mean_query_attention(view, rows, BLOCK), view.scores(rows).softmax(-1).sum(2)
    each = divergence(view, rows, means, mass, BLOCK)[0].tolist()
    assert each == pytest.approx([Loops(view, [head]).distance for head in range(HEADS)], abs=1e-4)
    of_groups = divergence(view, rows, *(view.per_group(x).mean(2) for x in (means, mass)), BLOCK)[0].tolist()
    heads = [list(range(group * GROUP, (group + 1) * GROUP)) for group in range(GROUPS)]
    assert of_groups == pytest.approx([Loops(view, some).distance for some in heads], abs=1e-4)


@pytest.mark.parametrize("gamma", [0.3, 0.6, 0.9, 0.99])
def test_the_last_block_of_queries_keeps_the_mass_that_was_asked_for(gamma: float) -> None:
    """Columns alone have gamma of it; the release takes one column fewer, and rounds up to blocks."""
    view = view_of(96)
    mask = mask_of(FlexPrefill(gamma=gamma, tau=0.0, block=BLOCK, min_budget=1), view)
    mass = (view.scores()[0].softmax(-1) * mask.repeat_interleave(GROUP, 0))[:, -BLOCK:].sum(-1)
    assert (mass.view(GROUPS, -1).mean(1) >= gamma - 1e-6).all()


def test_more_gamma_keeps_more_and_costs_are_counted() -> None:
    view = view_of(96)
    masks = [mask_of(FlexPrefill(gamma=g, block=BLOCK, min_budget=1), view) for g in (0.5, 0.8, 1.0)]
    assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all() and not torch.equal(masks[0], masks[1])
    for tau, blocks in ((0.0, 0), (2.0, 12 * 13 / 2)):
        plan = FlexPrefill(tau=tau, block=BLOCK, min_budget=1).prefill_select(view, State())
        assert plan is not None
        probe = sum(range(96 - BLOCK + 1, 97))
        assert plan.estimate.pairs == GROUP * (probe + 12 + blocks)
        assert plan.estimate.read == 96 * 16


def test_the_release_is_dense_up_to_two_blocks_or_its_least_budget() -> None:
    for tokens, budget, dense in ((16, 1, True), (17, 1, False), (16, 20, True), (24, 20, True), (80, 20, False)):
        mask = mask_of(FlexPrefillReleased(gamma=0.1, tau=0.0, block=BLOCK, min_budget=budget), view_of(tokens))
        assert bool((mask == torch.ones(tokens, tokens, dtype=torch.bool).tril()).all()) == dense


@pytest.mark.parametrize("tau", [0.0, 2.0])
@pytest.mark.parametrize("kind", [FlexPrefill, FlexPrefillReleased])
def test_a_sequence_chooses_as_it_does_alone_beside_one_that_has_more(kind: type[FlexPrefill], tau: float) -> None:
    """Of twelve blocks the shorter one has five. What both cost is their mean."""
    method, both = kind(tau=tau, **{**SMALL, "min_budget": 21}), view_of(92, batch=2, scale=1.0)
    both.k[1, 55:63] = 2 * both.q[1, 84:, ::GROUP]  # its last queries look at the farthest diagonals
    place = torch.stack([torch.arange(92), (torch.arange(92) - 55).clamp(min=-1)])
    slots = place[..., None].expand(-1, -1, GROUPS)
    both = replace(both, query_positions=place, positions=slots, seen=torch.tensor([92, 37]))
    plans = [method.prefill_select(both, State())]
    for row, start in enumerate((0, 55)):
        q, k, v = (x[row : row + 1, start:] for x in (both.q, both.k, both.v))
        alone = view_of(92 - start, q=q, k=k, v=v)
        plans.append(method.prefill_select(alone, State()))
        mask = kept(both, plans[0], torch.arange(start, 92))[row, ..., start:]
        assert torch.equal(mask, kept(alone, plans[-1], torch.arange(92 - start))[0])
    assert all(plan is not None for plan in plans)
    reads = [plan.estimate.read for plan in plans]  # type: ignore[union-attr]
    assert reads[0] == sum(reads[1:]) / 2


def test_a_head_at_tau_itself_takes_lines() -> None:
    """One block is its own mean: the divergence is 0, or almost. As a block it attends to all."""
    few: dict[str, Any] = {"block": BLOCK, "min_budget": 1, "gamma": 0.1}
    for tau, dense in ((0.0, False), (1e-3, True)):
        mask = mask_of(FlexPrefill(tau=tau, **few), view_of(BLOCK))
        assert [torch.equal(one, torch.ones_like(one).tril()) for one in mask] == [dense] * GROUPS


@pytest.mark.parametrize(
    "bad", [{"gamma": 0.0}, {"gamma": 1.1}, {"tau": -0.1}, {"block": 0}, {"min_budget": 0}], ids=str
)
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        FlexPrefill(**bad)


def test_padding_is_in_no_mean_and_in_no_share() -> None:
    """Twelve tokens behind eight of padding, where the last sixteen queries are looked at; a longer one is beside."""
    alone, both = view_of(12), view_of(20, batch=2)
    place = torch.stack([torch.arange(-8, 12).clamp(min=-1), torch.arange(20)])
    q, k, v = (
        torch.cat([torch.cat([torch.full((1, 8, *x.shape[2:]), 9.0), x], 1), y[1:]])
        for x, y in ((alone.q, both.q), (alone.k, both.k), (alone.v, both.v))
    )
    slots = place[..., None].expand(-1, -1, GROUPS)
    padded = replace(both, q=q, k=k, v=v, query_positions=place, positions=slots, seen=torch.tensor([12, 20]))
    found = []
    for view in (alone, padded):
        rows = last_rows(view, 16)
        means = mean_query_attention(view, rows, BLOCK)
        columns = view.scores(rows).softmax(-1).nan_to_num(0).sum(2)
        found.append((means[0], divergence(view, rows, means, columns, BLOCK)[0]))
    blocks = found[0][0].shape[-1]
    torch.testing.assert_close(found[1][0][:, :blocks], found[0][0])
    assert not found[1][0][:, blocks:].any(), "a block that the shorter one does not have"
    torch.testing.assert_close(found[1][1], found[0][1])
