"""NSA's loss of the selection where it looks at one of several neighbouring queries (``kl_stride``)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nsa.layers.figure import values
from nsa.layers.kind import OF_LOSS, Shape
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.nsa.figures import measure_taught
from nsa.layers.nsa.kind import NSA
from nsa.layers.nsa.layer import Draw, NativeSparseAttention
from nsa.models import AttentionConfig, Decoder, ModelConfig
from tests.layers.test_taught_selection import layer_of, some_input
from tests.ops.cases import cumulative


def taught(**changes) -> NativeSparseAttention:
    return layer_of(phase="sparse", kl_weight=3.0, **changes)


@contextmanager
def turned(by: int) -> Iterator[None]:
    """What is drawn, but turned by some places among its neighbours: over all turns each query is drawn once."""
    draw = Draw.forward

    def again(self: Draw, tokens: int, device: torch.device) -> Tensor:
        torch.manual_seed(1)
        first = torch.arange(0, tokens, self.stride)
        return (first + (draw(self, tokens, device) - first + by) % self.stride).int()

    with patch.object(Draw, "forward", again):
        yield


def learned(layer: NativeSparseAttention, x: Tensor, borders: Tensor | None) -> list[Tensor]:
    """The output, the loss over tokens, and the gradients of a pass, that of the input among them."""
    x = x.clone().requires_grad_()
    out = layer(x, cu_seqlens=borders)
    out.square().sum().backward()
    return [out.detach(), layer.attend.loss.tally, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("stride", [2, 7, 50])
@pytest.mark.parametrize(
    ("documents", "batch"), [([42], 1), ([43], 2), ([9, 1, 30, 0, 3], 1)], ids=["one", "a batch", "packed"]
)
@pytest.mark.parametrize("compression", ["mlp", "pooled"])
def test_the_mean_over_all_draws_is_the_whole_loss(
    stride: int, documents: list[int], batch: int, compression: str
) -> None:
    """And its gradients: also where the last neighbours are fewer, or all queries are."""
    tokens = sum(documents)
    x, borders = some_input(tokens, batch), cumulative(documents) if len(documents) > 1 else None
    expected, found = learned(taught(key_compression=compression), x, borders), []
    for by in range(stride):
        with turned(by):
            found.append(learned(taught(key_compression=compression, kl_stride=stride), x, borders))
        assert torch.equal(found[-1][0], expected[0]), "the output has nothing to do with the loss"
    mean = [torch.stack(each).mean(0) for each in zip(*found, strict=True)]
    assert expected[1] > 0.1
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=3e-6)  # keys are rotated in fp32
    torch.testing.assert_close(mean[1], expected[1])
    assert any(abs(each[1] - expected[1]) > 1e-3 * expected[1] for each in found), "each draw is another estimate"


@pytest.mark.parametrize("borders", [None, [0, 9, 10, 40], list(range(41))], ids=["one", "packed", "single tokens"])
def test_the_definition_has_the_loss_of_the_same_draw(borders: list[int] | None) -> None:
    """With a last draw beyond the tokens, which is no query."""
    x, found = some_input(40), []
    packed = None if borders is None else torch.tensor(borders).int()
    with patch.object(Draw, "forward", lambda draw, tokens, device: torch.tensor([1, 13, 20, 27, 41]).int()):
        for backend in ("naive", "torch"):
            found.append(learned(taught(kl_stride=9, backend=backend), x, packed))
    torch.testing.assert_close(*found, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("borders", [None, [0, 9, 10, 40]])
def test_chunks_of_queries_have_the_loss_of_their_draws(borders: list[int] | None) -> None:
    """As context-parallel ranks call it: each chunk draws among its own queries. With the gradients of the compressed
    keys, exactly."""
    layer, whole, seen = taught(kl_stride=4), taught(), []
    packed = None if borders is None else torch.tensor(borders).int()
    with torch.no_grad():  # so that the inputs alone are taken
        layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
        layer(some_input(40), cu_seqlens=packed)
    q, (k_cmp, v_cmp), kv_slc, kv_win, gates = seen[0]
    k_cmp.requires_grad_()

    def loss(layer: NativeSparseAttention, start: int, stop: int) -> list[Tensor]:
        layer.attend.loss.clear()
        k_cmp.grad = None
        layer.attend.loss.scale = 1.0
        inner = None if packed is None else packed.clamp(max=stop)
        keys = [tuple(x[:, :stop] for x in kv) for kv in (kv_slc, kv_win)]
        part = slice(start, stop)
        out = layer.attend(q[:, part], (k_cmp, v_cmp), *keys, gates[:, part], cu_seqlens=inner, offset=start)
        out.sum().backward()
        return [layer.attend.loss.tally.clone(), k_cmp.grad]

    for start, stop in ((0, 23), (23, 40)):
        expected, found = loss(whole, start, stop), []
        for by in range(4):
            with turned(by):
                found.append(loss(layer, start, stop))
        assert expected[0] > 0
        torch.testing.assert_close([torch.stack(each).mean(0) for each in zip(*found, strict=True)], expected)


def test_each_query_is_drawn_as_often_as_any() -> None:
    torch.manual_seed(0)
    draw, times = Draw(4), 4000
    drawn = torch.stack([draw(10, torch.device("cpu")) for _ in range(times)])
    assert drawn.dtype == torch.int32 and drawn.shape == (times, 3)
    assert (drawn // 4 == torch.arange(3)).all(), "one of each four neighbours"
    often = torch.bincount(drawn.flatten(), minlength=12) / times
    assert (often - 0.25).abs().max() < 5 * (0.25 * 0.75 / times) ** 0.5
    together = ((drawn[:, 0] % 4) == (drawn[:, 1] % 4)).float().mean()
    assert abs(together - 0.25) < 0.04, "neighbours draw apart"


def test_layers_and_passes_draw_others_and_what_learns_nothing_draws_nothing() -> None:
    shape = {"vocab_size": 24, "hidden_size": 12, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    model = ModelConfig(**shape, intermediate_size=16, max_position=64)
    sizes = {"compress_length": 4, "compress_stride": 2, "block_size": 4, "num_blocks": 4, "num_local": 1, "window": 5}
    decoder = Decoder(model, AttentionConfig(kind="nsa", nsa=NsaConfig(**sizes, kl_weight=1.0, kl_stride=4)))
    drawn: list[list[int]] = []
    for layer in decoder.layers:
        layer.attention.attend.draw.register_forward_hook(lambda module, args, out: drawn.append(out.tolist()))
    ids = torch.randint(24, (1, 64))
    for _ in range(2):
        decoder(ids, targets=ids).sum().backward()
    assert len(drawn) == 4 and len({tuple(rows) for rows in drawn}) == 4
    state = torch.get_rng_state()
    with torch.no_grad():
        decoder(ids, targets=ids)
    assert len(drawn) == 4 and torch.equal(torch.get_rng_state(), state)


def test_the_cost_of_the_loss_is_divided() -> None:
    """Products of matrices, in one tile of queries that see the same keys: the last ones of their neighbours."""

    def flops(**changes) -> int:
        layer, x = taught(**changes) if changes else layer_of(phase="sparse"), some_input(96)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        return counter.get_total_flops()

    def last(draw: Draw, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(draw.stride - 1, tokens, draw.stride).int()

    without, whole = flops(), flops(kl_stride=1)
    assert whole - without > 0
    for stride in (2, 8):
        with patch.object(Draw, "forward", last):
            assert stride * (flops(kl_stride=stride) - without) == pytest.approx(whole - without, rel=0.01)


def test_figures_are_of_all_queries() -> None:
    found = []
    for changes in ({}, {"kl_stride": 8}):
        layer, seen = taught(**changes), []
        layer.attend.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs))
        layer(some_input(40))
        found.append(values(measure_taught(layer.attend, *seen[0])))
    assert found[0] == found[1] and "recall" in found[0]


def test_in_the_warm_up_and_without_a_loss_nothing_is_drawn() -> None:
    """Dense attention is computed there anyway, and its loss is all that is trained."""
    assert layer_of(kl_weight=1.0, kl_stride=8).attend.draw is None
    assert layer_of(phase="sparse", kl_stride=8).attend.draw is None
    assert taught().attend.draw is None and taught(kl_stride=8).attend.draw.stride == 8
    records = [NsaConfig(kl_weight=1.0, kl_stride=stride, phase=p) for stride in (1, 8) for p in ("warm-up", "sparse")]
    assert ["attend.draw" in NSA.placed(config, 0).choices for config in records] == [False, False, False, True]


def test_an_export_does_not_say_how_its_selection_was_taught() -> None:
    assert set(NsaConfig.model_fields) - set(NSA.export) == {"kl_weight", "kl_stride"}
    assert {"kl_weight", "kl_stride"} <= set(NSA.free)


SMALL = {"compress_length": 4, "compress_stride": 2, "block_size": 4, "num_blocks": 4, "num_initial": 1, "num_local": 1}


@pytest.mark.parametrize(
    ("keys", "last", "message"),
    [
        ({"window": 3}, 8, "no block beside the initial and local ones"),  # two blocks of 4
        ({"window": 20}, 24, "the window .* reaches all of a sample"),  # behind a block of 4
        ({"window": 3, "kl_stride": 31}, 30, "kl_stride .31. exceeds a sample .30 tokens"),
    ],
)
@pytest.mark.parametrize("phase", ["sparse", "warm-up"])
def test_a_sample_in_which_nothing_is_taught_is_refused(keys: dict, last: int, message: str, phase: str) -> None:
    """Of the longest such sample; one token more is enough. In the warm-up no stride counts."""
    config = NsaConfig(**{**SMALL, "kl_weight": 1.0, "phase": phase, **keys})
    problem = NSA.placed(config, 0).problem
    if phase == "warm-up" and "kl_stride" in keys:
        assert problem(config, last) is None
    else:
        assert re.search(message, problem(config, last) or "")
    assert problem(config, last + 1) is None


@pytest.mark.parametrize("tokens", [7, 8, 9])
def test_a_plan_knows_how_many_are_drawn_and_what_they_cost(tokens: int) -> None:
    """A loss of all queries costs half of what dense attention costs, forward and backward."""
    config, shape = NsaConfig(**SMALL, window=3, kl_weight=1.0, kl_stride=4), Shape(16, 4, 2, 6, 4, 100.0)
    kind = NSA.placed(config, 0)
    (count,) = kind.parts(shape, config).drawn.values()
    assert count(tokens, 2) == len(Draw(4)(tokens, torch.device("cpu")))
    seen = sum(range(1, tokens + 1)) / tokens
    assert kind.keys(config, tokens)[OF_LOSS] == seen / 2 / 4


@pytest.mark.parametrize("stride", [0, -2])
def test_a_stride_below_one_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="kl_stride must be at least 1"):
        NativeSparseAttention(32, 4, 2, 8, kl_weight=1.0, kl_stride=stride)
