"""What a layer draws at random for a KV head is the same on all ranks that hold it."""

from nsa.planning.traffic import bytes_sent
from tests.parallel.layouts import BASE, SCRIPT
from tests.training.tiny import on_ranks, tiny_config

DMS = [*BASE, "attention.kind=dms", "attention.dms={window: 8, offset: 0.0}", "parallel.tensor=2"]
QUERIES = [*BASE, "attention.kind=nsa", "attention.nsa.kl_weight=1", "attention.nsa.kl_stride=4"]
QUERIES += ["attention.nsa.num_local=1", "parallel.tensor=2"]
CASES = {
    "shared": [*DMS, "model.num_kv_heads=1"],
    "shared and recomputed": [*DMS, "model.num_kv_heads=1", "engine.activation_checkpointing=full"],
    "own": [*DMS, "model.num_kv_heads=2"],
    "shared queries": [*QUERIES, "model.num_kv_heads=1"],
    "shared queries, recomputed": [*QUERIES, "model.num_kv_heads=1", "engine.activation_checkpointing=full"],
    "own queries": [*QUERIES, "model.num_kv_heads=2"],
}


def test_ranks_that_share_a_kv_head_draw_the_same_noise(tmp_path):
    """A key would else be forgotten for some of its query heads, and the loss of NSA's selection would be that of
    different queries. Ranks with KV heads of their own draw different noise, and so do layers."""
    found = on_ranks(2, tmp_path, {"drawn": ("drawn", {"cases": list(CASES.values())})}, SCRIPT, gpus=2)["drawn"]
    for number, (case, overrides) in enumerate(CASES.items()):
        one, other = found[number]["noise"]
        planned = bytes_sent(tiny_config(tmp_path, *overrides), 2).get("tensor/noise", 0)
        assert found[number]["sent"] == planned and (planned > 0) is case.startswith("shared"), case
        assert len(one) == len(other) >= 2 and all(len(set(noise)) > 10 for noise in one), case
        assert (one == other) is case.startswith("shared"), case
        assert len({tuple(noise) for noise in one}) >= 2, case
