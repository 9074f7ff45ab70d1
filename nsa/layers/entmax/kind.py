"""The record of entmax attention."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Size, Tensor, nn

from nsa.layers.entmax.config import EntmaxConfig
from nsa.layers.entmax.figures import measure
from nsa.layers.entmax.guest import GUEST
from nsa.layers.entmax.layer import EntmaxAttention, rotates_all
from nsa.layers.kind import Backends, Exchange, Gather, Kind, Own, Parts, Product, Shape
from nsa.layers.projections import gqa
from nsa.layers.projections.records import parts_of

MAPS = {"none": (), "asentmax": ("beta", "gamma"), "ssmax": ("log_scale",)}  # linear maps of each scaling


def build(shape: Shape, config: EntmaxConfig, backends: Backends, before: Sequence[nn.Module] = ()) -> nn.Module:
    return EntmaxAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        rope_theta=shape.rope_theta,
        projection=gqa.build(shape, backends.operators, rotates_all(config.position, config.nope_heads)),
        backend=backends.operators,
        **config.model_dump(),
    )


def products(shape: Shape, config: EntmaxConfig) -> list[Product]:
    joint, output = gqa.products(shape)
    if config.scaling == "ssmax":
        return [joint, output, Product(1, 1, shape.num_heads)]
    return [Product(1, joint.inner, joint.outer + shape.num_heads * len(MAPS[config.scaling])), output]


def parts(shape: Shape, config: EntmaxConfig) -> Parts:
    return parts_of(shape, columns=MAPS[config.scaling])


def exchanges(shape: Shape, config: EntmaxConfig) -> dict[str, Exchange]:
    return {"q": Own(), "kv": Gather("keys", gqa.row_width(shape)), "logit_scale": Own()}


def card(config: EntmaxConfig) -> dict[str, str]:
    return {
        "entmax": f"alpha {config.alpha:g}, scaling of scores: {config.scaling}",
        "positions": f"{config.position}; {config.nope_heads} heads without",
    }


def from_dense(name: str, shape: Size, config: Any, read: Callable[[str], Tensor]) -> Tensor | None:
    """All but what scales the scores."""
    return None if name.partition(".")[0] in MAPS["asentmax"] + MAPS["ssmax"] else read(name)


ENTMAX = Kind(
    name="entmax",
    title="alpha-entmax attention (ASEntmax, arXiv 2506.16640)",
    config=EntmaxConfig,
    build=build,
    keeps_scale=(),
    products=products,
    keys=lambda config, tokens: {"all": (tokens + 1) / 2},
    widths=lambda shape, config: (shape.head_dim, shape.v_head_dim),
    other_flops=lambda config, tokens: 0.0,
    reach=lambda config: 0,
    prices={"all": "causal"},
    priced_as="dense",
    lists=False,
    recordable=False,
    dense_library=False,
    options=("qkv_bias", "qk_norm", "v_head_dim"),
    parts=parts,
    exchanges=exchanges,
    choices=(),
    placed=None,
    borrows=False,
    twin=lambda config: config,
    expensive=(),
    loss=None,
    apart=(),
    taught=False,
    from_dense=from_dense,
    holds_dense=True,
    free=("alpha",),
    problem=lambda config, tokens: None,
    figures=measure,
    guest=GUEST,
    export={name: f"entmax_{name}" for name in EntmaxConfig.model_fields},
    known=lambda shape, config: None,
    card=card,
)
