"""Recomputed layers: the same gradients to the bit, and no second selection of blocks."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.layers import DeepSeekSparseAttention, DenseAttention, NativeSparseAttention
from nsa.layers.kind import Kind
from nsa.layers.kinds import NSA, kind_of
from nsa.layers.nsa.kind import WARM_UP
from nsa.layers.projections.config import MlaConfig
from nsa.layers.projections.mla import Latent
from nsa.layers.rotary import Rotary
from nsa.models import Decoder
from nsa.ops import selection
from nsa.training.activation_checkpointing import checkpoint_layers


class Layer(nn.Module):
    """What recomputation knows of a decoder layer: its attention, and the record of its kind."""

    def __init__(self, attention: nn.Module, kind: Kind) -> None:
        super().__init__()
        self.attention, self.kind = attention, kind

    def forward(self, *inputs) -> torch.Tensor:
        return self.attention(*inputs)


def stack(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    sizes = {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 4, "window": 10}
    return nn.ModuleList(Layer(NativeSparseAttention(16, 4, 2, 6, 4, **sizes), NSA) for _ in range(count))


def run(layers: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = x + layer(x)
    return x


class Calls(TorchDispatchMode):
    """Counts calls of the kernels' operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nsa":
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def over_latents(hidden_size: int, heads: int, *_: int, backend: str) -> DeepSeekSparseAttention:
    """Keys so wide that lists of them have kernels of their own."""
    sizes = MlaConfig(q_lora_rank=16, kv_lora_rank=128, qk_nope_head_dim=8, qk_rope_head_dim=16, v_head_dim=8)
    projection = Latent(hidden_size, heads, sizes, backend=backend)
    return DeepSeekSparseAttention(hidden_size, heads, heads, 24, 8, projection=projection, backend=backend)


@pytest.mark.parametrize(("mode", "again"), [("full", 1), ("selective", 0)])
@pytest.mark.parametrize("kind", ["nsa", "dense", "dsa", "dsa over latents"])
def test_which_kernels_run_again(kind: str, mode: str, again: int) -> None:
    """On the meta device, where the kernels' operators exist without a GPU. Norms, and cutting heads, are cheap.

    The loss of DSA's indexer comes with the backward pass of the attention, so it is not computed again.
    """
    with torch.device("meta"):
        make: dict[str, Any] = {"nsa": NativeSparseAttention, "dense": DenseAttention, "dsa": DeepSeekSparseAttention}
        make["dsa over latents"] = over_latents
        attention = make[kind](64, 4, 2, 16, backend="triton")
        layers = nn.ModuleList([Layer(attention, kind_of(kind.split()[0]))])
        x = torch.empty(1, 128, 64, requires_grad=True)
        rotary = Rotary().at(torch.empty(128, dtype=torch.int64))
    checkpoint_layers(layers, mode)
    out = layers[0](x, rotary)
    with Calls() as calls:
        out.sum().backward()
    others = ("backward", "gated_sum", "split_heads", "join_heads", "rms_norm")
    forward = {name: n for name, n in calls.counts.items() if not name.endswith(others)}
    once = {"nsa": {"range_attention": 2, "selected_attention": 1, "compress_blocks": 2}}
    once |= {"dsa": {"token_attention": 1}, "dsa over latents": {"latent_attention": 1}}
    assert forward == ({} if not again else once.get(kind, {"range_attention": 1}))


@pytest.mark.parametrize(("mode", "again"), [("full", 1), ("selective", 0)])
def test_the_attention_of_a_warm_up_runs_again_where_all_does(mode: str, again: int) -> None:
    with torch.device("meta"):
        layers = nn.ModuleList([Layer(NativeSparseAttention(64, 4, 2, 16, phase="warm-up", backend="triton"), WARM_UP)])
        x = torch.empty(1, 1024, 64, requires_grad=True)
        rotary = Rotary().at(torch.empty(1024, dtype=torch.int64))
    checkpoint_layers(layers, mode)
    out = layers[0](x, rotary)
    with Calls() as calls:
        out.sum().backward()
    assert calls.counts["range_attention"] == again


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each selection."""
    calls: list[int] = []
    tiles = selection._importance_tiles
    monkeypatch.setattr(selection, "_importance_tiles", lambda *a: (calls.append(0), tiles(*a))[1])
    return calls


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_selects_once_and_gives_the_same_gradients(selections: list[int], mode: str) -> None:
    plain = stack(3)
    recomputed = copy.deepcopy(plain)
    checkpoint_layers(recomputed, mode)
    x = torch.randn(2, 61, 16)
    outs = [run(layers, x) for layers in (plain, recomputed)]
    assert len(selections) == 6
    for out in outs:
        out.square().sum().backward()
    assert len(selections) == 6, "the recomputed pass selected again"
    assert torch.equal(*outs)
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("kind", ["csa", "dms", "dsa", "entmax", "nsa", "nsa of drawn queries"])
def test_every_kind_has_the_same_gradients(kind: str, mode: str, tmp_path: Path) -> None:
    """Those of a decoder without recomputation, with its layers' own losses: also where a layer draws at random: as
    DMS does, which noise decides what is forgotten, or NSA, which queries its loss looks at."""
    sections = {
        "csa": "attention.csa={topk: 4, window: 9, index_heads: 2, index_head_dim: 8, index_rotary_dims: 4}",
        "dms": "attention.dms={window: 8, offset: 0.0}",
        "dsa": "attention.dsa={topk: 8, index_heads: 2, index_head_dim: 8, index_rotary_dims: 4}",
    }
    overrides = [f"attention.kind={kind.split()[0]}", "model.init_std=0.3", *filter(None, [sections.get(kind)])]
    if kind == "nsa of drawn queries":
        overrides += [f"attention.nsa.{key}" for key in ("kl_weight=30", "kl_stride=4", "num_local=1")]
    config, found = tiny_config(tmp_path, *overrides), []
    ids = torch.randint(0, 400, (1, 64))
    for recomputed in (False, True):
        decoder = Decoder(config.model, config.attention)
        decoder.initialise(3)
        if recomputed:
            checkpoint_layers(decoder.layers, mode)
        torch.manual_seed(5)
        decoder(ids, targets=ids).sum().backward()
        found.append([p.grad for p in decoder.parameters()])
        found.append([torch.rand(1)])  # and the generator stands where it stood
    for plain, again in zip(found[0] + found[1], found[2] + found[3], strict=True):
        assert torch.equal(plain, again)


def test_a_layer_used_twice_keeps_both_choices(selections: list[int]) -> None:
    plain = stack(1)
    recomputed = copy.deepcopy(plain)
    checkpoint_layers(recomputed)
    x = torch.randn(1, 40, 16)
    twice = [run(nn.ModuleList([layers[0]] * 2), x).square().sum() for layers in (plain, recomputed)]
    weights = [list(layers.parameters()) for layers in (plain, recomputed)]
    expected = torch.autograd.grad(twice[0], weights[0])
    for retain in (True, False):  # a retained graph is recomputed a second time
        gradients = torch.autograd.grad(twice[1], weights[1], retain_graph=retain)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert len(selections) == 4


def test_selection_is_not_kept_outside_of_checkpoints(selections: list[int]) -> None:
    layers = stack(1)
    with torch.no_grad():
        assert torch.equal(run(layers, torch.ones(1, 20, 16)), run(layers, torch.ones(1, 20, 16)))
    assert len(selections) == 2
