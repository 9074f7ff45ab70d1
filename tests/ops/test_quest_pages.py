"""Quest's pages: bounds, their upkeep, and the choice, against the definition and against the baseline of that name."""

import pytest
import torch

from nsa import ops
from nsa.baselines.budget import Budget
from nsa.baselines.method import State
from nsa.baselines.methods.quest import Quest
from nsa.baselines.plan import View
from tests.ops.decode_cases import QUEST_CASES, listed, quest_case_of

BACKENDS = ["naive", "torch"]


def test_no_key_is_above_its_bound() -> None:
    """Against the products themselves; the bound is reached by a page of one token."""
    q, k = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 21, 1, 8, dtype=torch.float64)
    lengths = torch.tensor([21, 13])
    products = torch.einsum("bhd,bsd->bhs", q, k[:, :, 0])
    for page in (1, 4):
        low, high = ops.page_bounds(k, lengths, page_size=page)
        bounds = torch.maximum(q[:, :, None] * low[:, None, :, 0], q[:, :, None] * high[:, None, :, 0]).sum(-1)
        for row, length in enumerate(lengths.tolist()):
            for token in range(length):
                assert (products[row, :, token] <= bounds[row, :, token // page] + 1e-12).all()
            if page == 1:
                torch.testing.assert_close(products[row, :, :length], bounds[row, :, :length])


def test_bounds_that_grow_equal_those_of_the_whole() -> None:
    k, page = torch.randn(2, 10, 2, 4), 4
    low, high = ops.page_bounds(k, torch.tensor([3, 0]), page_size=page)
    for step in range(7):
        lengths = torch.tensor([4 + step, 1 + step], dtype=torch.int32)
        new = torch.stack([k[0, 3 + step], k[1, step]])
        ops.extend_page_bounds(low, high, new, lengths, page_size=page)
        for ours, theirs in zip((low, high), ops.page_bounds(k, lengths, page_size=page), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", QUEST_CASES, ids=str)
@pytest.mark.parametrize("over_group", ["sum", "max"])
def test_the_fallback_equals_the_definition(case, over_group: str) -> None:
    inputs, options = quest_case_of(case, torch.float64)
    ours, theirs = (ops.quest_pages(*inputs, **options, over_group=over_group, backend=b) for b in BACKENDS)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("over_group", ["sum", "max"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_are_those_of_the_baseline(backend: str, over_group: str) -> None:
    """At a budget of whole pages."""
    torch.manual_seed(2)
    batch, tokens, heads, groups, width, page, topk = 2, 43, 6, 2, 8, 4, 5
    q, k = torch.randn(batch, heads, width), torch.randn(batch, tokens, groups, width)
    positions = torch.arange(tokens).expand(batch, tokens)
    whole = positions[..., None].expand(-1, -1, groups)
    seen = positions[:, -1] + 1
    method = Quest(page=page, over_group=over_group, budget=Budget(tokens=(topk - 1) * page + tokens % page))
    state = State(shared={})
    prompt = View(k.repeat_interleave(3, 2), k, k, positions, whole, seen, width**-0.5, 0, 1, True, True)
    method.observe(prompt, None, state)
    plan = method.decode_select(
        View(q[:, None], k, k, positions[:, -1:], whole, seen, width**-0.5, 0, 1, False, True), state
    )
    assert plan is not None
    chosen = plan.parts[0].keep[:, :, 0, ::page]  # the first token of each page
    lengths = torch.full((batch,), tokens, dtype=torch.int32)
    found = ops.quest_pages(
        q, *ops.page_bounds(k, lengths, page_size=page), lengths, page_size=page, topk=topk, over_group=over_group,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(found, listed(chosen)[..., :topk]) and (chosen.sum(-1) == topk).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk": 1, "num_initial": 1}, "forced pages"),
        ({"over_group": "mean"}, "sum or max"),
        ({"lengths": torch.ones(1)}, "int32"),
        ({"q": torch.zeros(1, 2, 8)}, "share batch and width"),
        ({"page_size": 0}, "at least 1 token"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, message: str) -> None:
    low = torch.zeros(1, 3, 1, 4)
    arguments = {"q": torch.zeros(1, 2, 4), "low": low, "high": low, "lengths": torch.ones(1, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        ops.quest_pages(**arguments | {"page_size": 4, "topk": 2} | change)
