"""DeepSeek-V2 (arXiv 2405.04434), V3 (2412.19437) and V3.2 (2512.02556): multi-head latent attention.

V3.2 adds the lightning indexer of DeepSeek Sparse Attention. Experts are those of V3: sigmoid affinities, whose gates
are normalised over the selected ones. The factor of the gates (routed_scaling_factor) is multiplied into the experts'
last weights, which is the same function.
"""

from collections.abc import Mapping
from typing import Any

from nsa.importing.family import LLAMA_TENSORS, NO_BIAS, Family, baseline, nothing

# The modules of a layer's attention, and of its experts: this project's names -> the folder's.
ATTENTION = {
    "query": "q_proj",
    "query_down": "q_a_proj",
    "query_norm": "q_a_layernorm",
    "query_up": "q_b_proj",
    "key_value_down": "kv_a_proj_with_mqa",
    "key_value_norm": "kv_a_layernorm",
    "key_value_up": "kv_b_proj",
    "output": "o_proj",
}
INDEXER = {
    "indexer.query": "indexer.wq_b",
    "indexer.key": "indexer.wk",
    "indexer.key_norm": "indexer.k_norm",
    "indexer.head_weight": "indexer.weights_proj",
}
EXPERTS = {
    "router.weight": "gate.weight",
    "router.bias": "gate.e_score_correction_bias",
    "shared.gate.weight": "shared_experts.gate_proj.weight",
    "shared.up.weight": "shared_experts.up_proj.weight",
    "shared.down.weight": "shared_experts.down_proj.weight",
    "experts.gate": "experts.{expert}.gate_proj.weight",
    "experts.up": "experts.{expert}.up_proj.weight",
    "experts.down": "experts.{expert}.down_proj.weight",
}
# The indexer's rotary embedding is no matter of config.json: the first dims, as many as the heads rotate.
INDEX_ROTARY = {"index_rotary_place": "first", "index_rotary_pairs": "half-split"}
LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps is


def tensors(modules: Mapping[str, str], experts: Mapping[str, str]) -> dict[str, str]:
    """The names of a family: `Family.tensors`."""
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in modules.items()}
    if "indexer.key_norm" in modules:
        names["indexer.key_norm.bias"] = "indexer.k_norm.bias"
    around = {ours: theirs for ours, theirs in LLAMA_TENSORS.items() if ".attention." not in ours}
    around |= {f"layers.{{}}.mlp.{a}": f"model.layers.{{}}.mlp.{b}" for a, b in experts.items()}
    return around | {f"layers.{{}}.attention.{a}": f"model.layers.{{}}.self_attn.{b}" for a, b in names.items()}


def dense_layers(fields: Mapping[str, Any]) -> int:
    """How many layers, from the first, have a dense MLP; the others have experts.

    Raises:
        ValueError: there are dense layers after these.
    """
    layers, kinds = fields["num_hidden_layers"], fields.get("mlp_layer_types")
    if kinds is None:
        return min(_number(fields, "first_k_dense_replace", least=0), layers)
    dense = kinds.index("sparse") if "sparse" in kinds else layers
    if kinds != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise ValueError(f"mlp_layer_types = {kinds!r}: here all layers after the first with experts have experts")
    return dense


def has_experts(fields: Mapping[str, Any]) -> bool:
    return dense_layers(fields) < fields["num_hidden_layers"]


def interleaved(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of V2 and V3.2, which always rotate pairs of neighbours and have no field for it."""
    return model({**fields, "rope_interleave": True})


def model(fields: Mapping[str, Any]) -> dict[str, Any]:
    latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    mla: dict[str, Any] = {name: _number(fields, name) for name in latent}
    mla["q_lora_rank"] = None if fields["q_lora_rank"] is None else _number(fields, "q_lora_rank")
    mla["rope_interleave"] = bool(fields["rope_interleave"])
    section = {
        "projection": "mla",
        "mla": mla,
        "num_kv_heads": fields["num_attention_heads"],
        "head_dim": mla["qk_nope_head_dim"] + mla["qk_rope_head_dim"],
        "v_head_dim": mla["v_head_dim"],
    }
    if has_experts(fields):
        section["moe"] = {
            "num_experts": _number(fields, "n_routed_experts"),
            "top_k": _number(fields, "num_experts_per_tok"),
            "num_shared": _number(fields, "n_shared_experts"),
            "expert_size": _number(fields, "moe_intermediate_size"),
            "first_dense": dense_layers(fields),
        }
    return section


def latent_problems(fields: Mapping[str, Any]) -> list[str]:
    found = []
    if fields.get("rms_norm_eps", LATENT_EPS) != LATENT_EPS:
        found.append(
            f"rms_norm_eps = {fields['rms_norm_eps']!r}: transformers norms the latents with {LATENT_EPS:g} whatever "
            "this is, here all norms have one epsilon"
        )
    heads = fields["num_attention_heads"]
    if fields.get("num_key_value_heads") not in (None, heads):
        found.append(
            f"num_key_value_heads = {fields['num_key_value_heads']!r}: with latents every one of {heads} heads has "
            "keys and values of its own"
        )
    return found


def softmax_experts(fields: Mapping[str, Any]) -> list[str]:
    """Of V2: none of its experts can be honoured."""
    if not has_experts(fields):
        return latent_problems(fields)
    first = dense_layers(fields)
    return [
        *latent_problems(fields),
        f"layers from {first} on have experts (first_k_dense_replace = {first}) whose gates are a softmax over all "
        "experts; here gates are sigmoids, normalised over the selected experts, as in DeepSeek-V3: of V2, models "
        "without experts can be imported",
    ]


def sigmoid_experts(fields: Mapping[str, Any]) -> list[str]:
    found = latent_problems(fields)
    if not has_experts(fields):
        return found
    if fields["norm_topk_prob"] is not True:
        found.append(f"norm_topk_prob = {fields['norm_topk_prob']!r}: gates are normalised here")
    if fields["n_group"] != fields["topk_group"]:
        found.append(
            f"n_group = {fields['n_group']!r} with topk_group = {fields['topk_group']!r}: experts are selected from "
            "all groups here, so the two must be equal"
        )
    if fields["num_experts_per_tok"] == 1:
        found.append("num_experts_per_tok = 1: a gate of one expert is constant, at least 2 are needed")
    factor = fields["routed_scaling_factor"]
    if type(factor) not in (int, float) or not factor > 0:
        found.append(f"routed_scaling_factor = {factor!r}: a number above 0 is needed")
    return found


def factors(fields: Mapping[str, Any]) -> dict[str, float]:
    factor = fields["routed_scaling_factor"]
    return {"layers.{}.mlp.experts.down": factor} if has_experts(fields) and factor != 1 else {}


def indexed(fields: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"topk": "index_topk", "index_heads": "index_n_heads", "index_head_dim": "index_head_dim"}
    section: dict[str, Any] = {ours: _number(fields, theirs) for ours, theirs in sizes.items()}
    rotary = {"index_rotary_dims": fields["qk_rope_head_dim"], **INDEX_ROTARY}
    return {"kind": "dsa", "dsa": section | rotary | {"phase": "sparse"}}


def indexed_problems(fields: Mapping[str, Any]) -> list[str]:
    found = sigmoid_experts(fields)
    if fields["q_lora_rank"] is None:
        found.append("q_lora_rank = null: the indexer makes its queries of that latent")
    kinds = fields.get("layer_types")
    if kinds is not None and kinds != ["indexed_attention"] * fields["num_hidden_layers"]:
        found.append(f"layer_types = {kinds!r}: only indexed_attention, in all layers")
    return found


def _number(fields: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = fields.get(name)
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return value


V2 = {
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
}
V3 = V2 | {
    "max_position_embeddings": 4096,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
V32 = V3 | {
    "max_position_embeddings": 163_840,
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "mlp_layer_types": None,
    "layer_types": None,
}

DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    defaults=V2,
    only={"attention_bias": NO_BIAS, "mlp_bias": NO_BIAS},
    window=lambda fields: None,
    problems=softmax_experts,
    model=interleaved,
    attention=baseline,
    tensors=tensors(ATTENTION, {}),
    factors=nothing,
)
DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    defaults=V3 | {"rope_interleave": True},
    only={"attention_bias": NO_BIAS},
    window=lambda fields: None,
    problems=sigmoid_experts,
    model=model,
    attention=baseline,
    tensors=tensors(ATTENTION, EXPERTS),
    factors=factors,
)
DEEPSEEK_V32 = Family(
    architecture="DeepseekV32ForCausalLM",
    defaults=V32,
    only={"attention_bias": NO_BIAS, "mlp_bias": NO_BIAS},
    window=lambda fields: None,
    problems=indexed_problems,
    model=interleaved,
    attention=indexed,
    tensors=tensors(ATTENTION | INDEXER, EXPERTS),
    factors=factors,
)
