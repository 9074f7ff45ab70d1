"""The whole operator: the PyTorch fallback against the reference, packing, decoding and gradients."""

from collections.abc import Callable

import pytest
import torch

from nsa import ops
from nsa.ops.geometry import clip_borders
from tests.ops.cases import Case, gradients, random_case


def run(case: Case, backend: str) -> torch.Tensor:
    return ops.native_sparse_attention(
        case.q,
        case.kv_cmp,
        case.kv_slc,
        case.kv_win,
        case.gates,
        **case.sizes,
        cu_seqlens=case.cu_seqlens,
        backend=backend,
    )


@pytest.mark.parametrize("block", range(6))
def test_torch_equals_naive_in_values_and_gradients(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        case = random_case(seed, torch.float64)
        expected, actual = run(case, "naive"), run(case, "torch")
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, s=seed: f"seed {s}: {m}")
        for e, a in zip(gradients(expected, case.tensors), gradients(actual, case.tensors), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-9, msg=lambda m, s=seed: f"seed {s}: {m}")


def test_fp32_equals_float64_naive_branch_by_branch() -> None:
    """Both get the same blocks, since fp32 may decide near-ties differently."""
    for seed in range(100):
        case, exact = random_case(seed), random_case(seed, torch.float64)
        for part, reference in zip(exact.tensors, case.tensors, strict=True):
            part.data.copy_(reference)
        packed = {"cu_seqlens": case.cu_seqlens}
        out, lse = ops.compressed_attention(case.q, *case.kv_cmp, **case.compression, **packed)
        ref, ref_lse = ops.compressed_attention(exact.q, *exact.kv_cmp, **exact.compression, **packed, backend="naive")
        assert out.dtype == torch.float32 and lse.dtype == torch.float32
        pairs = [(out, ref, case.kv_cmp, exact.kv_cmp)]
        torch.testing.assert_close(lse, ref_lse.float(), rtol=1e-5, atol=1e-5)
        indices = ops.select_blocks(exact.q, exact.kv_cmp[0], ref_lse, **exact.selection, **packed)
        size = case.sizes["block_size"]
        out = ops.selected_attention(case.q, *case.kv_slc, indices, block_size=size, **packed)
        ref = ops.selected_attention(exact.q, *exact.kv_slc, indices, block_size=size, **packed, backend="naive")
        pairs.append((out, ref, case.kv_slc, exact.kv_slc))
        window = case.sizes["window"]
        out, lse = ops.dense_attention(case.q, *case.kv_win, window=window, return_lse=True, **packed)
        ref = ops.dense_attention(exact.q, *exact.kv_win, window=window, **packed, backend="naive")
        assert lse.shape == (case.q.shape[0], case.q.shape[2], case.q.shape[1])
        pairs.append((out, ref, case.kv_win, exact.kv_win))
        for actual, expected, kv, exact_kv in pairs:
            torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
            grads = zip(gradients(actual, [case.q, *kv]), gradients(expected, [exact.q, *exact_kv]), strict=True)
            for a, e in grads:
                torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_packed_equals_each_document_alone(backend: str) -> None:
    for seed in range(60):
        case = random_case(seed, torch.float64, packed=True)
        together = run(case, backend)
        first_token = first_block = 0
        for tokens in case.documents:
            blocks = max(0, (tokens - case.sizes["length"]) // case.sizes["stride"] + 1)
            if tokens:
                span, span_cmp = slice(first_token, first_token + tokens), slice(first_block, first_block + blocks)
                alone = ops.native_sparse_attention(
                    case.q[:, span],
                    tuple(x[:, span_cmp] for x in case.kv_cmp),
                    tuple(x[:, span] for x in case.kv_slc),
                    tuple(x[:, span] for x in case.kv_win),
                    case.gates[:, span],
                    **case.sizes,
                    backend=backend,
                )
                torch.testing.assert_close(together[:, span], alone, rtol=1e-9, atol=1e-9)
            first_token, first_block = first_token + tokens, first_block + blocks


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_decoding_equals_the_whole_sequence(backend: str) -> None:
    for seed in range(40):
        case = random_case(seed, torch.float64, packed=False)
        tokens, sizes = case.q.shape[1], case.sizes
        whole = run(case, backend)
        for start in {0, tokens // 2, tokens - 1}:
            keep = max(0, start - sizes["window"] + 1)
            part = ops.native_sparse_attention(
                case.q[:, start:],
                case.kv_cmp,
                case.kv_slc,
                tuple(x[:, keep:] for x in case.kv_win),
                case.gates[:, start:],
                **sizes,
                offset=start,
                backend=backend,
            )
            torch.testing.assert_close(part, whole[:, start:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_a_chunk_of_packed_documents_equals_its_part_of_the_whole(backend: str) -> None:
    """As in context parallelism: queries start..stop-1 with the keys before stop, and only the window's last keys."""
    for seed in range(40):
        case = random_case(seed, torch.float64, packed=True)
        assert case.cu_seqlens is not None
        tokens, sizes = case.q.shape[1], case.sizes
        whole = run(case, backend)
        for start, stop in {(0, tokens // 2), (tokens // 2, tokens), (tokens // 3, tokens - tokens // 4)}:
            if start == stop:
                continue
            keep = max(0, start - sizes["window"] + 1)
            part = ops.native_sparse_attention(
                case.q[:, start:stop],
                case.kv_cmp,
                tuple(x[:, :stop] for x in case.kv_slc),
                tuple(x[:, keep:stop] for x in case.kv_win),
                case.gates[:, start:stop],
                **sizes,
                cu_seqlens=clip_borders(case.cu_seqlens, 0, stop),
                offset=start,
                backend=backend,
            )
            torch.testing.assert_close(part, whole[:, start:stop], rtol=1e-9, atol=1e-9)


def find_case(wanted: Callable[[Case], bool]) -> Case:
    return next(case for seed in range(1000) if wanted(case := random_case(seed, torch.float64)))


def test_each_branch_gets_the_gradient_of_its_own_gate_only() -> None:
    case = find_case(lambda c: c.documents == [63] and c.sizes["window"] > 1 and c.sizes["num_blocks"] > 1)
    for branch, own in enumerate([case.kv_cmp, case.kv_slc, case.kv_win]):
        case.gates = torch.nn.functional.one_hot(torch.tensor(branch), 3).to(case.q).expand_as(case.gates)
        out = run(case, "torch")
        for kv in (case.kv_cmp, case.kv_slc, case.kv_win):
            moved = [bool(g.abs().sum() > 0) for g in gradients(out, list(kv))]
            assert all(moved) if kv is own else not any(moved)


@pytest.mark.parametrize("packed", [False, True])
def test_naive_gradients_by_finite_differences(packed: bool) -> None:
    case = find_case(
        lambda c: (c.cu_seqlens is not None) == packed and 10 < c.q.shape[1] < 20 and c.sizes["length"] < 9
    )
    documents = {"cu_seqlens": case.cu_seqlens, "backend": "naive"}
    _, lse = ops.compressed_attention(case.q, *case.kv_cmp, **case.compression, **documents)
    # Blocks are selected once, since the selection has no gradient.
    indices = ops.select_blocks(case.q, case.kv_cmp[0], lse, **case.selection, **documents)

    def attend(q, kc, vc, ks, vs, kw, vw, gates):
        cmp, _ = ops.compressed_attention(q, kc, vc, **case.compression, **documents)
        slc = ops.selected_attention(q, ks, vs, indices, block_size=case.sizes["block_size"], **documents)
        win = ops.dense_attention(q, kw, vw, window=case.sizes["window"], **documents)
        return (torch.stack([cmp, slc, win], dim=-1) * gates.unsqueeze(-2)).sum(-1)

    assert torch.autograd.gradcheck(attend, case.tensors, fast_mode=True)


def test_memory_of_the_fallback_is_linear_in_tokens() -> None:
    """No tensor saved for the backward pass grows faster than the inputs."""

    def saved(tokens: int) -> int:
        q, k = torch.randn(1, tokens, 4, 8, requires_grad=True), torch.randn(1, tokens, 1, 8, requires_grad=True)
        cmp = torch.randn(1, (tokens - 32) // 16 + 1, 1, 8, requires_grad=True)
        gates, total = torch.rand(1, tokens, 4, 3), 0

        def count(x: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += x.numel() * x.element_size()
            return x

        sizes = {"length": 32, "stride": 16, "block_size": 64, "num_blocks": 4, "window": 64}
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            ops.native_sparse_attention(q, (cmp, cmp), (k, k), (k, k), gates, **sizes)
        return total

    assert saved(2048) < 2.1 * saved(1024)
