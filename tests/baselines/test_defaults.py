"""The settings that a bare name stands for: a default that changes is another method under the same name in results."""

import re

import pytest

from nsa.baselines import METHODS, Method

SNAP = {"window": 32, "kernel": 5, "pooling": "avg", "group": "mean"}
ADA = {**SNAP, "kernel": 7, "pooling": "max", "safeguard": 0.2}
QUEST = {"page": 16, "over_group": "sum", "fp8": False}
SPARQ = {"dims": 32, "local": 0.25, "temperature": True, "mean_over": "all"}
SAMPLED = {"epsilon": 0.1, "delta": 0.1, "bound": "clt", "num_sinks": 4, "window": 32, "page": 16, "least": 64}
SAMPLED |= {"ranking": "bounds", "base_share": 0.01, "seed": 0}
SLASH = {"num_queries": 64, "vertical_share": 1000 / 7096, "sinks": 30, "near": 100}
FLEX = {"gamma": 0.95, "tau": 0.1, "block": 128, "min_budget": 1024}
WALK = {"block": 64, "sketch": 64, "power": 8.0, "normalise": True, "direct": 0.0, "scope": "group", "seed": 0}
CLUSTERS = {"p1": 0.95, "p2": 0.7, "relative": False, "num_sinks": 4, "recent": 64, "cluster_size": 16}
CLUSTERS |= {"iterations": 10, "segment": 8192, "refresh": 1024}
# As papers and releases say; of controls, as the committed results were measured.
DEFAULTS = {
    "oracle_topp": {"p": 0.95},
    "random": {"seed": 0},
    "sink_window": {"num_sinks": 4},
    "streaming_llm": {"num_sinks": 4, "evict_after": False},
    "lm_infinite": {"num_global": 10},
    "h2o": {"recent_share": 0.5, "normalise": False},
    "snapkv": SNAP,
    **dict.fromkeys(("ada_snapkv", "ada_snapkv_safeguard"), ADA),
    **dict.fromkeys(("pyramidkv", "pyramidkv_kvpress"), SNAP | {"beta": 20.0}),
    **dict.fromkeys(("quest", "quest_eval"), QUEST),
    **dict.fromkeys(("sparq", "sparq_released"), SPARQ),
    "twilight": {"base": {"name": "quest", **QUEST}, "p": 0.95, "bits": 4},
    "double_p": CLUSTERS,
    **dict.fromkeys(("vattention", "vattention_released"), SAMPLED),
    "block_sparse": {"block": 64, "first": 0, "near": 0},
    "block_sparse_frontier": {"block": 16, "first": 1, "near": 1},
    "vertical_slash": SLASH,
    "vertical_slash_blocks": {**SLASH, "block": 64},
    "minference": {"patterns": (), "block": 64, "num_queries": 64, "sinks": 30, "near": 100},
    **dict.fromkeys(("flexprefill", "flexprefill_released"), FLEX),
    "sketch_walk": WALK,
    "sketch_walk_damped": {**WALK, "direct": 0.75},
    "dual_chunk": {"chunk": 8192, "local": 1024},
    "qwen_1m": {**SLASH, "chunk": 8192, "local": 1024, "factors": ()},
}


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_a_bare_name_has_these_settings(kind: type[Method]) -> None:
    found = kind().settings()
    assert found == DEFAULTS.get(kind.name, {})
    if said := re.search(r"of (\d+)", kind.axes.unit):
        assert int(said[1]) in found.values(), "the axis names the size of a unit"


PROMPTS = {"block_sparse", "block_sparse_frontier", "vertical_slash", "vertical_slash_blocks", "minference", "qwen_1m"}
PROMPTS |= {"flexprefill", "flexprefill_released"}
WALKS = {"sketch_walk", "sketch_walk_damped"}
CONTROLS = {"oracle_topk", "oracle_topp", "random", "sink_window"}
STREAMS = {"streaming_llm", "lm_infinite"}


def test_what_methods_say_of_themselves() -> None:
    """Which identities a method must keep follows from this: one that claims less would be looked at less."""
    said = {
        flag: {m.name for m in METHODS if getattr(m, flag)} for flag in ("causal", "chunkable", "stepwise", "alone")
    }
    names = {kind.name for kind in METHODS}
    assert said["causal"] == said["chunkable"] == names - PROMPTS - WALKS
    assert said["stepwise"] == CONTROLS | STREAMS | {"dual_chunk"} and said["alone"] == names - WALKS
    assert {m.name for m in METHODS if "prefill" in m.phases} == CONTROLS | STREAMS | PROMPTS | WALKS
    assert {m.name for m in METHODS if "decode" in m.phases} == names - PROMPTS - {"dense", "dual_chunk"}
