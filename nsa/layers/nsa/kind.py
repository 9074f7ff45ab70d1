"""The record of Native Sparse Attention."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from nsa.layers.kind import (
    OF_LOSS,
    Backends,
    Blocks,
    Exchange,
    Gather,
    Halo,
    Kind,
    Own,
    Parts,
    Product,
    Same,
    Shape,
)
from nsa.layers.nsa.config import NsaConfig
from nsa.layers.nsa.figures import measure, measure_taught, measure_warm_up
from nsa.layers.nsa.guest import GUEST, GUEST_WARM_UP
from nsa.layers.nsa.layer import BRANCHES, NativeSparseAttention


def build(shape: Shape, config: NsaConfig, backends: Backends, before: Sequence[nn.Module] = ()) -> nn.Module:
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
    """The compression runs once per stride and KV head, on keys and on values. In the warm-up that of keys learns."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    joint = heads * shape.head_dim + 3 * kv_heads * (shape.head_dim + shape.v_head_dim) + 3 * heads
    linear_maps = [Product(1, shape.hidden_size, joint), Product(1, heads * shape.v_head_dim, shape.hidden_size)]
    blocks, key = kv_heads / config.compress_stride, shape.head_dim

    def mlp(width: int, inner: int, outer: int) -> list[Product]:
        hidden = config.compress_hidden or width
        return [
            Product(blocks, config.compress_length * width, hidden, alone=inner),
            Product(blocks, hidden, width, alone=outer),
        ]

    learns = (2, 3) if config.phase == "warm-up" else (1, 1)
    if config.key_compression == "pooled":
        rows = zip((kv_heads, blocks), learns, strict=True)
        linear_maps += [Product(each, key, key, alone=alone) for each, alone in rows]
    else:
        linear_maps += mlp(key, *learns)
    return linear_maps + mlp(shape.v_head_dim, 1, 1)


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
    width = shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)
    return {
        "q": Own(),
        "kv_cmp": Blocks(
            "compressed", "compression", "compress", config.compress_length, config.compress_stride, 0, width, width
        ),
        "kv_slc": Gather("selected", width),
        "kv_win": Halo("window", config.window - 1, width),
        "gates": Own(),
    }


def card(config: NsaConfig) -> dict[str, str]:
    return {
        "compression": f"blocks of {config.compress_length} tokens at stride {config.compress_stride}"
        + (", keys pooled" if config.key_compression == "pooled" else ""),
        "selection": f"{config.num_blocks} blocks of {config.block_size} tokens, {config.num_initial} initial "
        f"and {config.num_local} local ones among them",
        "window": f"{config.window} tokens",
    }


# First gates of a layer that was dense: selection and window, which see what dense attention sees in samples that they
# cover, have 1 in sum; the compressed branch begins almost shut, and its gate still learns.
FIRST_GATES = (0.02, 0.49, 0.49)
NARROW = 1 / 16  # slope of the hidden layer where it is too narrow for the exact mean: silu(x) is x / 2 near 0


def from_dense(name: str, shape: torch.Size, config: NsaConfig, read: Callable[[str], Tensor]) -> Tensor | None:
    """Each branch begins with the dense keys and values. The compression begins as a mean, the gates as a constant.

    Pooled keys are a mean with a gate of 0.

    phi is outer silu(inner block). Since silu(x) - silu(-x) = x, it is exactly the mean where the hidden layer has
    twice the width: inner is (mean, -mean), outer (1, -1). In a narrower one it is the mean where that is small.
    """
    _, branch, part = name.partition("key_value.")
    if branch:
        return read(part.partition(".")[2])
    if name.startswith("gate."):
        biases = torch.tensor(FIRST_GATES).logit().repeat(shape[0] // 3)
        return biases if name == "gate.bias" else torch.zeros(shape)
    if not name.startswith("compress."):
        return read(name)
    if name.endswith("position"):
        return torch.zeros(shape)
    if config.key_compression == "pooled" and name.startswith("compress.key."):
        return torch.eye(*shape) if name.endswith("outer.weight") else torch.zeros(shape)
    inner, length = name.endswith("inner.weight"), config.compress_length
    hidden, width = (shape[0], shape[1] // length) if inner else (shape[1], shape[0])
    wide = hidden >= 2 * width
    if inner:  # rows that outer does not read yet repeat others, so that they can learn
        mean = torch.eye(width).repeat(1, length) / length
        rows = torch.cat((mean, -mean)) if wide else NARROW * mean
        return rows.repeat(-(-hidden // len(rows)), 1)[:hidden]
    outer = torch.zeros(shape)
    outer[:, :width] = torch.eye(width, min(width, hidden)) * (1 if wide else 2 / NARROW)
    if wide:
        outer[:, width : 2 * width] = -torch.eye(width)
    return outer


OF_TRAINING = ("kl_weight", "kl_stride")  # keys of the loss


def at_work(config: NsaConfig) -> Kind:
    """What a layer is with these keys: NSA, with the selection's loss of all queries or of some, or the warm-up."""
    if config.phase == "warm-up":
        return WARM_UP
    if not config.kl_weight:
        return NSA
    return TAUGHT if config.kl_stride == 1 else THINNED


NSA: Kind = Kind(
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
    options=("v_head_dim",),
    parts=lambda shape, config: Parts(
        columns=("query", "gate"),
        kv_heads=tuple(f"key_value.{branch}.{part}" for branch in BRANCHES for part in ("key", "value")),
        rows=("output",),
        heads=(),
        whole=("compress",),
        one_kv_head=False,
        gathered={"attend.choose": (2, None, 1)},  # queries and their LSE
        gathered_bytes=lambda shape, width: shape.head_dim * width + 4,
        thinned={},
        drawn={},
        averaged={"attend.together": False},
    ),
    exchanges=exchanges,
    choices=("attend.choose",),
    placed=lambda config, place: at_work(config),
    borrows=False,
    twin=lambda config: config,
    expensive=("range_attention", "selected_attention", "compress_blocks"),
    loss=None,
    apart=(),
    taught=False,
    from_dense=from_dense,
    holds_dense=False,
    free=("num_blocks", "num_initial", "num_local", "window", "phase", *OF_TRAINING),
    problem=lambda config, tokens: None,
    figures=measure,
    guest=GUEST,
    export={
        name: "nsa_phase" if name == "phase" else name for name in NsaConfig.model_fields if name not in OF_TRAINING
    },
    known=lambda shape, config: None,
    card=card,
)


def nothing_to_teach(config: NsaConfig, tokens: int) -> str | None:
    what = "phase warm-up" if config.phase == "warm-up" else f"kl_weight {config.kl_weight:g}"
    if config.phase == "sparse" and config.kl_stride > tokens:
        return (
            f"attention.nsa.kl_stride ({config.kl_stride}) exceeds a sample ({tokens} tokens), and most passes "
            "would teach nothing: lower it"
        )
    initial = config.num_initial * config.block_size
    choice = initial + config.num_local * config.block_size
    if tokens <= choice:
        return (
            f"attention.nsa.{what}: a sample ({tokens} tokens) has no block beside the initial and local ones "
            f"({choice} tokens), so there is no choice to teach: train on longer samples"
        )
    if tokens <= initial + config.window:
        return (
            f"attention.nsa.{what}: the window ({config.window} tokens) reaches all of a sample ({tokens} "
            f"tokens) but the initial blocks ({initial} tokens), so there is nothing to teach: train on longer samples"
        )
    return None


# A layer whose selection goes on to be taught while it attends as NSA.
TAUGHT: Kind = replace(
    NSA,
    title=f"{NSA.title}, whose selection has a loss",
    # Of dense attention's six products forward and backward the loss takes three: both forward, and the scores again.
    # One query in kl_stride has them.
    keys=lambda config, tokens: keys(config, tokens) | {OF_LOSS: (tokens + 1) / 4 / config.kl_stride},
    prices={**NSA.prices, OF_LOSS: "causal"},
    parts=lambda shape, config: replace(
        NSA.parts(shape, config),
        gathered={**NSA.parts(shape, config).gathered, "attend.diverge": (2, None, None, 1)},
    ),
    loss=("attend.loss", "selection_kl"),
    problem=nothing_to_teach,
    figures=measure_taught,
)

# The same, where the loss looks at some of the queries.
THINNED: Kind = replace(
    TAUGHT,
    parts=lambda shape, config: replace(
        TAUGHT.parts(shape, config),
        thinned={"attend.diverge": config.kl_stride},
        drawn={"attend.draw": lambda tokens, heads: -(-tokens // config.kl_stride)},
    ),
    choices=("attend.choose", "attend.draw"),
)

# A layer whose selection is taught: it attends like the dense layer that it was, and only its keys' compression learns.
WARM_UP: Kind = replace(
    NSA,
    title=f"{NSA.title}, whose selection is taught",
    keys=lambda config, tokens: {"all": (tokens + 1) / 2},
    prices={"all": "causal"},
    reach=lambda config: 0,
    lists=False,
    recordable=False,
    parts=lambda shape, config: replace(
        NSA.parts(shape, config),
        gathered={"attend.diverge": (2, None, None, 1)},
        gathered_bytes=lambda shape, width: shape.head_dim * width + 4,
    ),
    exchanges=lambda shape, config: exchanges(shape, config) | {"kv_win": Same()},  # it is not looked at
    choices=(),
    expensive=("range_attention",),
    loss=("attend.loss", "selection_kl"),
    apart=("compress.key",),
    taught=True,
    free=("num_blocks", "num_initial", "num_local", "window", *OF_TRAINING),
    problem=nothing_to_teach,
    figures=measure_warm_up,
    guest=GUEST_WARM_UP,
)
