"""Qwen2 and Qwen2.5 (arXiv 2407.10671): queries, keys and values have a bias."""

from collections.abc import Mapping
from typing import Any

from nsa.importing.family import LLAMA_TENSORS, Family, baseline, no_problems, nothing

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def window(fields: Mapping[str, Any]) -> int | None:
    """Layers from max_window_layers on have a window, or those that layer_types names."""
    kinds = fields["layer_types"]
    some = fields["max_window_layers"] < fields["num_hidden_layers"] if kinds is None else "sliding_attention" in kinds
    return fields["sliding_window"] if some and fields["use_sliding_window"] else None


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    defaults=DEFAULTS,
    only={},
    window=window,
    problems=no_problems,
    model=lambda fields: {"qkv_bias": True},
    attention=baseline,
    tensors=LLAMA_TENSORS
    | {
        "layers.{}.attention.query.bias": "model.layers.{}.self_attn.q_proj.bias",
        "layers.{}.attention.key.bias": "model.layers.{}.self_attn.k_proj.bias",
        "layers.{}.attention.value.bias": "model.layers.{}.self_attn.v_proj.bias",
    },
    factors=nothing,
)
