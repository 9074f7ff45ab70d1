"""Each operator alone: explicit references, edge cases, and invalid arguments."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nsa import ops
from nsa.ops.geometry import num_compressed
from nsa.ops.selection import overlap_weights
from tests.ops.cases import cumulative, random_case

BACKENDS = ["naive", "torch"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dense_equals_torch(backend: str) -> None:
    q, k, v = torch.randn(2, 129, 6, 8), torch.randn(2, 129, 3, 8), torch.randn(2, 129, 3, 5)
    expected = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    out = ops.dense_attention(q, k, v, backend=backend)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_of_one_returns_the_own_value(backend: str) -> None:
    q, k, v = torch.randn(1, 17, 2, 4), torch.randn(1, 17, 1, 4), torch.randn(1, 17, 1, 4)
    torch.testing.assert_close(ops.dense_attention(q, k, v, window=1, backend=backend), v.expand(-1, -1, 2, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_before_the_first_block_sees_nothing(backend: str) -> None:
    q = torch.randn(1, 40, 2, 4, requires_grad=True)
    blocks = num_compressed(40, 32, 16)
    k, v = torch.randn(1, blocks, 1, 4, requires_grad=True), torch.randn(1, blocks, 1, 4, requires_grad=True)
    out, lse = ops.compressed_attention(q, k, v, length=32, stride=16, backend=backend)
    assert (out[:, :31] == 0).all() and (lse[:, :, :31] == -torch.inf).all()
    assert (out[:, 31:] != 0).all() and lse[:, :, 31:].isfinite().all()
    for gradient in torch.autograd.grad(out.sum(), [q, k, v]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("of", ["both", "lse"])
def test_a_returned_lse_has_a_gradient(backend: str, of: str) -> None:
    """Against an explicit softmax, and by finite differences."""
    torch.manual_seed(0)
    tokens, borders = 23, cumulative([9, 1, 13])
    q, k, v = (torch.randn(1, tokens, n, 4, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    document = torch.bucketize(torch.arange(tokens), borders[1:], right=True)
    seen = (document[:, None] == document) & torch.ones(tokens, tokens).tril().bool()
    seen &= torch.ones(tokens, tokens).triu(-6).bool()
    scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) / 2
    scores = scores.masked_fill(~seen, -torch.inf)
    out, lse = ops.dense_attention(q, k, v, window=7, cu_seqlens=borders, return_lse=True, backend=backend)
    expected = torch.einsum("bhts,bshe->bthe", scores.softmax(-1), v.repeat_interleave(2, 2)), scores.logsumexp(-1)
    weights = torch.randn_like(out) * (of == "both"), torch.randn_like(lse)
    found, wanted = (
        torch.autograd.grad(sum((x * w).sum() for x, w in zip(results, weights, strict=True)), [q, k, v])
        for results in ((out, lse), expected)
    )
    torch.testing.assert_close(lse, expected[1])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_without_blocks_gives_zero(backend: str) -> None:
    q = torch.randn(1, 9, 2, 4, requires_grad=True)
    k, v = torch.randn(1, 9, 1, 4), torch.randn(1, 9, 1, 4)
    indices = torch.full((1, 9, 1, 3), -1, dtype=torch.int32)
    out = ops.selected_attention(q, k, v, indices, block_size=4, backend=backend)
    assert (out == 0).all()
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


def test_overlap_weights_of_the_paper() -> None:
    assert overlap_weights(32, 16, 64, torch.empty(0)).tolist() == [1, 2, 2, 2, 1]
    assert overlap_weights(16, 16, 16, torch.empty(0)).tolist() == [1]
    assert overlap_weights(32, 16, 32, torch.empty(0)).tolist() == [1, 2, 1]


def brute_force_selection(q, k_cmp, *, length, stride, block_size, num_blocks, num_initial, num_local):
    """Eq. 9 to 11 with Python loops over queries, blocks and units."""
    batch, tokens, heads, dim = q.shape
    groups = k_cmp.shape[2]
    result = torch.full((batch, tokens, groups, num_blocks), -1, dtype=torch.int32)
    for b, t, g in itertools.product(range(batch), range(tokens), range(groups)):
        own = t // block_size
        importance = [0.0] * (own + 1)
        visible = num_compressed(t + 1, length, stride)
        for h in range(g * heads // groups, (g + 1) * heads // groups):
            p = (k_cmp[b, :visible, g] @ q[b, t, h] * dim**-0.5).softmax(0).tolist()
            for i, unit in itertools.product(range(visible), range(length // stride)):
                importance[(stride * (i + unit)) // block_size] += p[i]
        forced = {j for j in range(own + 1) if j < num_initial or j > own - num_local}
        ranked = sorted(set(range(own + 1)) - forced, key=lambda j: (-importance[j], j))
        chosen = sorted([*forced, *ranked[: num_blocks - len(forced)]])
        result[b, t, g, : len(chosen)] = torch.tensor(chosen)
    return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_selection_equals_loops(backend: str) -> None:
    for seed in range(30):
        case = random_case(seed, torch.float64, packed=False)
        if case.q.shape[1] > 70:
            continue
        _, lse = ops.compressed_attention(case.q, *case.kv_cmp, **case.compression)
        chosen = ops.select_blocks(case.q, case.kv_cmp[0], lse, **case.selection, backend=backend)
        assert chosen.dtype == torch.int32
        assert torch.equal(chosen, brute_force_selection(case.q.detach(), case.kv_cmp[0].detach(), **case.selection))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_lower_block(backend: str) -> None:
    tokens, sizes = 64, {"length": 4, "stride": 4, "block_size": 4}
    q, k = torch.zeros(1, tokens, 2, 4), torch.zeros(1, 16, 1, 4)
    _, lse = ops.compressed_attention(q, k, k, length=4, stride=4)
    chosen = ops.select_blocks(q, k, lse, **sizes, num_blocks=6, num_initial=1, num_local=2, backend=backend)
    assert chosen[0, -1, 0].tolist() == [0, 1, 2, 3, 14, 15]
    assert chosen[0, 9, 0].tolist() == [0, 1, 2, -1, -1, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_blocks_at_or_before_the_query(backend: str) -> None:
    case = random_case(7, torch.float64, packed=True)
    _, lse = ops.compressed_attention(case.q, *case.kv_cmp, **case.compression, cu_seqlens=case.cu_seqlens)
    chosen = ops.select_blocks(
        case.q, case.kv_cmp[0], lse, **case.selection, cu_seqlens=case.cu_seqlens, backend=backend
    )
    local = torch.cat([torch.arange(n) for n in case.documents])
    assert (chosen * case.sizes["block_size"] <= local[None, :, None, None]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_accumulates_in_fp32(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 63, h, 16) for h in (4, 2, 2))
    low = [x.to(dtype) for x in (q, k, v)]
    out, lse = ops.dense_attention(*low, return_lse=True)
    exact, exact_lse = ops.dense_attention(*(x.double() for x in low), return_lse=True, backend="naive")
    assert out.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out, exact.to(dtype))


def test_results_are_bitwise_deterministic() -> None:
    case = random_case(11)
    args = (case.q, case.kv_cmp, case.kv_slc, case.kv_win, case.gates)
    results = []
    for _ in range(2):
        out = ops.native_sparse_attention(*args, **case.sizes, cu_seqlens=case.cu_seqlens)
        results.append([out, *torch.autograd.grad(out.sum(), case.tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


Q, KV = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.dense_attention(Q, KV[:, :, :, :2], KV), "head width"),
        (lambda: ops.dense_attention(Q[:, :, :3], KV, KV), "multiple of key/value heads"),
        (lambda: ops.dense_attention(Q, KV[:, :4], KV[:, :4]), "keys for 8 queries"),
        (lambda: ops.dense_attention(Q, KV, KV, window=0), "window"),
        (lambda: ops.dense_attention(Q, KV, KV, backend="cuda"), "backend"),
        (lambda: ops.dense_attention(Q, KV, KV, cu_seqlens=cumulative([4, 3])), "cu_seqlens must rise"),
        (lambda: ops.dense_attention(Q, KV, KV, cu_seqlens=cumulative([8]).long()), "int32"),
        (
            lambda: ops.dense_attention(*(x.expand(2, -1, -1, -1) for x in (Q, KV, KV)), cu_seqlens=cumulative([8])),
            "batch 1",
        ),
        (lambda: ops.compressed_attention(Q, KV, KV, length=3, stride=2), "multiple of stride"),
        (lambda: ops.compressed_attention(Q, KV[:, :1], KV[:, :1], length=2, stride=2), "4 blocks"),
        (lambda: ops.selected_attention(Q, KV, KV, torch.zeros(1, 8, 1, 2), block_size=4), "block_indices"),
        (
            lambda: ops.select_blocks(
                Q, KV, torch.zeros(1, 4, 8), length=2, stride=2, block_size=2, num_blocks=2, num_initial=1, num_local=2
            ),
            "num_blocks",
        ),
    ],
)
def test_misuse_is_rejected_with_a_message(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
