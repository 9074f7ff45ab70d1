"""Throughput of the trainer over time: thousands of steps on one GPU, tokens/s at the beginning and at the end.

    python benchmarks/steady.py [--config 25m] [--steps 3000] [--kind nsa] [--out FILE] [KEY=VALUE ...]

Steps run through `nsa.training.trainer.Trainer.train_step`, without validation, probes and checkpoints. They are timed
in blocks of 100 (in short runs of a thirtieth of the run), and only between blocks the GPU is waited for. The first
block is the warm-up. The five blocks after it are compared with the last five. The text is the Python standard
library's. FILE (JSON) is rewritten after every block.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import environment, need_gpu
from benchmarks.training import ROOT, SOURCE
from nsa.config import Config, load_config
from nsa.data.progress import Progress
from nsa.training.signals import StopRequest
from nsa.training.trainer import Trainer

LEAST, BLOCK, COMPARED = 12, 100, 5  # steps of a run; steps of a block; blocks that are compared
TOKENS, BATCH = 4096, 4  # of a sample, and samples of a step: all in one micro batch


def configuration(name: str, kind: str | None, steps: int, folder: str, overrides: list[str]) -> Config:
    """The configuration of the run, with all of its output in ``folder``."""
    settings = [
        f"training.steps={steps}",
        f"optimizer.warmup_steps={block_size(steps)}",
        f"data.sequence_length={TOKENS}",
    ]
    settings += [f"training.micro_batch_size={BATCH}", f"training.global_batch_size={BATCH}", SOURCE]
    settings += [f"name=steady-{name}", f"output_dir={folder}/runs", f"data.cache_dir={folder}/cache"]
    settings += [f"attention.kind={kind}"] if kind else []
    return load_config(str(ROOT / f"configs/{name}.yaml"), [*settings, *overrides])


def block_size(steps: int) -> int:
    return min(BLOCK, max(1, steps // 30))


def borders(trainer: Trainer, steps: int) -> Iterator[tuple[int, float]]:
    """(steps done, seconds) before the first block and after each."""
    stop, size = StopRequest(), block_size(steps)
    yield 0, now()
    with Progress("train", steps, unit=" steps") as progress:
        for step in range(1, steps + 1):
            if code := trainer.train_step(stop).stop:
                raise SystemExit(code)
            progress.update(1)
            if step % size == 0 or step == steps:
                yield step, now()


def now() -> float:
    """The time in seconds, after waiting for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def rate(tokens: int, begin: tuple[int, float], end: tuple[int, float]) -> float:
    """Tokens per second between two times, with ``tokens`` per step."""
    return tokens * (end[0] - begin[0]) / (end[1] - begin[1])


def measure(config: Config, row: dict[str, Any], report: dict[str, Any], out: Path) -> None:
    """Train, fill in ``row``, which is part of ``report``, and write the report to ``out``."""
    trainer, steps = Trainer(config), config.training.steps
    row["tokens_per_step"] = tokens = trainer.step_metrics.tokens_per_step
    seen: list[tuple[int, float]] = []
    try:
        for border in borders(trainer, steps):
            seen.append(border)
            row["blocks"] = [round(rate(tokens, *pair)) for pair in pairwise(seen)]
            out.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        trainer.loader.close()
    trainer.close()
    first, last = rate(tokens, seen[1], seen[1 + COMPARED]), rate(tokens, seen[-1 - COMPARED], seen[-1])
    row |= {"first": round(first), "last": round(last), "ratio": round(last / first, 4)}
    out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="25m", help="a file of configs/, without .yaml (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3000, help="(default: %(default)s)")
    parser.add_argument("--kind", help="attention.kind (default: the configuration's)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    need_gpu(parser)
    if options.steps < LEAST:
        parser.error(f"--steps must be at least {LEAST}: the first blocks are compared with the last")
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(options.config, options.kind, options.steps, folder, options.overrides)
        row: dict[str, Any] = {"config": options.config, "attention": config.attention.kind}
        row |= {"steps": config.training.steps, "block": block_size(config.training.steps)}
        row["overrides"] = options.overrides
        row["command"] = shlex.join(["python", "benchmarks/steady.py", *sys.argv[1:]])
        report = environment() | {"steady": row}
        measure(config, row, report, options.out or Path(folder) / "steady.json")
    print(
        f"{row['config']}, {row['attention']}, {report['device']}: {row['first']:,} tokens/s after the first block, "
        f"{row['last']:,} at the end of {row['steps']:,} steps: {row['ratio']:.1%} of it"
    )


if __name__ == "__main__":
    main()
