"""The record of a family of models: what its folders hold, and how it is called here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nsa.layers.kinds import BASELINE

# Fields of config.json that change what is computed: the values that can be honoured (None: any), and what to
# do about others.
ONLY: dict[str, tuple[tuple[Any, ...] | None, str]] = {
    "hidden_act": (("silu", "swish"), "the MLP here is SwiGLU"),
    "attention_dropout": ((0,), "there is no dropout here: set it to 0 to train without"),
    "partial_rotary_factor": ((None, 1), "all dims of a head are rotated here"),
    "quantization_config": ((None,), "quantized weights cannot be trained: take the model's original ones"),
    "auto_map": ((None,), "the model has code of its own: import one that transformers itself has"),
}
NO_BIAS = (False,), "no weight has a bias here but those of query, key and value in Qwen2"
# This project's names of tensors and those of a folder, of layer {}.
LLAMA_TENSORS = {
    "embedding.weight": "model.embed_tokens.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.attention.query.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.{}.attention.key.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.{}.attention.value.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.{}.attention.output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.{}.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A family of models. No attribute has a default.

    Attributes:
        architecture: its name in config.json.
        defaults: of fields that config.json may leave out, as `transformers` has them.
        only: fields that change what is computed, beside `ONLY` or in place of its: the values that can be honoured
            (None: any), and what to do.
        window: fields of config.json -> tokens that a layer's sliding window sees; None: no layer has one.
        problems: fields -> what cannot be honoured and is no matter of one field, in words with what to do.
        model: fields -> keys of the `model` section beside those of Llama, or in their place.
        attention: fields -> the `attention` section.
        tensors: this project's names of tensors -> the folder's, with {} for the layer's number. With {expert},
            too, the tensor is those of all experts, each transposed. None: the names are the same.
        factors: fields -> this project's names -> what these tensors are multiplied by. The results are fp32.
    """

    architecture: str
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[tuple[Any, ...] | None, str]]
    window: Callable[[Mapping[str, Any]], int | None]
    problems: Callable[[Mapping[str, Any]], list[str]]
    model: Callable[[Mapping[str, Any]], dict[str, Any]]
    attention: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensors: Mapping[str, str] | None
    factors: Callable[[Mapping[str, Any]], dict[str, float]]


def nothing(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def no_problems(fields: Mapping[str, Any]) -> list[str]:
    return []


def baseline(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": BASELINE.name}
