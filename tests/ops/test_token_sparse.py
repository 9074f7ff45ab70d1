"""DSA's operators: the indexer's top-k, attention to listed tokens, and the indexer's loss."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsa import ops
from tests.ops.cases import LENGTHS, cumulative, gradients

BACKENDS = ["naive", "torch"]


@dataclass
class Case:
    """Inputs of the three operators; every tensor requires a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_idx: Tensor
    k_idx: Tensor
    weights: Tensor
    topk: int
    forced: dict[str, int]
    documents: list[int]
    cu_seqlens: Tensor | None

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_idx, self.k_idx, self.weights

    @property
    def attention(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def random_case(seed: int, dtype: torch.dtype = torch.float64, whole_numbers: bool = False) -> Case:
    """``whole_numbers``: of the indexer's inputs, so that scores are exact and many are equal."""
    choose, normal = random.Random(seed), torch.Generator().manual_seed(seed)
    if packed := choose.random() < 0.5:
        documents, batch = [choose.choice([0, 1, 1, 5, 17, 40]) for _ in range(choose.randint(1, 6))], 1
        documents[0] = max(documents[0], 1)
    else:
        documents, batch = [choose.choice(LENGTHS)], choose.choice([1, 2])
    tokens, groups = sum(documents), choose.choice([1, 2, 3])
    heads, (width, v_width) = groups * choose.choice([1, 2, 3]), choose.choice([(4, 4), (6, 4), (4, 6)])
    index_heads, index_width, topk = choose.choice([1, 3, 4]), choose.choice([4, 6]), choose.choice([1, 3, 16, 200])
    initial = choose.choice([0, 0, 1]) if topk > 1 else 0
    forced = {"num_initial": initial, "num_local": choose.choice([0, 0, topk - initial])}

    def tensor(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, dtype=dtype, generator=normal)

    index = [tensor(index_heads, index_width), tensor(index_width), tensor(index_heads)]
    if whole_numbers:
        index = [x.round() for x in index]
    attention = [tensor(heads, width), tensor(groups, width), tensor(groups, v_width)]
    inputs = [x.requires_grad_() for x in (*attention, *index)]
    return Case(*inputs, topk, forced, documents, cumulative(documents) if packed else None)


def brute_force_topk(case: Case, order: str = "index") -> tuple[Tensor, Tensor]:
    """By Python's own sort, token by token."""
    q, k, w = (x.detach() for x in case.index)
    indices = torch.full((*q.shape[:2], case.topk), -1, dtype=torch.int32)
    scores = torch.full(indices.shape, -torch.inf, dtype=q.dtype)
    starts = [start for start, n in zip(itertools.accumulate([0, *case.documents]), case.documents, strict=False)
              for _ in range(n)]  # fmt: skip
    for b, t in itertools.product(range(q.shape[0]), range(q.shape[1])):
        seen = range(starts[t], t + 1)
        score = {s: sum(float(w[b, t, j]) * max(0.0, float(q[b, t, j] @ k[b, s])) for j in range(q.shape[2]))
                 for s in seen}  # fmt: skip
        forced = {s for s in seen if s < starts[t] + case.forced["num_initial"] or s > t - case.forced["num_local"]}
        chosen = sorted(seen, key=lambda s: (s not in forced, -score[s], s))[: case.topk]
        chosen.sort(key=(lambda s: (-score[s], s)) if order == "score" else None)  # noqa: B023
        indices[b, t, : len(chosen)] = torch.tensor(chosen)
        scores[b, t, : len(chosen)] = torch.tensor([score[s] for s in chosen], dtype=q.dtype)
    return indices, scores


@pytest.mark.parametrize("order", ["index", "score"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_equals_sorting(backend: str, order: str) -> None:
    """With many ties, among them of +0 and -0."""
    for seed in range(25):
        case = random_case(seed, whole_numbers=True)
        if case.q.shape[1] > 70:
            continue
        found = ops.index_topk(
            *case.index, topk=case.topk, **case.forced, cu_seqlens=case.cu_seqlens, order=order, backend=backend
        )
        expected = brute_force_topk(case, order)
        assert found[0].dtype == torch.int32 and torch.equal(found[0], expected[0]), seed
        assert torch.equal(found[1], expected[1]), seed


def test_topk_in_tiles_equals_the_definition() -> None:
    for seed in range(100):
        case = random_case(seed, whole_numbers=seed % 2 == 0)
        options = {"topk": case.topk, **case.forced, "cu_seqlens": case.cu_seqlens}
        found, expected = (ops.index_topk(*case.index, **options, backend=name) for name in ("torch", "naive"))
        assert torch.equal(found[0], expected[0]), seed
        torch.testing.assert_close(found[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_topk_of_the_last_queries(backend: str) -> None:
    """Those of decoding on a cache, or of a chunk."""
    case = random_case(1, whole_numbers=True)
    last = max(1, case.q.shape[1] // 3)
    whole = ops.index_topk(*case.index, topk=case.topk, cu_seqlens=case.cu_seqlens, backend=backend)
    found = ops.index_topk(
        case.q_idx[:, -last:], case.k_idx, case.weights[:, -last:], topk=case.topk, cu_seqlens=case.cu_seqlens,
        backend=backend,
    )  # fmt: skip
    assert all(torch.equal(part, all_[:, -last:]) for part, all_ in zip(found, whole, strict=True))


def with_near(case: Case, seed: int) -> dict[str, object]:
    """A sink and a window for some seeds."""
    generator, options = torch.Generator().manual_seed(seed + 1000), {}
    if seed % 3:
        options["sink"] = torch.randn(case.q.shape[2], dtype=case.q.dtype, generator=generator).requires_grad_()
    if seed % 2:
        k, v = (torch.randn(x.shape, dtype=x.dtype, generator=generator).requires_grad_() for x in (case.k, case.v))
        options |= {"window": (k, v, 1 + seed % 7), "cu_seqlens": case.cu_seqlens}
    return options


def brute_force_attention(case: Case, lists: Tensor, sink=None, window=None, cu_seqlens=None) -> tuple[Tensor, Tensor]:
    """One softmax over all that a query sees, query by query and head by head."""
    outs, lses, scale = [], [], case.q.shape[3] ** -0.5
    document = torch.bucketize(torch.arange(case.q.shape[1]), cumulative(case.documents)[1:], right=True)
    shape = case.q.shape[:3]
    for b, t, h in itertools.product(*map(range, shape)):
        group = h * case.k.shape[2] // shape[2]
        listed = [s for s in lists[b, t].tolist() if s >= 0]
        keys, values = case.k[b, listed, group], case.v[b, listed, group]
        if window is not None:
            near = [s for s in range(max(0, t - window[2] + 1), t + 1) if document[s] == document[t]]
            keys, values = torch.cat([keys, window[0][b, near, group]]), torch.cat([values, window[1][b, near, group]])
        scores = keys @ case.q[b, t, h] * scale
        all_scores = scores if sink is None else torch.cat([scores, sink[h][None]])
        p = all_scores.softmax(0)[: len(values)]
        outs.append(p @ values if len(values) else torch.zeros_like(values.sum(0)))
        lses.append(all_scores.logsumexp(0) if len(all_scores) else torch.tensor(-torch.inf, dtype=case.q.dtype))
    return torch.stack(outs).unflatten(0, shape), torch.stack(lses).unflatten(0, shape).transpose(1, 2)


def some_lists(case: Case, seed: int) -> Tensor:
    """The indexer's top-k, in random order and with holes; some queries list nothing."""
    generator = torch.Generator().manual_seed(seed)
    lists = ops.index_topk(*case.index, topk=case.topk, cu_seqlens=case.cu_seqlens)[0]
    lists = lists[..., torch.randperm(case.topk, generator=generator)]
    return lists.masked_fill(torch.rand(lists.shape, generator=generator) < 0.2, -1)


def with_gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    out, lse = results
    both = torch.cat([out.flatten(), lse.masked_fill(lse == -torch.inf, 0).flatten()])
    return [out, lse, *gradients(both, inputs)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_equals_a_softmax_of_each_query(backend: str) -> None:
    for seed in range(24):
        case = random_case(seed)
        if case.q.shape[1] > 40:
            continue
        lists, options = some_lists(case, seed), with_near(case, seed)
        inputs = [*case.attention, *(x for x in options.values() if isinstance(x, Tensor) and x.requires_grad)]
        inputs += list(options.get("window", ())[:2])
        found = ops.token_sparse_attention(*case.attention, lists, **options, return_lse=True, backend=backend)
        expected = brute_force_attention(case, lists, **options)
        for ours, theirs in zip(with_gradients(found, inputs), with_gradients(expected, inputs), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, seed=seed: f"seed {seed}: {m}")


def test_attention_to_all_visible_tokens_is_dense() -> None:
    for seed in range(40):
        case = random_case(seed)
        lists, _ = ops.index_topk(*case.index, topk=case.q.shape[1], cu_seqlens=case.cu_seqlens)
        found = ops.token_sparse_attention(*case.attention, lists, return_lse=True)
        expected = ops.dense_attention(*case.attention, cu_seqlens=case.cu_seqlens, return_lse=True, backend="naive")
        for ours, theirs in zip(*(with_gradients(x, list(case.attention)) for x in (found, expected)), strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, seed=seed: f"seed {seed}: {m}")


def test_values_may_be_a_view_of_the_keys() -> None:
    case = random_case(5)
    k = torch.randn(*case.k.shape[:2], 1, 12, dtype=torch.float64, requires_grad=True)
    q = torch.randn(*case.q.shape[:3], 12, dtype=torch.float64, requires_grad=True)
    lists = some_lists(case, 5)
    found, expected = (
        ops.token_sparse_attention(q, k, k[..., :8], lists, backend=backend) for backend in ("torch", "naive")
    )
    for ours, theirs in zip([found, *gradients(found, [q, k])], [expected, *gradients(expected, [q, k])], strict=True):
        torch.testing.assert_close(ours, theirs)


def brute_force_kl(case: Case, lse: Tensor, lists: Tensor | None) -> Tensor:
    """The definition, query by query, with torch's own divergence."""
    document = torch.bucketize(torch.arange(case.q.shape[1]), cumulative(case.documents)[1:], right=True)
    total, heads = case.q_idx.sum() * 0, case.q.shape[2]
    for b, t in itertools.product(*map(range, case.q.shape[:2])):
        seen = [s for s in range(t + 1) if document[s] == document[t]]
        if lists is not None:
            seen = [s for s in lists[b, t].tolist() if s >= 0]
        if not seen:
            continue
        keys = case.k[b, seen].repeat_interleave(heads // case.k.shape[2], 1)
        scores = torch.einsum("hd,shd->hs", case.q[b, t], keys) * case.q.shape[3] ** -0.5
        target = (scores - lse[b, :, t, None]).exp().sum(0).detach()
        target = target / target.sum()
        index = (case.weights[b, t, :, None] * (case.q_idx[b, t] @ case.k_idx[b, seen].T).relu()).sum(0)
        total = total + torch.nn.functional.kl_div(index.log_softmax(0), target, reduction="sum")
    return total


@pytest.mark.parametrize("target", ["dense", "list", "joint", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_kl_equals_its_definition(backend: str, target: str) -> None:
    for seed in range(24):
        case = random_case(seed)
        if case.q.shape[1] > 40:
            continue
        lists = None if target == "dense" else some_lists(case, seed)
        near = with_near(case, seed) if target == "joint" else {}
        if target in ("dense", "full"):
            _, lse = ops.dense_attention(*case.attention, cu_seqlens=case.cu_seqlens, return_lse=True)
        else:
            _, lse = ops.token_sparse_attention(*case.attention, lists, **near, return_lse=True)
        loss = ops.indexer_kl(
            *case.index, case.q, case.k, lse, token_indices=lists, cu_seqlens=case.cu_seqlens, backend=backend
        )
        expected = brute_force_kl(case, lse, lists)
        torch.testing.assert_close(loss, expected)
        found, wanted = (gradients(x, list(case.index)) for x in (loss, expected))
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, seed=seed: f"seed {seed}: {m}")
        attention = torch.autograd.grad(loss, case.attention[:2], allow_unused=True) if loss.requires_grad else (None,)
        assert all(x is None for x in attention), "the target has no gradient"


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_with_its_loss_attached_equals_the_definition(backend: str) -> None:
    """The objective's gradients with weight x loss added, and the loss itself as the weight's gradient."""
    for seed in range(24):
        case = random_case(seed)
        if case.q.shape[1] > 40:
            continue
        lists = some_lists(case, seed)
        weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        inputs = [*case.attention, *case.index]
        out = ops.token_sparse_attention_kl(*case.attention, lists, *case.index, weight, backend=backend)
        expected, lse = ops.token_sparse_attention(*case.attention, lists, return_lse=True, backend="naive")
        assert torch.allclose(out, expected), seed
        loss = brute_force_kl(case, lse.detach(), lists)
        found = torch.autograd.grad(out.sin().sum(), [*inputs, weight])
        wanted = torch.autograd.grad(
            expected.sin().sum() + 0.3 * loss, inputs, allow_unused=True, materialize_grads=True
        )
        for ours, theirs in zip(found, [*wanted, loss.detach()], strict=True):
            torch.testing.assert_close(ours, theirs, msg=lambda m, seed=seed: f"seed {seed}: {m}")


def test_a_tiny_target_is_not_clipped() -> None:
    """Joint with a window that takes nearly all: a floor of 1e-10 would change the target."""
    case = random_case(3)
    lists = some_lists(case, 3).clamp(min=-1)
    lse = torch.full((case.q.shape[0], case.q.shape[2], case.q.shape[1]), 40.0, dtype=torch.float64)
    sparse = ops.indexer_kl(*case.index, case.q, case.k, lse, token_indices=lists)
    torch.testing.assert_close(sparse, brute_force_kl(case, lse, lists))
    assert sparse > 1e-3


def test_results_have_the_same_bits_twice() -> None:
    case = random_case(8, torch.float32)

    def results() -> list[Tensor]:
        lists, scores = ops.index_topk(*case.index, topk=case.topk, cu_seqlens=case.cu_seqlens)
        out, lse = ops.token_sparse_attention(*case.attention, lists, return_lse=True)
        loss = ops.indexer_kl(*case.index, case.q, case.k, lse, token_indices=lists)
        return [lists, scores, *with_gradients((out, lse), list(case.attention)), *gradients(loss, list(case.index))]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"topk": 0}, "topk .0. must be at least 1"),
        ({"topk": 3, "num_initial": 2, "num_local": 2}, "hold the forced tokens"),
        ({"order": "random"}, "order must be one of index, score"),
        ({"weights": torch.zeros(1, 5, 3)}, "weights must be .1, 5, 2., one per index head"),
        ({"k_idx": torch.zeros(1, 5, 3)}, "share batch and width"),
        ({"k_idx": torch.zeros(1, 4, 4)}, "at least as many keys as queries"),
        ({"backend": "fast"}, "backend must be one of"),
    ],
)
def test_bad_input_of_the_indexer_is_named(change: dict[str, object], words: str) -> None:
    inputs = {"q_idx": torch.zeros(1, 5, 2, 4), "k_idx": torch.zeros(1, 5, 4), "weights": torch.zeros(1, 5, 2)}
    with pytest.raises(ValueError, match=words):
        ops.index_topk(**{**inputs, "topk": 2, **change})


def test_bad_input_of_the_attention_and_its_loss_is_named() -> None:
    q, k, lists = torch.zeros(1, 5, 4, 8), torch.zeros(1, 5, 2, 8), torch.zeros(1, 5, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"token_indices must be \(1, 5, 'K'\)"):
        ops.token_sparse_attention(q, k, k, lists[:, :4])
    with pytest.raises(ValueError, match="one logit per query head"):
        ops.token_sparse_attention(q, k, k, lists, sink=torch.zeros(2))
    index = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 4), torch.zeros(1, 5, 2)
    with pytest.raises(ValueError, match=r"lse must be \(1, 4, 5\)"):
        ops.indexer_kl(*index, q, k, torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="share batch and tokens"):
        ops.indexer_kl(*index, q[:, :4], k, torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="share batch and tokens"):
        ops.token_sparse_attention_kl(q[:, :4], k, k, lists[:, :4], *index, torch.zeros(()))
    with pytest.raises(ValueError, match=r"kl_weight must be a tensor without dimensions, got \(1,\)"):
        ops.token_sparse_attention_kl(q, k, k, lists, *index, torch.zeros(1))
    with pytest.raises(ValueError, match=r"token_indices must be \(1, 5, 'K'\)"):
        ops.token_sparse_attention_kl(q, k, k, lists[:, :4], *index, torch.zeros(()))
