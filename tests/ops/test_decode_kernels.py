"""The kernels of decoding against the definition: on a GPU if there is one, else in Triton's interpreter (fp32).

Without a GPU they run within tests/ops/test_kernels.py::test_in_the_interpreter.
"""

from collections.abc import Iterator

import pytest
import torch

from nsa import ops
from nsa.models import Decoder, DecodingSteps
from nsa.ops.compression import Weights, extend_compressed
from nsa.ops.decode import append_rows
from nsa.ops.geometry import num_compressed
from nsa.ops.kernels import index_topk, native_sparse_decode
from tests.models.test_decoder import small
from tests.ops.decode_cases import (
    CASES,
    INDEX_CASES,
    LATENT_CASES,
    QUEST_CASES,
    SPARSE_CASES,
    TIES,
    TOP_P_CASES,
    Case,
    IndexCase,
    QuestCase,
    SparseCase,
    TopPCase,
    case_of,
    index_case_of,
    quest_case_of,
    sparse_case_of,
    top_p_case_of,
)
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels, normal


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that is allocated holds NaN, or the greatest integers, until something is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case, poisoned: None) -> None:
    inputs, options = case_of(case, torch.float32, DEVICE)
    found, expected = (ops.decode_attention(*inputs, **options, backend=b) for b in ("triton", "naive"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("case", LATENT_CASES, ids=str)
def test_values_that_are_columns_of_the_keys(case: Case, poisoned: None) -> None:
    (q, k, _, lengths), options = case_of(case, torch.float32, DEVICE)
    v = k[..., : case.v_width]
    found = ops.decode_attention(q, k, v, lengths, **options, backend="triton")
    expected = ops.decode_attention(q, k, v.clone(), lengths, **options, backend="naive")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_which_values_may_be_columns_of_the_keys() -> None:
    (q, k, _, lengths), _ = case_of(Case(2, 1, 48, 32, (9,), terms=3), torch.float32, DEVICE)
    other = torch.zeros_like(k)
    for v, message in ((k[..., :40], "the first 32"), (other[..., :32], "contiguous"), (k[..., 8:40], "contiguous")):
        with pytest.raises(ValueError, match=message):
            ops.decode_attention(q, k, v, lengths, backend="triton")
    terms = ops.Terms(other, other[..., :32], lengths[:, None, None], torch.zeros(1, 1, 1, device=DEVICE))
    with pytest.raises(ValueError, match="no terms"):
        ops.decode_attention(q, k, k[..., :32], lengths, terms=terms, backend="triton")
    wide = torch.zeros(1, 9, 1, 320, device=DEVICE)  # 1,280 bytes of fp32
    with pytest.raises(ValueError, match="at most 1152"):
        ops.decode_attention(wide[:, :2, 0], wide, wide[..., :256], lengths, backend="triton")


@needs_kernels
@pytest.mark.parametrize("case", [Case(6, 2, 16, 16, (70, 50), pages=30, page_size=8), Case(6, 2, 16, 16, (70, 200))])
def test_a_sequence_has_the_same_bits_beside_others(case: Case) -> None:
    """Beside others a program goes through more chunks."""
    inputs, options = case_of(case, torch.float32, DEVICE)
    alone = [x[1:] for x in inputs]
    out, lse = ops.decode_attention(*inputs, **options, backend="triton")
    if case.pages:
        options["pages"] = options["pages"][1:]
    one, one_lse = ops.decode_attention(*alone, **options, backend="triton")
    assert torch.equal(out[1:], one) and torch.equal(lse[1:], one_lse)


@needs_kernels
def test_native_sparse_has_the_same_bits_beside_others() -> None:
    inputs, sizes = sparse_case_of(SPARSE_CASES[0], torch.float32, DEVICE)
    alone = [tuple(y[2:] for y in x) if isinstance(x, tuple) else x[2:] for x in inputs]
    both, one = (ops.native_sparse_decode(*given, **sizes, backend="triton") for given in (inputs, alone))
    assert torch.equal(both[2:], one)


@needs_kernels
@pytest.mark.parametrize("listed", [0, 1, 33, 70])
def test_lists_that_are_not_full(listed: int, poisoned: None) -> None:
    """Chunks behind the last page have parts, too."""
    inputs, _ = case_of(Case(4, 2, 16, 16, (150, 90)), torch.float32, DEVICE)
    pages = torch.full((2, 2, 140), -1, dtype=torch.int32, device=DEVICE)
    pages[..., :listed] = torch.arange(listed, device=DEVICE)
    pages[0, 0, 0], pages[1, 1, listed // 2 :] = -1, -1
    found, expected = (ops.decode_attention(*inputs, pages=pages, backend=b) for b in ("triton", "naive"))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_memory_is_read_where_it_lies() -> None:
    """The first tokens of more; what is not contiguous otherwise would have to be copied."""
    (q, k, v, lengths), _ = case_of(Case(6, 2, 16, 32, (40, 9)), torch.float32, DEVICE)
    more_k, more_v = (torch.cat((x, x), 1)[:, : x.shape[1]] for x in (k, v))
    found, expected = (
        ops.decode_attention(q, *kv, lengths, backend=backend)[0]
        for kv, backend in (((more_k, more_v), "triton"), ((k, v), "naive"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        ops.decode_attention(q, k[:, ::2], v[:, ::2], lengths, backend="triton")
    with pytest.raises(ValueError, match="lie alike"):
        ops.decode_attention(q, more_k, v, lengths, backend="triton")


@needs_kernels
@pytest.mark.parametrize(("case", "ties"), TIES, ids=str)
def test_native_sparse(case: SparseCase, ties: bool, poisoned: None) -> None:
    inputs, sizes = sparse_case_of(case, torch.float32, DEVICE)
    if ties:
        inputs[1][0].nan_to_num_(0).zero_()
    ours = ops.native_sparse_decode(*inputs, **sizes, backend="triton")
    on_cpu = [tuple(y.cpu() for y in x) if isinstance(x, tuple) else x.cpu() for x in inputs]  # where sums tie, too
    theirs = ops.native_sparse_decode(*on_cpu, **sizes, backend="naive")
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("case", [*SPARSE_CASES[:2], *SPARSE_CASES[4:]], ids=str)
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
def test_quest_pages(case: QuestCase, over_group: str, poisoned: None) -> None:
    inputs, options = quest_case_of(case, torch.float32, DEVICE)
    found, expected = (
        ops.quest_pages(*inputs, **options, over_group=over_group, backend=b) for b in ("triton", "naive")
    )
    assert torch.equal(found, expected)


@needs_kernels
@pytest.mark.parametrize("case", QUEST_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("over_group", ["sum", "max"])
def test_quest_pages_by_bounds_in_fp8(case: QuestCase, dtype: torch.dtype, over_group: str, poisoned: None) -> None:
    (q, *others), options = quest_case_of(case, torch.float32, DEVICE, fp8=True)
    q = q.to(dtype)
    found = ops.quest_pages(q, *others, **options, over_group=over_group, backend="triton")
    expected = ops.quest_pages(q.double(), *others, **options, over_group=over_group, backend="naive")
    assert torch.equal(found, expected)


@needs_kernels
@pytest.mark.parametrize("case", INDEX_CASES, ids=str)
def test_index_sets(case: IndexCase, poisoned: None) -> None:
    inputs, options = index_case_of(case, torch.float32, DEVICE)
    found, expected = (ops.index_topk_decode(*inputs, **options, backend=b) for b in ("triton", "naive"))
    assert torch.equal(found, expected)


@needs_kernels
@pytest.mark.parametrize("size", [1, 3, 17, 32])
@pytest.mark.parametrize("kind", ["whole numbers", "one number", "far apart", "close together", "infinite"])
def test_rows_that_a_program_holds(kind: str, size: int, poisoned: None) -> None:
    """Against sorted rows: some of the entries, from a first one on, and forced ones, also more than are chosen."""
    x = torch.randn(6, size, generator=torch.Generator().manual_seed(size))
    rows = {
        "whole numbers": x.round(), "one number": torch.full_like(x, 1.5), "close together": 3000 + x / 100,
        "far apart": x * torch.exp2(120 * x.sign() * (x.abs() - 1)), "infinite": x.masked_fill(x > 0.5, torch.inf),
    }[kind]  # fmt: skip
    own = torch.tensor([size - 1, size // 2, 0, -1, size - 1, size - 1])
    first = torch.minimum(torch.tensor([0, 1, 0, 0, 2, 0]), own.clamp(min=0))
    rows[torch.arange(size) > own[:, None]] = torch.nan
    for topk, num_initial, num_local in ((1, 0, 0), (5, 0, 1), (8, 2, 1), (6, 3, 20), (size + 2, 1, 1)):
        found = torch.full((len(rows), topk), -1, dtype=torch.int32, device=DEVICE)
        seen = torch.stack([first, own]).int().to(DEVICE)
        index_topk.choose_rows(rows.to(DEVICE), seen, found, topk, num_initial, num_local)
        for row, (begin, end) in enumerate(zip(first.tolist(), own.tolist(), strict=True)):
            keys = range(begin, end + 1)
            free = [key for key in keys if begin + num_initial <= key <= end - num_local]
            best = sorted(set(keys) - set(free)) + sorted(free, key=lambda key: (-rows[row, key].item(), key))
            expected = sorted(best[:topk])
            assert found[row].tolist() == expected + [-1] * (topk - len(expected))


@needs_kernels
@pytest.mark.parametrize("case", TOP_P_CASES, ids=str)
def test_top_p_tokens(case: TopPCase, poisoned: None) -> None:
    inputs, options = top_p_case_of(case, torch.float32, DEVICE)
    found, expected = (ops.top_p_tokens(*inputs, **options, backend=b) for b in ("triton", "naive"))
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
    memory, others = [x.new_zeros(batch, 3, *x.shape[2:]) for x in raw], torch.zeros_like(raw[1])
    angles = torch.arange(tokens, device=DEVICE)[:, None] * torch.rand(width // 2, device=DEVICE)
    cos, sin = angles.cos(), angles.sin()
    for token in range(tokens):
        index = torch.tensor([token], device=DEVICE)
        rows = [x[:, token : token + 1] for x in raw]
        given = [*rings, others], [*rows, rows[1]], weights, memory, cos[index], sin[index], index
        extend_compressed(*given, stride=stride, backend="triton")
    assert torch.equal(others, raw[1])
    for ring, x in zip(rings, raw, strict=True):
        assert torch.equal(ring, torch.cat((x[:, 8:], x[:, 7:8]), 1))
    options = {"length": length, "stride": stride, "backend": "naive"}
    whole = [ops.compress_blocks(x, *w, **options) for x, w in zip(raw, weights, strict=True)]
    ends = torch.tensor([length - 1, length - 1 + stride], device=DEVICE)
    whole[0] = ops.apply_rotary(whole[0], cos, sin, ends, backend="naive")
    for found, expected in zip(memory, whole, strict=True):
        torch.testing.assert_close(found[:, :2], expected, rtol=1e-4, atol=1e-5)
        assert not found[:, 2].any()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize(
    "case",
    [
        Case(32, 8, 128, 128, (5000, 700)),
        Case(64, 4, 128, 128, (3000,), pages=40, page_size=64),
        Case(6, 2, 192, 128, (2000, 1), pages=100, page_size=16, weighted=True, terms=300),
        Case(3, 3, 64, 64, (3000,), pages=1500),
    ],
    ids=str,
)
def test_in_bf16(case: Case) -> None:
    """Against the reference in fp32 on the same rounded inputs, as a CUDA graph that is replayed at other lengths."""
    inputs, options = case_of(case, torch.float32, DEVICE)
    q, k, v = (x.bfloat16() for x in inputs[:3])
    lengths = inputs[3]
    exact = dict(options)
    if (terms := options.get("terms")) is not None:
        options["terms"] = terms._replace(keys=terms.keys.bfloat16(), values=terms.values.bfloat16())
        exact["terms"] = ops.Terms(*(x.float() if x.is_floating_point() else x for x in options["terms"]))
    ops.decode_attention(q, k, v, lengths, **options, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = ops.decode_attention(q, k, v, lengths, **options, backend="triton")
    for share in (1, 2):
        lengths.floor_divide_(share)
        graph.replay()
        expected = ops.decode_attention(q.float(), k.float(), v.float(), lengths, **exact, backend="naive")[0]
        assert (out.float() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize("heads", [128, 16])
@pytest.mark.parametrize("listed", [0, 2048])
def test_latents_in_bf16(heads: int, listed: int) -> None:
    """512 columns and 64 rotary ones, of which the values are a view."""
    (q, k, _, lengths), options = case_of(Case(heads, 1, 576, 512, (5000, 700), pages=listed), torch.float32, DEVICE)
    q, k = q.bfloat16(), k.bfloat16()
    out, lse = ops.decode_attention(q, k, k[..., :512], lengths, **options, backend="triton")
    exact = q.float(), k.float(), k[..., :512].float(), lengths
    expected, expected_lse = ops.decode_attention(*exact, **options, backend="naive")
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize("heads", [64, 12, 8])
def test_native_sparse_in_bf16(heads: int) -> None:
    """The reference selects from bf16 scores' fp32 products, too: but for near ties the blocks are the same."""
    case = SparseCase(heads, 4, 128, 128, (9000, 40, 3000), 512, (32, 16, 64, 16, 1, 2))
    inputs, sizes = sparse_case_of(case, torch.float32, DEVICE)
    rounded = [tuple(y.bfloat16() for y in x) if isinstance(x, tuple) else x for x in inputs]
    rounded[0], rounded[4] = inputs[0].bfloat16(), inputs[4].bfloat16()
    exact = [tuple(y.float() for y in x) if isinstance(x, tuple) else x for x in rounded]
    exact[0], exact[4] = rounded[0].float(), rounded[4].float()
    out = ops.native_sparse_decode(*rounded, **sizes, backend="triton")
    expected = ops.native_sparse_decode(*exact, **sizes, backend="naive")
    assert (out.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize("fp8", [False, True])
def test_quest_pages_in_bf16(fp8: bool) -> None:
    """Of the pages that the reference chooses nearly all: bounds that are nearly equal may change places."""
    inputs, options = quest_case_of(QuestCase(32, 8, 128, (60000, 9000), 16, 200), torch.float32, DEVICE, fp8)
    rounded = [inputs[0].bfloat16(), *(x if fp8 else x.bfloat16() for x in inputs[1:3])]
    found = ops.quest_pages(*rounded, inputs[3], **options, backend="triton")
    expected = ops.quest_pages(*(x.float() for x in rounded), inputs[3], **options, backend="naive")
    missing = (expected[..., None] != found[..., None, :]).all(-1).float().mean()
    assert missing < 0.01 and torch.equal(found, ops.quest_pages(*rounded, inputs[3], **options, backend="triton"))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 is wrong")
@pytest.mark.parametrize(
    "case", [TopPCase(32, 8, 128, (60000, 9000), 0.7), TopPCase(64, 4, 128, (9000,), 0.9, 200, 16)]
)
def test_top_p_tokens_in_bf16(case: TopPCase) -> None:
    """As a CUDA graph. The share of the attention is reached, and the last tokens alone may differ by rounding."""
    inputs, options = top_p_case_of(case, torch.float32, DEVICE)
    q, sketch, lengths = inputs[0].bfloat16(), *inputs[1:]
    ops.top_p_tokens(q, sketch, lengths, **options, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.top_p_tokens(q, sketch, lengths, **options, backend="triton")
    for share in (1, 2):
        lengths.floor_divide_(share)
        graph.replay()
        expected = ops.top_p_tokens(q.float(), sketch, lengths, **options, backend="torch")
        for ours, theirs in zip(found.flatten(0, 1).tolist(), expected.flatten(0, 1).tolist(), strict=True):
            a, b = ({token for token in tokens if token >= 0} for tokens in (ours, theirs))
            assert len(a ^ b) <= 2 + len(b) // 200
            assert ours == sorted(a) + [-1] * (len(ours) - len(a))
