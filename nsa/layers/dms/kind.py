"""The record of Dynamic Memory Sparsification."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from nsa.layers.dms.config import DmsConfig
from nsa.layers.dms.layer import MemorySparseAttention
from nsa.layers.kind import Backends, Gather, Kind, Own, Parts, Product, Shape
from nsa.layers.projections.records import parts_of, projection_of


def build(shape: Shape, config: DmsConfig, backends: Backends, before: Sequence[Any] = ()) -> nn.Module:
    return MemorySparseAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        rope_theta=shape.rope_theta,
        projection=projection_of(shape).build(shape, backends.operators),
        backend=backends.operators,
        **config.model_dump(),
    )


def parts(shape: Shape, config: DmsConfig) -> Parts:
    """Eviction logits belong to KV heads, and so does their noise."""
    return parts_of(shape, kv_heads=("evict",), drawn={"noise": lambda tokens, heads: tokens * heads})


def products(shape: Shape, config: DmsConfig) -> list[Product]:
    joint, *rest = projection_of(shape).products(shape)
    return [replace(joint, outer=joint.outer + shape.num_kv_heads), *rest]


def problem(config: DmsConfig, tokens: int) -> str | None:
    if config.window + 1 >= tokens:
        return f"attention.dms.window ({config.window}) fills the sample ({tokens} tokens): nothing would be forgotten"
    return None


DMS = Kind(
    name="dms",
    title="Dynamic Memory Sparsification (arXiv 2506.05345)",
    config=DmsConfig,
    build=build,
    keeps_scale=(),
    products=products,
    keys=lambda config, tokens: {"all": (tokens + 1) / 2},  # in training nothing is forgotten
    widths=lambda shape, config: projection_of(shape).widths(shape, False),
    other_flops=lambda config, tokens: 0.0,
    reach=lambda config: config.window + 1,
    prices={"all": "causal"},
    priced_as="dense",
    lists=False,
    dense_library=False,
    recordable=False,
    options=("qkv_bias", "qk_norm", "v_head_dim"),
    parts=parts,
    exchanges=lambda shape, config: {
        "q": Own(),
        "kv": Gather("keys", projection_of(shape).row_width(shape)),
        "log_keep": Gather("eviction logits", shape.num_kv_heads),
    },
    choices=("noise",),
    placed=None,
    borrows=False,
    twin=lambda config: config,
    expensive=(),
    loss=("share", "eviction"),
    apart=(),
    taught=False,
    from_dense=lambda name, shape, config, read: None if name.startswith("evict.") else read(name),
    holds_dense=True,
    free=("window", "evicted", "weight", "temperature"),
    problem=problem,
    figures=None,
    guest=None,
    export=None,
    known=lambda shape, config: None,
    card=lambda config: {},
)
