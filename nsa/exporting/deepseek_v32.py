"""DeepSeek-V3.2 (arXiv 2512.02556): DeepSeek Sparse Attention over multi-head latent attention in all layers."""

from typing import Any

from nsa.config import Config
from nsa.exporting.family import Family
from nsa.importing.deepseek import ATTENTION, INDEXER, tensors


def unlike(config: Config) -> list[str]:
    """Its experts are gated alike, but their weights are laid out otherwise; its YaRN is another one."""
    found = ["model.moe"] if config.model.moe else []
    if (factor := config.model.rope.yarn_factor) != 1:
        found.append(f"model.rope.yarn_factor {factor:g}")
    return found


def fields(config: Config) -> dict[str, Any]:
    model = config.model
    assert model.mla is not None
    scaling = model.rope_scaling.model_dump(exclude_none=True) if model.rope_scaling else {}
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
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope.theta, **scaling},
        "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


DEEPSEEK_V32 = Family(
    model_type="deepseek_v32",
    architecture="DeepseekV32ForCausalLM",
    transformers="5.24",
    unlike=unlike,
    fields=fields,
    tensors=tensors(ATTENTION | INDEXER, {}),
)
