"""What TensorBoard shows of a layer's attention, of packed documents and of each branch."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsa.layers import CompressedSparseAttention, DeepSeekSparseAttention, EntmaxAttention, NativeSparseAttention
from nsa.layers.csa import figures as csa
from nsa.layers.dsa import figures as dsa
from nsa.layers.entmax import figures as entmax
from nsa.layers.kind import Blocks, Exchange, Own, Same, Shape
from nsa.layers.kinds import kind_of
from nsa.layers.means import Mean, mean_of
from nsa.layers.nsa import figures as nsa
from nsa.ops.geometry import RotaryLayout
from tests.ops.cases import cumulative

SIZES = {"compress_length": 4, "compress_stride": 2, "block_size": 4, "num_blocks": 3, "num_local": 1, "window": 5}
INDEX = {"index_heads": 3, "index_head_dim": 8}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[..., dict[str, float]]]] = {
    "nsa": (lambda: NativeSparseAttention(16, 4, 2, 6, **SIZES), nsa.measure),
    "dsa": (
        lambda: DeepSeekSparseAttention(16, 4, 2, 6, topk=5, **INDEX, index_rotary=RotaryLayout(4)),
        dsa.measure,
    ),
    "csa": (
        lambda: CompressedSparseAttention(16, 4, 6, ratio=2, topk=3, window=4, **INDEX, index_rotary_dims=4),
        csa.measure,
    ),
    "entmax": (lambda: EntmaxAttention(16, 4, 2, 6), entmax.measure),
}
SHAPE = Shape(
    hidden_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    v_head_dim=6,
    rope_theta=10000.0,
    qkv_bias=False,
    qk_norm=False,
    norm_eps=1e-6,
    mla=None,
)
# No mean over queries: a share of sums of norms, and an entropy of all documents' blocks.
NO_MEAN = {"mass_compressed", "mass_selected", "mass_window", "block_entropy"}


def layer_of(kind: str) -> nn.Module:
    """In float64, with attention that is not flat."""
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().double()
    for name, parameter in layer.named_parameters():
        if name.endswith(("query.weight", "key.weight", "gate.weight", "key_value.weight")):
            nn.init.normal_(parameter)
    return layer


def figures_of(kind: str, layer: Any, x: Tensor, borders: Tensor | None = None) -> dict[str, float]:
    seen: list[Any] = []
    hook = layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
    layer(x, cu_seqlens=borders)
    hook.remove()
    return LAYERS[kind][1](layer.attend, *seen[0], cu_seqlens=borders)


@pytest.mark.parametrize("kind", LAYERS)
def test_figures_of_packed_documents_are_those_of_each_alone(kind: str) -> None:
    """Two documents of one length: means over all queries, or over those that see more than they select.

    Notices figures that take positions in the batch for positions in the document: then the second document's first
    queries count as if they saw all of the first.
    """
    layer, tokens = layer_of(kind), 30
    documents = [torch.randn(1, n, 16, dtype=torch.float64) for n in (tokens, tokens)]
    packed = figures_of(kind, layer, torch.cat(documents, 1), cumulative([tokens, tokens]))
    alone = [figures_of(kind, layer, x) for x in documents]
    assert packed.keys() == alone[0].keys()
    for name in packed.keys() - NO_MEAN:
        assert packed[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-5), name
        assert alone[0][name] != alone[1][name] or name in ("first_block_share", "token_overlap"), name


def cut(given: Any, exchange: Exchange, start: int, stop: int) -> Any:
    """What ``attend`` gets of an input for the queries ``start`` .. ``stop`` - 1, as of a context-parallel rank."""
    if isinstance(exchange, Same | Blocks):
        return given
    if isinstance(given, tuple):
        return tuple(cut(x, exchange, start, stop) for x in given)
    return given[:, start if isinstance(exchange, Own) else 0 : stop]


@pytest.mark.parametrize("kind", LAYERS)
def test_figures_of_chunks_are_put_together(kind: str) -> None:
    """As context-parallel ranks do, of which each has some of the queries: those of the first chunk see no more than
    they select, so it has nothing to say of what the selection leaves out."""
    layer, tokens, seen = layer_of(kind), 30, []
    layer.attend.register_forward_pre_hook(lambda module, inputs, options: seen.append(inputs), with_kwargs=True)
    layer(torch.randn(1, tokens, 16, dtype=torch.float64))
    record: Any = kind_of(kind)
    exchanges = record.exchanges(SHAPE, record.config()).values()
    measure, parts = LAYERS[kind][1], []
    whole = measure(layer.attend, *seen[0])
    for start, stop in ((0, 4), (4, 9), (9, tokens)):
        inputs = [cut(x, exchange, start, stop) for x, exchange in zip(seen[0], exchanges, strict=True)]
        parts.append((stop - start, measure(layer.attend, *inputs, offset=start)))
    for name in whole.keys() - NO_MEAN - {"block_overlap", "token_overlap"}:  # of pairs, which chunks part
        values = [f[name] if isinstance(f[name], Mean) else Mean(f[name], number) for number, f in parts]
        assert mean_of(values) == pytest.approx(whole[name], rel=1e-5), name
    if kind in ("dsa", "csa", "nsa"):
        assert any(isinstance(value, Mean) and value.number == 0 for value in parts[0][1].values())


def test_means_are_put_together_by_their_numbers() -> None:
    assert mean_of([Mean(1.0, 0), Mean(0.25, 30), Mean(0.5, 10)]) == pytest.approx(0.3125)
    assert mean_of([Mean(1.0, 0), Mean(1.0, 0)]) == 1 and mean_of([0.5, 0.25]) == 0.375
    assert json.loads(json.dumps({"figure": Mean(0.5, 3)})) == {"figure": 0.5}


def test_a_branch_whose_gate_is_shut_has_no_share() -> None:
    layer, x = layer_of("nsa"), torch.randn(1, 40, 16, dtype=torch.float64)
    for number, branch in enumerate(("compressed", "selected", "window")):
        nn.init.zeros_(layer.gate.weight)
        nn.init.zeros_(layer.gate.bias)
        layer.gate.bias.data.view(-1, 3)[:, number] = -40
        found = figures_of("nsa", layer, x)
        shares = [found.pop(f"mass_{name}") for name in ("compressed", "selected", "window")]
        assert shares[number] < 1e-9 and sum(shares) == pytest.approx(1)
        assert sum(share > 0.1 for share in shares) == 2 and found[f"gate_{branch}"] < 1e-9


def test_the_first_block_counts_where_it_is_not_forced() -> None:
    """Its share is that of a layer that forces none of its blocks, though this one always selects it."""
    layer, x = layer_of("nsa"), torch.randn(1, 60, 16, dtype=torch.float64)
    chosen: list[Tensor] = []
    layer.attend.choose.register_forward_hook(lambda module, inputs, out: chosen.append(out))
    found = figures_of("nsa", layer, x)["first_block_share"]
    assert (chosen[0][..., 0] == 0).all()
    layer.attend.choose.sizes["num_initial"] = 0
    chosen.clear()
    layer(x)
    free = chosen[0][:, 12:]  # that see more blocks than they select
    assert found == pytest.approx((free == 0).any(-1).double().mean().item()) and 0 < found < 1
