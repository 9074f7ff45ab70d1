"""Steps of the trainer on one GPU, long samples: step time, MFU and memory beside the plan's prediction.

    python benchmarks/training.py [--config 1b] [--cases nsa:32768:30 ...] [--out FILE] [KEY=VALUE ...]

A case is attention:tokens:steps; each runs in a process of its own (one that runs out of memory is reported, the next
goes on) through `nsa.training.trainer.Trainer`: DeepSpeed's engine, the loader, bf16, batch 1, activation checkpointing
as in the configuration. No checkpoint is written, no validation is run. The text is the Python standard library's.
Time is the median of the last 20 steps, the first left out. FILE (JSON) is written anew after every step;
`python -m nsa.plan --check FILE` prints its table again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import environment, need_gpu
from nsa.config import Config, load_config
from nsa.models import training_flops_per_token
from nsa.planning.measured import ALONE, compare, error_lines, table
from nsa.training.signals import die_with_parent

ROOT = Path(__file__).resolve().parents[1]
CASES = ["nsa:32768:30", "dense:32768:30"]  # longer ones of 1b: with engine.activation_checkpointing=full
SOURCE = "data.sources=[{name: python, kind: builtin}]"
TOKENIZER = "data.tokenizer={vocab_size: 4096, train_bytes: 5_000_000}"


def configuration(path: str, case: str, folder: str, overrides: list[str]) -> Config:
    """Of a case: everything in ``folder``."""
    attention, tokens, steps = case.split(":")
    mine = [*ALONE, f"attention.kind={attention}", f"data.sequence_length={tokens}", f"model.max_position={tokens}"]
    mine += [f"name={attention}-{tokens}", f"output_dir={folder}/runs", f"data.cache_dir={folder}/cache"]
    mine += [SOURCE, TOKENIZER, "data.validation_fraction=0.02", "optimizer.warmup_steps=1", f"training.steps={steps}"]
    return load_config(path, [*mine, *overrides])


def train(config: Config, to_parent: Connection) -> None:
    """In a process of its own: train, and send (seconds, loss, peak GiB, peak FLOP/s) of every step."""
    from nsa.training.performance import memory_gib
    from nsa.training.signals import StopRequest
    from nsa.training.trainer import Trainer

    die_with_parent()
    try:
        trainer, stop = Trainer(config), StopRequest()
        for _ in range(config.training.steps):
            started = time.perf_counter()
            result = trainer.train_step(stop)
            if result.stop:
                break
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            to_parent.send((seconds, result.loss, memory_gib(trainer.ranks.device), trainer.step_metrics.peak))
        trainer.loader.close()
        trainer.close()
    except torch.OutOfMemoryError:
        to_parent.send("out of memory")
    to_parent.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="1b", help="a file of configs/, without .yaml")
    parser.add_argument("--cases", nargs="+", default=CASES, help="attention:tokens:steps (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args()
    need_gpu(parser)
    options.overrides += [case for case in options.cases if "=" in case]
    options.cases = [case for case in options.cases if "=" not in case]
    path = ROOT / f"configs/{options.config}.yaml"
    report: dict = environment()
    out = options.out or Path(tempfile.mkdtemp()) / "training.json"
    rows: list[dict] = []
    report["training"] = rows
    processes = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            attention, tokens, _ = case.split(":")
            row: dict = {"config": options.config, "attention": attention, "tokens": int(tokens)}
            row["overrides"] = options.overrides
            rows.append(row)
            listen, to_parent = processes.Pipe(duplex=False)
            config = configuration(str(path), case, folder, options.overrides)
            process = processes.Process(target=train, args=(config, to_parent))
            process.start()
            to_parent.close()
            flops = training_flops_per_token(config.model, config.attention, int(tokens))
            count = config.training.global_batch_size * int(tokens)
            times, losses = [], []
            while True:
                try:
                    message = listen.recv()
                except EOFError:
                    break
                if isinstance(message, str):
                    row["refused"] = message
                    break
                seconds, loss, peak_gib, peak = message
                times.append(seconds)
                losses.append(round(loss, 4))
                measured = statistics.median(times[1:][-20:] or times)
                row |= {"steps": len(times), "first_step_s": round(times[0], 1), "step_ms": round(measured * 1e3, 1)}
                row |= {"tokens_per_s": round(count / measured), "peak_gib": round(peak_gib, 2)}
                row |= {f"mfu_{k}": round(f * count / measured / peak, 3) for k, f in flops.items()}
                row["loss"] = [losses[0], losses[-1]]
                out.write_text(json.dumps(report, indent=1) + "\n")
            process.join()
            if "steps" not in row:
                row.setdefault("refused", f"failed with exit code {process.exitcode}")
            out.write_text(json.dumps(report, indent=1) + "\n")
            print(row, flush=True)
    try:
        compared = list(compare(out))
    except ValueError as error:  # a device without a data sheet
        print(error)
        return
    print("\n".join(["", table(compared), "", *error_lines(compared)]))


if __name__ == "__main__":
    main()
