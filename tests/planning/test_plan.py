"""nsa.plan: predicted memory and speed by layout, and the command."""

import json

import pytest

from nsa.config import load_config
from nsa.models import count_parameters
from nsa.plan import main
from nsa.planning.describe import describe_search
from nsa.planning.measured import compare, error_lines
from nsa.planning.memory import memory_of
from nsa.planning.search import Candidate
from nsa.planning.speed import GPUS, predict_speed
from nsa.planning.traffic import data_bytes
from tests.conftest import ROOT

CONFIG = ROOT / "configs/1b.yaml"
H200 = GPUS["H200"]


def config(*overrides: str, name: str = "1b"):
    return load_config(ROOT / f"configs/{name}.yaml", overrides)


PARAMETERS = count_parameters(config().model, config().attention)["total"]


@pytest.mark.parametrize(
    ("stage", "bytes_each"),
    [(0, (2, 6, 12)), (1, (2, 4, 12 / 8)), (2, (2, 4 / 8, 12 / 8)), (3, (2 / 8, 4 / 8, 12 / 8))],
)
def test_memory_by_zero_stage(stage, bytes_each):
    memory = memory_of(config(f"engine.zero_stage={stage}"), 8).device
    expected = dict(zip(("weights", "gradients", "optimizer"), bytes_each, strict=True))
    if stage == 3:
        expected["weights"] += 2 * 1e9 / PARAMETERS  # gathered
    for kind, size in expected.items():
        assert memory[kind] == pytest.approx(PARAMETERS * size), kind


def test_fp32_has_no_second_copy_of_the_weights_and_sgd_no_moments():
    memory = memory_of(config("engine.precision=fp32", "optimizer.kind=sgd", "engine.zero_stage=0"), 1).device
    assert memory["weights"] == 4 * PARAMETERS and memory["gradients"] == 4 * PARAMETERS
    assert memory["optimizer"] == 0


def test_an_offloaded_optimizer_is_on_the_host():
    on, off = (memory_of(config("engine.zero_stage=2", f"engine.offload_optimizer={x}"), 8) for x in ("true", "false"))
    assert on.host["optimizer"] == off.device["optimizer"] and not off.host
    assert "optimizer" not in on.device and on.device["gradients"] == 0
    speeds = [predict_speed(config("engine.zero_stage=2", f"engine.offload_optimizer={x}"), 8, H200) for x in
              ("true", "false")]  # fmt: skip
    assert speeds[0].step_seconds > speeds[1].step_seconds


def test_memory_is_sharded_over_tensor_and_pipeline_ranks():
    whole = memory_of(config(), 8).device["weights"]
    for parallel in ("parallel.tensor=2", "parallel.pipeline=2"):
        part = memory_of(config(parallel), 8).device["weights"]
        assert whole / 2 <= part < 0.56 * whole  # with the replicated parameters
        assert memory_of(config(parallel), 8).start < whole, "no rank builds the whole decoder"


def test_recomputation_saves_memory_and_costs_time():
    kept, seconds = {}, {}
    long = ["training.micro_batch_size=1", "data.sequence_length=65536", "model.max_position=65536"]
    for mode in ("none", "selective", "full"):
        one = config(f"engine.activation_checkpointing={mode}", *long)
        kept[mode] = memory_of(one, 8).device["activations"]
        seconds[mode] = predict_speed(one, 8, H200).step_seconds
    assert kept["full"] < kept["selective"] < kept["none"] / 2
    assert seconds["none"] < seconds["selective"] < seconds["full"]


def test_a_measurement_of_the_trainer_is_compared_with_its_memory(tmp_path, capsys):
    row = {"config": "125m", "attention": "nsa", "tokens": 8192, "overrides": ["engine.activation_checkpointing=full"]}
    rows = [row | {"step_ms": 100.0, "tokens_per_s": 81920, "peak_gib": 3.0}, row | {"refused": "out of memory"}]
    path = tmp_path / "training.json"
    path.write_text(json.dumps({"device": "NVIDIA H100 80GB HBM3", "date": "2026-12-01", "training": rows}))
    first, second = compare(path)
    assert first.config == "125m (full)" and second.error is None
    assert first.error == first.step_seconds / 0.1 - 1 and not first.fitted
    assert first.memory_gib > 2 and first.memory_error == first.memory_gib / 3 - 1
    assert main(["--check", str(path)]) == 0
    output = capsys.readouterr().out
    assert "out of memory" in output and error_lines([first, second])[0] in output


def test_the_command_plans_the_configured_layout(capsys):
    assert main([str(CONFIG), "--gpus", "16", "--gpu", "H100", "parallel.tensor=2", "parallel.context=2"]) == 0
    output = capsys.readouterr().out
    for words in ("4 data x 2 tensor x 2 context", "context/selected", "tokens/s", "dense-equivalent", "at the start"):
        assert words in output, words
    step = 128 * 8192
    assert f"= {step:,} tokens; micro batches per GPU" in output
    assert f"20,000 steps = {20000 * step:,} tokens, {20000 * step / PARAMETERS:.1f} per parameter" in output


def test_the_plan_of_a_taught_selection(capsys):
    """In the warm-up a layer has a dense one's forward pass, and its scores again. Pooled keys are smaller."""
    nsa = ["attention.kind=nsa", "attention.nsa.key_compression=pooled"]
    warm_up = [*nsa, "attention.nsa.phase=warm-up", "train=indexer", "start_from=somewhere"]
    assert main([str(CONFIG), "--gpus", "8", *warm_up]) == 0
    assert "layers      16 nsa" in capsys.readouterr().out
    long = ["training.micro_batch_size=1", "data.sequence_length=65536", "model.max_position=65536"]
    dense, taught, sparse = (
        predict_speed(config(*long, *kind), 8, H200).step_seconds for kind in (["attention.kind=dense"], warm_up, nsa)
    )
    assert sparse < 0.7 * dense and dense / 3 < taught < 0.6 * dense
    assert count_parameters(config(*nsa).model, config(*nsa).attention)["total"] < PARAMETERS


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "7"], r"training.global_batch_size (128) must be a multiple"),
        (["--gpus", "0"], "at least one"),
        (["--gpus", "6", "parallel.tensor=4"], "no multiple of it"),
        (["--gpu", "Z80"], "one of H200, H100, A100"),
        (["--memory", "0"], "GB of a GPU"),
    ],
)
def test_invalid_arguments_are_reported(capsys, arguments, words):
    assert main([str(CONFIG), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said


def test_a_number_of_gpus_that_nobody_named_is_told(capsys):
    for arguments, told in (([], True), (["--gpus", "8"], False)):
        assert main([str(CONFIG), "training.global_batch_size=4", *arguments]) == 2
        said = capsys.readouterr().err
        assert "8 data-parallel ranks" in said and ("--gpus is 8 by default: add --gpus N" in said) is told


def test_the_trainers_dry_run_prints_the_plan(run_python, tmp_path):
    """Overrides may stand after an option."""
    nowhere = f"data.cache_dir={tmp_path}/none"
    result = run_python("-m", "nsa.train", str(CONFIG), "--dry-run", "training.steps=20000", nowhere)
    assert result.returncode == 0, result.stderr
    for words in (
        "1,039,404,544 parameters",
        "dense-equivalent",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "Text: not prepared",
    ):
        assert words in result.stdout, words
    assert not (tmp_path / "none").exists()


def test_a_dry_run_of_a_layout_for_many_ranks_points_to_the_plan(run_python):
    path = str(CONFIG.with_name("27b-a5b.yaml"))
    result = run_python("-m", "nsa.train", path, "--dry-run")
    assert result.returncode == 2
    assert f"python -m nsa.plan {path} --gpus N" in result.stderr and "Traceback" not in result.stderr


def test_memory_with_expert_parallelism():
    """All but the routed experts is replicated, and its state is sharded over the ranks with the same experts."""
    papers = config("parallel={expert: 8}", name="27b-a5b")
    counts = count_parameters(papers.model, papers.attention)
    held = counts["total"] - counts["routed"] * 7 / 8
    memory = memory_of(papers, 64)
    assert memory.device["weights"] == pytest.approx(2 * held)
    assert memory.device["optimizer"] == pytest.approx(12 * held / 8)


@pytest.mark.parametrize(
    ("stage", "mode", "each"),
    [
        (0, "none", 2 * 4),  # fp32 gradients are summed: a ring sends them twice
        (1, "none", 2 * 4 + 2),  # and the new bf16 weights are gathered
        (2, "none", 4 * 4 + 2),  # each of four passes leaves a part of the sum at its owner
        (3, "none", 4 * (4 + 2 * 2)),  # and gathers weights for the forward and for the backward pass
        (3, "full", 4 * (4 + 2 * 3)),  # and for what is recomputed
    ],
)
def test_what_ranks_with_the_same_weights_send(stage, mode, each):
    """In four passes of a step; all but an eighth leaves each of eight ranks."""
    passes = ["training.micro_batch_size=2", "training.global_batch_size=64", "engine.precision=bf16"]
    layout = config(*passes, f"engine.zero_stage={stage}", f"engine.activation_checkpointing={mode}")
    assert data_bytes(layout, 8) == PARAMETERS * 7 / 8 * each


def test_the_table_of_layouts_shares_the_gpus_out():
    experts = config("parallel={expert: 8}", "training.global_batch_size=64", name="27b-a5b")
    found = Candidate(experts, predict_speed(experts, 32, H200), memory_of(experts, 32))
    row = describe_search([found], 32, H200).splitlines()[-1].split()
    assert row[:5] == ["1", "1", "1", "8", "4"]


def test_activations_are_those_of_the_length():
    """Two plans of a process share what they know of a layer, except where the length differs."""
    whole, half = (memory_of(config(f"data.sequence_length={n}"), 8).device["activations"] for n in (8192, 4096))
    assert half == pytest.approx(whole / 2, rel=0.1)
