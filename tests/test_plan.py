"""nsa.plan: what a run will need."""

import pytest

from nsa.config import ConfigError, load_config
from nsa.models import count_parameters
from nsa.plan import main, make_plan
from tests.conftest import ROOT

CONFIG = ROOT / "configs/1b.yaml"


def plan(gpus: int, *overrides: str):
    return make_plan(load_config(CONFIG, overrides), gpus)


def test_counts_are_those_of_the_decoder():
    config = load_config(CONFIG)
    found = make_plan(config, 8)
    assert found.parameters == count_parameters(config.model, config.attention)["total"]
    assert found.embedding_parameters == config.model.vocab_size * config.model.hidden_size
    assert found.tokens_per_step == 128 * 8192
    assert found.micro_batches_per_step == 128 // (8 * config.training.micro_batch_size)
    assert found.flops_per_token["sparse"] < found.flops_per_token["dense_equivalent"]


@pytest.mark.parametrize(("stage", "sharded"), [(0, ""), (1, "o"), (2, "go"), (3, "wgo")])
def test_zero_shards_what_its_stage_says(stage, sharded):
    found = plan(8, f"engine.zero_stage={stage}")
    for kind, size in {"weights": 2, "gradients": 4, "optimizer": 12}.items():
        share = 8 if kind[0] in sharded else 1
        assert found.memory[kind] == pytest.approx(found.parameters * size / share)


def test_fp32_has_no_second_copy_of_the_weights_and_sgd_no_moments():
    found = plan(1, "engine.precision=fp32", "optimizer.kind=sgd")
    assert found.memory["weights"] == 4 * found.parameters
    assert found.memory["optimizer"] == 0


def test_activations_follow_the_micro_batch_and_checkpointing():
    without, more, with_ = (
        plan(8, "engine.activation_checkpointing=none", "training.micro_batch_size=1"),
        plan(8, "engine.activation_checkpointing=none", "training.micro_batch_size=4"),
        plan(8, "engine.activation_checkpointing=full", "training.micro_batch_size=1"),
    )
    assert with_.memory["activations"] < without.memory["activations"] / 3
    assert 3 < more.memory["activations"] / without.memory["activations"] <= 4


def test_a_batch_that_cannot_be_dealt_out_is_refused(capsys):
    with pytest.raises(ConfigError, match=r"global_batch_size \(128\) must be a multiple of .* 7 GPUs"):
        plan(7)
    assert main([str(CONFIG), "--gpus", "0"]) == 2
    assert "0 GPUs" in capsys.readouterr().err


def test_dry_run_prints_parameters_memory_and_flops(run_python):
    result = run_python("-m", "nsa.train", str(CONFIG), "--dry-run")
    assert result.returncode == 0, result.stderr
    for words in ("1,039,404,544 parameters", "dense-equivalent", "weights", "gradients", "optimizer", "activations"):
        assert words in result.stdout
