"""Parameters and FLOPs of a decoder, counted without its weights."""

from functools import lru_cache
from typing import Any

import torch

from nsa.layers.kind import OF_LOSS, Backends, Kind, Shape
from nsa.layers.kinds import BASELINE
from nsa.models.config import AttentionConfig, ModelConfig


@lru_cache(maxsize=256)
def parameters_of_attention(kind: Kind, shape: Shape, config: Any) -> dict[str, int]:
    """name in the layer -> number of elements, for each parameter of one layer."""
    with torch.device("meta"):
        layer = kind.build(shape, config, Backends())
    return {name: parameter.numel() for name, parameter in layer.named_parameters()}


def attention_parameters(kind: Kind, model: ModelConfig, attention: AttentionConfig) -> int:
    """Parameters of one attention layer."""
    return sum(parameters_of_attention(kind, model.attention_shape, attention.of(kind)).values())


def apart_parameters(kind: Kind, model: ModelConfig, attention: AttentionConfig) -> int:
    """Of these, those of what is trained apart."""
    inside = tuple(f"{path}." for path in kind.apart)
    parameters = parameters_of_attention(kind, model.attention_shape, attention.of(kind))
    return sum(number for name, number in parameters.items() if name.startswith(inside))


def mlp_parameters(model: ModelConfig, active: bool = False) -> int:
    """Parameters of the MLPs of all layers, experts included; ``active``: only the experts that a token goes to."""
    moe, layers = model.moe, [model.has_experts(number) for number in range(model.num_layers)]
    total = layers.count(False) * 3 * model.hidden_size * model.intermediate_size
    if moe is not None:
        experts = (moe.top_k if active else moe.num_experts) + moe.num_shared
        total += layers.count(True) * model.hidden_size * (3 * experts * moe.expert_size + moe.num_experts)
    return total


def count_parameters(model: ModelConfig, attention: AttentionConfig) -> dict[str, int]:
    """Numbers of parameters.

    ``total``, ``embedding`` (with the head's, unless tied), ``non_embedding``, ``routed``: of the routed experts,
    ``active``: all except those of the experts that a token does not go to, ``apart``: of what is trained apart
    (`nsa.layers.kind.Kind.apart`).
    """
    body = model.hidden_size + 2 * model.hidden_size * model.num_layers + mlp_parameters(model)
    body += sum(attention_parameters(kind, model, attention) for kind in attention.kinds(model.num_layers))
    embedding = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    idle = mlp_parameters(model) - mlp_parameters(model, active=True)
    total = body + embedding
    routed = 0
    if model.moe is not None:
        layers = model.num_layers - model.moe.first_dense
        routed = layers * model.moe.num_experts * 3 * model.hidden_size * model.moe.expert_size
    return {
        "total": total,
        "embedding": embedding,
        "non_embedding": body,
        "routed": routed,
        "active": total - idle,
        "apart": sum(apart_parameters(kind, model, attention) for kind in attention.kinds(model.num_layers)),
    }


def attention_flops(kind: Kind, model: ModelConfig, attention: AttentionConfig, sequence_length: int) -> float:
    """Forward FLOPs per token of scores and weighted values of one layer, and of an indexer's scores; means.

    Means are over a causal sequence. A multiply-add is 2 FLOPs; only keys that a query sees are counted. What NSA's
    selection computes again is not, as recomputation is not in a model-FLOPs utilisation (PaLM, arXiv 2204.02311).
    """
    return sum(_flops_by_use(kind, model, attention, sequence_length))


def _flops_by_use(
    kind: Kind, model: ModelConfig, attention: AttentionConfig, sequence_length: int
) -> tuple[float, float, float]:
    """As `attention_flops`: of the attention, of what only the layer's loss computes, of an indexer's scores."""
    config = attention.of(kind)
    keys = dict(kind.keys(config, sequence_length))
    per_key = 2 * model.num_heads * sum(kind.widths(model.attention_shape, config))
    of_loss = keys.pop(OF_LOSS, 0.0)
    return per_key * sum(keys.values()), per_key * of_loss, kind.other_flops(config, sequence_length)


def training_flops_per_token(
    model: ModelConfig, attention: AttentionConfig, sequence_length: int, apart: bool = False
) -> dict[str, float]:
    """Forward and backward FLOPs per token (backward counts twice the forward), of the active parameters.

    Args:
        apart: only what is trained apart is trained. Then there is no output head, and all else has a forward pass
            alone.

    Returns:
        ``sparse``: FLOPs of the configured attention. ``dense_equivalent``: of the same decoder with dense attention in
        every layer, to compare speeds across kinds of attention.
    """

    def total(kinds: list[Kind]) -> float:
        matrices: float = mlp_parameters(model, active=True) * (1 if apart else 3)
        scores = 0.0
        for kind in kinds:
            products = kind.products(model.attention_shape, attention.of(kind))
            matrices += sum(p.rows * p.inner * p.outer * (p.alone if apart else 3) for p in products)
            own, of_loss, indexer = _flops_by_use(kind, model, attention, sequence_length)
            scores += own + 3 * indexer if apart else 3 * (own + of_loss + indexer)
        matrices += 0 if apart else 3 * model.vocab_size * model.hidden_size
        return 2 * matrices + scores

    return {
        "sparse": total(attention.kinds(model.num_layers)),
        "dense_equivalent": total([BASELINE] * model.num_layers),
    }
