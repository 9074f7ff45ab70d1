"""The kernels of decoding against the definition: on a GPU if there is one, else in Triton's interpreter (fp32).

Without a GPU they run within tests/ops/test_kernels.py::test_in_the_interpreter.
"""

import pytest
import torch

from nsa import ops
from nsa.ops.geometry import num_compressed
from nsa.ops.kernels import native_sparse_decode
from tests.ops.decode_cases import (
    CASES,
    QUEST_CASES,
    SPARSE_CASES,
    TIES,
    Case,
    QuestCase,
    SparseCase,
    case_of,
    quest_case_of,
    sparse_case_of,
)
from tests.ops.test_kernels import DEVICE, needs_kernels


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    inputs, options = case_of(case, torch.float32, DEVICE)
    found, expected = (ops.decode_attention(*inputs, **options, backend=b) for b in ("triton", "naive"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_sequence_has_the_same_bits_beside_others() -> None:
    inputs, options = case_of(Case(6, 2, 16, 16, (70, 50), pages=10, page_size=8), torch.float32, DEVICE)
    alone = [x[1:] for x in inputs]
    out, lse = ops.decode_attention(*inputs, **options, backend="triton")
    options["pages"] = options["pages"][1:]
    one, one_lse = ops.decode_attention(*alone, **options, backend="triton")
    assert torch.equal(out[1:], one) and torch.equal(lse[1:], one_lse)


@needs_kernels
def test_no_copy_of_the_memory() -> None:
    q, k, lengths = torch.zeros(2, 2, 16), torch.zeros(2, 8, 1, 16), torch.ones(2, dtype=torch.int32)
    inputs = [x.to(DEVICE) for x in (q, k[:, :4], k[:, :4], lengths)]
    with pytest.raises(ValueError, match="contiguous"):
        ops.decode_attention(*inputs, backend="triton")


@needs_kernels
@pytest.mark.parametrize(("case", "ties"), TIES, ids=str)
def test_native_sparse(case: SparseCase, ties: bool) -> None:
    inputs, sizes = sparse_case_of(case, torch.float32, DEVICE)
    if ties:
        inputs[1][0].nan_to_num_(0).zero_()
    ours, theirs = (ops.native_sparse_decode(*inputs, **sizes, backend=b) for b in ("triton", "naive"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("case", SPARSE_CASES[:2], ids=str)
def test_blocks_are_those_of_the_selection(case: SparseCase) -> None:
    inputs, sizes = sparse_case_of(case, torch.float32, DEVICE)
    q, (k, _), lengths = inputs[0], inputs[1], inputs[5]
    kv = [x for pair in inputs[1:4] for x in pair]
    found = native_sparse_decode.attention(q, kv, inputs[4], lengths, *sizes.values(), q.shape[2] ** -0.5)[1]
    for row, tokens in enumerate(lengths.tolist()):
        seen = num_compressed(tokens, sizes["length"], sizes["stride"])
        if tokens:
            one = q[row, None, None], k[row, None, :seen]
            lse = ops.compressed_attention(*one, one[1], length=4, stride=case.sizes[1], offset=tokens - 1)[1]
            expected = ops.select_blocks(*one, lse, **sizes, offset=tokens - 1, backend="naive")[0, 0]
        else:
            expected = torch.full_like(found[row], -1)
        assert torch.equal(found[row], expected)


@needs_kernels
@pytest.mark.parametrize("case", QUEST_CASES, ids=str)
@pytest.mark.parametrize("over_group", ["sum", "max"])
def test_quest_pages(case: QuestCase, over_group: str) -> None:
    inputs, options = quest_case_of(case, torch.float32, DEVICE)
    found, expected = (
        ops.quest_pages(*inputs, **options, over_group=over_group, backend=b) for b in ("triton", "naive")
    )
    assert torch.equal(found, expected)
