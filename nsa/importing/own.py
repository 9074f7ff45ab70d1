"""Exports of this project that carry code of their own (`nsa.models.hf`). The code is not run: config.json says it all.

The tables give the keys of a configuration and their names in config.json. Exports are written by them
(`nsa.exporting.folder`) and read by them, also where transformers has saved the model again.
"""

from collections.abc import Mapping
from itertools import cycle
from operator import eq
from typing import Any

from nsa.importing.family import Family, nothing
from nsa.layers.kinds import DEFAULT, KINDS
from nsa.models import AttentionConfig, ModelConfig

ARCHITECTURE, MODEL_TYPE = "NSAForCausalLM", "nsa"
AUTO_MAP = {
    "AutoConfig": "configuration_nsa.NSAConfig",
    "AutoModel": "modeling_nsa.NSAModel",
    "AutoModelForCausalLM": f"modeling_nsa.{ARCHITECTURE}",
    "AutoModelForSequenceClassification": "modeling_nsa.NSAForSequenceClassification",
}
MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "max_position": "original_max_position",
    "rope_scaling": "rotary_scaling",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "projection": "projection",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_norm",
    "init_std": "initializer_range",
}
ROPE = {
    "theta": "rotary_base",
    "yarn_factor": "yarn_factor",
    "yarn_beta_fast": "yarn_beta_fast",
    "yarn_beta_slow": "yarn_beta_slow",
}
MOE = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_token",
    "num_shared": "num_shared_experts",
    "expert_size": "expert_size",
    "first_dense": "first_dense",
}
MLA = {
    name: name
    for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave")
}
LONGEST = 16  # layers of a pattern that is looked for
OTHERS = {"attention_kinds", "max_position_embeddings", "use_cache"}
KNOWN = {name for table in (MODEL, ROPE, MOE, MLA, *(kind.export or {} for kind in KINDS)) for name in table.values()}
KNOWN |= OTHERS
# What any model's config.json may have beside. Names with a leading underscore are transformers' own, too.
GENERAL = {
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "custom_pipelines",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_decoder",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",  # which is refused for all
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
}


def _sub(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A section of a configuration. What an earlier version did not write keeps the section's default."""
    return {ours: fields[theirs] for ours, theirs in names.items() if theirs in fields}


def problems(fields: Mapping[str, Any]) -> list[str]:
    found = []
    if fields.get("model_type") != MODEL_TYPE:
        found.append(f"model_type = {fields.get('model_type')!r}: {ARCHITECTURE} of this project is {MODEL_TYPE!r}")
    given = fields.get("auto_map") or {}
    for name, ours in AUTO_MAP.items():
        if str(given.get(name, ours)).rpartition("--")[2] != ours:  # a hub's copy: user/name--module.Class
            found.append(f"auto_map.{name} = {given[name]!r}: an export of this project has {ours}")
    known = KNOWN | GENERAL
    found += [
        f"{name} = {value!r} is unknown: a newer version of this project may have written it. Update this one, or take "
        "the key out of config.json if nothing depends on it"
        for name, value in fields.items()
        if name not in known and not name.startswith("_")
    ]
    kinds, layers = fields["attention_kinds"], fields.get("num_hidden_layers")
    if kinds is None:
        return found
    if not isinstance(kinds, list) or len(kinds) != layers:
        found.append(f"attention_kinds must name the kind of each of {layers} layers (num_hidden_layers)")
    elif unknown := sorted({str(kind) for kind in kinds} - {kind.name for kind in KINDS if kind.export is not None}):
        found.append(f"attention_kinds has {', '.join(unknown)}: no export of this version has it, update this project")
    return found


def model(fields: Mapping[str, Any]) -> dict[str, Any]:
    section = _sub(fields, MODEL) | {"rope": _sub(fields, ROPE)}
    section["max_position"] = fields.get("original_max_position") or fields["max_position_embeddings"]
    if fields.get("num_experts"):
        section["moe"] = {ours: fields.get(theirs, 0) for ours, theirs in MOE.items()}
    if fields.get("projection") == "mla":
        section["mla"] = _sub(fields, MLA)
    elif fields.get("v_head_dim") == fields["head_dim"]:
        section["v_head_dim"] = None
    return section


def attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With the sections of the kinds that layers have, and the shortest pattern of these: all layers if it is long."""
    kinds = fields["attention_kinds"] or [DEFAULT.name]
    periods = range(1, min(LONGEST, len(kinds)) + 1)
    period = next((n for n in periods if all(map(eq, kinds, cycle(kinds[:n])))), len(kinds))
    section: dict[str, Any] = {"kind": kinds[0] if period == 1 else kinds[:period]}
    for kind in KINDS:
        if kind.name in kinds and kind.export:
            section[kind.name] = _sub(fields, kind.export)
    return section


def fields_of(model: ModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """The way back: what config.json has of a model, whose kinds of attention all have `nsa.layers.kind.Kind.export`.

    It has the sections of all kinds, used or not.
    """
    values = model.model_dump()
    tables: list[tuple[Mapping[str, str], Any]] = [
        (MODEL, values),
        (ROPE, values["rope"]),
        (MOE, values["moe"]),
        (MLA, values["mla"]),
    ]
    tables += [(kind.export, attention.of(kind).model_dump()) for kind in KINDS if kind.export]
    return {
        "attention_kinds": [kind.name for kind in attention.kinds(model.num_layers)],
        "max_position_embeddings": int(model.max_position * model.rope.yarn_factor),
        **{theirs: section[ours] for table, section in tables if section for ours, theirs in table.items()},
    }


OWN = Family(
    architecture=ARCHITECTURE,
    defaults={
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "attention_kinds": None,
    },
    only={"auto_map": (None, "")},
    window=lambda fields: None,
    problems=problems,
    model=model,
    attention=attention,
    tensors=None,
    factors=nothing,
)
