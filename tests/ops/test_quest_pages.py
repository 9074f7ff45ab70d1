"""Quest's pages: bounds, their upkeep, and the choice, against the definition and against the baseline of that name."""

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.budget import Budget
from nsa.baselines.importance import pages
from nsa.baselines.method import State
from nsa.baselines.methods.quest import Quest, QuestEval
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


def test_bounds_in_fp8_are_the_nearest_outside() -> None:
    """Every number of fp8 and what lies between two of them, against a search in the list of all."""
    exact = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    exact = exact[exact.isfinite()].unique()
    between = (exact[1:] + exact[:-1]) / 2
    k = torch.cat([exact, between, torch.nextafter(exact, exact + 1), torch.nextafter(exact, exact - 1)]).clamp(
        -448, 448
    )
    low, high = ops.page_bounds(k[None, :, None, None], torch.tensor([len(k)]), page_size=1, fp8=True)
    assert low.dtype == high.dtype == torch.float8_e4m3fn
    assert torch.equal(high.float().flatten(), exact[torch.searchsorted(exact, k)])
    assert torch.equal(low.float().flatten(), exact[torch.searchsorted(exact, k, right=True) - 1])
    fine = torch.tensor([1 + 1e-10, -1 - 1e-10], dtype=torch.float64)[None, :, None, None]  # in fp32 they are 1 and -1
    for bounds in ops.page_bounds(fine, torch.tensor([2]), page_size=2, fp8=True):
        assert bounds.float().abs().item() == 1.125
    large = torch.tensor([500.0, -500.0])[None, :, None, None]
    for bounds in ops.page_bounds(large, torch.tensor([2]), page_size=1, fp8=True):
        assert bounds.flatten().tolist() == [448, -448]


def test_bounds_in_fp8_that_grow_equal_those_of_the_whole() -> None:
    k, page = 30 * torch.randn(2, 10, 2, 4), 4
    low, high = ops.page_bounds(k, torch.tensor([3, 0]), page_size=page, fp8=True)
    for step in range(7):
        lengths = torch.tensor([4 + step, 1 + step], dtype=torch.int32)
        new = torch.stack([k[0, 3 + step], k[1, step]])
        ops.extend_page_bounds(low, high, new, lengths, page_size=page)
        for ours, theirs in zip((low, high), ops.page_bounds(k, lengths, page_size=page, fp8=True), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("narrow", [0, 1])
def test_bounds_of_two_dtypes_do_not_grow(narrow: int) -> None:
    """Nor does one of them: the message comes before a change."""
    bounds = [torch.zeros(1, 2, 1, 4, dtype=torch.bfloat16) for _ in range(2)]
    bounds[narrow] = bounds[narrow].to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="low and high must have one dtype, got torch"):
        ops.extend_page_bounds(*bounds, torch.ones(1, 1, 4).bfloat16(), torch.tensor([1]), page_size=4)
    assert all(not bound.float().any() for bound in bounds)


@pytest.mark.parametrize("backend", ["torch", "naive"])
def test_pages_by_bounds_in_fp8_are_those_of_the_same_numbers(backend: str) -> None:
    for case in QUEST_CASES:
        (q, low, high, lengths), options = quest_case_of(case, torch.float32, fp8=True)
        found = ops.quest_pages(q, low, high, lengths, **options, backend=backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under = ops.quest_pages(q.bfloat16(), low, high, lengths, **options, backend=backend)
        assert torch.equal(found, ops.quest_pages(q, low.float(), high.float(), lengths, **options, backend="naive"))
        same = ops.quest_pages(q.bfloat16().float(), low.float(), high.float(), lengths, **options, backend="naive")
        assert torch.equal(under, same)


def test_the_baseline_rounds_as_the_operator_does() -> None:
    k, positions = 30 * torch.randn(1, 12, 2, 8), torch.arange(12)[None]
    whole, state = positions[..., None].expand(-1, -1, 2), State(shared={})
    view = View(k, k, k, positions, whole, torch.tensor([12]), 1.0, 0, 1, True, True)
    ours = pages.rounded(pages.fold(view, state, 4), True)
    for found, expected in zip(ours, ops.page_bounds(k, torch.tensor([12]), page_size=4, fp8=True), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_autocast_leaves_bounds_in_fp8_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    (q, low, high, lengths), options = quest_case_of(QUEST_CASES[0], torch.float32, fp8=True)
    read: list[torch.dtype] = []
    monkeypatch.setattr(Tensor, "to", lambda x, *a, to=Tensor.to, **k: read.append(x.dtype) or to(x, *a, **k))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.quest_pages(q, low, high, lengths, **options)
    assert read.count(torch.float8_e4m3fn) == 2 and read.count(torch.bfloat16) == 1, "q alone is cast twice"


def test_the_released_evaluation_in_fp8_takes_the_pages_with_the_highest_bounds() -> None:
    """Each query head three pages of its own; pages behind the tokens, for which there is room, are none."""
    torch.manual_seed(4)
    tokens, page, width = 28, 4, 8
    q, k = torch.randn(1, 1, 4, width), 30 * torch.randn(1, tokens, 2, width)
    positions = torch.arange(tokens)[None]
    whole, seen = positions[..., None].expand(-1, -1, 2), torch.tensor([tokens])
    method, state = QuestEval(page=page, fp8=True, budget=Budget(share=0.5, counts="reads")), State(shared={})
    prompt = View(k.repeat_interleave(2, 2), k, k, positions, whole, seen, width**-0.5, 0, 1, True, True)
    method.observe(prompt, None, state)
    plan = method.decode_select(View(q, k, k, positions[:, -1:], whole, seen, width**-0.5, 0, 1, False, True), state)
    low, high = (x.double() for x in ops.page_bounds(k, seen, page_size=page, fp8=True))
    for head in range(4):
        mine = q[0, 0, head].double()
        bounds = torch.maximum(mine * low[0, :, head // 2], mine * high[0, :, head // 2]).sum(-1)
        assert set(plan.parts[0].keep[0, head, 0].nonzero()[:, 0].tolist()) == {
            page * int(j) + i for j in bounds.topk(3).indices for i in range(page)
        }


def test_the_baseline_in_fp8_takes_these_pages_and_pays_half_for_them() -> None:
    """Sequences of two lengths, so that one call does not do for both."""
    torch.manual_seed(3)
    batch, tokens, groups, width, page = 2, 40, 2, 8, 4
    q, k = torch.randn(batch, 4, width), torch.randn(batch, tokens, groups, width)
    positions = torch.arange(tokens).expand(batch, tokens) - torch.tensor([0, 12])[:, None]
    whole, seen = positions[..., None].expand(-1, -1, groups), torch.tensor([40, 28])
    plans = {}
    for fp8 in (False, True):
        method, state = Quest(page=page, fp8=fp8, budget=Budget(share=0.5, counts="reads")), State(shared={})
        prompt = View(k.repeat_interleave(2, 2), k, k, positions, whole, seen, width**-0.5, 0, 1, True, True)
        method.observe(prompt, None, state)
        step = View(q[:, None], k, k, positions[:, -1:], whole, seen, width**-0.5, 0, 1, False, True)
        plans[fp8] = method.decode_select(step, state)
    few, many = plans[False].estimate, plans[True].estimate
    assert (many.read, many.resident, many.pairs) == (few.read / 2, few.resident / 2, few.pairs)
    kept = {fp8: plan.parts[0].keep.sum((1, 2, 3)) for fp8, plan in plans.items()}
    assert (kept[True] > kept[False]).all(), "what the bounds no longer take goes to keys"
    for row, length in enumerate(seen.tolist()):
        own = k[row, None, tokens - length :]
        chosen = plans[True].parts[0].keep[row, :, 0, tokens - length :: page]
        lengths = torch.tensor([length], dtype=torch.int32)
        bounds = ops.page_bounds(own, lengths, page_size=page, fp8=True)
        found = ops.quest_pages(q[row, None], *bounds, lengths, page_size=page, topk=int(chosen[0].sum()))
        assert torch.equal(found, listed(chosen[None])[..., : found.shape[2]])


@pytest.mark.parametrize("case", QUEST_CASES, ids=str)
@pytest.mark.parametrize("over_group", ["sum", "max"])
def test_the_fallback_equals_the_definition(case, over_group: str) -> None:
    inputs, options = quest_case_of(case, torch.float64)
    ours, theirs = (ops.quest_pages(*inputs, **options, over_group=over_group, backend=b) for b in BACKENDS)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_short_sequence_has_its_pages_and_no_others(backend: str) -> None:
    """Of 5 pages that are asked for, and 4 that there are room for: 2 and 1 with tokens, and of no tokens none."""
    lengths = torch.tensor([7, 4, 0], dtype=torch.int32)
    low, high = ops.page_bounds(torch.randn(3, 16, 1, 4), lengths, page_size=4)
    found = ops.quest_pages(torch.randn(3, 2, 4), low, high, lengths, page_size=4, topk=5, backend=backend)
    assert found[:, 0].tolist() == [[0, 1, -1, -1, -1], [0, -1, -1, -1, -1], [-1] * 5] and found.dtype == torch.int32


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
