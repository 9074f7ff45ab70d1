"""The paper's mixture of experts at toy width: builds, plans, trains; its biases are in the checkpoints."""

import json

import torch

from nsa import plan
from nsa.config import load_config
from nsa.models import count_parameters
from nsa.training import checkpoint
from tests.conftest import ROOT
from tests.training.tiny import TEXT, start

CONFIG = ROOT / "configs/27b-a5b.yaml"
TOY = {
    "model": {
        "vocab_size": 400,
        "hidden_size": 48,
        "num_layers": 3,
        "num_heads": 16,
        "num_kv_heads": 1,
        "head_dim": 12,
        "v_head_dim": 8,
        "intermediate_size": 128,
        "max_position": 128,
        "moe.expert_size": 16,
    },
    "attention": {"nsa": {"compress_length": 8, "compress_stride": 4, "block_size": 8, "num_blocks": 4, "window": 16}},
    "data": {"sequence_length": 64, "validation_fraction": 0.2, "workers": 1, "tokenizer.vocab_size": 400},
    "optimizer": {"learning_rate": 2e-2, "warmup_steps": 2},
    "training": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "log_every": 1},
    "checkpoint": {"every": 4},
    "engine": {"precision": "fp32"},
    "parallel": {"expert": 1, "pipeline": 1},
}


def test_the_papers_model_plans_and_trains_at_toy_width(tmp_path, capsys):
    overrides = [f"{section}.{key}={value}" for section, keys in TOY.items() for key, value in keys.items()]
    overrides += [f"data.sources=[{{name: text, kind: files, path: '{TEXT}'}}]", f"output_dir={tmp_path}"]
    overrides += [f"data.cache_dir={tmp_path}/cache"]
    config = load_config(CONFIG, overrides)
    assert (config.model.moe.num_experts, config.model.moe.top_k, config.model.moe.num_shared) == (72, 6, 2)
    assert plan.main([str(CONFIG), *overrides, "--gpus", "1"]) == 0
    assert f"{count_parameters(config.model, config.attention)['total']:,} parameters" in capsys.readouterr().out

    process = start(["-m", "nsa.train", str(CONFIG), *overrides])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    run = tmp_path / "27b-a5b"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines]
    assert losses[-1] < losses[0] - 0.5, losses
    assert {key for key in lines[-1] if key.startswith("moe/max_violation")} == {
        "moe/max_violation/layer_01",
        "moe/max_violation/layer_02",
    }, "the first layer is dense"
    weights = checkpoint.load_weights(run / "step_00000008")
    for layer in (1, 2):
        steps = weights[f"layers.{layer}.mlp.router.bias"] / 0.001
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
        assert 0 < steps.abs().max() <= 8.001
