"""Rotary embedding as config.json describes it, in the words of today's `transformers` or of earlier ones."""

from collections.abc import Mapping
from typing import Any

THETA = 10_000.0
FIELDS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
# Keys beside those of the types, and the values that can be honoured: None is any.
OTHERS: dict[str, tuple[Any, ...] | None] = {
    "rope_type": None,
    "type": None,
    "rope_theta": None,
    "factor": None,
    "original_max_position_embeddings": None,
    "partial_rotary_factor": (None, 1),
    "truncate": (True,),
}


def read_rope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `rope` and, if frequencies are scaled, `rope_scaling` of the `model` section.

    Raises:
        ValueError: they are of another type, or have a field that cannot be honoured.
    """
    given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError("rope_parameters is no object")
    theta = given.get("rope_theta", fields.get("rope_theta") or THETA)
    rope = {"rope": {"theta": theta}}
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default" and kind not in FIELDS:
        raise ValueError(f"rotary embedding of type {kind!r}; only default, {', '.join(FIELDS)} are supported")
    allowed = OTHERS | dict.fromkeys(FIELDS.get(kind, ()))
    for key, value in given.items():
        if key not in allowed:
            raise ValueError(
                f"rope_parameters.{key} is unknown for type {kind!r}: take it out if nothing depends on it"
            )
        values = allowed[key]
        if values is not None and value not in values:
            raise ValueError(f"rope_parameters.{key} = {value!r} cannot be honoured: only {values[-1]!r}")
    if kind == "default":
        return rope
    length = fields["max_position_embeddings"]
    original = fields.get("original_max_position_embeddings") or given.get("original_max_position_embeddings") or length
    scaling = {key: given[key] for key in FIELDS[kind] if given.get(key) is not None}
    factor = given.get("factor")
    if factor is None and kind == "yarn":
        factor = length / original
    return rope | {
        "rope_scaling": {
            "rope_type": kind,
            "factor": factor,
            "original_max_position_embeddings": original,
            **scaling,
        }
    }
