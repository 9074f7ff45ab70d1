"""The search over layouts, recomputation and micro batches; shipped configurations are close to its best."""

import math
from dataclasses import replace

import pytest

from nsa.config import Config, ConfigError, load_config
from nsa.parallel.config import ParallelConfig
from nsa.plan import main
from nsa.planning.memory import memory_at_least, memory_of
from nsa.planning.search import MODES, in_layout, layouts, micro_batches, search
from nsa.planning.speed import GPUS, fits, predict_speed
from nsa.stages import stages_of
from tests.conftest import ROOT

H100, H200 = GPUS["H100"], GPUS["H200"]
# The number of GPUs (of 80 GB) that each configuration is planned for.
SHIPPED = {"25m": 1, "25m-recall": 1, "125m": 8, "350m": 8, "1b": 8, "3b": 8, "7b": 64, "27b-a5b": 64}
NEAR = 0.97  # of the best speed


def config(*overrides: str, name: str = "1b") -> Config:
    return load_config(ROOT / f"configs/{name}.yaml", overrides)


@pytest.mark.parametrize(
    ("name", "gpus"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[0] == "27b-a5b")) for case in SHIPPED.items()],
)
def test_shipped_configurations_are_near_the_best_layout(name, gpus):
    shipped = config(name=name)
    best = search(shipped, gpus, H100, most=1)[0]
    assert fits(memory_of(shipped, gpus), H100)
    speed = predict_speed(shipped, gpus, H100).tokens_per_second
    choice = best.config.engine.activation_checkpointing, best.config.training.micro_batch_size, best.config.parallel
    assert speed >= NEAR * best.speed.tokens_per_second, f"the search finds {choice}"


def test_every_shipped_configuration_is_in_the_table():
    plain = {path.stem for path in (ROOT / "configs").glob("*.yaml") if not stages_of(path)}
    assert plain == {*SHIPPED, "demo"}


def test_the_search_does_not_recompute_if_memory_suffices():
    wasteful = config("engine.activation_checkpointing=full")
    best = search(wasteful, 8, H100, most=1)[0]
    assert best.config.engine.activation_checkpointing == "none"
    assert predict_speed(wasteful, 8, H100).tokens_per_second < 0.85 * best.speed.tokens_per_second


def test_the_search_takes_a_smaller_micro_batch_with_less_memory():
    large, small = (search(config(), 8, replace(H100, memory=size * 1e9), most=1)[0] for size in (80, 24))
    assert small.memory.peak < 24e9 < large.memory.peak
    assert small.speed.tokens_per_second < large.speed.tokens_per_second
    assert small.config.training.micro_batch_size < large.config.training.micro_batch_size


def test_the_search_tries_all_layouts_and_returns_those_that_fit():
    assert len(set(map(str, layouts(16)))) == 35
    assert all(16 % math.prod(p.model_dump().values()) == 0 for p in layouts(16))
    candidates = search(config("engine.zero_stage=1", name="7b"), 16, H200, most=3)
    assert len(candidates) == 3 and all(fits(one.memory, H200) for one in candidates)
    assert [one.speed.step_seconds for one in candidates] == sorted(one.speed.step_seconds for one in candidates)
    choices = {(str(one.config.parallel), one.config.engine.activation_checkpointing) for one in candidates}
    assert len(choices) == 3, "of each layout and recomputation the fastest micro batch"


def test_micro_batches_are_powers_of_two_that_divide_the_global_batch():
    assert micro_batches(config(), ParallelConfig(), 8) == [1, 2, 4, 8, 16]
    assert micro_batches(config(), ParallelConfig(tensor=2), 8) == [1, 2, 4, 8, 16, 32]
    odd = config("training.global_batch_size=24", "training.micro_batch_size=3")
    assert micro_batches(odd, ParallelConfig(), 1) == [1, 2, 3, 4, 8]
    learned = config("model.moe.loss_weight=0.01", "training.micro_batch_size=2", name="27b-a5b")
    assert micro_batches(learned, ParallelConfig(), 8) == [2], "it is part of what is learned"


@pytest.mark.parametrize("overrides", [(), ("parallel.tensor=2",), ("parallel.context=4",), ("parallel.pipeline=2",)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("micro", [1, 8])
def test_the_lower_bound_of_memory_is_below_the_plan(overrides, mode, micro):
    one = config(f"engine.activation_checkpointing={mode}", f"training.micro_batch_size={micro}", *overrides)
    assert 0.4 * memory_of(one, 8).peak < memory_at_least(one, 8) < memory_of(one, 8).peak


def test_the_search_reports_the_trainers_error():
    with pytest.raises(ValueError, match=r"parallel.tensor \(3\) must divide model.num_heads"):
        in_layout(config(), ParallelConfig(tensor=3))
    with pytest.raises(ConfigError, match=r"no layout of 17 GPUs.*parallel.tensor \(17\) must divide"):
        search(config(), 17, H200)
    with pytest.raises(ConfigError, match="fits into"):
        search(config("engine.zero_stage=0", name="7b"), 1, H100)


def test_the_command_prints_recomputation_and_free_memory(capsys):
    assert main([str(ROOT / "configs/125m.yaml"), "--gpus", "8", "--memory", "24"]) == 0
    output = capsys.readouterr().out
    for words in ("8 x H100 that fit with 10 % of 24 GB left free", "recomputed  micro batch", "  none  "):
        assert words in output, words
