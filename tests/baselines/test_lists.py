"""A plan as masks and as lists."""

from dataclasses import replace

import pytest
import torch
from sessions import GROUPS, HEADS, half, inputs, run
from torch import Tensor
from views import view_of

from nsa.baselines import METHODS, Method, Part, Plan, View
from nsa.baselines.attention import attend
from nsa.baselines.listed import attend_listed, can_list


def test_lists_are_the_mask() -> None:
    """Rows with nothing kept are there, too; members go up within a row."""
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0, 1, 2] = False
    starts, members, counts = Part(keep, unit=4, tile=2).lists()
    found = torch.zeros_like(keep)
    for b, n, r in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        start, count = int(starts[b, n, r]), int(counts[b, n, r])
        row = members[start : start + count].long()
        assert (row.diff() > 0).all()
        found[b, n, r, row] = True
    assert torch.equal(found, keep) and len(members) == keep.sum() and counts[0, 1, 2] == 0


def test_a_mask_has_the_keys_of_its_units_for_the_queries_of_its_tiles() -> None:
    keep = torch.tensor([[True, False, True], [False, True, False]])[None, None]
    mask = Part(keep, unit=2, tile=3).mask(torch.tensor([0, 2, 3, 5]), 5)
    assert mask[0, 0].tolist() == [[1, 1, 0, 0, 1]] * 2 + [[0, 0, 1, 1, 0]] * 2
    every = Part(keep[:, :, :1]).mask(torch.arange(4), 3)  # one row stands for all
    assert every[0, 0].tolist() == [[1, 0, 1]] * 4


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_lists_for_kernels_give_what_the_plan_means(kind: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each decoded token, with padding and after evictions; what moves keys to other positions cannot be listed."""
    listed = []

    def both(view: View, plan: Plan | None) -> tuple[Tensor, Tensor]:
        expected = attend(view, plan)
        if view.q.shape[1] == 1 and not view.prompt:
            listed.append(can_list(view, plan))
            if listed[-1]:
                for ours, theirs in zip(attend_listed(view, plan), expected, strict=True):
                    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        return expected

    monkeypatch.setattr("nsa.baselines.session.attend", both)
    run(half(kind), inputs(52, layers=2), prompt=48, padding=torch.tensor([0, 5]))
    assert len(listed) == 8 and all(listed) == (kind.name not in ("streaming_llm", "lm_infinite"))


@pytest.mark.parametrize("heads", [GROUPS, HEADS])
def test_a_weight_of_all_heads_is_each_ones_own(heads: int) -> None:
    """In a list for each KV head, and for each query head where another part has that."""
    view = view_of(12, batch=2)
    view = replace(view, q=view.q[:, -1:], query_positions=view.query_positions[:, -1:], prompt=False)
    weight, first = torch.randn(1, 1, 1, 12), torch.rand(2, GROUPS, 1, 12) < 0.5
    other = Part((torch.rand(2, heads, 1, 12) < 0.5) & ~first.repeat_interleave(heads // GROUPS, 1))
    found = attend_listed(view, Plan((Part(first, log_weight=weight), other)))
    written = Part(first, log_weight=weight.expand(2, GROUPS, 1, 12))
    for ours, theirs in zip(found, attend(view, Plan((written, other))), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
