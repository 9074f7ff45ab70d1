"""The record of DeepSeek Sparse Attention."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from nsa.layers.dsa.config import DsaConfig
from nsa.layers.dsa.figures import measure
from nsa.layers.dsa.guest import GUEST
from nsa.layers.dsa.layer import DeepSeekSparseAttention
from nsa.layers.dsa.share import IndexShare
from nsa.layers.kind import Backends, Borrowed, Exchange, Gather, Kind, Known, Own, Product, Shape
from nsa.layers.projections.records import parts_of, projection_of
from nsa.ops.geometry import RotaryLayout

LAYOUT = {"index_rotary_dims", "index_rotary_place", "index_rotary_pairs", "share_layers", "share_from"}


# The indexer chooses for all query heads.
AVERAGED = {"attend.together": True}


def build(
    shape: Shape, config: DsaConfig, backends: Backends, before: Sequence[Any] = (), served: bool = False
) -> nn.Module:
    rotary = RotaryLayout(config.index_rotary_dims, config.index_rotary_place, config.index_rotary_pairs)
    share = None
    if served:  # alone it can be counted, but not called
        share = before[-1].share if before else IndexShare(config.kl_weight)
    return DeepSeekSparseAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        index_rotary=rotary,
        share=share,
        rope_theta=shape.rope_theta,
        projection=projection_of(shape).build(shape, backends.operators),
        backend=backends.operators,
        **config.model_dump(exclude=LAYOUT),
    )


def served_products(shape: Shape, config: DsaConfig) -> list[Product]:
    return projection_of(shape).products(shape)


def products(shape: Shape, config: DsaConfig) -> list[Product]:
    queries, latent = config.index_heads * config.index_head_dim, shape.mla.q_lora_rank if shape.mla else None
    return [
        *projection_of(shape).products(shape),
        Product(1, latent or shape.hidden_size, queries, alone=2),
        Product(1, shape.hidden_size, config.index_head_dim + config.index_heads, alone=2),
    ]


def keys(config: DsaConfig, tokens: int) -> dict[str, float]:
    if config.phase == "warm-up":
        return {"all": (tokens + 1) / 2}
    full = min(config.topk, tokens)  # the first queries see fewer tokens than they may select
    return {"selected": (full * (full + 1) / 2 + (tokens - full) * full) / tokens}


def widths(shape: Shape, config: DsaConfig) -> tuple[int, int]:
    return projection_of(shape).widths(shape, config.phase == "sparse")


def index_flops(config: DsaConfig, tokens: int) -> float:
    return 2 * config.index_heads * config.index_head_dim * (tokens + 1) / 2


def exchanges(shape: Shape, config: DsaConfig) -> dict[str, Exchange]:
    return {
        "q": Own(),
        "kv": Gather("keys", projection_of(shape).row_width(shape)),
        "q_idx": Own(),
        "k_idx": Gather("index keys", config.index_head_dim, apart=True),
        "weights": Own(),
    }


def served_exchanges(shape: Shape, config: DsaConfig) -> dict[str, Exchange]:
    return exchanges(shape, config) | {"k_idx": Borrowed()}


def card(config: DsaConfig) -> dict[str, str]:
    groups = {}
    if config.share_layers > 1:
        groups["shared"] = f"groups of {config.share_layers} layers attend to the tokens of one indexer"
    return groups | {
        "selection": f"{config.topk} tokens, {config.num_initial} initial and {config.num_local} local ones among them",
        "indexer": f"{config.index_heads} heads of width {config.index_head_dim}, "
        f"{config.index_rotary_place} {config.index_rotary_dims} dims rotated ({config.index_rotary_pairs})"
        + (", in fp8" if config.index_fp8 else ""),
    }


# NSA has fields of some of these names, in blocks.
EXPORT = {name: f"index_{name.removeprefix('index_')}" for name in DsaConfig.model_fields if name != "kl_weight"}


def known(shape: Shape, config: DsaConfig) -> Known | None:
    """Over latents: DeepSeek-V3.2. Its code has the epsilon of the latents' norms, and how the indexer rotates."""
    if shape.mla is None:
        return None
    theirs: dict[str, Any] = {"num_initial": 0, "num_local": 0, "index_rotary_dims": shape.mla.qk_rope_head_dim}
    theirs |= {"index_fp8": False, "index_rotary_place": "first", "index_rotary_pairs": "half-split", "phase": "sparse"}
    ours = config.model_dump()
    unlike = [f"attention.dsa.{name} {ours[name]}" for name in theirs if ours[name] != theirs[name]]
    if config.share_layers > 1:
        unlike.append(f"index sets that layers share (attention.dsa.share_layers {config.share_layers})")
    unlike += ["model.mla.q_lora_rank null"] if shape.mla.q_lora_rank is None else []
    unlike += [] if shape.mla.rope_interleave else ["model.mla.rope_interleave false"]
    unlike += [f"model.norm_eps {shape.norm_eps:g}"] if shape.norm_eps != 1e-6 else []
    fields = {"index_topk": config.topk, "index_n_heads": config.index_heads, "index_head_dim": config.index_head_dim}
    return Known("deepseek_v32", tuple(unlike), fields)


def problem(config: DsaConfig, tokens: int) -> str | None:
    if config.phase == "sparse" and config.topk > tokens:
        return f"attention.dsa.topk ({config.topk}) exceeds the sample ({tokens} tokens): nothing would be left out"
    return None


DSA: Kind = Kind(
    name="dsa",
    title="DeepSeek Sparse Attention (arXiv 2512.02556)",
    config=DsaConfig,
    build=build,
    keeps_scale=(),
    products=products,
    keys=keys,
    widths=widths,
    other_flops=index_flops,
    reach=lambda config: config.topk,
    prices={"all": "causal", "selected": "near"},
    priced_as="nsa",
    lists=False,
    dense_library=False,
    recordable=True,
    options=("qkv_bias", "qk_norm", "mla", "v_head_dim"),
    parts=lambda shape, config: parts_of(shape, whole=("indexer",), averaged=AVERAGED),
    exchanges=exchanges,
    choices=("attend.choose", "shared"),
    placed=lambda config, place: SERVED if config.is_served(place) else DSA,
    borrows=False,
    twin=lambda config: config.model_copy(update={"share_layers": 1}),
    expensive=("range_attention", "token_attention", "latent_attention"),
    loss=("attend.loss", "indexer_kl"),
    apart=("indexer",),
    taught=False,
    from_dense=lambda name, shape, config, read: None if name.startswith("indexer.") else read(name),
    holds_dense=True,
    free=("topk", "num_initial", "num_local", "index_fp8", "phase", "kl_weight", "share_layers", "share_from"),
    problem=problem,
    figures=measure,
    guest=GUEST,
    export=EXPORT,
    known=known,
    card=card,
)

# A layer that attends to the tokens that an earlier one selects.
SERVED: Kind = replace(
    DSA,
    title=f"{DSA.title} with shared index sets",
    build=partial(build, served=True),
    products=served_products,
    other_flops=lambda config, tokens: 0.0,
    parts=lambda shape, config: parts_of(shape, averaged=AVERAGED),
    exchanges=served_exchanges,
    borrows=True,
    twin=lambda config: config.model_copy(update={"share_layers": 2, "share_from": 0}),
    apart=(),
)
