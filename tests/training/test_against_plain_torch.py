"""The trainer's steps against plain PyTorch: the same samples and first weights, and none of its machinery.

Plain: every document runs through the decoder alone, by the operators' definitions; the loss is `cross_entropy`; Adam,
clipping and the schedule are written out from their formulas. A fifth of the samples are of a task that counts few
targets, so micro batches differ in how many they count. The script side (at the end) runs in a process of its own.
"""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import on_ranks, tiny_config, write_documents
from torch.nn.functional import cross_entropy

from nsa.data.loader import SampleStream
from nsa.data.prepare import prepare
from nsa.models import Decoder

STEPS = 6
RUN = [
    "data.sources.0.path={folder}/documents/*.txt",
    "data.workers=1",
    "model.tie_embeddings=false",
    # First weights that are larger than usual: logits, and so the losses of tokens, differ.
    "model.init_std=0.1",
    # Not torch's defaults; eps so large that a gradient of rounding alone is not taken for a step of full size.
    "optimizer={learning_rate: 3.0e-3, min_learning_rate: 1.0e-3, warmup_steps: 2, schedule: cosine, beta1: 0.8, "
    "beta2: 0.9, eps: 1.0e-5, weight_decay: 0.5, gradient_clipping: 0.5}",
    f"training.steps={STEPS}",
    "training.global_batch_size=6",
    "training.micro_batch_size=2",
]
# What breaks, in which step (from 0); the run is saved and resumed after RESUMED steps.
STRAIGHT = {"broken": {}, "resumed": None}
INTERRUPTED = {"broken": {"1": "loss", "3": "gradient"}, "resumed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    write_documents(folder, 700, 41)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Any]:
    """What the trainer made of both runs in ZeRO 0 and 1, in one process of its own."""
    overrides = [override.format(folder=folder) if "{folder}" in override else override for override in RUN]
    checks = {
        f"{name}-{stage}": ("take_steps", {"overrides": [*overrides, f"engine.zero_stage={stage}"], **run})
        for name, run in (("straight", STRAIGHT), ("interrupted", INTERRUPTED))
        for stage in (0, 1)
    }
    return on_ranks(1, folder, checks, script=Path(__file__))


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, list[dict[str, Any]]]:
    overrides = [override.format(folder=folder) if "{folder}" in override else override for override in RUN]
    config = tiny_config(folder / "straight-0", *overrides)
    return {"straight": train_plainly(config, ()), "interrupted": train_plainly(config, (1, 3))}


def rate_of(step: int, *, peak: float, low: float, warm_up: int) -> float:
    """Of the documentation: linear warm-up, then half a cosine from the peak to the minimum after the last step."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (STEPS - warm_up)))


def loss_of(decoder: Decoder, stream: SampleStream, indices: range) -> tuple[torch.Tensor, int, int]:
    """The mean over the counted targets of all samples, their number, and that of documents."""
    total, counted, documents = torch.zeros((), dtype=torch.float64), 0, 0
    for index in indices:
        sample = stream[index]
        borders = [*sample.starts.tolist(), len(sample.tokens)]
        for start, stop in pairwise(borders):
            targets = torch.from_numpy(sample.targets[start:stop])
            logits = decoder(torch.from_numpy(sample.tokens[None, start:stop]))[0]
            total = total + cross_entropy(logits, targets, ignore_index=-100, reduction="sum").double()
            counted += int((targets != -100).sum())
            documents += 1
    return total / counted, counted, documents


def train_plainly(config: Any, skipped: tuple[int, ...]) -> list[dict[str, Any]]:
    """Loss, gradient norm, rate and weights of each step."""
    o, size = config.optimizer, config.training.global_batch_size
    stream = SampleStream(prepare(config.data, config.seed, progress=False), config.data, "train", config.seed)
    decoder = Decoder(config.model, config.attention, backend="naive")
    decoder.initialise(config.seed)
    named = dict(decoder.named_parameters())
    mean, square = ({n: torch.zeros_like(p) for n, p in named.items()} for _ in range(2))
    updates, steps = 0, []
    for step in range(STEPS):
        loss, counted, documents = loss_of(decoder, stream, range(step * size, (step + 1) * size))
        assert documents > 3 * size and counted < 0.9 * size * config.data.sequence_length, "the samples test packing"
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        rate = rate_of(step, peak=o.learning_rate, low=o.min_learning_rate, warm_up=o.warmup_steps)
        if step not in skipped:
            updates += 1
            for name, p in named.items():
                matrix = p.ndim >= 2 and not name.startswith("embedding.") and not name.endswith(".position")
                g = gradients[name] * min(1.0, 0.5 / norm)
                mean[name].mul_(0.8).add_(0.2 * g)
                square[name].mul_(0.9).add_(0.1 * g * g)
                adam = (mean[name] / (1 - 0.8**updates)) / ((square[name] / (1 - 0.9**updates)).sqrt() + 1e-5)
                p.data.sub_(rate * (adam + (0.5 if matrix else 0.0) * p.data))
        weights = {name: p.detach().clone() for name, p in named.items()}
        steps.append({"loss": loss.item(), "norm": norm, "rate": rate, "weights": weights})
    return steps


def assert_alike(logged: list[dict[str, Any]], weights: Path, expected: list[dict[str, Any]]) -> None:
    assert len(logged) == len(expected) == STEPS
    for step, (found, plainly) in enumerate(zip(logged, expected, strict=True)):
        assert found["rate"] == pytest.approx(plainly["rate"], rel=1e-12), f"step {step}"
        if found["broken"] != "loss":
            assert found["loss"] == pytest.approx(plainly["loss"], rel=1e-5), f"step {step}"
        if not found["broken"]:
            assert found["norm"] == pytest.approx(plainly["norm"], rel=1e-5), f"step {step}"
        after = load_file(weights / f"step-{step}.safetensors")
        assert after.keys() == plainly["weights"].keys()
        for name, weight in plainly["weights"].items():
            torch.testing.assert_close(
                after[name], weight, rtol=1e-5, atol=2e-6, msg=lambda m, s=step, n=name: f"step {s}, {n}: {m}"
            )


@pytest.mark.parametrize("stage", [0, 1])
def test_steps_are_those_of_plain_torch(folder, trained, plain, stage) -> None:
    """Loss, norm and weights of six steps.

    It would notice: a rate that one group of parameters does not get, a beta that is not the configured one, decay of
    norms, biases, embeddings or positions, no clipping, a loss averaged within micro batches or ranks instead of over
    all counted targets, samples out of order, attention or a target across the border of packed documents.
    """
    logged = trained[f"straight-{stage}"]
    assert_alike(logged, folder / f"straight-{stage}", plain["straight"])
    assert min(step["norm"] for step in logged) > 0.6, "clipping bites in every step"
    assert [step["updates"] for step in logged] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("stage", [0, 1])
def test_skipped_steps_are_no_updates(folder, trained, plain, stage) -> None:
    """Two of six steps break, one by its loss and one by its gradient; after the second the run is saved and resumed.

    It would notice: a broken step that moves weights or moments, or that Adam's count or the schedule takes for another
    number, a resumed run that restores Adam's count from the steps instead of the updates, or forgets its moments or
    the position in the data.
    """
    logged = trained[f"interrupted-{stage}"]
    assert_alike(logged, folder / f"interrupted-{stage}", plain["interrupted"])
    assert [step["updates"] for step in logged] == [1, 1, 2, 2, 3, 4]
    assert [step["skipped"] for step in logged] == [False, True, False, True, False, False]


# ------------------------------------------------------------------------------------- in a process of the test's own


def take_steps(
    ranks: Any, folder: Path, overrides: list[str], broken: dict[str, str], resumed: int | None
) -> list[dict[str, Any]]:
    """The trainer's steps; the weights after each land in ``folder``."""
    config = tiny_config(folder, *overrides)
    trainer, stop, logged = Trainer(config, ranks), StopRequest(), []
    for step in range(STEPS):
        if step == resumed:
            trainer.save(wait=True)
            rank_checks.close(trainer)
            trainer._run_folder.close()
            trainer = Trainer(config, ranks)
            assert trainer.progress.step == step
        fault = broken.get(str(step), "none")
        with rank_checks.broken(trainer, fault):
            result = trainer.train_step(stop)
        weights = {name: p.detach() for name, p in trainer.engine.module.named_parameters()}
        save_file(weights, folder / f"step-{step}.safetensors")
        logged.append({"loss": result.loss, "norm": result.grad_norm, "rate": result.learning_rate})
        logged[-1] |= {"broken": broken.get(str(step)), "skipped": result.skipped, "updates": trainer.progress.updates}
    rank_checks.close(trainer)
    return logged


if __name__ == "__main__":
    import rank_checks

    from nsa.training.signals import StopRequest
    from nsa.training.trainer import Trainer

    rank_checks.main(globals())
