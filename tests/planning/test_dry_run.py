"""The plan's traffic and memory equal those of a dry run, and a dry run fails for invalid layouts."""

import time

import pytest
import torch.distributed as dist

from nsa.config import ConfigError, load_config
from nsa.layers.kinds import KINDS
from nsa.planning.dry_run import dry_run
from nsa.planning.memory import memory_of
from nsa.planning.traffic import bytes_sent
from tests.conftest import ROOT
from tests.parallel.conftest import CSA, DSA, LATENT
from tests.parallel.layouts import MOE
from tests.training.tiny import tiny_config

BASE = ["model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=4"]
LAYOUTS = [  # tensor, context, pipeline, activation checkpointing, rank
    (2, 2, 1, "none", 0),
    (4, 1, 1, "full", 0),
    (4, 2, 1, "selective", 3),
    (1, 4, 1, "none", 2),
    (1, 4, 1, "full", 1),
    (2, 1, 2, "full", 0),
    (2, 1, 2, "none", 3),
    (1, 2, 2, "none", 3),
    (1, 1, 4, "none", 2),
    (1, 1, 4, "none", 0),  # fewer micro batches than stages
    (1, 1, 1, "full", 0),
]


@pytest.mark.parametrize(("tensor", "context", "pipeline", "mode", "rank"), LAYOUTS)
@pytest.mark.parametrize("more", ["model.tie_embeddings=false", "engine.precision=bf16"])
def test_planned_traffic_equals_a_dry_runs(tmp_path, tensor, context, pipeline, mode, rank, more):
    sizes = {"tensor": tensor, "context": context, "pipeline": pipeline}
    overrides = [f"parallel.{name}={size}" for name, size in sizes.items()]
    config = tiny_config(tmp_path, *BASE, *overrides, f"engine.activation_checkpointing={mode}", more)
    ranks = 2 * tensor * context * pipeline
    assert bytes_sent(config, ranks, rank) == dry_run(config, ranks, rank).sent
    assert not dist.is_initialized()


@pytest.mark.parametrize(("tensor", "context", "pipeline", "mode", "rank"), LAYOUTS[:6:2])
@pytest.mark.parametrize("kinds", [[*DSA, "attention.kind=[dsa, dense]"], LATENT, CSA], ids=["dsa", "mla", "csa"])
def test_planned_traffic_of_an_indexer_equals_a_dry_runs(tmp_path, tensor, context, pipeline, mode, rank, kinds):
    """Index keys have a width of their own, and so have latents and entries."""
    sizes = {"tensor": tensor, "context": context, "pipeline": pipeline}
    overrides = [f"parallel.{name}={size}" for name, size in sizes.items()]
    config = tiny_config(tmp_path, *BASE, *kinds, *overrides, f"engine.activation_checkpointing={mode}")
    ranks = 2 * tensor * context * pipeline
    assert bytes_sent(config, ranks, rank) == dry_run(config, ranks, rank).sent


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_every_kind_has_a_dry_run(tmp_path, kind, mode):
    """Operators without a kernel must not look at values, which the meta device does not have."""
    indexer = "index_heads: 2, index_head_dim: 16, index_rotary_dims: 8}"
    kinds = [
        "attention.dms={window: 16}",
        f"attention.dsa={{topk: 16, {indexer}",
        f"attention.csa={{topk: 8, {indexer}",
    ]
    mode = f"engine.activation_checkpointing={mode}"
    config = tiny_config(tmp_path, *BASE, *kinds, f"attention.kind={kind.name}", mode)
    assert dry_run(config, 1).peak_bytes > 0


@pytest.mark.parametrize(("sizes", "rank"), [({"expert": 2}, 1), ({"expert": 2, "tensor": 2}, 2), ({"tensor": 2}, 0)])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_planned_expert_traffic_equals_a_dry_runs(tmp_path, sizes, rank, mode):
    overrides = [*BASE, *MOE, f"engine.activation_checkpointing={mode}"]
    config = tiny_config(tmp_path, *overrides, *(f"parallel.{name}={size}" for name, size in sizes.items()))
    planned, counted = bytes_sent(config, 4, rank), dry_run(config, 4, rank).sent
    assert planned["experts/tokens"] == counted["experts/tokens"]
    if "tensor" not in sizes:
        assert planned["expert/gradients"] == pytest.approx(counted["expert/gradients"], rel=0.001)


@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=4", "parallel.context=2")])
@pytest.mark.parametrize("mode", ["full", "selective", "none"])
def test_planned_activations_equal_a_dry_runs(overrides, mode):
    config = load_config(ROOT / "configs/1b.yaml", [*overrides, f"engine.activation_checkpointing={mode}"])
    planned = memory_of(config, 32).device["activations"]
    assert planned == pytest.approx(dry_run(config, 32).peak_bytes, rel=0.02)


def test_planned_memory_of_a_pipeline_stage_equals_a_dry_runs():
    config = load_config(ROOT / "configs/1b.yaml", ["parallel.tensor=2", "parallel.pipeline=4"])
    run, planned = dry_run(config, 64), memory_of(config, 64).device
    own = run.parameters * (4 + 2)  # the pipeline's fp32 sum of gradients, and the gradients of one pass
    assert planned["activations"] + own == pytest.approx(run.peak_bytes, rel=0.05)


@pytest.mark.parametrize("more", [(), ("model.tie_embeddings=false",), ("model.tie_embeddings=false", *MOE)])
def test_planned_weights_are_the_decoders(tmp_path, more):
    config = tiny_config(tmp_path, *BASE, *more, "engine.precision=bf16")
    assert memory_of(config, 1).device["weights"] == 2 * dry_run(config, 1).parameters


def test_dry_run_of_a_large_decoder_is_fast():
    started = time.process_time()
    config = load_config(
        ROOT / "configs/7b.yaml",
        ["parallel.tensor=4", "parallel.context=2", "engine.activation_checkpointing=full"],
    )
    run = dry_run(config, 64)
    assert time.process_time() - started < 60
    assert run.layout == "8 data x 2 context x 4 tensor" and run.parameters > 1.7e9
    head = config.model.vocab_size * config.model.hidden_size / 4
    layers = run.parameters - (1 if config.model.tie_embeddings else 2) * head
    tokens = 64 * 8192 / 2  # half of each sample
    expected = 2 * tokens * (4 * layers + 3 * head)  # layers are recomputed, except for the last product of each
    assert run.flops == pytest.approx(expected, rel=0.1)


def test_a_layout_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no multiple of it"):
        dry_run(tiny_config(tmp_path, "parallel.context=2"), 3)
    with pytest.raises(ConfigError, match="head widths"):
        dry_run(tiny_config(tmp_path, "model.head_dim=6"), 1)
    assert not dist.is_initialized()


def test_wide_latents_have_kernels_in_16_bits(tmp_path):
    """Lists of DeepSeek-V3.2's latents: 576 columns. In fp32 there are none."""
    sizes = "q_lora_rank: 12, kv_lora_rank: 512, qk_nope_head_dim: 16, qk_rope_head_dim: 64, v_head_dim: 8"
    wide = [*BASE, *LATENT, f"model.mla={{{sizes}}}", "model.head_dim=80"]
    assert dry_run(tiny_config(tmp_path, *wide, "engine.precision=bf16"), 1).flops > 0
    with pytest.raises(ConfigError, match="head widths"):
        dry_run(tiny_config(tmp_path, *wide), 1)


def test_a_dry_run_fails_for_a_broken_layer(tmp_path, monkeypatch):
    from nsa.parallel import tensor

    monkeypatch.setattr(tensor, "_gather_tokens", lambda axis, tokens, module, args: args)
    with pytest.raises((RuntimeError, ConfigError)):
        dry_run(tiny_config(tmp_path, *BASE, "parallel.tensor=2"), 2)
