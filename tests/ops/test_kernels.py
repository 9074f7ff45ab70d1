"""The Triton kernels against the reference: on a GPU if there is one, else in Triton's interpreter (fp32)."""

import itertools
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.layers import NativeSparseAttention
from nsa.ops.geometry import RotaryLayout
from tests.conftest import HAS_GPU
from tests.ops import test_compression
from tests.ops.cases import cumulative, gradients

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
needs_kernels = pytest.mark.skipif(not (HAS_GPU or INTERPRETED), reason="runs within test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="the tests below run by themselves")
@pytest.mark.time_limit(1000)
def test_in_the_interpreter(run_python) -> None:
    """Runs in another process, since Triton reads TRITON_INTERPRET when a kernel is defined."""
    names = ["test_batch_of_two.py"]  # on a GPU the others run by themselves
    names += [] if HAS_GPU else ["test_kernels.py", "test_dsa_kernels.py", "test_decode_kernels.py", "test_fused.py"]
    names += [] if HAS_GPU else ["test_block_sparse.py", "test_choose.py", "test_latent_kernels.py"]
    names += [] if HAS_GPU else ["test_selection_kl_kernels.py", "test_few_rows.py", "test_masked.py"]
    files = [str(Path(__file__).with_name(name)) for name in names]
    files += [] if HAS_GPU else [str(Path(__file__).parents[1] / "baselines/test_prompt_blocks.py")]
    done = run_python("-m", "pytest", "-q", "-x", *files, timeout=900, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()


def packing(documents: list[int]) -> Tensor | None:
    return cumulative(documents).to(DEVICE) if len(documents) > 1 else None


def check(kernel, definition, inputs: list[Tensor]) -> None:
    """Compare outputs and gradients; ``kernel`` and ``definition`` return (output, other outputs...)."""
    out, expected = kernel(), definition()
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients(out[0], inputs), gradients(expected[0], inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


RANGES = [  # batch, documents, heads, groups, D, Dv, window
    (1, [1], 2, 1, 16, 16, None),
    (2, [63], 6, 2, 16, 32, 7),
    (2, [40], 3, 1, 48, 24, None),
    (1, [1, 1, 0, 31, 37], 4, 1, 16, 16, 9),
    (1, [33, 17, 20], 1, 1, 16, 16, None),
]


@needs_kernels
@pytest.mark.parametrize(("batch", "documents", "heads", "groups", "width", "v_width", "window"), RANGES)
def test_dense(batch, documents, heads, groups, width, v_width, window) -> None:
    tokens = sum(documents)
    q, k, v = normal(batch, tokens, heads, width), normal(batch, tokens, groups, width), None
    v = normal(batch, tokens, groups, v_width, seed=1)
    options = {"window": window, "cu_seqlens": packing(documents), "return_lse": True}
    check(
        lambda: ops.dense_attention(q, k, v, **options, backend="triton"),
        lambda: ops.dense_attention(q, k, v, **options, backend="naive"),
        [q, k, v],
    )


@needs_kernels
@pytest.mark.parametrize("of", ["both", "lse"])
def test_a_returned_lse_has_a_gradient(of: str) -> None:
    """Queries before the first block see no key: their LSE is -inf and has no gradient."""
    documents, sizes = [40, 9, 30], {"length": 8, "stride": 4}
    q, k, v = normal(1, 79, 4, 16), normal(1, 18, 2, 16), normal(1, 18, 2, 16, seed=1)
    weights = torch.randn(1, 79, 4, 16, device=DEVICE) * (of == "both"), torch.randn(1, 4, 79, device=DEVICE)
    found = []
    for backend in ("triton", "naive"):
        out, lse = ops.compressed_attention(q, k, v, **sizes, cu_seqlens=packing(documents), backend=backend)
        finite = lse.masked_fill(lse == -torch.inf, 0.0)
        loss = (finite * weights[1]).sum() + ((out * weights[0]).sum() if of == "both" else 0.0)
        found.append(torch.autograd.grad(loss, [q, k] + [v] * (of == "both")))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=3e-5)


PARTS = [
    [
        ops.Heads(3, 16, "rotate"),
        ops.Heads(1, 16),
        ops.Heads(2, 8),
        ops.Heads(1, 16, "rotate"),
        ops.Heads(3, 3, "sigmoid"),
    ],
    [ops.Heads(1, 2, "sigmoid")],
    [ops.Heads(1, 6, "rotate")],
    [ops.Heads(1, 7), ops.Heads(5, 48, "rotate")],
    [ops.Heads(2, 24, "rotate", RotaryLayout(8, place)) for place in ("first", "last")],
    [ops.Heads(3, 20, "rotate", RotaryLayout(6, place, "interleaved")) for place in ("first", "last")],
    [ops.Heads(2, 10, "rotate", RotaryLayout(pairs="interleaved")), ops.Heads(1, 12)],
]


@needs_kernels
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 17), (3, 63), (1, 0)])
@pytest.mark.parametrize("given", [False, True])
def test_split_heads(parts: list[ops.Heads], batch: int, tokens: int, given: bool) -> None:
    x = normal(batch, tokens, sum(part.columns for part in parts))
    half = next((part.layout.turning(part.width)[0] // 2 for part in parts if part.how == "rotate"), 1)
    tables = [normal(tokens + 5 if given else tokens, half, seed=i).detach() for i in (1, 2)]
    rows = torch.arange(tokens, device=DEVICE).flip(0) + 5 if given else None
    gate = next((part for part in parts if part.how == "sigmoid"), None)
    bias = normal(gate.columns, seed=3) if gate else None
    inputs = [x, *([bias] if bias is not None else [])]
    results = []
    for backend in ("triton", "torch"):
        outs = ops.split_heads(x, parts, *tables, rows=rows, bias=bias, backend=backend)
        assert [out.shape for out in outs] == [(batch, tokens, part.number, part.width) for part in parts]
        weights = [normal(*out.shape, seed=i).detach() for i, out in enumerate(outs)]
        results.append([*outs, *torch.autograd.grad(outs, inputs, weights)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_split_heads_with_the_gradient_of_one_part() -> None:
    """The other parts have no gradient instead of zeros, as if no token is compressed."""
    x, (cos, sin) = normal(1, 9, 40), normal(2, 9, 8).detach()
    parts = [ops.Heads(1, 16, "rotate"), ops.Heads(1, 24)]
    (ours,) = torch.autograd.grad(ops.split_heads(x, parts, cos, sin, backend="triton")[1].sum(), x)
    assert (ours[..., :16] == 0).all() and (ours[..., 16:] == 1).all()


@needs_kernels
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (2, 4096), (0, 4)])
def test_swiglu(shape: tuple[int, ...]) -> None:
    gate, up = normal(*shape), normal(*shape, seed=1)
    check(
        lambda: [ops.swiglu(gate, up, backend="triton")],
        lambda: [ops.swiglu(gate, up, backend="torch")],
        [gate, up],
    )


LISTS = [(1, 1, 1, 1, 1, 128), (2, 70, 3, 4, 9, 8), (1, 300, 1, 16, 40, 128), (1, 130, 2, 5, 700, 4)]
LISTS += [(1, 20, 1, 3, lists, 4) for lists in (32767, 32768)]  # keys of 16 bits, and of 32


@needs_kernels
@pytest.mark.parametrize(("batch", "tokens", "groups", "n", "num_blocks", "chunk"), LISTS)
def test_lists_of_tokens_and_their_work_items(batch, tokens, groups, n, num_blocks, chunk, monkeypatch) -> None:
    from nsa.ops.kernels import lists as kernels
    from nsa.ops.kernels.lists import NO_BLOCK, work_items

    if INTERPRETED and num_blocks > 10_000:  # wide programs, and few: each takes the interpreter as long
        for name in ("BLOCK", "ITEM_BLOCK", "LISTS"):
            monkeypatch.setattr(kernels, name, 8192)
    torch.manual_seed(0)
    blocks = torch.randint(num_blocks, (batch, tokens, groups, n), dtype=torch.int32)
    blocks[torch.rand(blocks.shape) < 0.2] = NO_BLOCK.value
    found = [x.tolist() for x in work_items(blocks.to(DEVICE), num_blocks, chunk)]
    lists: list[list[int]] = [[] for _ in range(batch * groups * num_blocks)]
    places = itertools.product(*map(range, blocks.shape))
    for (b, t, g, _), block in zip(places, blocks.flatten().tolist(), strict=True):
        if block != NO_BLOCK.value:
            lists[(b * groups + g) * num_blocks + block].append(t)
    begins = [0, *itertools.accumulate(map(len, lists))]
    items = [max(1, -(-len(tokens_) // chunk)) for tokens_ in lists]
    parts = [count if count > 1 else 0 for count in items]
    blocks_of = [i for i, count in enumerate(items) for _ in range(count)]
    order, list_begin, item_block, item_begin, part_begin, turns = found
    assert order[: begins[-1]] == list(itertools.chain.from_iterable(lists)) and list_begin == begins
    assert item_begin == [0, *itertools.accumulate(items)]
    assert part_begin == [0, *itertools.accumulate(parts)]
    assert item_block == blocks_of + [len(lists)] * (len(item_block) - len(blocks_of))
    last_tokens = [
        (i // num_blocks, tokens_[min(at + chunk, len(tokens_)) - 1] if tokens_ else 0)
        for i, tokens_ in enumerate(lists)
        for at in range(0, max(1, len(tokens_)), chunk)
    ]
    assert turns[: len(blocks_of)] == sorted(range(len(blocks_of)), key=lambda item: last_tokens[item])


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "groups", "n", "per_tile", "block_size"),
    [(70, 2, 4, 4, 8), (33, 1, 3, 7, 2), (64, 1, 40, 64, 1)],
)
def test_unions_of_blocks_and_their_members(tokens, groups, n, per_tile, block_size) -> None:
    """With blocks that are selected twice, and with bit 63."""
    from nsa.ops.geometry import Documents
    from nsa.ops.kernels.selected import NO_BLOCK, BlockLayout, unions

    torch.manual_seed(0)
    indices = torch.randint(-(-tokens // block_size), (1, tokens, groups, n), dtype=torch.int32, device=DEVICE)
    indices[:, ::5, :, -1] = -1
    layout = BlockLayout.of(Documents.of(tokens, 0, None, indices.device), indices, tokens, block_size)
    starts, members, counts, num_tiles = (
        x.tolist() if torch.is_tensor(x) else x for x in unions(layout, per_tile, block_size)
    )
    blocks = layout.blocks.tolist()
    for group, tile in itertools.product(range(groups), range(num_tiles)):
        chosen: dict[int, int] = {}
        for place, token in enumerate(range(tile * per_tile, min((tile + 1) * per_tile, tokens))):
            for block in set(blocks[0][token][group]) - {NO_BLOCK.value}:
                chosen[block * block_size] = chosen.get(block * block_size, 0) | 1 << place
        whole, count = counts[0][group][tile]
        bits = [x % 2**64 for x in members[0][group][tile][:count]]
        assert list(zip(starts[0][group][tile][:count], bits, strict=True)) == sorted(chosen.items())
        assert whole == sum(start + block_size - 1 <= tile * per_tile for start in chosen)


COMPRESSED = [  # documents, heads, groups, length, stride
    ([3], 2, 1, 4, 2),
    ([129], 6, 2, 4, 2),
    ([1, 50, 3, 20], 3, 1, 6, 2),
    ([140], 4, 1, 8, 8),  # a tile of keys has so many rows of queries that programs share it
]


@needs_kernels
@pytest.mark.parametrize(("documents", "heads", "groups", "length", "stride"), COMPRESSED)
def test_compressed(documents, heads, groups, length, stride) -> None:
    tokens = sum(documents)
    blocks = max(0, (tokens - length) // stride + 1)
    q, k, v = normal(1, tokens, heads, 16), normal(1, blocks, groups, 16), normal(1, blocks, groups, 16, seed=1)
    options = {"length": length, "stride": stride, "cu_seqlens": packing(documents)}
    check(
        lambda: ops.compressed_attention(q, k, v, **options, backend="triton"),
        lambda: ops.compressed_attention(q, k, v, **options, backend="naive"),
        [q, k, v],
    )


@needs_kernels
def test_long_sums_are_split(monkeypatch) -> None:
    """With few keys and small partial sums, no program sums more rows than its accumulator has precision for."""
    from nsa.ops.kernels import ranges

    add, shares = ranges._add_splits_of, []
    monkeypatch.setattr(ranges, "LONGEST_SUM", 50)
    monkeypatch.setattr(ranges, "_add_splits_of", lambda *args: shares.append(len(args[0])) or add(*args))
    q, k, v = normal(1, 70, 4, 16), normal(1, 8, 1, 16), normal(1, 8, 1, 16, seed=1)
    check(
        lambda: [ops.compressed_attention(q, k, v, length=8, stride=8, backend="triton")[0]],
        lambda: [ops.compressed_attention(q, k, v, length=8, stride=8, backend="naive")[0]],
        [q, k, v],
    )
    k, v = normal(1, 70, 1, 16), normal(1, 70, 1, 16, seed=1)
    ops.dense_attention(q, k, v, window=9, backend="triton").sum().backward()
    assert shares == [6]


SELECTION = [  # documents, heads, groups, length, stride, block size, blocks, initial, local
    ([70], 4, 2, 4, 2, 6, 5, 1, 2),
    ([1, 40, 34], 3, 1, 4, 4, 4, 3, 1, 1),
    ([130], 1, 1, 8, 4, 16, 16, 2, 1),
]


@needs_kernels
@pytest.mark.parametrize(
    ("documents", "heads", "groups", "length", "stride", "block_size", "blocks", "initial", "local"), SELECTION
)
@pytest.mark.parametrize("ties", [False, True])
def test_selection(documents, heads, groups, length, stride, block_size, blocks, initial, local, ties) -> None:
    tokens = sum(documents)
    keys = max(0, (tokens - length) // stride + 1)
    q, k = normal(1, tokens, heads, 16).detach(), normal(1, keys, groups, 16).detach()
    if ties:
        if DEVICE == "cuda" and length > stride:
            pytest.skip("the definition itself rounds equal sums differently there")
        k.zero_()
    sizes, packed = {"length": length, "stride": stride}, {"cu_seqlens": packing(documents)}
    _, lse = ops.compressed_attention(q, k, k, **sizes, **packed, backend="naive")
    sizes |= {"block_size": block_size, "num_blocks": blocks, "num_initial": initial, "num_local": local}
    chosen = ops.select_blocks(q, k, lse, **sizes, **packed, backend="triton")
    assert torch.equal(chosen, ops.select_blocks(q, k, lse, **sizes, **packed, backend="naive"))


SELECTED = [  # batch, documents, heads, groups, D, Dv, block size, blocks
    (1, [70], 4, 2, 16, 16, 8, 4),
    (1, [1, 40, 34], 3, 1, 16, 32, 6, 3),
    (2, [33], 2, 1, 48, 16, 16, 2),
    (1, [300], 2, 2, 16, 16, 64, 3),  # the first block's list has several items
    (1, [600], 2, 1, 16, 16, 256, 2),  # a block has more tokens than short items have entries
]


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "documents", "heads", "groups", "width", "v_width", "block_size", "blocks", "part_bytes"),
    [(*case, None) for case in SELECTED] + [(*case, 100_000) for case in SELECTED[:3]],
)
def test_selected(batch, documents, heads, groups, width, v_width, block_size, blocks, part_bytes, monkeypatch) -> None:
    if part_bytes is not None:  # a launch for each KV head or sequence
        monkeypatch.setattr("nsa.ops.kernels.selected.PART_BYTES", part_bytes)
    tokens = sum(documents)
    q, k = normal(batch, tokens, heads, width), normal(batch, tokens, groups, width)
    v = normal(batch, tokens, groups, v_width, seed=1)
    order = normal(batch, tokens, groups, tokens // block_size + 1).detach().argsort(-1)
    indices = order[..., :blocks].int()  # with some blocks after the query
    indices[..., 0] = torch.where((indices == 0).any(-1), indices[..., 0], 0)
    indices[:, ::5, :, -1] = -1
    options = {"block_size": block_size, "cu_seqlens": packing(documents)}
    check(
        lambda: (ops.selected_attention(q, k, v, indices, **options, backend="triton"),),
        lambda: (ops.selected_attention(q, k, v, indices, **options, backend="naive"),),
        [q, k, v],
    )


@needs_kernels
@pytest.mark.parametrize("documents", [[75], [20, 1, 40]])
def test_native_sparse(documents) -> None:
    tokens = sum(documents)
    keys = (tokens - 4) // 2 + 1
    q, gates = normal(1, tokens, 6, 16), torch.rand(1, tokens, 6, 3, device=DEVICE).requires_grad_()
    pairs = [
        (normal(1, n, 2, 16, seed=i), normal(1, n, 2, 16, seed=i + 9)) for i, n in enumerate((keys, tokens, tokens))
    ]
    sizes = {"length": 4, "stride": 2, "block_size": 8, "num_blocks": 4, "window": 9, "cu_seqlens": packing(documents)}
    check(
        lambda: (ops.native_sparse_attention(q, *pairs, gates, **sizes, backend="triton"),),
        lambda: (ops.native_sparse_attention(q, *pairs, gates, **sizes, backend="naive"),),
        [q, *(x for pair in pairs for x in pair), gates],
    )


@needs_kernels
def test_outputs_of_the_branches_are_freed_before_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.ops.kernels import selected

    forward, key_gradients, outputs, alive = selected.forward, selected.key_gradients, [], []

    def remember(*args: object) -> tuple[Tensor, Tensor]:
        out, lse = forward(*args)
        outputs.append(weakref.ref(out.untyped_storage()))
        return out, lse

    def look(*args: object) -> tuple[Tensor, Tensor]:
        alive.append(outputs[-1]() is not None)
        return key_gradients(*args)

    monkeypatch.setattr(selected, "forward", remember)
    monkeypatch.setattr(selected, "key_gradients", look)
    q, gates = normal(1, 40, 2, 16), torch.rand(1, 40, 2, 3, device=DEVICE)
    pairs = [(normal(1, n, 1, 16), normal(1, n, 1, 16, seed=1)) for n in (19, 40, 40)]
    sizes = {"length": 4, "stride": 2, "block_size": 8, "num_blocks": 4, "window": 9, "backend": "triton"}
    out = ops.native_sparse_attention(q, *pairs, gates, **sizes)
    (kept,) = torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
    (freed,) = torch.autograd.grad(out, q, torch.ones_like(out))
    assert alive == [True, False]
    assert torch.equal(kept, freed)


@needs_kernels
@pytest.mark.parametrize(test_compression.COLUMNS, test_compression.CASES)
def test_compress_blocks(batch, documents, groups, width, v_width, hidden, length, stride) -> None:
    inputs = test_compression.inputs_of(batch, documents, groups, width, v_width, hidden, length, torch.float32, DEVICE)
    options = {"length": length, "stride": stride, "cu_seqlens": packing(documents)}
    check(
        lambda: (ops.compress_blocks(*inputs, **options, backend="triton"),),
        lambda: (ops.compress_blocks(*inputs, **options, backend="naive"),),
        inputs,
    )


@needs_kernels
def test_compression_sums_long_runs_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.ops.kernels import compression

    monkeypatch.setattr(compression, "ROWS_PER_SPLIT", 8)
    monkeypatch.setattr(compression, "MOST_SPLITS", 3)
    test_compress_blocks(1, [63], 2, 16, 16, 16, 4, 2)


@needs_kernels
def test_decoding_equals_prefill() -> None:
    tokens, keys = 40, 19
    q, gates = normal(1, tokens, 4, 16).detach(), torch.rand(1, tokens, 4, 3, device=DEVICE)
    pairs = [(normal(1, n, 2, 16, seed=i).detach(),) * 2 for i, n in enumerate((keys, tokens, tokens))]
    sizes = {"length": 4, "stride": 2, "block_size": 8, "num_blocks": 4, "window": 9, "backend": "triton"}
    whole = ops.native_sparse_attention(q, *pairs, gates, **sizes)
    last = ops.native_sparse_attention(q[:, -1:], *pairs, gates[:, -1:], **sizes, offset=tokens - 1)
    torch.testing.assert_close(last, whole[:, -1:])


@needs_kernels
def test_compiles_without_graph_breaks() -> None:
    torch.manual_seed(0)
    layer = NativeSparseAttention(
        32, 4, 2, 16, compress_length=4, compress_stride=2, block_size=8, num_blocks=4, window=9, backend="triton"
    ).to(DEVICE)
    x = torch.randn(1, 20, 32, device=DEVICE)
    out, expected = torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)
    torch.testing.assert_close(out, expected)
    weights = list(layer.parameters())
    for ours, theirs in zip(gradients(out, weights), gradients(expected, weights), strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_kernels
@pytest.mark.parametrize(("batch", "tokens"), [(0, 40), (1, 0)])
def test_empty_inputs(batch: int, tokens: int) -> None:
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32

    def empty(count: int, heads: int, width: int = 64) -> Tensor:
        return torch.zeros(batch, count, heads, width, device=DEVICE, dtype=dtype, requires_grad=True)

    pairs = [(empty(n, 2), empty(n, 2)) for n in (max(0, tokens // 16 - 1), tokens, tokens)]
    inputs = [empty(tokens, 4), *(x for pair in pairs for x in pair), empty(tokens, 4, 3)]
    sizes = {"length": 32, "stride": 16, "block_size": 64, "num_blocks": 4, "window": 9}
    out = ops.native_sparse_attention(inputs[0], *pairs, inputs[-1], **sizes, backend="triton")
    assert out.shape == (batch, tokens, 4, 64)
    assert [x.shape for x in gradients(out, inputs)] == [x.shape for x in inputs]


@needs_kernels
@pytest.mark.parametrize(
    ("width", "dtype", "reason"), [(6, torch.float32, "16 bytes"), (16, torch.float64, "float16"), (256, None, "fp32")]
)
def test_unsupported_inputs_are_rejected(width: int, dtype: torch.dtype | None, reason: str) -> None:
    x = torch.randn(1, 4, 2, width, device=DEVICE, dtype=dtype)
    with pytest.raises(ValueError, match=reason):
        ops.dense_attention(x, x, x, backend="triton")
    torch.testing.assert_close(ops.dense_attention(x, x, x), ops.dense_attention(x, x, x, backend="naive"))
