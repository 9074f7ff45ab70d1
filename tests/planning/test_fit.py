"""The plan's constants: their file is validated, a fit recovers known constants, and the stated error is correct."""

import json
from dataclasses import fields, replace
from statistics import fmean
from types import SimpleNamespace

import numpy as np
import pytest

from nsa.config import load_config
from nsa.layers.kinds import NSA
from nsa.models.sizes import attention_flops, training_flops_per_token
from nsa.plan import main
from nsa.planning import constants, measured
from nsa.planning import fit as fitting
from nsa.planning.constants import Constants
from nsa.planning.dry_run import dry_run
from nsa.planning.fit import fit
from nsa.planning.measured import cases, compare, fitted_files, result_files
from nsa.planning.speed import AXES, GPUS, dense_attention, link, predict_speed
from nsa.planning.work import work_of
from tests.conftest import ROOT

CONFIG = ROOT / "configs/1b.yaml"
MEANT = {"matrices": 0.62, "lists": 7e-8, "elementwise": 0.55, "step": 4e-3}


def test_the_stated_error_is_below_15_percent():
    rows = [row for path in fitted_files() for row in compare(path)]
    errors = [abs(row.error) for row in rows if row.error is not None]
    stated = constants.read()
    assert all(row.fitted for row in rows) and len(errors) == stated.cases >= 15
    assert max(errors) == pytest.approx(stated.worst_error, abs=1e-3)
    assert fmean(errors) == pytest.approx(stated.mean_error, abs=1e-3)
    assert max(errors) < 0.15 and stated.worst_error_left_out < 0.15 and fmean(errors) < 0.05
    memory = [row.memory_error for row in rows if row.memory_error is not None]
    assert memory and max(map(abs, memory)) < 0.15


def test_measurements_of_older_code_can_be_compared():
    """Their configurations recomputed more, and their rows have fewer fields."""
    rows = [row for path in result_files() for row in compare(path) if not row.fitted]
    assert len(rows) >= 39 and all(abs(row.error) < 0.5 for row in rows if row.error is not None)
    old = next(row for row in rows if row.config == "1b (full)")
    assert abs(old.memory_error) < 0.05, "recomputed as it was then"


def test_files_of_the_constants_exist():
    content = constants.read()
    named = {name for constant in content.constants.values() for name in constant.files}
    assert set(content.files) <= named and all((ROOT / name).exists() for name in named)
    assert (ROOT / "benchmarks/results/plan-constants.json").samefile(constants.PATH)


def broken(change) -> str:
    content = json.loads(constants.PATH.read_text())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["constants"].pop("lists"), "lists is missing"),
        (lambda c: c["constants"].update(more=c["constants"]["lists"]), "more is unknown"),
        (lambda c: c["constants"]["room"].update(units="x"), "constants.room.units: Extra inputs"),
        (lambda c: c["constants"]["room"].pop("meaning"), "constants.room.meaning: Field required"),
        (lambda c: c["constants"]["lists"].update(value=1.0), "between lowest and highest"),
        (lambda c: c["constants"]["lists"].pop("start"), "needs start"),
        (lambda c: c["constants"]["room"].update(start=0.9), "go with source: fit"),
        (lambda c: c.update(error=0.1), "error: Extra inputs"),
    ],
)
def test_invalid_constants_files_are_rejected(tmp_path, change, words):
    path = tmp_path / "constants.json"
    path.write_text(broken(change))
    with pytest.raises(ValueError, match=words) as raised:
        constants.read(path)
    assert str(path) in str(raised.value)


def made_up(path, known: Constants) -> None:
    """A file of measurements as predicted by the plan with ``known`` constants."""
    rows = []
    for config, attention, tokens, mode in [
        (config, attention, tokens, mode)
        for config in ("25m", "125m", "1b")
        for attention in ("nsa", "dense")
        for tokens in (4096, 32768)
        for mode in ("none", "full")
    ]:
        overrides = [f"engine.activation_checkpointing={mode}"]
        row = {"config": config, "attention": attention, "tokens": tokens, "overrides": overrides}
        rows.append(row | {"step_ms": 1.0, "tokens_per_s": 1})
    result = {"device": "NVIDIA H200", "date": "2026-12-01", "training": rows}
    path.write_text(json.dumps(result))
    for row, case in zip(rows, cases(path), strict=True):
        row["step_ms"] = 1e3 * case.plan.speed(known).step_seconds
    path.write_text(json.dumps(result))


def test_a_fit_finds_the_constants_of_made_up_measurements(tmp_path):
    before = constants.read()
    starts = {name: one.start for name, one in before.constants.items() if one.source == "fit"}
    known = replace(before.values(), **{**starts, **MEANT})
    made_up(tmp_path / "made.json", known)
    fitted = fit(list(cases(tmp_path / "made.json")), before)
    assert fitted.worst_error < 0.02 and fitted.files == ["made.json"] and fitted.cases == 24
    for name, value in MEANT.items():
        assert fitted.constants[name].value == pytest.approx(value, rel=0.25), name
    assert fitted.constants["lists"].files == ["made.json"]
    # A constant that no measurement depends on keeps its start, and lists no file.
    assert fitted.constants["gradient"].value == starts["gradient"] and not fitted.constants["gradient"].files
    assert fitted.constants["room"] == before.constants["room"]
    with pytest.raises(ValueError, match="at least two"):
        fit([], before)


def test_a_case_is_left_out_of_the_fit_that_predicts_it(monkeypatch):
    """The error "left out" says how well a step is predicted that was not measured."""
    errors, fitted = {"a": 0.1, "b": -0.2, "c": 0.3}, []
    steps = [SimpleNamespace(name=name, error=lambda known, error=error: error) for name, error in errors.items()]
    monkeypatch.setattr(
        fitting, "_fitted", lambda cases, before: fitted.append([c.name for c in cases]) or constants.read()
    )
    content = fit(steps, constants.read())
    assert fitted == [["a", "b", "c"], ["b", "c"], ["a", "c"], ["a", "b"]]
    assert (content.cases, content.mean_error, content.worst_error_left_out) == (3, 0.2, 0.3)


def test_the_command_writes_what_it_fits(tmp_path, monkeypatch, capsys):
    path, made = tmp_path / "constants.json", tmp_path / "made.json"
    path.write_bytes(constants.PATH.read_bytes())
    monkeypatch.setattr(constants, "PATH", path)
    made_up(made, replace(constants.read().values(), **MEANT))
    few = json.loads(made.read_text())
    few["training"] = [*few["training"][:4], few["training"][0] | {"step_ms": None}]
    del few["training"][4]["step_ms"]
    made.write_text(json.dumps(few))
    assert main(["--fit", str(made)]) == 0
    output = capsys.readouterr().out
    assert "25m nsa 1 x 4096 tokens recomputed full" in output and f"Written: {path}" in output
    written = constants.read(path)
    assert written.cases == 4 and f"{100 * written.worst_error:.1f} % at most" in output
    assert main(["--fit", str(tmp_path / "none.json")]) == 2


def test_every_constant_has_unit_meaning_and_source():
    content = constants.read()
    assert {field.name for field in fields(Constants)} == content.constants.keys()
    for name, one in content.constants.items():
        assert one.unit and one.meaning, name
        assert one.source != "assumed" or not one.files, name


@pytest.mark.parametrize("tokens", [1, 17, 129, 2048, 8192])
def test_planned_keys_equal_the_mfus(tokens):
    config = load_config(CONFIG)
    each = 2 * config.model.num_heads * 2 * config.model.head_dim
    expected = attention_flops(NSA, config.model, config.attention, tokens)
    assert each * sum(NSA.keys(config.attention.of(NSA), tokens).values()) == pytest.approx(expected)


@pytest.mark.parametrize(("name", "gpus"), [("25m", 1), ("1b", 8), ("27b-a5b", 64)])
def test_planned_flops_equal_the_mfus_and_a_dry_runs(name, gpus):
    """Against `training_flops_per_token` without recomputation, and against dry runs with and without."""
    overrides = ["engine.activation_checkpointing=none", "parallel={}"]
    if name == "27b-a5b":  # nine tenths of the products are those of layers still; the first layer is dense
        overrides += ["model.num_layers=8"]
    config = load_config(ROOT / f"configs/{name}.yaml", overrides)
    work, model = work_of(config, gpus), config.model
    tokens = config.training.global_batch_size / gpus * config.data.sequence_length
    whole = training_flops_per_token(model, config.attention, config.data.sequence_length)["sparse"]
    assert work.flops + sum(work.attention.values()) == pytest.approx(tokens * whole, rel=1e-3)
    for mode in ("none", "full"):
        config = config.model_copy(
            update={"engine": config.engine.model_copy(update={"activation_checkpointing": mode})}
        )
        assert dry_run(config, gpus).flops == pytest.approx(work_of(config, gpus).flops, rel=0.03)


@pytest.mark.parametrize(("pipeline", "passes"), [(1, 8), (2, 8), (4, 8), (4, 2)])
def test_a_pipelines_bubble_stretches_what_its_passes_take(pipeline, passes):
    """(micro batches + stages - 1) / micro batches of it, and none of what is done once a step. Tokens per second are
    those of all ranks."""
    sizes = [f"parallel.pipeline={pipeline}", "training.micro_batch_size=1", f"training.global_batch_size={2 * passes}"]
    config = load_config(CONFIG, sizes)
    speed = predict_speed(config, 2 * pipeline, GPUS["H200"])
    once = {"optimizer", "between steps", "data links"}
    assert once <= speed.seconds.keys() and min(speed.seconds[kind] for kind in once) > 0
    in_passes = sum(seconds for kind, seconds in speed.seconds.items() if kind not in once)
    slots = (passes + pipeline - 1) / passes
    assert speed.step_seconds == pytest.approx(in_passes * slots + sum(speed.seconds[kind] for kind in once))
    tokens = 2 * passes * config.data.sequence_length
    assert speed.tokens_per_second == pytest.approx(tokens / speed.step_seconds)


def test_link_speed_within_and_between_nodes():
    gpu = GPUS["H100"]
    sizes = dict.fromkeys(AXES, 1)
    assert link(gpu, sizes | {"data": 8}, "data") == gpu.fast
    assert link(gpu, sizes | {"data": 64}, "data") == 8 * gpu.slow
    assert link(gpu, sizes | {"tensor": 8, "data": 8}, "data") == gpu.slow
    assert link(gpu, sizes | {"context": 8, "data": 8}, "data") == 8 * gpu.slow, "ZeRO's ranks are both"
    assert link(gpu, sizes | {"expert": 16}, "expert") == gpu.slow
    assert link(gpu, sizes | {"expert": 8}, "expert") == gpu.fast


def test_planned_dense_attention_is_the_fastest_measured():
    config = load_config(CONFIG, ["attention.kind=dense"])
    chosen = [dense_attention(config, GPUS[name], packed) for name in ("H100", "A100") for packed in (False, True)]
    assert chosen == ["cudnn", "triton", "triton", "triton"]
    ours = load_config(CONFIG, ["attention.kind=dense", "engine.dense_attention=triton"])
    speeds = [predict_speed(one, 8, GPUS["H100"]).step_seconds for one in (config, ours)]
    assert speeds[0] < speeds[1]


def test_packed_documents_take_less_attention():
    config = load_config(CONFIG, ["attention.kind=dense"])
    whole, packed = (predict_speed(config, 8, GPUS["H100"], document=size).seconds for size in (None, 1024))
    assert packed["dense attention"] < 0.2 * whole["dense attention"]
    assert packed["matrix products"] == whole["matrix products"]
    pieces = np.interp([2048, 131072], measured.SAMPLES, measured.PIECES)
    assert pieces[0] <= 2048 and pieces[1] < 131072
