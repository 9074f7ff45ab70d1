"""The indexer's operators over compressed entries: token t of a document sees entry i iff i < (t + 1) // ratio."""

import itertools
import random
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from nsa import ops
from tests.ops.cases import cumulative, gradients

CASES = [  # documents, ratio, tokens of the pass before which others came
    ([21], 4, 0),
    ([3], 4, 0),
    ([9, 1, 0, 4, 7], 4, 0),
    ([1, 1, 2, 30], 3, 0),
    ([5, 12], 2, 6),
    ([26], 5, 19),
]
by_case = pytest.mark.parametrize(("documents", "ratio", "offset"), CASES)


class Case(NamedTuple):
    """Inputs of both operators. ``seen``: the entries that each query sees."""

    index: list[Tensor]
    q: Tensor
    k: Tensor
    where: dict[str, Any]
    seen: list[list[int]]


def case_of(documents: list[int], ratio: int, offset: int, dtype=torch.float64, whole=False, surplus=2) -> Case:
    """``surplus``: rows that follow the last entry. ``whole``: of the indexer's inputs, so that scores are exact."""
    made = torch.Generator().manual_seed(sum(documents) + ratio)
    tokens, counts = sum(documents) - offset, [n // ratio for n in documents]
    entries, batch = sum(counts) + surplus, 2 if len(documents) == 1 else 1

    def tensor(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=dtype, generator=made)

    index = [tensor(tokens, 3, 4), tensor(entries, 4), tensor(tokens, 3)]
    index = [(x.round() if whole else x).requires_grad_() for x in index]
    starts = [0, *itertools.accumulate(counts)]
    spans = zip(starts, documents, strict=False)
    seen = [list(range(start, start + (t + 1) // ratio)) for start, n in spans for t in range(n)]
    where = {"ratio": ratio, "offset": offset, "cu_seqlens": cumulative(documents) if batch == 1 else None}
    return Case(index, tensor(tokens, 4, 8), tensor(entries, 2, 8), where, seen[offset:])


@pytest.mark.parametrize("topk", [1, 3, 30])
@pytest.mark.parametrize("backend", ["naive", "torch"])
@by_case
def test_topk_equals_sorting(documents: list[int], ratio: int, offset: int, backend: str, topk: int) -> None:
    case = case_of(documents, ratio, offset, whole=True)
    forced = {"num_initial": int(topk > 1), "num_local": int(topk > 2)}
    q, k, w = (x.detach() for x in case.index)
    found, scores = ops.index_topk(q, k, w, topk=topk, **forced, **case.where, backend=backend)
    for b, (t, seen) in itertools.product(range(len(q)), enumerate(case.seen)):
        score = {s: float((w[b, t] * (q[b, t] @ k[b, s]).relu()).sum()) for s in seen}
        always = {*seen[: forced["num_initial"]], *seen[len(seen) - forced["num_local"] :]}
        best = sorted(sorted(seen, key=lambda s: (s not in always, -score[s], s))[:topk])
        assert found[b, t].tolist() == best + [-1] * (topk - len(best)), (b, t)
        assert scores[b, t, : len(best)].tolist() == [score[s] for s in best]


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("backend", ["naive", "torch"])
@by_case
def test_kl_equals_its_definition(documents: list[int], ratio: int, offset: int, backend: str, listed: bool) -> None:
    """Against torch's own divergence, query by query; the target is joint with a window that takes a part."""
    case = case_of(documents, ratio, offset)
    (q_idx, k_idx, w), dice = case.index, random.Random(ratio)
    seen = case.seen
    if listed:
        seen = [sorted(dice.sample(entries, min(2, len(entries)))) for entries in seen]
    lists = torch.tensor([entries + [-1] * (2 - len(entries)) for entries in seen]) if listed else None
    lists = None if lists is None else lists.int()[None].expand(len(case.q), -1, -1)
    keys = case.k.repeat_interleave(2, 2)
    scores = torch.einsum("bthd,bshd->bhts", case.q, keys) * 8**-0.5
    lse = torch.full(scores.shape[:3], 0.5, dtype=torch.float64)  # of the window
    expected = q_idx.sum() * 0
    for b, (t, entries) in itertools.product(range(len(case.q)), enumerate(seen)):
        if entries:
            lse[b, :, t] = torch.logaddexp(lse[b, :, t], scores[b, :, t, entries].logsumexp(-1))
            target = (scores[b, :, t, entries] - lse[b, :, t, None]).exp().sum(0)
            index = (w[b, t, :, None] * (q_idx[b, t] @ k_idx[b, entries].T).relu()).sum(0).log_softmax(0)
            expected = expected + torch.nn.functional.kl_div(index, target / target.sum(), reduction="sum")
    loss = ops.indexer_kl(*case.index, case.q, case.k, lse, token_indices=lists, **case.where, backend=backend)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(*(gradients(x, case.index) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_query_whose_attention_is_elsewhere_teaches_nothing(backend: str) -> None:
    """All of it is on the window, to the last bit: there is no target, and no gradient towards an even one."""
    case = case_of([21], 4, 0)
    lse = torch.zeros(2, 4, 21, dtype=torch.float64)
    lse[:, :, 5:] = 1e4
    loss = ops.indexer_kl(*case.index, case.q, case.k, lse, **case.where, backend=backend)
    d_q, _, d_w = gradients(loss, case.index)
    assert not d_q[:, 5:].any() and not d_w[:, 5:].any() and loss.isfinite()
    some = ops.indexer_kl(*case.index, case.q, case.k, torch.zeros_like(lse), **case.where, backend=backend)
    assert all(gradient[:, 9:].any() for gradient in gradients(some, [case.index[0], case.index[2]]))


def test_entries_must_be_there() -> None:
    q_idx, w = torch.zeros(1, 9, 2, 4), torch.zeros(1, 9, 2)
    with pytest.raises(ValueError, match="9 tokens have 2 entries of 4, got 1 keys"):
        ops.index_topk(q_idx, torch.zeros(1, 1, 4), w, topk=1, ratio=4)
    with pytest.raises(ValueError, match="13 tokens have 3 entries of 4, got 2 keys"):
        ops.index_topk(q_idx, torch.zeros(1, 2, 4), w, topk=1, ratio=4, offset=4)
    with pytest.raises(ValueError, match="ratio must be at least 1"):
        ops.index_topk(q_idx, torch.zeros(1, 9, 4), w, topk=1, ratio=0)
    with pytest.raises(ValueError, match="without a ratio the queries are of the last keys"):
        ops.index_topk(q_idx, torch.zeros(1, 9, 4), w, topk=1, offset=3)
