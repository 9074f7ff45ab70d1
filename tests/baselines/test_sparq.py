"""SparQ against its definition, and when its mean value is exact."""

import pytest
import torch
from decoding import Step, attention, decoded
from sessions import HEADS, WIDTH, inputs

from nsa.baselines import Budget
from nsa.baselines.methods.sparq import SparQ
from nsa.baselines.methods.sparq_released import SparQReleased

PADDING = torch.tensor([0, 5])


def by_definition(
    step: Step, row: int, head: int, dims: int, tokens: int, *, released: bool
) -> tuple[set[int], torch.Tensor]:
    """Algorithm 1 for one query head: the slots, and the output."""
    view, start = step.view, int(PADDING[row])
    group, n = view.group, view.k.shape[1] - start
    kv = head // group
    heads = range(group * kv, group * kv + group)
    k, v = view.k[row, start:, kv], view.v[row, start:, kv]
    size = sum(view.q[row, 0, h].abs() for h in heads)
    chosen = sorted(range(WIDTH), key=lambda d: -size[d].item())[:dims]
    scores = {}
    for h in heads:
        q = view.q[row, 0, h]
        scores[h] = k[:, chosen] @ q[chosen] / (WIDTH * q[chosen].abs().sum() / q.abs().sum()).sqrt()
    shares = {h: scores[h].softmax(0) for h in heads}
    rank = sum((scores if released else shares).values())
    local = tokens // 4 + 1 if released else max(1, tokens // 4)
    rank[n - local :] = torch.inf
    best = sorted(range(n), key=lambda i: (-rank[i].item(), i))[: tokens + released]
    mass = shares[head][best].sum()
    slots = sorted(i + start for i in best)
    return set(slots), mass * attention(step, row, head, slots) + (1 - mass) * v.mean(0)


@pytest.mark.parametrize("kind", [SparQ, SparQReleased])
def test_sparq_is_its_definition(kind: type[SparQ]) -> None:
    steps, _ = decoded(kind(budget=Budget(tokens=12), dims=5), inputs(44, layers=1), 40, PADDING)
    for step in steps:
        for row in range(2):
            for head in range(HEADS):
                slots, out = by_definition(step, row, head, 5, 12, released=kind is SparQReleased)
                assert set(step.mask[row, head].nonzero()[:, 0].tolist()) == slots
                torch.testing.assert_close(step.out[row, head], out, atol=1e-5, rtol=1e-5)


def test_all_dims_rank_as_the_oracle_does() -> None:
    for step in decoded(SparQ(budget=Budget(tokens=9), dims=WIDTH, local=0), inputs(44, layers=1, groups=4), 40)[0]:
        scores = step.view.scores()[:, :, 0]
        scores[..., -1] = torch.inf
        assert torch.equal(step.mask.nonzero()[:, 2].view(2, HEADS, 9), scores.topk(9).indices.sort().values)
        share = step.view.scores()[:, :, 0].softmax(-1)
        torch.testing.assert_close(step.plan.blend[0][..., 0], (share * step.mask).sum(-1))


def test_the_mean_of_dropped_values_is_exact_where_their_scores_are_equal() -> None:
    """And the mean of all values is not: the kept ones are in it."""
    given = inputs(41, layers=1)
    given.layers[0][1][:, :36] = 0.0  # equal scores of all but the latest five, whatever the query
    dense = torch.stack([attention_of_all(given, row) for row in range(2)])
    errors = {}
    for over in ("dropped", "all", ""):
        method = SparQ(budget=Budget(tokens=12), dims=WIDTH, mean_over=over, local=0.5)
        step = decoded(method, given, 40)[0][-1]
        errors[over] = float((step.out - dense).abs().max())
    assert errors["dropped"] < 1e-5 < 1e-3 < errors["all"] < errors[""]


def attention_of_all(given: object, row: int) -> torch.Tensor:
    q, k, v = (x[row] for x in given.layers[0])  # type: ignore[attr-defined]
    outs = []
    for head in range(HEADS):
        weight = torch.softmax(k[:, head // 2] @ q[-1, head] * WIDTH**-0.5, 0)
        outs.append(weight @ v[:, head // 2])
    return torch.stack(outs)


def test_nothing_is_left_to_a_mean_where_all_is_kept() -> None:
    """Not even what rounding leaves of the sum of probabilities."""
    for step in decoded(SparQ(budget=Budget(tokens=50), dims=4), inputs(44, layers=1), 40, PADDING)[0]:
        assert step.plan.blend[0].eq(1).all()


def test_temperature_makes_up_for_the_dims_that_are_missing() -> None:
    """Without it approximate probabilities are too flat or too sharp: they differ, and the plan has another share."""
    given = inputs(41, layers=1)
    one, two = (
        decoded(SparQ(budget=Budget(tokens=12), dims=4, temperature=t), given, 40)[0][-1] for t in (True, False)
    )
    q, k = one.view.q[0, 0, 0], one.view.k[0, :, 0]
    size = one.view.q[0, 0, :2].abs().sum(0)
    dims = size.topk(4).indices
    for step, factor in ((one, float((q[dims].abs().sum() / q.abs().sum()).sqrt())), (two, 1.0)):
        share = (k[:, dims] @ q[dims] * WIDTH**-0.5 / factor).softmax(0)
        torch.testing.assert_close(step.plan.blend[0][0, 0, 0], (share * step.mask[0, 0]).sum())


def test_the_mean_kept_is_the_mean_computed_anew() -> None:
    given = inputs(50, layers=1)
    _, states = decoded(SparQ(budget=Budget(tokens=12)), given, 33, PADDING, chunks=(2, 20))
    for row, start in enumerate(PADDING.tolist()):
        torch.testing.assert_close(states[0].rest["values"][row], given.layers[0][2][row, start:].sum(0))


def test_what_it_reads_is_counted() -> None:
    step = decoded(SparQ(budget=Budget(tokens=22, counts="reads"), dims=4), inputs(40, layers=1), 39)[0][0]
    assert step.mask.sum(-1).eq(22 - 5).all(), "4 of the 32 elements of 40 tokens are 5 tokens"
    assert step.plan.estimate.read == 40 * 4
    assert step.plan.estimate.pairs == 40 * 2 * 4 / WIDTH
    assert step.plan.estimate.resident == 40 * WIDTH + WIDTH, "keys once more by dims, and a mean"
    for bad in ({"dims": 0}, {"local": 2.0}, {"mean_over": "kept"}):
        with pytest.raises(ValueError, match=r"dim|local|mean"):
            SparQ(**bad)
