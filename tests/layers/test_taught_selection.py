"""NSA whose selection is taught: what the layer computes in the warm-up, what learns from its loss, and its figures;
and the same where the loss goes on in the sparse phase."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nsa import ops
from nsa.layers import DenseAttention, NativeSparseAttention
from nsa.layers.figure import values
from nsa.layers.kind import Shape
from nsa.layers.nsa import figures
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.nsa.figures import measure, measure_taught, measure_warm_up
from nsa.layers.nsa.kind import WARM_UP
from nsa.layers.rotary import Rotary
from nsa.ops.selection_kl import block_attention
from tests.ops.cases import cumulative

SIZES = {"compress_length": 4, "compress_stride": 2, "block_size": 4, "num_blocks": 4, "num_local": 1, "window": 5}
FIGURES = {"recall", "recall_bound", "choice_mass"}


def layer_of(**changes) -> NativeSparseAttention:
    """In float64; four heads of two KV heads."""
    torch.manual_seed(0)
    layer = NativeSparseAttention(16, 4, 2, 6, 4, **{**SIZES, "phase": "warm-up", **changes}).double()
    for name, parameter in layer.named_parameters():  # attention that is not flat
        if name.endswith(("query.weight", "key.weight", "position")):
            torch.nn.init.normal_(parameter)
    return layer


def some_input(tokens: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def freeze_others(layer: NativeSparseAttention) -> None:
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name.startswith("compress.key."))


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
def test_in_the_warm_up_it_is_dense_attention_of_the_selected_branch(compression: str) -> None:
    layer, x = layer_of(key_compression=compression), some_input(40, batch=2)
    dense = DenseAttention(16, 4, 2, 6, 4).double()
    there = layer.state_dict()
    own = {name: there[name] for name in ("query.weight", "output.weight")}
    own |= {f"{part}.weight": there[f"key_value.selected.{part}.weight"] for part in ("key", "value")}
    dense.load_state_dict(own)
    torch.testing.assert_close(layer(x), dense(x, Rotary().at(torch.arange(40))))


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
def test_the_compression_of_keys_learns_from_its_loss_alone_and_nothing_else_does(compression: str) -> None:
    x = some_input(40).requires_grad_()

    def gradients(weight: float) -> dict[str, Tensor | None]:
        layer = layer_of(key_compression=compression)
        layer.attend.loss.weight = weight
        x.grad = None
        layer(x).square().sum().backward()
        return {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}

    none, much = gradients(0.0), gradients(1000.0)
    unused = ("gate.", "compress.value.", "key_value.window.", "key_value.compressed.value.")
    for name, gradient in none.items():
        if name.startswith("compress.key."):
            assert gradient.eq(0).all() and much[name].ne(0).any(), name
        elif name.startswith(unused):
            assert all(g is None or not g.any() for g in (gradient, much[name])), name
        elif name in ("key_value.compressed.key.weight", "x"):
            continue  # the keys that are compressed learn along, where they are not frozen
        else:
            assert gradient.any() and torch.equal(gradient, much[name]), name


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
def test_the_loss_falls_and_the_selection_finds_more(compression: str) -> None:
    """Training the compression of keys alone, as `train: indexer` does: the losses are kept. The first loss is that of
    the definition, as a mean over tokens."""
    layer, x = layer_of(key_compression=compression), some_input(64)
    freeze_others(layer)
    loss, optimizer = layer.attend.loss, torch.optim.Adam(layer.compress.key.parameters(), 0.02)
    seen: list[tuple] = []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    curve, figures = [], []
    for _ in range(60):
        optimizer.zero_grad()
        loss.clear()
        assert not layer(x).requires_grad
        kept = loss.take()
        kept.backward()
        optimizer.step()
        curve.append(loss.tally[0].item() / 64)
        assert kept.item() == pytest.approx(curve[-1])
        figures.append(values(measure_warm_up(layer.attend, *seen[-1])))
    q, (k_cmp, _), (k, v), *_ = seen[0]
    _, lse = ops.dense_attention(q, k, v, return_lse=True)
    sizes = {"length": 4, "stride": 2, "block_size": 4, "num_initial": 1, "num_local": 1, "window": 5}
    first = ops.selection_kl(q, k_cmp, k, lse, **sizes, backend="naive")
    assert curve[0] == pytest.approx(first.item() / 64)
    assert curve[-1] < 0.7 * curve[0]
    assert figures[-1]["recall"] > figures[0]["recall"] + 0.05
    assert figures[-1]["recall_bound"] == figures[0]["recall_bound"], "that of the dense attention alone"


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_packed_documents_are_as_each_alone(phase: str, compression: str) -> None:
    """Outputs, and in the warm-up the loss and its gradient."""
    documents = [9, 1, 30, 3]
    outs, grads = [], []
    for packed in (True, False):
        layer, x = layer_of(phase=phase, key_compression=compression), some_input(43)
        if phase == "warm-up":
            freeze_others(layer)
            layer.attend.loss.scale = 0.1
        pieces = [x] if packed else x.split(documents, 1)
        borders = cumulative(documents) if packed else None
        outs.append(torch.cat([layer(piece, cu_seqlens=borders) for piece in pieces], 1))
        if phase == "warm-up":
            layer.attend.loss.take().backward()
            grads.append([layer.attend.loss.tally, *(p.grad for p in layer.compress.key.parameters())])
    torch.testing.assert_close(*outs)
    if phase == "warm-up":
        assert all(gradient.any() for gradient in grads[0])
        torch.testing.assert_close(*grads)


def test_the_loss_is_counted_where_gradients_of_the_parameters_alone_are_asked_for() -> None:
    """As a recording of CUDA graphs does; and as often as the pass goes backward."""
    layer, x = layer_of(), some_input(40)
    found = []
    for ask in (lambda total: total.backward(), lambda total: torch.autograd.grad(total, [layer.query.weight])):
        layer.attend.loss.clear()
        ask(layer(x.requires_grad_()).square().sum())
        found.append(layer.attend.loss.tally.clone())
    assert found[0] > 0 and torch.equal(*found)


def test_a_method_in_its_place_chooses_as_in_a_dense_layer() -> None:
    """All of its output is what the method attends to; it reads no compressed blocks, and has no window beside."""
    layer, seen = layer_of(), []
    layer.attend.register_forward_hook(lambda module, inputs, out: seen.append((inputs, out)))
    layer(some_input(40, batch=2))
    (inputs, out), guest = seen[0], WARM_UP.guest

    def method(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return ops.dense_attention(q, k, v, scale=scale)

    torch.testing.assert_close(guest.attention(layer.attend, method, *inputs), out)
    reads = guest.spent(layer.attend, *inputs)
    per_head = 2 * 40 * 41 / 2  # of both samples
    assert reads.attended.tolist() == [2 * per_head] * 2 and not reads.scored.any(), "two query heads of two KV heads"
    assert guest.beside is None and not guest.cached


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
@pytest.mark.parametrize("documents", [[40], [9, 1, 30]])
def test_in_the_sparse_phase_the_loss_is_added_and_nothing_else_changes(documents: list[int], compression: str) -> None:
    """Against NSA without it, and the definition of the loss on the inputs of ``attend``: a mean over tokens."""
    x, borders = some_input(40), cumulative(documents)
    sizes = {"length": 4, "stride": 2, "block_size": 4, "num_initial": 1, "num_local": 1, "window": 5}
    changes = {"phase": "sparse", "key_compression": compression}
    layer, without, seen = layer_of(**changes, kl_weight=3.0), layer_of(**changes), []
    without.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    out, expected = layer(x, cu_seqlens=borders), without(x, cu_seqlens=borders)
    assert torch.equal(out, expected) and without.attend.loss is None
    q, (k_cmp, _), (k, v), *_ = seen[0]
    _, lse = ops.dense_attention(q, k, v, cu_seqlens=borders, return_lse=True, backend="naive")
    loss = ops.selection_kl(q, k_cmp, k, lse, **sizes, cu_seqlens=borders, backend="naive") / 40
    out.square().sum().backward()
    (expected.square().sum() + 3 * loss).backward()
    assert layer.attend.loss.tally[0].item() / 40 == pytest.approx(loss.item()) and loss > 0.01
    for (name, found), wanted in zip(layer.named_parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, msg=name)


def test_its_figures_in_the_sparse_phase_are_those_of_both() -> None:
    layer, seen = layer_of(phase="sparse", kl_weight=1.0), []
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    layer(some_input(40))
    found = values(measure_taught(layer.attend, *seen[0]))
    assert found == values(measure(layer.attend, *seen[0])) | values(measure_warm_up(layer.attend, *seen[0]))
    assert found.keys() > FIGURES and "gate_window" in found


@pytest.mark.parametrize("changes", [{}, {"phase": "sparse", "kl_weight": 1.0}])
def test_without_gradients_there_is_no_loss(changes: dict) -> None:
    layer = layer_of(**changes)
    with torch.no_grad():
        layer(some_input(40))
    assert layer.attend.loss.tally is None and layer.attend.loss.take() is None


def test_the_weight_of_the_sparse_phase_is_none_of_the_warm_up() -> None:
    """Its loss is all that is trained there. A file with both stages has one ``kl_weight``."""
    weights = [layer_of(phase=phase, kl_weight=0.3).attend.loss.weight for phase in ("warm-up", "sparse")]
    assert weights == [1.0, 0.3]


def test_the_loss_is_a_mean_over_the_tokens_of_all_samples() -> None:
    """Equal samples have the loss of one."""
    losses = []
    for batch in (1, 3):
        layer, x = layer_of(), some_input(40).expand(batch, -1, -1)
        freeze_others(layer)
        layer(x)
        losses.append(layer.attend.loss.take())
    assert losses[0] > 0
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("borders", [None, [0, 9, 10, 40]])
def test_chunks_of_queries_have_the_losses_of_the_whole(borders: list[int] | None) -> None:
    """As context-parallel ranks call it: a chunk's queries are the last tokens of what its keys end with."""
    layer, seen, cumulative_lengths = layer_of(), [], None if borders is None else torch.tensor(borders).int()
    freeze_others(layer)
    layer.attend.loss.scale = 1.0
    with torch.no_grad():  # so that the inputs alone are taken, and no loss
        layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
        layer(some_input(40), cu_seqlens=cumulative_lengths)
    q, (k_cmp, v_cmp), kv, *rest = seen[0]
    k_cmp.requires_grad_()

    def outcome(start: int, stop: int) -> tuple[Tensor, Tensor]:
        inner = None if cumulative_lengths is None else cumulative_lengths.clamp(max=stop)
        keys = tuple(x[:, :stop] for x in kv)
        out = layer.attend(q[:, start:stop], (k_cmp, v_cmp), keys, *rest, cu_seqlens=inner, offset=start)
        return out, layer.attend.loss.take()

    (out, loss), (first, head), (second, tail) = outcome(0, 40), outcome(0, 23), outcome(23, 40)
    assert head > 0 and tail > 0
    torch.testing.assert_close(torch.cat((first, second), 1), out)
    torch.testing.assert_close(head + tail, loss)


@pytest.mark.parametrize("documents", [[60], [9, 1, 30, 0, 20], [7, 3]])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_local": 0},
        {"num_blocks": 30},
        {"num_blocks": 30, "num_initial": 0},  # lists have room, and the first block is no forced one
        {"window": 100},
        {"num_blocks": 2},
    ],
)
def test_figures_are_shares(documents: list[int], changes: dict[str, int]) -> None:
    layer, seen = layer_of(**changes), []
    layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
    borders = cumulative(documents) if len(documents) > 1 else None
    layer(some_input(sum(documents)), cu_seqlens=borders)
    found = values(measure_warm_up(layer.attend, *seen[0], cu_seqlens=borders))
    assert found.keys() == FIGURES
    assert all(0 <= value < 1 + 1e-9 for value in found.values())
    assert found["recall"] <= found["recall_bound"] + 1e-9
    if documents == [60] and not changes:
        assert 0.1 < found["recall"] < found["recall_bound"] < 1 and 0.1 < found["choice_mass"] < 1
    if changes.get("num_blocks") == 30:
        assert [found["recall"], found["recall_bound"]] == pytest.approx([1, 1]), "as many as there are"
    if changes.get("num_blocks") == 2 and documents == [60]:
        assert [found["recall"], found["recall_bound"]] == [0, 0], "all that it may select is forced"


@pytest.mark.parametrize("documents", [[60], [9, 1, 30, 0, 20]])
def test_recall_is_of_the_blocks_that_the_sparse_layer_selects(documents: list[int]) -> None:
    borders, x, seen, chosen = cumulative(documents) if len(documents) > 1 else None, some_input(60), [], []
    warm, sparse = layer_of(), layer_of(phase="sparse")
    sparse.load_state_dict(warm.state_dict())
    warm.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
    sparse.attend.choose.register_forward_hook(lambda module, inputs, out: chosen.append(out))
    for layer in (warm, sparse):
        layer(x, cu_seqlens=borders)
    q, _, (k, v), *_ = seen[0]
    _, lse = ops.dense_attention(q, k, v, cu_seqlens=borders, return_lse=True)
    sizes = {"block_size": 4, "window": 5, "num_initial": 1, "num_local": 1}
    target = block_attention(q, k, lse, **sizes, cu_seqlens=borders)  # (1, G, T, M)
    held = sum(
        target[0, g, t, block].item()
        for t in range(60)
        for g in range(2)
        for block in chosen[0][0, t, g].tolist()
        if block >= 0
    )
    found = values(measure_warm_up(warm.attend, *seen[0], cu_seqlens=borders))
    assert 0 < held < found["recall_bound"] * target.sum() and found["recall"] == pytest.approx(
        held / target.sum().item()
    )


@pytest.mark.parametrize("documents", [[60], [9, 1, 30, 0, 20]])
def test_figures_are_summed_over_parts_of_the_queries(documents: list[int], monkeypatch) -> None:
    """So that their memory does not grow with queries x blocks."""
    layer, seen, shapes = layer_of(), [], []
    layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
    borders = cumulative(documents) if len(documents) > 1 else None
    layer(some_input(60, batch=2 if borders is None else 1), cu_seqlens=borders)
    expected = values(measure_warm_up(layer.attend, *seen[0], cu_seqlens=borders))

    def watched(*args, **options) -> Tensor:
        target = block_attention(*args, **options)
        shapes.append(target.shape[2])
        return target

    monkeypatch.setattr(figures, "ROWS", 7)
    monkeypatch.setattr(figures, "block_attention", watched)
    found = values(measure_warm_up(layer.attend, *seen[0], cu_seqlens=borders))
    assert found == pytest.approx(expected, rel=1e-9) and found["recall"] < found["recall_bound"] < 1
    assert shapes == [7] * 8 + [4]


def test_figures_of_a_known_selection() -> None:
    """Uniform attention, so that of every query all tokens have the same share; equal importance, so that the first
    blocks are chosen. A loop over queries."""
    layer, seen = layer_of(num_blocks=4), []
    torch.nn.init.zeros_(layer.query.weight)
    layer.attend.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    layer(some_input(40))
    found = values(measure_warm_up(layer.attend, *seen[0]))
    mass, most = 0.0, 0.0
    for t in range(40):
        blocks = [max(0, min(4 * j + 4, t - 4) - 4 * j) / (t + 1) for j in range(1, t // 4)]  # 0 and the own: forced
        mass += sum(blocks)
        most += sum(sorted(blocks)[-2:])
    assert found["choice_mass"] == pytest.approx(mass / 40)
    assert found["recall_bound"] == pytest.approx(most / mass)


@pytest.mark.parametrize("compression", ["mlp", "pooled"])
@pytest.mark.parametrize("phase", ["warm-up", "sparse"])
def test_products_of_the_compression_are_those_that_are_computed(phase: str, compression: str) -> None:
    """Where the loss of the selection alone trains: in the warm-up keys' compression learns, its inputs do not. Of many
    tokens, so that the ends of a sample and the positions in a block hardly count."""
    tokens, config = 4000, NsaConfig(**SIZES, phase=phase, key_compression=compression)
    layer, x = layer_of(phase=phase, key_compression=compression), torch.randn(1, tokens, 2, 6, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        found = layer.compress.key(x)
        if phase == "warm-up":
            found.sum().backward()
        with torch.no_grad():
            layer.compress.value(x[..., :4])
    listed = WARM_UP.products(Shape(16, 4, 2, 6, 4, 100.0), config)[2:]
    expected = sum(2 * tokens * p.rows * p.inner * p.outer * p.alone for p in listed)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
