"""What a run writes down of itself, and the parts of its objective beside the loss of the model.

The script side (at the end) runs in a process of its own.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import on_ranks, tiny_config

from nsa.data.loader import SampleStream, batch
from nsa.data.prepare import prepare
from nsa.models import Decoder
from nsa.training import metrics, performance, state
from nsa.training.metrics import StepMetrics, StepResult
from nsa.training.spikes import SpikeState

STEP = StepResult(
    2.5, 0.5, 1e-3, False, 0.25, 0, {"tensor/activations": 3 * 2**20}, {"moe/max_violation/layer_01": 0.5}
)
PLAIN = ["data.sources.1.weight=0.01", "optimizer.kind=sgd", "optimizer.gradient_clipping=0"]
MOE = ["num_experts=8", "top_k=2", "num_shared=1", "expert_size=16", "first_dense=1", "bias_rate=0.01"]
MOE = [f"model.moe.{override}" for override in [*MOE, "loss_weight=20"]]
DSA = ["attention.dsa={topk: 8, index_heads: 2, index_head_dim: 8, index_rotary_dims: 4, kl_weight: 300}"]
DSA += ["attention.kind=[dsa, dsa]", "model.init_std=0.3"]
# The balance loss is one of micro batches: the whole batch is one here. That of an indexer is not.
OBJECTIVES = {"experts": [*PLAIN, *MOE, "training.micro_batch_size=4"], "indexers": [*PLAIN, *DSA]}
# Of a run of 7 steps that logs every third, of which the second is not finite.
LOGGED = ["training.steps=7", "training.log_every=3", "training.validation_every=99", "training.probe_every=99"]
LOGGED += ["checkpoint.every=99"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("figures")
    checks = {name: ("first_step", {"overrides": overrides}) for name, overrides in OBJECTIVES.items()}
    checks |= {"logged": ("logged_run", {"overrides": LOGGED}), "kept": ("kept", {"overrides": [*PLAIN, *MOE]})}
    return folder, on_ranks(1, folder, checks, script=Path(__file__))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_objective_is_that_of_plain_torch(found: tuple[Path, dict[str, Any]], kind: str) -> None:
    """The gradient of the mean of the losses of all targets, plus the mean over all tokens of each layer's own loss
    times its weight; in micro batches, and as one pass of the decoder. The logged loss is that of the model alone.

    It would notice: a loss of a layer that is a sum over micro batches, over layers or over ranks in place of a mean.
    """
    folder, answers = found
    config = tiny_config(folder / kind, *OBJECTIVES[kind])
    stream = SampleStream(prepare(config.data, config.seed, progress=False), config.data, "train", config.seed)
    whole: Any = batch(stream, range(config.training.global_batch_size))
    decoder = Decoder(config.model, config.attention, backend="naive")
    decoder.initialise(config.seed)
    losses = decoder(whole["input_ids"], targets=whole["targets"], cu_seqlens=whole["cu_seqlens"])
    mean = losses.sum() / (whole["targets"] != -100).sum()
    parameters = list(decoder.parameters())
    gradients = torch.autograd.grad(mean, parameters, allow_unused=True)
    norm = torch.stack([g.double().square().sum() for g in gradients if g is not None]).sum().sqrt().item()
    assert answers[kind]["loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert answers[kind]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert answers[kind]["without"] < 0.9 * norm, "the layers' own losses are a part of it that shows"
    own = [layer.mlp.balance if kind == "experts" else layer.attention.attend.loss for layer in decoder.layers[1:]]
    name = {"experts": "moe/balance_loss", "indexers": "attention/indexer_kl"}[kind]
    seen = {key: value for key, value in answers[kind]["figures"].items() if key.startswith(name)}
    assert seen[f"{name}/layer_01"] == pytest.approx(own[0].tally[0].item() / losses.numel(), rel=1e-4)
    assert len(seen) == (1 if kind == "experts" else 2), "the first layer has no experts"


def test_figures_of_a_layer_are_those_of_a_step(found: tuple[Path, dict[str, Any]]) -> None:
    """Of two steps on the same samples that change nothing: what the first tallied is not in the second."""
    for kind in OBJECTIVES:
        first, second = found[1][kind]["figures"], found[1][kind]["again"]
        assert first and second == pytest.approx(first, rel=1e-5)


def test_the_load_of_experts(found: tuple[Path, dict[str, Any]]) -> None:
    """Biases move in a step that updates the weights, and in no other; figures are those of the loads they move by."""
    kept = found[1]["kept"]
    assert kept["bias"][0] != kept["bias"][1] == kept["bias"][2], "the second step is not finite"
    load = torch.tensor(kept["load"]).double()
    assert load.sum() == 4 * 64 * 2 and kept["figures"].keys() == {
        f"moe/{name}/layer_01" for name in ("max_violation", "mean_violation", "dead_share", "balance_loss")
    }
    assert kept["figures"]["moe/max_violation/layer_01"] == pytest.approx((load.max() / load.mean() - 1).item())
    assert kept["figures"]["moe/mean_violation/layer_01"] == pytest.approx(
        ((load - load.mean()).abs().mean() / load.mean()).item()
    )
    assert kept["figures"]["moe/dead_share/layer_01"] == (load == 0).double().mean()


def test_a_run_remembers_what_it_skipped(found: tuple[Path, dict[str, Any]]) -> None:
    """Spikes, quarantine and steps in a row that were not finite, through a checkpoint; and it trains on."""
    kept = found[1]["kept"]
    assert kept["resumed"] == kept["saved"] and kept["saved"]["skipped_in_a_row"] == 1
    assert kept["saved"]["spikes"] == vars(SPIKES)
    assert kept["in a row after a good step"] == 0
    assert kept["snapshot is a copy"] and kept["training after the probe"]


def test_a_line_is_the_mean_since_the_last(found: tuple[Path, dict[str, Any]]) -> None:
    """Seconds and data seconds of a step, and tokens per second; the clock is the test's own.

    Validation, probe and checkpoint take long and are not of a step.
    """
    lines = {line["step"]: line for line in found[1]["logged"]["lines"]}
    assert list(lines) == [1, 3, 6, 7] and "train/loss" not in lines[1], "the first step has a probe alone"
    for step in (3, 6, 7):
        assert lines[step]["perf/step_seconds"] == pytest.approx(2) and lines[step]["perf/data_seconds"] == 0.5
        assert lines[step]["perf/tokens_per_second"] == pytest.approx(4 * 64 / 2)
        assert lines[step]["train/tokens"] == step * 4 * 64 and lines[step]["train/skipped_steps"] == 1
    assert [step for step, line in lines.items() if "validation/loss" in line] == [7], "the last step validates"
    assert [step for step, line in lines.items() if any("gate_" in name for name in line)] == [1, 7]


def test_a_checkpoint_counts_what_was_read(found: tuple[Path, dict[str, Any]]) -> None:
    """Also what a skipped step read: an export says on how many tokens it was trained."""
    saved = found[1]["logged"]["state"]
    assert {name: saved[name] for name in ("step", "updates", "samples", "tokens")} == {
        "step": 7,
        "updates": 6,
        "samples": 28,
        "tokens": 28 * 64,
    }


def test_the_size_of_a_checkpoint_is_known_before(found: tuple[Path, dict[str, Any]]) -> None:
    """Weights and both moments, but for the files' headers: a run is refused at its start if they have no room."""
    folder, answers = found
    expected = state.state_bytes(tiny_config(folder / "logged", *LOGGED))
    assert expected < answers["logged"]["size"] < expected + 20_000


def test_figures_of_a_step_on_several_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "peak_flops", lambda device, precision: (1e12, "data sheet"))
    ranks: Any = SimpleNamespace(device=torch.device("cpu"), world_size=4)
    figures = StepMetrics(tiny_config(tmp_path), ranks)
    line = figures.of(STEP, 10, 8, seconds=0.5, data_seconds=0.25)
    assert line["train/skipped_steps"] == 2 and line["train/tokens"] == 10 * 4 * 64
    assert line["perf/tokens_per_second"] == 4 * 64 / 0.5 and line["perf/data_seconds"] == 0.25
    assert line["perf/mfu_sparse"] == pytest.approx(figures.flops["sparse"] * 512 / (4 * 1e12))
    assert line["comm/tensor_activations_mib"] == 3 and line["moe/max_violation/layer_01"] == 0.5
    assert (line["train/loss"], line["train/grad_norm"], line["train/learning_rate"]) == (2.5, 0.5, 1e-3)


def test_a_measured_peak_counts_a_product_and_a_sum_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product takes three seconds of the test's clock."""
    now = iter(range(0, 99, 3))
    monkeypatch.setattr(performance, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    measured = performance._measured_flops.__wrapped__(torch.device("cpu"), torch.float32)
    assert measured == pytest.approx(2 * 1024**3 / 3)


def test_ranks_draw_numbers_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the beginning, by rank and seed; and of a run that goes on with another number of ranks, by the step too."""

    def seed_of(rank: int, seed: int = 5, step: int | None = None) -> int:
        def load(folder: Path) -> dict[str, Any]:
            return {"step": step, "updates": step, "skipped_in_a_row": 0, "data": "d", "world_size": 3}

        monkeypatch.setattr(state.checkpoint, "latest_complete", lambda *_: None if step is None else tmp_path)
        monkeypatch.setattr(state.checkpoint, "load_state", load)
        ranks: Any = SimpleNamespace(rank=rank, world_size=2, on_main=lambda action: action())
        config = tiny_config(tmp_path, f"seed={seed}")
        state.restore(None, config, ranks, tmp_path, state.Identity("d", tmp_path))  # type: ignore[arg-type]
        return torch.initial_seed()

    for name in ("create_optimizer_state", "scatter", "local_shards", "record_changes", "check_same"):
        monkeypatch.setattr(state, name, lambda *_: {})
    monkeypatch.setattr(state.checkpoint, "set_aside", lambda *_: None)
    places = [(0, 5, None), (1, 5, None), (0, 8, None), (0, 5, 10), (1, 5, 10), (0, 5, 20)]
    assert len({seed_of(*place) for place in places}) == len(places)
    assert seed_of(1, 5, 10) == seed_of(1, 5, 10)


# ------------------------------------------------------------------------------------- in a process of the test's own

SPIKES = SpikeState([2.0, 2.5], [0.5, 0.25], [3], [1, 4], 1)


def first_step(ranks: Any, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Loss and gradient norm of the first step, and the norm without the layers' own losses; figures of the step, and
    of another on the same samples and weights."""
    still = ["optimizer.learning_rate=1e-30", "optimizer.weight_decay=0"]
    experts = any("moe" in override for override in overrides)
    still += ["model.moe.bias_rate=0"] if experts else []
    without = ["model.moe.loss_weight=0"] if experts else ["attention.dsa.kl_weight=0"]
    trainer = Trainer(tiny_config(folder, *overrides, *still), ranks)
    read = trainer._read_step
    trainer._read_step = lambda step: read(0)
    trainer.loader = StepLoader(trainer._read_step)
    step, again = (trainer.train_step(StopRequest()) for _ in range(2))
    rank_checks.close(trainer)
    alone = Trainer(tiny_config(folder, "name=without", *overrides, *still, *without), ranks)
    norm = alone.train_step(StopRequest()).grad_norm
    rank_checks.close(alone)
    answer = {"loss": step.loss, "grad_norm": step.grad_norm, "without": norm}
    return answer | {"figures": step.figures, "again": again.figures}


def kept(ranks: Any, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """What a step of experts, one that is not finite and a checkpoint leave."""
    config = tiny_config(folder, *overrides)
    trainer, loads = Trainer(config, ranks), []
    moved = balance.moved_bias
    balance.moved_bias = lambda bias, load, rate: loads.append(load.tolist()) or moved(bias, load, rate)
    router = trainer.engine.module.layers[1].mlp.router
    bias = [router.bias.tolist()]
    figures = trainer.train_step(StopRequest()).figures
    bias.append(router.bias.tolist())
    with rank_checks.broken(trainer, "loss"):
        trainer.train_step(StopRequest())
    bias.append(router.bias.tolist())
    trainer.probe_attention()
    training = trainer.engine.module.training and trainer.engine.training
    trainer.progress.spikes = SpikeState(*vars(SPIKES).values())
    copy = snapshot(trainer.engine, config, ranks, trainer.progress, trainer.identity)
    before = [tensor.clone() for _, _, tensor in copy.tensors]
    trainer.save(wait=True)
    saved = asdict(trainer.progress)
    trainer.train_step(StopRequest())
    is_copy = all(torch.equal(a, b) for a, (_, _, b) in zip(before, copy.tensors, strict=True))
    rank_checks.close(trainer)
    trainer._run_folder.close()
    other = Trainer(config, ranks)
    resumed = asdict(other.progress)
    other.train_step(StopRequest())
    in_a_row = other.progress.skipped_in_a_row
    rank_checks.close(other)
    answer = {"bias": bias, "load": loads[0], "figures": figures, "saved": saved, "resumed": resumed}
    answer["in a row after a good step"] = in_a_row
    return answer | {"snapshot is a copy": is_copy, "training after the probe": training}


def logged_run(ranks: Any, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """The lines of metrics.jsonl and the last state.json of a run whose clock goes on by two seconds a step."""
    now = [0.0]
    trainer_module.time = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    trainer = Trainer(tiny_config(folder, *overrides), ranks)
    take = trainer.train_step

    def train_step(stop: Any) -> Any:
        with rank_checks.broken(trainer, "loss" if trainer.progress.step == 1 else "none"):
            result = take(stop)
        now[0] += 2
        return replace(result, data_seconds=0.5)

    def slow(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            now[0] += 1000
            return function(*args, **kwargs)

        return call

    trainer.train_step = train_step
    for name in ("validate", "probe_attention", "save"):
        setattr(trainer, name, slow(getattr(trainer, name)))
    assert trainer.run() == 0
    run = trainer.folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    saved = run / "step_00000007"
    size = sum(path.stat().st_size for path in saved.glob("*.safetensors"))
    return {"lines": lines, "state": json.loads((saved / "state.json").read_text()), "size": size}


if __name__ == "__main__":
    import time
    from dataclasses import asdict, replace

    import rank_checks

    from nsa.training import balance
    from nsa.training import trainer as trainer_module
    from nsa.training.batches import StepLoader
    from nsa.training.signals import StopRequest
    from nsa.training.state import snapshot
    from nsa.training.trainer import Trainer

    rank_checks.main(globals())
