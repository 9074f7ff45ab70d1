"""The kernels of decoding against the definition: on a GPU if there is one, else in Triton's interpreter (fp32).

Without a GPU they run within tests/ops/test_kernels.py::test_in_the_interpreter.
"""

import pytest
import torch

from nsa import ops
from nsa.models import Decoder, DecodingSteps
from nsa.ops.compression import Weights, extend_compressed
from nsa.ops.decode import append_rows
from nsa.ops.geometry import num_compressed
from nsa.ops.kernels import native_sparse_decode
from tests.models.test_decoder import small
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
from tests.ops.test_kernels import DEVICE, needs_kernels, normal


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


@needs_kernels
@pytest.mark.parametrize("kind", ["dense", "nsa"])
def test_steps_of_a_decoder(kind: str) -> None:
    """On a GPU each step is the replay of a CUDA graph."""
    torch.manual_seed(0)
    shape = {"head_dim": 16, "v_head_dim": 16, "num_layers": 1}
    model, attention = small(kind, **shape)
    attention = attention.model_copy(update={"nsa": attention.nsa.model_copy(update={"compress_hidden": 16})})
    decoder = Decoder(model, attention, backend="triton").to(DEVICE).eval()
    with torch.no_grad():
        ids = torch.randint(0, 97, (2, 26), device=DEVICE)
        steps, expected = DecodingSteps(decoder, ids[:, :18], 26), decoder(ids)
    for token in range(18, 26):
        torch.testing.assert_close(steps.step(ids[:, token]), expected[:, token], rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("index", [0, 5, 19])
def test_rows_go_to_their_slots(index: int) -> None:
    """Rings and other memory, of several widths."""
    shapes = [(3,), (2, 5), (1, 1100)]
    rows = [torch.randn(2, 1, *shape).to(DEVICE) for shape in shapes]
    memories = [x.new_zeros(2, slots, *x.shape[2:]) for slots, x in zip((7, 20, 33), rows, strict=True)]
    append_rows(memories, rows, torch.tensor([index], device=DEVICE), backend="triton")
    for memory, x, slots in zip(memories, rows, (7, 20, 33), strict=True):
        expected = torch.zeros_like(memory)
        expected[:, index % slots] = x[:, 0]
        assert torch.equal(memory, expected)


@needs_kernels
@pytest.mark.parametrize(("groups", "width", "v_width", "hidden"), [(2, 16, 16, 16), (3, 48, 24, 40), (9, 80, 16, 16)])
def test_compressed_blocks_are_extended(groups: int, width: int, v_width: int, hidden: int) -> None:
    """Token by token: the blocks are those of the whole; before the first block, and between two, none is written."""
    batch, tokens, length, stride = 2, 15, 8, 4
    raw = normal(batch, tokens, groups, width).detach(), normal(batch, tokens, groups, v_width, seed=1).detach()
    weights = []
    for x in raw:
        sizes = (hidden, length * x.shape[3]), (length, x.shape[3]), (x.shape[3], hidden)
        weights.append(Weights(*(normal(*size, seed=i).detach() / 4 for i, size in enumerate(sizes))))
    rings = [x.new_zeros(batch, length, *x.shape[2:]) for x in raw]
    memory = [x.new_zeros(batch, 3, *x.shape[2:]) for x in raw]
    angles = torch.arange(tokens, device=DEVICE)[:, None] * torch.rand(width // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    for token in range(tokens):
        index = torch.tensor([token], device=DEVICE)
        append_rows(rings, [x[:, token : token + 1] for x in raw], index, backend="triton")
        extend_compressed(rings, weights, memory, cos[index], sin[index], index, stride=stride, backend="triton")
    options = {"length": length, "stride": stride, "backend": "naive"}
    whole = [ops.compress_blocks(x, *w, **options) for x, w in zip(raw, weights, strict=True)]
    ends = torch.tensor([length - 1, length - 1 + stride], device=DEVICE)
    whole[0] = ops.apply_rotary(whole[0], cos, sin, ends, backend="naive")
    for found, expected in zip(memory, whole, strict=True):
        torch.testing.assert_close(found[:, :2], expected, rtol=1e-4, atol=1e-5)
        assert not found[:, 2].any()
