"""Speed of the trainer on several GPUs of one machine, over that of one: whole steps, NCCL and optimizer included.

    python benchmarks/scaling.py [--cases data tensor ...] [--gpus 1 2] [--kind nsa] [--out FILE]
    python benchmarks/scaling.py --join FILE ... --out FILE     # rows of several calls in one file

Each run is `nsa/train.py` under torchrun, in processes of its own. One that fails is reported, and the next goes on.
Samples are of the Python standard library. The time of a step is the median of what the run itself logged, without the
first half of its steps; then it is killed. `data` and `data-64k` have 16 and 64 thousand tokens for each GPU (weak
scaling), the others the same samples on all GPUs (strong). FILE (JSON) is rewritten after every run.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import environment, need_gpu
from benchmarks.training import ROOT, SOURCE, TOKENIZER

SECONDS = 300  # that a run may take
FIGURES = {"loss": "train/loss", "mfu": "perf/mfu_sparse", "peak_gib": "perf/memory_gib"}


@dataclass(frozen=True)
class Case:
    """A model, its samples, and how ranks are dealt out.

    Attributes:
        config: a file of configs/, without .yaml. tokens: of a sample. samples: of a step; of each GPU's where weak.
        micro: samples of a micro batch. steps: of a run. layout: settings, with the number of GPUs for {}.
        settings: the other ones. beside: the case whose run on one GPU this one is compared with; "": its own.
    """

    config: str
    tokens: int
    samples: int
    micro: int
    steps: int
    layout: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    weak: bool = False
    beside: str = ""


RECOMPUTE = "engine.activation_checkpointing=full"  # one sample of 64K tokens must fit on one GPU
CASES = {
    "data": Case("25m", 4096, 4, 4, 400, weak=True),
    "data-64k": Case("25m", 4096, 16, 16, 200, weak=True),
    "tensor": Case("1b", 8192, 8, 4, 24, ("parallel.tensor={}",)),
    "context": Case("1b", 65536, 1, 1, 16, ("parallel.context={}",), (RECOMPUTE,)),
    "zero3": Case("1b", 8192, 8, 4, 24, ("engine.zero_stage=3",), beside="tensor"),
    "pipeline": Case("1b", 8192, 8, 1, 24, ("parallel.pipeline={}",), beside="tensor"),
}


def overrides(case: Case, gpus: int, kind: str, folder: str) -> list[str]:
    """Settings of a run with all of its output in ``folder``."""
    samples = case.samples * gpus if case.weak else case.samples
    ranks = 1 if any(key.startswith("parallel.") for key in case.layout) else gpus
    mine = [SOURCE, TOKENIZER, "data.validation_fraction=0.02", "optimizer.warmup_steps=1", "data.workers=2"]
    mine += [f"name=run-{gpus}", f"output_dir={folder}", f"data.cache_dir={folder}/cache", f"attention.kind={kind}"]
    mine += [f"data.sequence_length={case.tokens}", f"model.max_position={case.tokens}"]
    mine += [f"training.global_batch_size={samples}", "training.steps=1000000"]
    mine += [f"training.micro_batch_size={min(case.micro, samples // ranks)}"]
    mine += [f"training.log_every={max(1, case.steps // 12)}", "training.validation_every=1000000"]
    return [*mine, *case.settings, *(key.format(gpus) for key in case.layout)]


def run(name: str, gpus: int, kind: str, folder: str) -> dict[str, Any]:
    """A row: of the run's own log, or why there is none."""
    case = CASES[name]
    settings = overrides(case, gpus, kind, folder)
    row: dict[str, Any] = {"case": name, "config": case.config, "attention": kind, "tokens": case.tokens, "gpus": gpus}
    row |= {"samples": case.samples * gpus if case.weak else case.samples, "weak": case.weak}
    row["overrides"] = [x for x in settings if folder not in x]
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    command = [*starter, "nsa/train.py", f"configs/{case.config}.yaml", *settings]
    path = os.pathsep.join([str(ROOT), os.getenv("PYTHONPATH", "")])
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    log, metrics = Path(folder) / f"{name}-{gpus}.log", Path(folder) / f"run-{gpus}" / "metrics.jsonl"
    with log.open("w") as file:
        process = psutil.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
    until = time.monotonic() + SECONDS
    try:
        while process.poll() is None and time.monotonic() < until and steps_in(metrics) < case.steps:
            time.sleep(0.2)
    finally:  # without a last checkpoint, which would be gigabytes
        for child in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait()
    if steps_in(metrics) < case.steps:
        return row | {"refused": log.read_text(errors="replace")[-2000:] or f"no step in {SECONDS} s"}
    return row | figures(metrics, case)


def steps_in(metrics: Path) -> int:
    """The last step in a log that may be in the middle of a line."""
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def figures(path: Path, case: Case) -> dict[str, Any]:
    """Of the second half of a run."""
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    late = [line for line in lines if line["step"] > case.steps // 2 and "perf/step_seconds" in line]
    seconds = statistics.median(line["perf/step_seconds"] for line in late)
    found: dict[str, Any] = {"step_ms": round(seconds * 1e3, 1)}
    found["tokens_per_s"] = round(statistics.median(line["perf/tokens_per_second"] for line in late))
    found |= {key: round(late[-1][tag], 4) for key, tag in FIGURES.items() if tag in late[-1]}
    sent = {key: value for key, value in late[-1].items() if key.startswith("comm/")}
    return found | ({"sent_mib": {key[5:-4]: round(value, 1) for key, value in sent.items()}} if sent else {})


def compared(rows: list[dict[str, Any]]) -> None:
    """Fill in how many times as many tokens a second as on one GPU, where that was measured."""
    alone = {(r["case"], r["attention"]): r for r in rows if r["gpus"] == 1 and "tokens_per_s" in r}
    for row in rows:
        one = alone.get((CASES[row["case"]].beside or row["case"], row["attention"]))
        if one and "tokens_per_s" in row:
            row["over_one"] = round(row["tokens_per_s"] / one["tokens_per_s"], 3)


def write(report: dict[str, Any], out: Path | None) -> None:
    compared(report["scaling"])
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["data", "data-64k", "tensor", "context"], choices=CASES)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kind", default="nsa", help="attention.kind (default: %(default)s)")
    parser.add_argument("--join", type=Path, nargs="+", help="files of earlier calls: nothing is measured")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.join:
        if not options.out:
            parser.error("--join needs --out: the file that gets the rows of all")
        files = [json.loads(path.read_text()) for path in options.join]
        write(files[0] | {"scaling": [row for file in files for row in file["scaling"]]}, options.out)
        return
    need_gpu(parser)
    if max(options.gpus) > torch.cuda.device_count():
        parser.error(f"--gpus {max(options.gpus)}: there are {torch.cuda.device_count()}")
    report: dict[str, Any] = environment() | {"scaling": []}
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            for gpus in options.gpus:
                report["scaling"].append(run(name, gpus, options.kind, folder))
                write(report, options.out)
                print(report["scaling"][-1], flush=True)


if __name__ == "__main__":
    main()
