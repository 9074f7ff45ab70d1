"""Schedule, optimizer groups, generators, DeepSpeed's JSON: each against its definition."""

import json
import random
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import tiny_config

from nsa.config import OptimizerConfig
from nsa.models import Decoder
from nsa.training.deepspeed_config import deepspeed_config, micro_batches_per_step
from nsa.training.optimizer import AdamW, build_optimizer, decays
from nsa.training.rng import rng_state, seed_all, set_rng_state
from nsa.training.schedule import learning_rate


def rates(steps=100, **options):
    config = OptimizerConfig(learning_rate=1.0, min_learning_rate=0.1, warmup_steps=10, **options)
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_warm_up_is_linear_and_never_zero():
    for schedule in ("cosine", "wsd", "constant"):
        assert rates(schedule=schedule)[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])


def test_cosine_falls_to_the_minimum():
    found = rates(schedule="cosine")
    assert found[10] == 1 and found[55] == pytest.approx(0.55) and found[99] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in pairwise(found[10:]))


def test_wsd_is_flat_and_then_linear():
    found = rates(schedule="wsd", decay_steps=30)
    assert set(found[10:71]) == {1.0}
    assert found[71:] == pytest.approx([1 - 0.9 * i / 30 for i in range(1, 30)])
    assert rates(schedule="wsd") == rates(schedule="wsd", decay_steps=20), "a fifth of the steps"


def test_constant_stays():
    assert set(rates(schedule="constant")[10:]) == {1.0}


def test_a_run_of_warm_up_alone():
    assert rates(steps=10) == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates(steps=5) == pytest.approx([0.1 * (i + 1) for i in range(5)])


def test_only_matrices_decay(tmp_path):
    config = tiny_config(tmp_path, "model.tie_embeddings=false")
    model = Decoder(config.model, config.attention)
    decayed = {name for name, p in model.named_parameters() if decays(name, p)}
    assert {"head.weight", "layers.0.attention.query.weight", "layers.0.attention.compress.key.inner.weight"} <= decayed
    kept = {name for name, _ in model.named_parameters()} - decayed
    assert {"embedding.weight", "norm.weight", "layers.0.attention.gate.bias"} <= kept
    assert "layers.0.attention.compress.key.position" in kept
    optimizer = build_optimizer(model, config.optimizer)
    assert isinstance(optimizer, AdamW)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [config.optimizer.weight_decay, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))


def test_a_skipped_step_changes_nothing():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([weight], lr=1.0)
    weight.grad = torch.ones(3)
    optimizer.gate.close()
    optimizer.step()
    assert weight.equal(torch.ones(3)) and not optimizer.state
    optimizer.gate.reset()
    optimizer.step()
    assert not weight.equal(torch.ones(3))


def test_generators_are_restored_through_json():
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist()  # noqa: NPY002

    seed_all(5)
    first = draw()
    assert draw() != first
    seed_all(5)
    state = json.loads(json.dumps(rng_state()))
    assert draw() == first, "what is saved is not disturbed"
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_a_batch_that_cannot_be_divided_over_the_ranks(tmp_path):
    config = tiny_config(tmp_path, "training.global_batch_size=12", "training.micro_batch_size=2")
    assert micro_batches_per_step(config, 3) == 2
    with pytest.raises(ValueError, match=r"training.global_batch_size \(12\).*divides 6"):
        micro_batches_per_step(config, 4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_deepspeed_configuration(tmp_path, stage, precision):
    config = tiny_config(tmp_path, f"engine.zero_stage={stage}", f"engine.precision={precision}")
    written = deepspeed_config(config, 2)
    assert written["train_batch_size"] == 4 == 2 * written["gradient_accumulation_steps"]
    assert written["zero_optimization"]["stage"] == stage and written["bf16"]["enabled"] == (precision == "bf16")
    assert written["gradient_clipping"] == config.optimizer.gradient_clipping
    assert written["data_types"]["grad_accum_dtype"] == ("bf16" if (stage, precision) == (0, "bf16") else "fp32")
    assert written["communication_data_type"] == "fp32", "gradients are summed over ranks in fp32"
    assert written["bf16"]["check_grad_overflow"] is True, "a step whose gradient is not finite is skipped"
    assert json.loads(json.dumps(written)) == written


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_deepspeed_configuration_of_an_optimizer_on_the_host(tmp_path, stage):
    config = tiny_config(tmp_path, f"engine.zero_stage={stage}", "engine.offload_optimizer=true")
    written = deepspeed_config(config, 2)
    assert written["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert written["zero_force_ds_cpu_optimizer"] is False, "the optimizer is ours"
    model = Decoder(config.model, config.attention)
    assert build_optimizer(model, config.optimizer, offload=True).defaults["fused"]
    assert "offload_optimizer" not in deepspeed_config(tiny_config(tmp_path), 2)["zero_optimization"]
    with pytest.raises(ValueError, match=r"offload_optimizer needs engine.zero_stage 1, 2 or 3"):
        tiny_config(tmp_path, "engine.zero_stage=0", "engine.offload_optimizer=true")
