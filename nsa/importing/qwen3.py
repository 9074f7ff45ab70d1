"""Qwen3 (arXiv 2505.09388): query and key heads are normed before they are rotated."""

from nsa.importing.family import LLAMA_TENSORS, NO_BIAS, Family, baseline, no_problems, nothing
from nsa.importing.qwen2 import DEFAULTS, window

QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    defaults=DEFAULTS | {"head_dim": 128},
    only={"attention_bias": NO_BIAS},
    window=window,
    problems=no_problems,
    model=lambda fields: {"qk_norm": True},
    attention=baseline,
    tensors=LLAMA_TENSORS
    | {
        "layers.{}.attention.query_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
        "layers.{}.attention.key_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    },
    factors=nothing,
)
