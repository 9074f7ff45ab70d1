"""The record of Compressed Sparse Attention."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
from torch import Size, Tensor, nn

from nsa.layers.csa.config import CsaConfig
from nsa.layers.csa.figures import measure
from nsa.layers.csa.guest import GUEST
from nsa.layers.csa.layer import CompressedSparseAttention
from nsa.layers.kind import Backends, Blocks, Exchange, Halo, Kind, Own, Parts, Product, Same, Shape


def build(shape: Shape, config: CsaConfig, backends: Backends, before: Sequence[nn.Module] = ()) -> nn.Module:
    return CompressedSparseAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.head_dim,
        norm_eps=shape.norm_eps,
        rope_theta=shape.rope_theta,
        backend=backends.operators,
        **config.model_dump(exclude={"heavy_ratio"}),
    )


def parts(shape: Shape, config: CsaConfig) -> Parts:
    """The one KV head is on all ranks. For the indexer's loss they send each other queries."""
    low_rank = () if config.q_lora_rank is None else ("query_down", "query_norm")
    indexed = config.topk is not None
    return Parts(
        columns=("query",),
        kv_heads=(),
        rows=("output",),
        heads=("sink",),
        whole=(*low_rank, "key_value", "key_value_norm", "compress", *(("indexer",) if indexed else ())),
        one_kv_head=True,
        gathered={"attend.diverge": (2, 1, None, None, None, None, None)} if indexed else {},  # queries and their LSE
        gathered_bytes=lambda shape, width: shape.head_dim * width + 4,
        thinned={},
        drawn={},
        averaged={},
    )


def products(shape: Shape, config: CsaConfig) -> list[Product]:
    hidden, width, series = shape.hidden_size, shape.head_dim, 1 + config.overlap
    queries, latent = shape.num_heads * width, config.q_lora_rank
    found = [Product(1, hidden, (latent or queries) + width)]
    if latent is not None:
        found.append(Product(1, latent, queries))
    found += [Product(1, hidden, 2 * series * width), Product(1, queries, hidden)]
    if config.topk is not None:
        found += [
            Product(1, latent or hidden, config.index_heads * config.index_head_dim, alone=2),
            Product(1, hidden, 2 * series * config.index_head_dim, alone=2),
            Product(1, hidden, config.index_heads, alone=2),
        ]
    return found


@lru_cache(maxsize=256)
def keys(config: CsaConfig, tokens: int) -> dict[str, float]:
    seen = (np.arange(tokens) + 1) // config.ratio
    window = float(np.minimum(np.arange(tokens) + 1, config.window).mean())
    if config.topk is None or config.phase == "warm-up":
        return {"entries": float(seen.mean()), "window": window}
    return {"selected": float(np.minimum(seen, config.topk).mean()), "window": window}


def index_flops(config: CsaConfig, tokens: int) -> float:
    if config.topk is None:
        return 0.0
    seen = float(((np.arange(tokens) + 1) // config.ratio).mean())
    return 2 * config.index_heads * config.index_head_dim * seen


def exchanges(shape: Shape, config: CsaConfig) -> dict[str, Exchange]:
    """A rank makes the entries of its tokens, and gets those of all."""
    series, before = 1 + config.overlap, config.ratio if config.overlap else 0

    def entries(name: str, halo: str, module: str, width: int) -> Blocks:
        return Blocks(name, halo, module, config.ratio, config.ratio, before, 2 * series * width, width)

    found: dict[str, Exchange] = {
        "q": Own(),
        "near": Halo("window", config.window - 1, shape.head_dim),
        "sink": Same(),
        "entries": entries("entries", "entry tokens", "compress", shape.head_dim),
    }
    if config.topk is not None:
        found |= {
            "q_idx": Own(),
            "k_idx": entries("index entries", "index tokens", "indexer.compress", config.index_head_dim),
            "weights": Own(),
        }
    return found


def from_dense(name: str, shape: Size, config: CsaConfig, read: Callable[[str], Tensor]) -> Tensor | None:
    """Queries and output; what is compressed, and the one KV head, are new."""
    return read(name) if name == "output.weight" or (name == "query.weight" and config.q_lora_rank is None) else None


def problem(config: CsaConfig, tokens: int) -> str | None:
    entries, heavy = tokens // config.ratio, config.heavy_ratio
    if heavy is not None and heavy > tokens:
        return f"attention.csa.heavy_ratio ({heavy}) exceeds the sample ({tokens} tokens): there is no entry; lower it"
    if not entries:
        return f"attention.csa.ratio ({config.ratio}) exceeds the sample ({tokens} tokens): there is no entry; lower it"
    if config.topk is not None and config.phase == "sparse" and config.topk > entries:
        return (
            f"attention.csa.topk ({config.topk}) exceeds the entries of a sample ({tokens} tokens / ratio "
            f"{config.ratio} = {entries}): nothing would be left out; lower it, or set it to null for all entries"
        )
    return None


def card(config: CsaConfig) -> dict[str, str]:
    return {
        "entries": f"one of every {config.ratio} tokens{', overlapping' if config.overlap else ''}"
        + ("" if config.heavy_ratio is None else f"; of every {config.heavy_ratio} in every second layer"),
        "selection": "all entries" if config.topk is None else f"{config.topk} entries",
        "window": f"{config.window} tokens",
    }


CSA: Kind = Kind(
    name="csa",
    title="Compressed Sparse Attention (DeepSeek-V4, arXiv 2606.19348)",
    config=CsaConfig,
    build=build,
    keeps_scale=(),
    products=products,
    keys=keys,
    widths=lambda shape, config: (shape.head_dim, shape.head_dim),
    other_flops=index_flops,
    reach=lambda config: config.window if config.topk is None else config.topk * config.ratio,
    prices={"entries": "compressed", "selected": "near", "window": "near"},
    priced_as="nsa",
    lists=False,
    recordable=False,
    dense_library=False,
    options=(),
    parts=parts,
    exchanges=exchanges,
    choices=("attend.choose",),
    placed=lambda config, place: HEAVY if config.is_heavy(place) else WITHOUT_INDEXER if config.topk is None else CSA,
    borrows=False,
    twin=lambda config: config.model_copy(update={"heavy_ratio": None}),
    expensive=("range_attention", "token_attention"),
    loss=("attend.loss", "indexer_kl"),
    apart=("indexer",),
    taught=False,
    from_dense=from_dense,
    holds_dense=False,
    free=("topk", "window", "phase", "kl_weight"),
    problem=problem,
    figures=measure,
    guest=GUEST,
    export={name: f"csa_{name}" for name in CsaConfig.model_fields if name != "kl_weight"},
    known=lambda shape, config: None,
    card=card,
)

# A layer that attends to all entries.
WITHOUT_INDEXER: Kind = replace(CSA, title=f"{CSA.title} without an indexer", choices=(), loss=None, apart=())

# One of heavily compressed attention (HCA), between others that are not.
HEAVY: Kind = replace(
    WITHOUT_INDEXER,
    title=f"{CSA.title}, heavily compressed (HCA)",
    build=lambda shape, config, backends, before=(): build(shape, config.heavy(), backends, before),
    products=lambda shape, config: products(shape, config.heavy()),
    keys=lambda config, tokens: keys(config.heavy(), tokens),
    other_flops=lambda config, tokens: 0.0,
    reach=lambda config: config.window,
    parts=lambda shape, config: parts(shape, config.heavy()),
    exchanges=lambda shape, config: exchanges(shape, config.heavy()),
    twin=lambda config: config,
)
