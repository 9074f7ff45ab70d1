"""The record of dense attention."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from nsa.layers.dense.guest import GUEST
from nsa.layers.dense.layer import DenseAttention
from nsa.layers.kind import Backends, Gather, Kind, Own, Product, Shape
from nsa.layers.projections.records import parts_of, projection_of


def build(shape: Shape, config: Any, backends: Backends, before: Sequence[nn.Module] = ()) -> nn.Module:
    return DenseAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        projection=projection_of(shape).build(shape, backends.operators),
        backend=backends.operators,
        implementation=backends.dense,
    )


def products(shape: Shape, config: Any) -> list[Product]:
    return projection_of(shape).products(shape)


DENSE = Kind(
    name="dense",
    title="dense attention",
    config=None,
    build=build,
    keeps_scale=(),
    products=products,
    keys=lambda config, tokens: {"all": (tokens + 1) / 2},
    widths=lambda shape, config: projection_of(shape).widths(shape, False),
    other_flops=lambda config, tokens: 0.0,
    reach=lambda config: 0,
    prices={"all": "causal"},
    priced_as="dense",
    lists=False,
    recordable=True,
    dense_library=True,
    options=("qkv_bias", "qk_norm", "mla", "v_head_dim"),
    parts=lambda shape, config: parts_of(shape),
    exchanges=lambda shape, config: {"q": Own(), "kv": Gather("keys", projection_of(shape).row_width(shape))},
    choices=(),
    placed=None,
    borrows=False,
    twin=lambda config: config,
    expensive=("range_attention",),
    loss=None,
    apart=(),
    taught=False,
    from_dense=lambda name, shape, config, read: read(name),
    holds_dense=True,
    free=(),
    problem=lambda config, tokens: None,
    figures=None,
    guest=GUEST,
    export={},
    known=lambda shape, config: None,
    card=lambda config: {},
)
