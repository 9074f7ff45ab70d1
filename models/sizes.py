"""Parameters and FLOPs of a decoder, counted without its weights."""

from functools import lru_cache
from typing import Any

import torch

from nsa.layers.kind import Backends, Kind, Shape
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
    ``active``: all except those of the experts that a token does not go to.
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
    }


def attention_flops(kind: Kind, model: ModelConfig, attention: AttentionConfig, sequence_length: int) -> float:
    """Forward FLOPs per token of scores and weighted values of one layer, and of an indexer's scores; means.

    Means are over a causal sequence. A multiply-add is 2 FLOPs; only keys that a query sees are counted. What NSA's
    selection computes again is not, as recomputation is not in a model-FLOPs utilisation (PaLM, arXiv 2204.02311).
    """
    config = attention.of(kind)
    keys = sum(kind.keys(config, sequence_length).values())
    per_key = 2 * model.num_heads * sum(kind.widths(model.attention_shape, config))
    return per_key * keys + kind.other_flops(config, sequence_length)


def training_flops_per_token(model: ModelConfig, attention: AttentionConfig, sequence_length: int) -> dict[str, float]:
    """Forward and backward FLOPs per token (backward counts twice the forward), of the active parameters.

    Returns:
        ``sparse``: FLOPs of the configured attention. ``dense_equivalent``: of the same decoder with dense attention in
        every layer, to compare speeds across kinds of attention.
    """

    def total(kinds: list[Kind]) -> float:
        matrices: float = mlp_parameters(model, active=True)
        for kind in kinds:
            products = kind.products(model.attention_shape, attention.of(kind))
            matrices += sum(product.rows * product.inner * product.outer for product in products)
        matrices += model.vocab_size * model.hidden_size
        scores = sum(attention_flops(kind, model, attention, sequence_length) for kind in kinds)
        return 3 * (2 * matrices + scores)

    return {
        "sparse": total(attention.kinds(model.num_layers)),
        "dense_equivalent": total([BASELINE] * model.num_layers),
    }
