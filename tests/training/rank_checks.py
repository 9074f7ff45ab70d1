"""What the tests run on several ranks: `rank_checks.py FOLDER WORLD_SIZE`, started by tiny.on_ranks."""

import json
import math
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny import as_rank, free_port, tiny_config

from nsa.config import Config
from nsa.layers.kinds import kind_of
from nsa.training import checkpoint
from nsa.training import trainer as trainer_module
from nsa.training.cuda_graphs import forget_recordings
from nsa.training.deepspeed_config import deepspeed_config
from nsa.training.distributed import Ranks, initialize
from nsa.training.optimizer import STATE_KEYS
from nsa.training.sharded_state import local_shards
from nsa.training.signals import StopRequest
from nsa.training.spikes import batch_number
from nsa.training.trainer import Trainer
from tests.warm_python import import_all


def every_weight_sharded(config: Config, world_size: int) -> dict[str, Any]:
    """`deepspeed_config`, without ZeRO 3's exception for small weights: those of a tiny model are all small."""
    result = deepspeed_config(config, world_size)
    if config.engine.zero_stage == 3:
        result["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return result


@mock.patch.object(trainer_module, "deepspeed_config", every_weight_sharded)
def curves(ranks: Ranks, folder: Path, cases: list[list[str]], steps: int) -> list[list[list[float]]]:
    """For each case (overrides): loss and gradient norm of every step."""
    answer = []
    for number, overrides in enumerate(cases):
        config = tiny_config(folder, f"name=curve{number}-{ranks.world_size}", f"training.steps={steps}", *overrides)
        trainer, stop = Trainer(config, ranks), StopRequest()
        results = [trainer.train_step(stop) for _ in range(steps)]
        close(trainer)
        answer.append([[r.loss, r.grad_norm] for r in results])
    return answer


def resume(ranks: Ranks, folder: Path, cases: list[list[str]], after: list[int]) -> list[list[list[str]]]:
    """For each case and each step in ``after``: what differs between a run that went through, and one resumed there."""
    answer = []
    for number, overrides in enumerate(cases):
        straight = tiny_config(folder, f"name=straight{number}", *overrides)
        run(ranks, straight)
        different = []
        for step in after:
            resumed = tiny_config(folder, f"name=resumed{number}-{step}", *overrides)
            ranks.on_main(lambda straight=straight, resumed=resumed, step=step: copy(straight, resumed, step))
            run(ranks, resumed)
            different.append(ranks.on_main(lambda a=straight, b=resumed: differences(a, b)))
        answer.append(different)
    return answer


def go_on(ranks: Ranks, folder: Path, overrides: list[str], checkpoint_of: str | None = None) -> list[float]:
    """Losses of a run, or of what another left: ``checkpoint_of`` is a run folder whose checkpoints it takes over."""
    config = tiny_config(folder, *overrides)
    if checkpoint_of:
        target = Path(config.output_dir) / config.name
        ranks.on_main(lambda: shutil.copytree(checkpoint_of, target) and None)
    run(ranks, config)
    return ranks.on_main(lambda: logged(Path(config.output_dir) / config.name, "train/loss"))


def not_finite(ranks: Ranks, folder: Path, cases: list[list[str]]) -> list[list[dict[str, Any]]]:
    """For each case, three steps that break on the last rank alone, by loss or by gradient, with a good one between:
    what every rank saw, and the weights before and after."""
    answer = []
    for number, overrides in enumerate(cases):
        trainer = Trainer(tiny_config(folder, f"name=broken{number}", *overrides), ranks)
        stop, seen = StopRequest(), []
        for fault in ("loss", "none", "gradient", "none"):
            before = weights(trainer)
            with broken(trainer, fault if ranks.rank == ranks.world_size - 1 else "none"):
                result = trainer.train_step(stop)
            after = weights(trainer)
            changed = any(not torch.equal(before[name], after[name]) for name in before)
            finite = all(bool(t.isfinite().all()) for t in after.values())
            mine = {"skipped": result.skipped, "changed": changed, "finite": finite}
            mine |= {"loss": result.loss, "updates": trainer.progress.updates, "rate": result.learning_rate}
            seen.append(ranks.gather(mine))
        close(trainer)
        answer.append(seen)
    return answer


def stop_one_rank(ranks: Ranks, folder: Path) -> int:
    """The step in which all ranks stopped, after the last rank alone was asked to before its third step."""
    trainer = Trainer(tiny_config(folder, "name=stopped"), ranks)
    step = trainer.train_step

    def asked(stop: StopRequest) -> Any:
        if trainer.progress.step == 2 and ranks.rank == ranks.world_size - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(stop)

    trainer.train_step = asked
    trainer.run()
    assert len(set(ranks.gather(trainer.progress.step))) == 1
    return trainer.progress.step


def rolled_back(ranks: Ranks, folder: Path, cases: list[list[str]]) -> list[dict[str, Any]]:
    """For each case: a run whose batches 6 and 7 spike goes back and leaves them out. What differs at its end from a
    run that left them out from the beginning, and what it remembers."""
    answer = []
    for number, overrides in enumerate(cases):
        rules = ["training.steps=10", "recovery.window=8", "recovery.max_spikes=1", "checkpoint.keep_last=2"]
        spiky, never = (tiny_config(folder, f"name={n}{number}", *rules, *overrides) for n in ("spiky", "never"))
        trainer = Spiky(spiky, ranks)
        assert trainer.run() == 0
        other = Spiky(never, ranks)
        other.progress.spikes.quarantine, other.progress.spikes.rollbacks = [6, 7], 1
        assert other.run() == 0
        found = {"different": ranks.on_main(lambda a=spiky, b=never: differences(a, b))}
        found |= {"quarantine": trainer.progress.spikes.quarantine, "rollbacks": trainer.progress.spikes.rollbacks}
        answer.append(found)
    return answer


def stages(ranks: Ranks, folder: Path, cases: list[list[str]], kind: str = "dsa") -> list[dict[str, Any]]:
    """For each case, a dense run, one that trains what chooses, and a sparse one, each from the one before."""
    sizes, part, rate = STAGED[kind]
    answer = []
    for number, overrides in enumerate(cases):
        runs = folder / "runs"

        def config(name: str, *more: str, overrides: Any = overrides, number: int = number) -> Config:
            return tiny_config(folder, f"name={name}{number}", *overrides, *more)

        dense = config("dense", "attention.kind=dense", "training.steps=4")
        taught = [*sizes, f"attention.{kind}.phase=warm-up", "train=indexer", f"start_from={runs}/dense{number}"]
        taught += [f"optimizer.learning_rate={rate}", "training.steps=8"]
        sparse = [*sizes, f"start_from={runs}/taught{number}", "training.steps=4"]
        first, again = config("taught", *taught), config("again", *taught)
        last, killed = config("sparse", *sparse), config("killed", *sparse)
        for one in (dense, first, last):
            run(ranks, one)
        ranks.on_main(lambda a=first, b=again, c=last, d=killed: copy(a, b, 4) or copy(c, d, 2))
        run(ranks, again)
        run(ranks, killed)
        runs_twice = config("twice", *sparse)  # killed before its first checkpoint
        run(ranks, runs_twice)

        def facts(runs: Any = (dense, first, last, again, killed, runs_twice)) -> dict[str, Any]:
            _, taught, last, again, killed, twice = runs
            folders = [Path(c.output_dir) / c.name for c in runs]
            before, after, sparse = (checkpoint.load_weights(checkpoint.latest_complete(f)) for f in folders[:3])
            moments = checkpoint.TensorReader(checkpoint.latest_complete(folders[1]), "optimizer").names()
            begun = {name: first_value(name, tensor, before, taught, kind) for name, tensor in after.items()}
            changed = [n for n, value in begun.items() if value is None or not torch.equal(value, after[n])]
            return {
                "frozen changed": [n for n in changed if f".attention.{part}." not in n],
                "trained": sum(f".attention.{part}." in n for n in changed) / sum(f".{part}." in n for n in after),
                "moments of it alone": all(f".{part}." in n for n in moments) and bool(moments),
                "sparse changed": sum(not torch.equal(after[n], sparse[n]) for n in sparse) / len(sparse),
                "losses": [logged(f, "train/loss") for f in folders[:3]],
                "validation": [logged_some(f, "validation/loss")[-1] for f in folders[:3]],
                "different": differences(taught, again) + differences(last, killed) + differences(last, twice),
            }

        answer.append(ranks.on_main(facts))
    return answer


def first_value(
    name: str, tensor: torch.Tensor, before: dict[str, torch.Tensor], config: Config, kind: str
) -> torch.Tensor | None:
    """Of a weight of a run that began with the weights ``before`` of a dense one; None: it is a new run's."""
    prefix, _, inside = name.partition(".attention.")
    if not inside:
        return before[name]
    here = kind_of(kind)
    section = config.attention.of(here)
    return here.from_dense(inside, tensor.shape, section, lambda part: before[f"{prefix}.attention.{part}"])


INDEXER = [
    "attention.kind=dsa",
    "attention.dsa={topk: 16, index_heads: 4, index_head_dim: 16, index_rotary_dims: 8}",
]
# Overrides of a kind that is taught, what its warm-up trains, and how fast: an indexer is new, a compression a mean.
STAGED = {
    "dsa": (INDEXER, "indexer", 0.02),
    "nsa": (["attention.kind=nsa", "attention.nsa.num_local=1"], "compress.key", 0.001),
}


def sections(ranks: Ranks, folder: Path, cases: list[list[str]]) -> list[dict[str, Any]]:
    """For each case, one clipped step with the indexer's loss times 1 and times 1000: the length of the step, over the
    learning rate, in the model and in the indexer; and whether the model's weights are the same."""
    answer = []
    for number, overrides in enumerate(cases):
        seen: list[dict[str, torch.Tensor]] = []
        lengths = []
        for weight in (1, 1000):
            more = ["optimizer.kind=sgd", "optimizer.learning_rate=1", "optimizer.weight_decay=0"]
            more += [
                "optimizer.gradient_clipping=0.01",
                "optimizer.warmup_steps=0",
                *INDEXER,
                f"name=s{number}-{weight}",
            ]
            config = tiny_config(folder, *more, *overrides, f"attention.dsa.kl_weight={weight}")
            trainer = Trainer(config, ranks)
            before = weights(trainer)
            trainer.train_step(StopRequest())
            after = {n: t for n, t in weights(trainer).items() if n.startswith("weight.")}
            squares = torch.zeros(2, dtype=torch.float64)
            shards = local_shards(trainer.engine, ())
            for name, value in after.items():
                if shards[name.removeprefix("weight.")].speaks:
                    squares[int(".indexer." in name)] += (value - before[name]).double().square().sum()
            lengths.append(ranks.sum(squares).sqrt().tolist())
            seen.append({n: t for n, t in after.items() if ".indexer." not in n})
            close(trainer)
        same = all(torch.equal(seen[0][n], seen[1][n]) for n in seen[0])
        answer.append({"lengths": lengths, "same": all(ranks.gather(same))})
    return answer


class Spiky(Trainer):
    """Batches 6 and 7 have ten times the loss."""

    def _read_step(self, step: int) -> list[Any]:
        number = batch_number(step, self.progress.spikes.quarantine)
        return [micro_batch | {"bad": number in (6, 7)} for micro_batch in super()._read_step(step)]

    def _losses(self, micro_batch: Any) -> torch.Tensor:
        return super()._losses(micro_batch) * (10 if micro_batch.get("bad") else 1)


# ------------------------------------------------------------------------------------------------------- parts


def run(ranks: Ranks, config: Config) -> None:
    Trainer(config, ranks).run()


def close(trainer: Trainer) -> None:
    """Of a trainer whose steps were taken one by one."""
    trainer.loader.close()
    if trainer.monitor:
        trainer.monitor.close()


def copy(source: Config, target: Config, step: int) -> None:
    """Leave ``target`` as a run that was killed after ``step``."""
    folder = Path(target.output_dir) / target.name
    folder.mkdir(parents=True)
    name = checkpoint.folder_name(step)
    shutil.copytree(Path(source.output_dir) / source.name / name, folder / name)


def differences(a: Config, b: Config) -> list[str]:
    """Files of the last checkpoint whose bytes differ."""
    name = checkpoint.folder_name(a.training.steps)
    entries = []
    for config in (a, b):
        manifest = (Path(config.output_dir) / config.name / name / checkpoint.MANIFEST).read_text()
        entries.append({k: v["sha256"] for k, v in json.loads(manifest)["files"].items() if k != "config.yaml"})
    return [key for key in sorted(entries[0].keys() | entries[1].keys()) if entries[0].get(key) != entries[1].get(key)]


def logged_some(folder: Path, key: str) -> list[float]:
    """As `logged`, of the steps that have it."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def logged(folder: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights that this rank computes with, and what it holds of the fp32 weights, moments and buffers."""
    shards = local_shards(trainer.engine, STATE_KEYS[trainer.config.optimizer.kind])
    held = {f"{key}.{name}": t.clone() for name, shard in shards.items() for key, t in shard.tensors.items()}
    # Between steps ZeRO 3 keeps partitions (ds_tensor) of the weights it computes with.
    return held | {n: getattr(p, "ds_tensor", p).detach().clone() for n, p in trainer.engine.module.named_parameters()}


class broken:
    """While open, the trainer's losses (or the gradient that flows from them) are not finite."""

    def __init__(self, trainer: Trainer, fault: str) -> None:
        self.trainer, self.fault = trainer, fault

    def __enter__(self) -> None:
        self.stage = stage = self.trainer._stage

        def with_fault(micro_batch: Any) -> torch.Tensor:
            values = stage(micro_batch)
            if self.fault == "loss":
                return values * math.nan
            if self.fault == "gradient":
                values.register_hook(lambda gradient: gradient * math.inf)
            return values

        self.trainer._stage = with_fault

    def __exit__(self, *error: object) -> None:
        self.trainer._stage = self.stage


def main(checks: dict[str, Any]) -> None:
    """Run each check in processes of its own. They are forked: the imports take longer than most checks."""
    folder, world_size = Path(sys.argv[1]), int(sys.argv[2])
    import_all()
    for name, (check, arguments) in json.loads((folder / "checks.json").read_text()).items():
        port = free_port()
        ranks = [fork(partial(run_check, checks[check], arguments, folder / name), rank, world_size, port)
                 for rank in range(world_size)]  # fmt: skip
        if failed := [rank for rank, process in enumerate(ranks) if os.waitpid(process, 0)[1]]:
            sys.exit(f"{name} failed on ranks {failed}")


def fork(function: Callable[[], None], rank: int, world_size: int, port: int) -> int:
    """Call ``function`` in a new process, as one rank; returns the process."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ |= as_rank(rank, world_size, port)
        function()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_check(function: Callable[..., Any], arguments: dict[str, Any], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    ranks = initialize()
    try:
        answer = function(ranks, folder, **arguments)
    finally:
        forget_recordings()
    if ranks.is_main:
        (folder.parent / f"{folder.name}.json").write_text(json.dumps(answer))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(globals())
