"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek Sparse Attention over multi-head latent attention in all layers."""

from typing import Any

from nsa.config import Config
from nsa.exporting.family import Family
from nsa.importing.family import LLAMA_TENSORS

ATTENTION = {
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query_up": "q_b_proj",
    "key_value_down": "kv_a_proj_with_mqa",
    "key_value_norm": "kv_a_layernorm",
    "key_value_up": "kv_b_proj",
    "output": "o_proj",
    "indexer.query": "indexer.wq_b",
    "indexer.key": "indexer.wk",
    "indexer.key_norm": "indexer.k_norm",
    "indexer.head_weight": "indexer.weights_proj",
}


def unlike(config: Config) -> list[str]:
    """Its experts are gated alike, but their weights are laid out otherwise; its YaRN is another one."""
    found = ["model.moe"] if config.model.moe else []
    if (factor := config.model.rope.yarn_factor) != 1:
        found.append(f"model.rope.yarn_factor {factor:g}")
    return found


def fields(config: Config) -> dict[str, Any]:
    model = config.model
    assert model.mla is not None
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_heads,
        **model.mla.model_dump(exclude={"rope_interleave"}),  # true, and no field there
        "layer_types": ["indexed_attention"] * model.num_layers,
        "mlp_layer_types": ["dense"] * model.num_layers,
        "first_k_dense_replace": model.num_layers,
        "max_position_embeddings": model.max_position,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope.theta},
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def tensors() -> dict[str, str]:
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in ATTENTION.items()}
    names["indexer.key_norm.bias"] = "indexer.k_norm.bias"
    around = {ours: theirs for ours, theirs in LLAMA_TENSORS.items() if ".attention." not in ours}
    return around | {f"layers.{{}}.attention.{a}": f"model.layers.{{}}.self_attn.{b}" for a, b in names.items()}


DEEPSEEK_V32 = Family(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    transformers="5.24",
    unlike=unlike,
    fields=fields,
    tensors=tensors(),
)
