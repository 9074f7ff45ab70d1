"""The record of Native Sparse Attention."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from torch import Tensor, nn

from nsa.layers.kind import Backends, Blocks, Exchange, Gather, Halo, Kind, Own, Parts, Product, Shape
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.nsa.figures import measure
from nsa.layers.nsa.guest import GUEST
from nsa.layers.nsa.layer import BRANCHES, NativeSparseAttention


def build(shape: Shape, config: NsaConfig, backends: Backends) -> nn.Module:
    return NativeSparseAttention(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        rope_theta=shape.rope_theta,
        backend=backends.operators,
        **config.model_dump(),
    )


def products(shape: Shape, config: NsaConfig) -> list[Product]:
    """The compression runs once per stride and KV head, on keys and on values."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    joint = heads * shape.head_dim + 3 * kv_heads * (shape.head_dim + shape.v_head_dim) + 3 * heads
    linear_maps = [Product(1, shape.hidden_size, joint), Product(1, heads * shape.v_head_dim, shape.hidden_size)]
    for width in (shape.head_dim, shape.v_head_dim):
        blocks, hidden = kv_heads / config.compress_stride, config.compress_hidden or width
        linear_maps.append(Product(blocks, config.compress_length * width, hidden))
        linear_maps.append(Product(blocks, hidden, width))
    return linear_maps


@lru_cache(maxsize=256)
def keys(config: NsaConfig, tokens: int) -> dict[str, float]:
    t = np.arange(tokens)
    compressed = np.maximum(0, (t - config.compress_length + 1) // config.compress_stride + 1)
    selected = np.minimum(t + 1, (config.num_blocks - 1) * config.block_size + t % config.block_size + 1)
    window = np.minimum(t + 1, config.window)
    seen = (compressed, selected, window)
    return {branch: float(number.mean()) for branch, number in zip(BRANCHES, seen, strict=True)}


def exchanges(shape: Shape, config: NsaConfig) -> dict[str, Exchange]:
    """Any query may select any block, so all keys and values of the selected branch are gathered."""
    return {
        "q": Own(),
        "kv_cmp": Blocks("compressed", "compression", "compress", config.compress_length, config.compress_stride),
        "kv_slc": Gather("selected", shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)),
        "kv_win": Halo("window", config.window - 1),
        "gates": Own(),
    }


def card(config: NsaConfig) -> dict[str, str]:
    return {
        "compression": f"blocks of {config.compress_length} tokens at stride {config.compress_stride}",
        "selection": f"{config.num_blocks} blocks of {config.block_size} tokens, {config.num_initial} initial "
        f"and {config.num_local} local ones among them",
        "window": f"{config.window} tokens",
    }


def from_dense(name: str, read: Callable[[str], Tensor]) -> Tensor | None:
    """Each branch begins with the dense keys and values; compression and gates as in a new run."""
    _, branch, part = name.partition("key_value.")
    if branch:
        return read(part.partition(".")[2])
    return None if name.startswith(("compress.", "gate.")) else read(name)


NSA = Kind(
    name="nsa",
    title="Native Sparse Attention (arXiv 2502.11089)",
    config=NsaConfig,
    build=build,
    keeps_scale=("compress",),
    products=products,
    keys=keys,
    widths=lambda shape, config: (shape.head_dim, shape.v_head_dim),
    other_flops=lambda config, tokens: 0.0,
    reach=lambda config: max(config.num_blocks * config.block_size, config.window),
    prices={"compressed": "compressed", "selected": "near", "window": "near"},
    priced_as="nsa",
    lists=True,
    recordable=True,
    dense_library=False,
    options=(),
    parts=lambda shape: Parts(
        columns=("query", "gate"),
        kv_heads=tuple(f"key_value.{branch}.{part}" for branch in BRANCHES for part in ("key", "value")),
        rows=("output",),
        whole=("compress",),
        gathered={"attend.choose": (2, None, 1)},  # queries and their LSE
        gathered_bytes=lambda shape, width: shape.head_dim * width + 4,
    ),
    exchanges=exchanges,
    choices=("attend.choose",),
    expensive=("range_attention", "selected_attention", "compress_blocks"),
    loss=None,
    apart=(),
    from_dense=from_dense,
    free=("num_blocks", "num_initial", "num_local", "window"),
    problem=lambda config, tokens: None,
    figures=measure,
    guest=GUEST,
    export=lambda config: config.model_dump(),
    known=lambda shape, config: None,
    card=card,
)
