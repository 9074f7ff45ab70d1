"""Decoding with one query token: against the definition, against the operators of prefill, and against plans."""

from typing import Any

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.baselines.attention import attend
from nsa.baselines.plan import Part, Plan, View
from nsa.baselines.plan import Terms as PlanTerms
from nsa.ops.choose import cover, top
from tests.models.test_decoding_steps import Apart
from tests.ops.decode_cases import CASES, INDEX_CASES, Case, IndexCase, case_of, index_case_of, listed

BACKENDS = ["naive", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 5])
def test_all_tokens_equal_dense_attention(backend: str, window: int | None) -> None:
    """Each sequence has a length of its own, and the memory behind it is not read."""
    q, k, v = (torch.randn(3, *shape, dtype=torch.float64) for shape in ((6, 8), (20, 2, 8), (20, 2, 4)))
    lengths = torch.tensor([20, 1, 7], dtype=torch.int32)
    pages = None
    if window is not None:
        last = lengths[:, None, None] - 1 - torch.arange(window)
        pages = last.clamp(min=-1).expand(3, 2, window).int()
    for sequence, length in enumerate(lengths.tolist()):
        k[sequence, length:], v[sequence, length:] = torch.nan, torch.inf
    out, lse = ops.decode_attention(q, k, v, lengths, pages=pages, backend=backend)
    for sequence, length in enumerate(lengths.tolist()):
        one = q[sequence, None, None], k[sequence, None, :length], v[sequence, None, :length]
        expected = ops.dense_attention(*one, window=window, return_lse=True, backend="naive")
        torch.testing.assert_close(out[sequence], expected[0][0, 0])
        torch.testing.assert_close(lse[sequence], expected[1][0, :, 0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_fallback_equals_the_definition(case: Case) -> None:
    inputs, options = case_of(case, torch.float64)
    for ours, theirs in zip(*(ops.decode_attention(*inputs, **options, backend=b) for b in BACKENDS), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_head", [False, True])
def test_pages_equal_a_plan(backend: str, per_head: bool) -> None:
    """A plan's pages, the weights of what was drawn, and its terms: one softmax (Double-P and vAttention)."""
    torch.manual_seed(1)
    batch, tokens, heads, groups, width, page, clusters = 2, 22, 6, 2, 8, 4, 5
    q, k, v = (torch.randn(batch, *shape) for shape in ((heads, width), (tokens, groups, width), (tokens, groups, 4)))
    rows, count = heads if per_head else groups, -(-tokens // page)
    keep = torch.rand(batch, rows, 1, count) < 0.6
    page_weights = torch.rand(batch, rows, 1, count)
    means, sums = torch.randn(batch, clusters, groups, width), torch.randn(batch, clusters, groups, 4)
    log_counts = torch.rand(batch, rows, clusters) * 3
    log_counts[:, 0, 1] = -torch.inf  # a cluster without tokens
    scale = width**-0.5

    weights = page_weights.repeat_interleave(page, -1)[..., :tokens]
    grouped = q.unflatten(1, (groups, -1))
    scores = torch.einsum("bgjd,bcgd->bgjc", grouped, means).flatten(1, 2) * scale
    scores = scores + log_counts.repeat_interleave(heads // rows, 1)
    positions = torch.arange(tokens).expand(batch, tokens)
    view = View(
        q[:, None], k, v, positions[:, -1:], positions[..., None].expand(-1, -1, groups), positions[:, -1] + 1, scale,
        0, 1, False, True,
    )  # fmt: skip
    terms = PlanTerms(scores[:, :, None], sums.transpose(1, 2), 4)
    expected, lse = attend(view, Plan((Part(keep, page, 1, weights),), terms))

    pages = listed(keep[:, :, 0])
    out = ops.decode_attention(
        q, k, v, torch.full((batch,), tokens, dtype=torch.int32), pages=pages, page_size=page,
        log_weights=page_weights[:, :, 0].gather(2, pages.long().clamp(min=0)),
        terms=ops.Terms(means, sums, listed(torch.ones(batch, rows, clusters) > 0), log_counts), backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(out[0], expected[:, 0])
    torch.testing.assert_close(out[1], lse[:, :, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_index_sets_are_those_of_prefill(case: IndexCase, backend: str) -> None:
    """Each sequence alone, by the operator of prefill."""
    (q, k, weights, lengths), options = index_case_of(case, torch.float64)
    found = ops.index_topk_decode(q, k, weights, lengths, **options, backend=backend)
    for row, tokens in enumerate(lengths.tolist()):
        if tokens == 0:
            assert (found[row] == -1).all()
            continue
        one = q[row, None, None], k[row, None, :tokens], weights[row, None, None]
        assert torch.equal(found[row], ops.index_topk(*one, **options, backend="naive")[0][0, 0])


def test_nothing_to_see() -> None:
    q, k = torch.randn(2, 2, 4), torch.randn(2, 3, 1, 4)
    lengths = torch.tensor([0, 3], dtype=torch.int32)
    for options in ({}, {"pages": torch.full((2, 1, 2), -1, dtype=torch.int32)}):
        for backend in BACKENDS:
            out, lse = ops.decode_attention(q, k, k, lengths, **options, backend=backend)
            assert not out[0].any() and (lse[0] == -torch.inf).all()
            assert bool(out[1].any()) == (not options)


def _wrong() -> list[tuple[dict[str, Tensor | int], str]]:
    pages = torch.zeros(2, 2, 1, dtype=torch.int32)
    return [
        ({"q": torch.zeros(2, 3, 4)}, "multiple"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "int32"),
        ({"pages": pages[:, :, 0]}, "number"),
        ({"pages": pages.long()}, "must be int32"),
        ({"page_size": 4}, "belong to lists"),
        ({"pages": pages, "page_size": 0}, "at least 1 token"),
        ({"pages": pages, "log_weights": torch.zeros(2, 2, 2)}, "shape of pages"),
        ({"terms": ops.Terms(*[torch.zeros(2, 1, 2, 3)] * 2, pages, torch.zeros(2, 2, 1))}, "like k"),
    ]


@pytest.mark.parametrize(("change", "message"), _wrong(), ids=[message for _, message in _wrong()])
def test_mistakes_are_named(change: dict[str, Tensor | int], message: str) -> None:
    k = torch.zeros(2, 3, 2, 4)
    arguments = {"q": torch.zeros(2, 4, 4), "k": k, "v": k, "lengths": torch.ones(2, dtype=torch.int32)}
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(**arguments | change)  # type: ignore[arg-type]


def test_the_fallbacks_of_all_choices_have_no_part_on_the_host() -> None:
    """A CUDA graph can capture them: on the meta device nothing can be read, and nothing comes from the CPU."""
    meta: dict[str, Any] = {"device": "meta", "dtype": torch.float64}
    q, k, v = torch.empty(2, 4, 8, **meta), torch.empty(2, 40, 2, 8, **meta), torch.empty(2, 40, 2, 6, **meta)
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    pages, logs = lengths.new_empty(2, 2, 5), torch.empty(2, 2, 5, **meta)
    terms = ops.Terms(k[:, :9], v[:, :9], pages, logs)
    with Apart() as watch:
        ops.decode_attention(q, k, v, lengths)
        ops.decode_attention(q, k, v, lengths, pages=pages, page_size=4, log_weights=logs, terms=terms)
        low, high = ops.page_bounds(k, lengths, page_size=4)
        ops.extend_page_bounds(low, high, k[:, 0], lengths, page_size=4)
        for over in ("sum", "max"):
            ops.quest_pages(q, low, high, lengths, page_size=4, topk=3, over_group=over)
        sketch = ops.sketch_keys(k)
        ops.extend_key_sketch(sketch, k[:, 0], lengths)
        for p in (0.5, 1.0):
            ops.top_p_tokens(q, sketch, lengths, p=p)
            ops.top_p_tokens(q, sketch, lengths, p=p, pages=pages, page_size=4)
        ops.index_topk_decode(q, k[:, :, 0], q[:, :, 0], lengths, topk=3, num_local=1)
        top(logs, 2), cover(logs, 0.5), cover(logs, logs[..., 0])
    assert not any(name.startswith("nsa::") for name in watch.names), "a kernel"
