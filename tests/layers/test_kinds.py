"""The records of the kinds of attention agree with the layers that they describe."""

import inspect
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from nsa.layers.around import Around, innermost
from nsa.layers.auxiliary_loss import AuxiliaryLoss, untallied
from nsa.layers.csa.config import CsaConfig
from nsa.layers.csa.kind import HEAVY, WITHOUT_INDEXER
from nsa.layers.dsa.kind import SERVED
from nsa.layers.kind import Backends, Blocks, Kind, Price, Shape
from nsa.layers.kinds import KINDS
from nsa.layers.projections.config import MlaConfig

# All values differ, so that none can be mistaken for another.
SHAPE = Shape(hidden_size=48, num_heads=6, num_kv_heads=2, head_dim=8, v_head_dim=4, rope_theta=100.0)
LATENT = {"kv_lora_rank": 13, "qk_nope_head_dim": 6, "qk_rope_head_dim": 2, "v_head_dim": 4}
OPTIONS = [
    {},
    {"qkv_bias": True, "qk_norm": True},
    {"mla": MlaConfig(**LATENT)},
    {"mla": MlaConfig(**LATENT, q_lora_rank=11)},
]
VARIANTS = {
    SERVED: ("served", SERVED.config()),
    WITHOUT_INDEXER: ("all", CsaConfig(topk=None, overlap=False, q_lora_rank=11)),
    HEAVY: ("heavy", CsaConfig(heavy_ratio=7)),
}
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
each_layer = pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(kind, options, id="-".join((kind.name, *VARIANTS.get(kind, ())[:1], *options)))
        for kind in (*KINDS, *VARIANTS)
        for options in OPTIONS
        if set(options) <= set(kind.options)
    ],
)


def built(kind: Kind, options: dict[str, Any]) -> tuple[torch.nn.Module, Shape, object]:
    config, shape = kind.config() if kind.config else None, replace(SHAPE, **options)
    _, config = VARIANTS.get(kind, ("", config))
    with torch.device("meta"):
        return kind.build(shape, config, Backends()), shape, config


@each_layer
def test_parts_and_exchanges_match_the_layer(kind: Kind, options: dict[str, Any]) -> None:
    layer, shape, config = built(kind, options)
    parts = kind.parts(shape, config)
    linears = [layer.get_submodule(n) for n in (*parts.columns, *parts.kv_heads, *parts.rows)]
    whole = [layer.get_submodule(name) for name in parts.whole]
    listed = {id(p) for module in [*linears, *whole] for p in module.parameters()}
    rows = [layer.get_parameter(name) for name in parts.heads]
    assert all(len(p) == shape.num_heads for p in rows)
    listed |= {id(p) for p in rows}
    assert listed == {id(p) for p in layer.parameters()}, (
        "tensor-parallel ranks would hold a parameter unsplit, unsummed"
    )
    for name in (*parts.gathered, *parts.drawn, *parts.averaged, *kind.keeps_scale):
        layer.get_submodule(name)
    exchanges = kind.exchanges(shape, config)
    inputs = inspect.signature(layer.attend.forward).parameters
    left_out = [name for name in inputs if name not in (*exchanges, "cu_seqlens", "offset")]
    assert [name for name in inputs if name not in left_out] == [*exchanges, "cu_seqlens", "offset"]
    assert kind in VARIANTS or not left_out, "only a variant of a kind may do without some"
    for exchange in exchanges.values():
        if isinstance(exchange, Blocks):
            layer.get_submodule(exchange.module)


@each_layer
def test_products_match_the_weights(kind: Kind, options: dict[str, Any]) -> None:
    """Each is used once per token, or once per block and KV head. The first is the joint projection."""
    layer, shape, config = built(kind, options)
    matrices = {name: p.shape for name, p in layer.named_parameters() if p.ndim == 2 and not name.endswith("position")}
    products = kind.products(shape, config)
    assert sum(p.inner * p.outer for p in products) == sum(rows * columns for rows, columns in matrices.values())
    parts = kind.parts(shape, config)
    modules = [layer.get_submodule(name) for name in (*parts.columns, *parts.kv_heads, *parts.whole)]
    linears = [m for m in modules if isinstance(m, torch.nn.Linear) and m.in_features == shape.hidden_size]
    assert products[0].inner == shape.hidden_size and products[0].outer == sum(m.out_features for m in linears)


@each_kind
def test_all_keys_have_a_price(kind: Kind) -> None:
    config = kind.config() if kind.config else None
    assert set(kind.prices) >= set(kind.keys(config, 100)) and set(kind.prices.values()) <= set(get_args(Price))


def test_a_wrapper_changes_no_parameter_name() -> None:
    inside = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    outside = Around(Around(inside))
    assert list(outside.state_dict()) == list(inside.state_dict()) and innermost(outside) is inside
    assert [name for name, _ in outside.named_modules()] == [name for name, _ in inside.named_modules()]
    inside[0].weight = torch.nn.Parameter(torch.zeros(3, 2))
    assert outside.state_dict()["0.weight"].eq(0).all()


def test_warm_up_passes_are_not_tallied() -> None:
    loss, x = AuxiliaryLoss(0.5), torch.ones(1, 3, 2, requires_grad=True)

    def backward() -> None:
        loss(x, x.sum(), 3, torch.tensor([1, 2])).sum().backward()

    with untallied(loss):
        backward()
    assert loss.tally.tolist() == [0, 0, 0]
    backward()
    kept = loss.tally
    with untallied(loss):
        backward()
    assert loss.tally is kept and kept.tolist() == [6, 1, 2], "in place: recordings add to it"
    loss.clear()
    assert loss.tally is kept and kept.tolist() == [0, 0, 0]
