"""Parameters and FLOPs of a decoder, counted without building it."""

from nsa.models.config import AttentionConfig, ModelConfig


def attention_parameters(kind: str, model: ModelConfig, attention: AttentionConfig) -> int:
    """Parameters of one attention layer."""
    key, value = model.head_dim, model.v_head_dim or model.head_dim
    projections = model.hidden_size * model.num_heads * (key + value)  # query and output
    key_value = model.hidden_size * model.num_kv_heads * (key + value)
    if kind == "dense":
        return projections + key_value
    length = attention.compress_length
    compression = 0
    for width in (key, value):
        hidden = attention.compress_hidden or width
        compression += length * width * (hidden + 1) + hidden * width
    gate = (model.hidden_size + 1) * 3 * model.num_heads
    return projections + 3 * key_value + compression + gate


def mlp_parameters(model: ModelConfig, active: bool = False) -> int:
    """Parameters of the MLPs of all layers, mixtures of experts included; ``active``: those that compute a token."""
    moe, layers = model.moe, [model.has_experts(number) for number in range(model.num_layers)]
    total = layers.count(False) * 3 * model.hidden_size * model.intermediate_size
    if moe is not None:
        experts = (moe.top_k if active else moe.num_experts) + moe.num_shared
        total += layers.count(True) * model.hidden_size * (3 * experts * moe.expert_size + moe.num_experts)
    return total


def count_parameters(model: ModelConfig, attention: AttentionConfig) -> dict[str, int]:
    """``total`` parameters; ``embedding`` (the head's too, unless tied) and ``non_embedding`` ones of them; ``routed``:
    of the routed experts; ``active``: all but those of the experts that a token does not go to."""
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


def attention_flops(kind: str, model: ModelConfig, attention: AttentionConfig, sequence_length: int) -> float:
    """Forward FLOPs per token of scores and weighted values of one layer, mean over a causal sequence.

    A multiply-add is 2 FLOPs; only keys that a query sees are counted. NSA's selection recomputes the compressed
    scores: they are not counted, as recomputation is not in a model-FLOPs utilisation (PaLM, arXiv 2204.02311).
    """
    tokens, value = sequence_length, model.v_head_dim or model.head_dim
    if kind == "dense":
        keys = (tokens + 1) / 2  # the mean over the sequence
    else:
        a = attention
        compressed = sum(max(0, (t - a.compress_length + 1) // a.compress_stride + 1) for t in range(tokens)) / tokens
        most = a.num_blocks * a.block_size
        selected = sum(min(t + 1, most - a.block_size + t % a.block_size + 1) for t in range(tokens)) / tokens
        window = sum(min(t + 1, a.window) for t in range(tokens)) / tokens
        keys = compressed + selected + window
    return 2 * model.num_heads * (model.head_dim + value) * keys


def training_flops_per_token(model: ModelConfig, attention: AttentionConfig, sequence_length: int) -> dict[str, float]:
    """Forward and backward FLOPs per token (backward counts twice the forward), of the active parameters.

    Returns:
        ``sparse``: what the configured attention needs. ``dense_equivalent``: the same decoder with dense attention
        in every layer: what its speed is compared by across kinds of attention.
    """

    def total(kinds: list[str]) -> float:
        matrices: float = mlp_parameters(model, active=True)
        matrices += sum(_matrix_parameters(kind, model, attention) for kind in kinds)
        matrices += model.vocab_size * model.hidden_size
        scores = sum(attention_flops(kind, model, attention, sequence_length) for kind in kinds)
        return 3 * (2 * matrices + scores)

    kinds = [str(kind) for kind in attention.kinds(model.num_layers)]
    return {"sparse": total(kinds), "dense_equivalent": total(["dense"] * model.num_layers)}


def _matrix_parameters(kind: str, model: ModelConfig, attention: AttentionConfig) -> float:
    """Multiply-adds per token in the linear maps of one attention layer; compression runs per stride and KV head."""
    parameters = attention_parameters(kind, model, attention)
    if kind == "dense":
        return parameters
    compression = parameters - attention_parameters("dense", model, attention)
    key, value = model.head_dim, model.v_head_dim or model.head_dim
    compression -= 2 * model.hidden_size * model.num_kv_heads * (key + value)
    compression -= (model.hidden_size + 1) * 3 * model.num_heads
    return parameters + compression * (model.num_kv_heads / attention.compress_stride - 1)
