"""Tokens with a share of the attention: the sketch, and the choice, against loops and against the baseline Twilight."""

import math

import pytest
import torch

from nsa import ops
from nsa.baselines.budget import Budget
from nsa.baselines.importance.quantised import quantised
from nsa.baselines.method import State
from nsa.baselines.methods.quest import Quest
from nsa.baselines.methods.twilight import Twilight
from nsa.baselines.plan import View
from tests.ops.decode_cases import TOP_P_CASES, TopPCase, listed, top_p_case_of


def read_back(sketch: ops.KeySketch) -> torch.Tensor:
    least, step = sketch.ranges.split(1, -1)
    return torch.cat((sketch.codes & 15, sketch.codes >> 4), -1).float() * step + least


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_reads_back_what_the_baseline_reads(dtype: torch.dtype) -> None:
    k = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    k[0, 0] = 1.5  # all equal
    found = read_back(ops.sketch_keys(k))
    assert torch.equal(found, quantised(k, 4))
    span = k.float().amax(-1, keepdim=True) - k.float().amin(-1, keepdim=True)
    assert ((found - k.float()).abs() <= span / 30 + 1e-6).all()


def test_a_sketch_that_grows_equals_that_of_the_whole() -> None:
    k = torch.randn(2, 9, 2, 8, generator=torch.Generator().manual_seed(1))
    whole = ops.sketch_keys(k)
    grown = ops.KeySketch(*(torch.zeros_like(x) for x in whole))
    for step in range(7):
        lengths = torch.tensor([step + 1, step + 3], dtype=torch.int32)
        ops.extend_key_sketch(grown, torch.stack([k[0, step], k[1, step + 2]]), lengths)
    for ours, theirs in zip(grown, whole, strict=True):
        assert torch.equal(ours[0, :7], theirs[0, :7]) and torch.equal(ours[1, 2:], theirs[1, 2:])


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("case", TOP_P_CASES, ids=str)
def test_the_choice_is_its_definition(case: TopPCase, backend: str) -> None:
    """Loops over heads and candidates."""
    (q, sketch, lengths), options = top_p_case_of(case, torch.float64)
    found, keys = ops.top_p_tokens(q, sketch, lengths, **options, backend=backend), read_back(sketch).double()
    for row, length in enumerate(case.lengths):
        for group in range(case.groups):
            candidates = list(range(length))
            if case.pages:
                pages = [page for page in options["pages"][row, group].tolist() if page >= 0]
                spans = [range(page * case.page_size, (page + 1) * case.page_size) for page in pages]
                candidates = [token for span in spans for token in span if token < length]
            wanted: set[int] = set()
            each = case.heads // case.groups
            for head in range(group * each, (group + 1) * each):
                scores = [float(keys[row, token, group] @ q[row, head]) / math.sqrt(case.width) for token in candidates]
                wanted |= fewest(candidates, scores, case.p)
            expected = [token for token in candidates if token in wanted]
            expected += [-1] * (found.shape[2] - len(expected))
            assert found[row, group].tolist() == expected


def fewest(candidates: list[int], scores: list[float], p: float) -> set[int]:
    if p >= 1 or not candidates:
        return set(candidates)
    weights = [math.exp(score - max(scores)) for score in scores]
    chosen, mass = set(), 0.0
    for at in sorted(range(len(scores)), key=lambda i: (-round(scores[i], 9), i)):
        if chosen and mass >= p * sum(weights):
            break
        chosen.add(candidates[at])
        mass += weights[at]
    return chosen


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_tokens_are_those_of_the_baseline(backend: str) -> None:
    """Twilight after Quest's pages, at a budget of whole pages."""
    torch.manual_seed(3)
    batch, tokens, heads, groups, width, page, topk, p = 2, 43, 6, 2, 8, 4, 6, 0.8
    q, k = 2 * torch.randn(batch, heads, width), torch.randn(batch, tokens, groups, width)
    positions = torch.arange(tokens).expand(batch, tokens)
    whole = positions[..., None].expand(-1, -1, groups)
    seen = positions[:, -1] + 1
    base, budget = Quest(page=page), Budget(tokens=(topk - 1) * page + tokens % page)
    method, state = Twilight(base=base, budget=budget, p=p), State(shared={})
    prompt = View(k.repeat_interleave(3, 2), k, k, positions, whole, seen, width**-0.5, 0, 1, True, True)
    method.observe(prompt, None, state)
    plan = method.decode_select(
        View(q[:, None], k, k, positions[:, -1:], whole, seen, width**-0.5, 0, 1, False, True), state
    )
    assert plan is not None
    chosen, lengths = plan.parts[0].keep[:, :, 0], torch.full((batch,), tokens, dtype=torch.int32)
    pages = ops.quest_pages(q, *ops.page_bounds(k, lengths, page_size=page), lengths, page_size=page, topk=topk)
    found = ops.top_p_tokens(q, ops.sketch_keys(k), lengths, p=p, pages=pages, page_size=page, backend=backend)
    assert torch.equal(found, listed(chosen)[..., : topk * page])
    assert 0 < (found >= 0).sum() < found.numel() * 0.9  # something was left out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": -0.1}, "at least 0"),
        ({"lengths": torch.ones(1)}, "int32"),
        ({"q": torch.zeros(1, 2, 8)}, "share batch and width"),
        ({"page_size": 4}, "lists of pages"),
        ({"pages": torch.zeros(1, 2, 3, dtype=torch.int32)}, "pages must be"),
        ({"pages": torch.zeros(1, 1, 3)}, "pages must be int32"),
        ({"sketch": ops.KeySketch(torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2))}, "uint8"),
        ({"sketch": ops.KeySketch(torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 1))}, "ranges"),
    ],
    ids=str,
)
def test_mistakes_are_named(change, message: str) -> None:
    sketch = ops.sketch_keys(torch.zeros(1, 3, 1, 4))
    arguments = {"q": torch.zeros(1, 2, 4), "sketch": sketch, "lengths": torch.ones(1, dtype=torch.int32), "p": 0.5}
    with pytest.raises(ValueError, match=message):
        ops.top_p_tokens(**arguments | change)
    with pytest.raises(ValueError, match="even D"):
        ops.sketch_keys(torch.zeros(1, 3, 1, 5))
