"""How soon a model learns to recall: seeds of configs/25m-recall.yaml and of configs/25m-taught.yaml, with curves.

    python benchmarks/recall.py [--kinds dense nsa] [--seeds 1 2 3] [--at-once N] [--runs FOLDER] [--out FILE]
                                [KEY=VALUE ...]

- nsa: 25m-recall, from random weights.
- dense, selection, taught: the stages of 25m-taught, each from the one before: a dense model of as many parameters, the
  teaching of NSA's selection alone, and NSA.
- untaught: as taught, but that it begins with dense.

Every run is a process of its own with the trainer of `nsa.train`; all have one tokenizer. After every --every steps it
answers mqar_wide in episodes of 256 tokens and of the training length, and the other recall tasks of the mixture at the
training length, eight episodes each; at the end 64, and as many before the first step of one that begins with another.
The seconds of a curve are those of its steps. Checkpoints are in FOLDER, and `python -m nsa.export
FOLDER/dense-1-dense` makes a model of one. FILE (JSON) has the curves of the runs that have ended; a plot is drawn
beside it.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import environment
from benchmarks.training import ROOT
from nsa.config import Config, load_config
from nsa.data.load_tokenizer import load_tokenizer
from nsa.data.prepare import prepare
from nsa.data.tasks import task_named
from nsa.training.signals import die_with_parent

FIRST, STAGES = ROOT / "configs" / "25m-recall.yaml", ROOT / "configs" / "25m-taught.yaml"
KINDS: dict[str, tuple[Path, list[str], str | None]] = {  # its file, its keys, and the kind that it begins with
    "nsa": (FIRST, [], None),
    "dense": (STAGES, ["stage=dense"], None),
    "untaught": (STAGES, ["stage=sparse"], "dense"),
    "selection": (STAGES, ["stage=selection"], "dense"),
    "taught": (STAGES, ["stage=sparse"], "selection"),
}
SHORT, FEW, EPISODES = 256, 8, 64


def configuration(kind: str, seed: int, runs: str, settings: list[str]) -> Config:
    path, keys, before = KINDS[kind]
    mine = [f"name={kind}-{seed}", f"seed={seed}", f"output_dir={runs}", f"data.cache_dir={runs}/cache"]
    start = [f"start_from={folder_of(before, seed, runs)}"] if before else []
    return load_config(str(path), [*mine, *keys, *start, *settings])


def folder_of(kind: str, seed: int, runs: str) -> str:
    """Of a run: its name has that of its stage."""
    stage = "".join(key.replace("stage=", "-") for key in KINDS[kind][1])
    return f"{runs}/{kind}-{seed}{stage}"


def train(case: tuple[str, int], every: int, runs: str, settings: list[str]) -> dict[str, Any]:
    """A run: its kind, seed and curve."""
    from nsa.evaluation.recall import measure, predictor
    from nsa.training.signals import StopRequest
    from nsa.training.trainer import Trainer

    die_with_parent()
    kind, seed = case
    config = configuration(kind, seed, runs, settings)
    trainer, stop, steps = Trainer(config), StopRequest(), config.training.steps
    tokenizer, length = load_tokenizer(trainer.identity.tokenizer), config.data.sequence_length
    tasks = [source.task for source in config.data.sources if source.task]

    def recalled(episodes: int) -> dict[str, float]:
        trainer.engine.eval()
        asked = [("mqar_wide", SHORT), *((task, length) for task in tasks)]
        found = {
            f"{name} {size}": measure(predictor(trainer.engine.module), task_named(name), tokenizer, size, episodes)
            for name, size in asked
        }
        trainer.engine.train()
        return {name: round(recall.accuracy, 4) for name, recall in found.items()}

    curve: list[dict[str, Any]] = []
    if config.start_from is not None:
        curve.append({"step": 0, "tokens": 0, "seconds": 0.0, **recalled(EPISODES)})
        print(json.dumps({"run": f"{kind}-{seed}", **curve[-1]}), flush=True)
    seconds, losses, since = 0.0, [], time.perf_counter()
    for step in range(1, steps + 1):
        losses.append(trainer.train_step(stop).loss)
        if step % every == 0 or step == steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds += time.perf_counter() - since
            tokens = step * trainer.step_metrics.tokens_per_step
            curve.append({"step": step, "tokens": tokens, "seconds": round(seconds, 1)})
            curve[-1] |= {"loss": round(sum(losses) / len(losses), 4), **recalled(EPISODES if step == steps else FEW)}
            print(json.dumps({"run": f"{kind}-{seed}", **curve[-1]}), flush=True)
            losses, since = [], time.perf_counter()
    trainer.save(wait=True)
    trainer.loader.close()
    trainer.end_threads()
    trainer.close()
    return {"kind": kind, "seed": seed, "steps": steps, "episodes": EPISODES, "curve": curve}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Recall by tokens seen of the kinds of MQAR, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for run in runs for name in run["curve"][0] if name.startswith("mqar")))
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.2), sharey=True, squeeze=False)
    colours = {kind: f"C{number}" for number, kind in enumerate(dict.fromkeys(run["kind"] for run in runs))}
    for axis, name in zip(axes[0], names, strict=True):
        for run in runs:
            first = run["seed"] == min(r["seed"] for r in runs)
            label = run["kind"] if first else None
            x = [at["tokens"] / 1e6 for at in run["curve"]]
            axis.plot(x, [at[name] for at in run["curve"]], color=colours[run["kind"]], label=label)
        axis.set(title=f"{name} tokens", xlabel="million tokens trained on", ylim=(-0.02, 1.02))
        axis.axhline(0.9, color="grey", linewidth=0.8, linestyle=":")
    axes[0][0].set_ylabel("answers that are right")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["dense", "nsa"], choices=KINDS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--every", type=int, default=100, help="steps between measurements (default: %(default)s)")
    parser.add_argument("--at-once", type=int, default=1, help="runs that share the GPU (default: %(default)s)")
    parser.add_argument("--runs", help="folder of the checkpoints (default: a temporary one)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    cases = [(kind, seed) for kind in KINDS if kind in options.kinds for seed in options.seeds]
    report: dict[str, Any] = environment() | {"command": shlex.join(["python", "benchmarks/recall.py", *sys.argv[1:]])}
    report |= {"at_once": options.at_once, "recall": []}
    with tempfile.TemporaryDirectory() as folder:
        runs = options.runs or folder
        first = configuration(*cases[0], runs, options.overrides)
        tokenizer = prepare(first.data, first.seed).tokenizer.path
        settings = [*options.overrides, f"data.tokenizer.path={tokenizer}"]
        workers = ProcessPoolExecutor(options.at_once, mp_context=get_context("spawn"), max_tasks_per_child=1)
        asked: dict[tuple[str, int], Future] = {}

        def write(_: object = None) -> None:
            """What has ended so far, so that a run that is stopped loses only what it was at."""
            report["recall"] = [run.result() for run in list(asked.values()) if run.done() and not run.exception()]
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")

        with workers:
            for kind, seed in cases:
                if (before := asked.get((KINDS[kind][2] or "", seed))) is not None:
                    before.result()
                asked[kind, seed] = workers.submit(train, (kind, seed), options.every, runs, settings)
                asked[kind, seed].add_done_callback(write)
            for run in asked.values():
                run.result()
        write()
    if options.out:
        draw(report["recall"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
