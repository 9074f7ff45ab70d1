"""The record of dense attention."""

from typing import Any

from torch import nn

from nsa.layers.dense.layer import DenseAttention
from nsa.layers.kind import Backends, Gather, Kind, Own, Parts, Product, Shape


def build(shape: Shape, config: Any, backends: Backends) -> nn.Module:
    return DenseAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        backend=backends.operators,
        implementation=backends.dense,
    )


def products(shape: Shape, config: Any) -> list[Product]:
    joint = shape.num_heads * shape.head_dim + shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)
    return [
        Product(1, shape.hidden_size, joint),
        Product(1, shape.num_heads * shape.v_head_dim, shape.hidden_size),
    ]


DENSE = Kind(
    name="dense",
    title="dense attention",
    config=None,
    build=build,
    keeps_scale=(),
    products=products,
    keys=lambda config, tokens: {"all": (tokens + 1) / 2},
    other_flops=lambda config, tokens: 0.0,
    reach=lambda config: 0,
    prices={"all": "causal"},
    priced_as="dense",
    lists=False,
    recordable=True,
    dense_library=True,
    parts=Parts(
        columns=("query",),
        kv_heads=("key", "value"),
        rows=("output",),
        whole=(),
        gathered={},
        gathered_bytes=lambda shape, width: 0,
    ),
    exchanges=lambda config: {"q": Own(), "kv": Gather("keys")},
    choices=(),
    expensive=("range_attention",),
    loss=None,
    figures=None,
    export=lambda config: {},
    card=lambda config: {},
)
