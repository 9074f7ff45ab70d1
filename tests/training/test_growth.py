"""No step of the trainer costs more than the one before: between step 50 and step 150 nothing grows.

Counted are the objects of each type; the lengths of all containers within reach of the trainer (and so of its engine,
loader, watchdog, monitor and checkpoint_writer) or of a module of ours or DeepSpeed's; hooks, threads and open files.
"""

import gc
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from sys import modules
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import rank_checks
from deepspeed.runtime.config import DeepSpeedConfig
from tiny import on_ranks, tiny_config

from nsa.config import Config
from nsa.training import trainer as trainer_module
from nsa.training.deepspeed_config import deepspeed_config
from nsa.training.distributed import Ranks
from nsa.training.signals import StopRequest
from nsa.training.trainer import Trainer
from tests.parallel.layouts import MOE, layout
from tests.training.conftest import OFFLOAD, engines

LOOKS = [50, 150]
# All periods divide the distance of two looks: both are at the same phase, and what leaks by period leaks ten times.
PERIODS = ["training.log_every=4", "training.validation_every=10", "training.probe_every=10", "checkpoint.every=10"]
# The window of losses is full long before a look, and no loss of so small a model is a spike.
TINY = ["model.num_layers=1", "attention.kind=nsa", "data.sequence_length=32", "data.workers=1"]
TINY += ["training.global_batch_size=2", "checkpoint.keep_last=2", "recovery.window=8", "recovery.loss_sigma=100"]
BUSY = 5  # objects of a type that the watchdog or TensorBoard may hold at the moment, or threads that wait just then

CONTAINERS = (dict, list, tuple, set, frozenset, deque)
OURS = {"nsa", "deepspeed"}
# Whose objects are looked into. What others (pydantic, numpy) keep of a run shows in the number of objects alone.
WALKED = OURS | {"__main__", "builtins", "collections", "concurrent", "functools", "queue", "threading"}
WALKED |= {"tensorboard", "torch", "weakref"}


def package(module: str) -> str:
    return module.split(".")[0]


def walked(value: Any) -> bool:
    """Whether to look into ``value``."""
    if isinstance(value, ModuleType):
        return False  # those of OURS are roots
    if isinstance(value, type):
        return package(value.__module__) in OURS
    if hasattr(value, "cache_info"):
        return value.cache_info().maxsize is None  # others are bounded
    return isinstance(value, CONTAINERS) or (gc.is_tracked(value) and package(type(value).__module__) in WALKED)


def parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What ``value`` refers to, by names that do not depend on how much of it there is."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield f"{path}[{key!r}]" if isinstance(key, str) else f"{path}[{type(key).__name__}]", part
    elif isinstance(value, CONTAINERS):
        yield from ((f"{path}[]", part) for part in value)
    else:
        attributes = getattr(value, "__dict__", {})
        yield from ((f"{path}.{name}", part) for name, part in attributes.items())
        known = {id(part) for part in (attributes, *attributes.values(), getattr(value, "__globals__", None))}
        for part in gc.get_referents(value):  # slots, closures, arguments of a partial
            if id(part) not in known:
                yield f"{path}<{type(part).__name__}>", part


def lengths(roots: dict[str, Any]) -> Counter[str]:
    """Of all containers within reach of ``roots``, by the way to them; those of one way together."""
    found: Counter[str] = Counter()
    seen = set(map(id, roots.values()))
    ahead = deque(roots.items())
    while ahead:
        path, value = ahead.popleft()
        if isinstance(value, CONTAINERS):
            found[path] += len(value)
        for name, part in parts(value, path):
            if id(part) not in seen and walked(part):
                seen.add(id(part))
                ahead.append((name, part))
    return found


def native_threads() -> int:
    """Those that stay: the fewest in a second. One that a library starts for a moment is not counted."""
    counts = []
    for _ in range(20):
        counts.append(len(list(Path("/proc/self/task").iterdir())))
        time.sleep(0.05)
    return min(counts)


def look(trainer: Trainer) -> dict[str, int]:
    """Counts of what this process holds, once the threads beside the training have nothing to do."""
    trainer.writer.wait()
    if trainer.loader._ahead:
        trainer.loader._ahead[1].result()
    counts = lengths({"trainer": trainer} | {name: vars(m) for name, m in modules.items() if package(name) in OURS})
    hooks = [p._backward_hooks for p in trainer.engine.module.parameters()]
    hooks += [p._post_accumulate_grad_hooks for p in trainer.engine.module.parameters()]
    counts["hooks of parameters"] = sum(len(h or ()) for h in hooks)  # those of modules are within reach
    counts["threads"] = threading.active_count()
    counts["native threads"] = native_threads()
    counts["open files"] = len(list(Path("/proc/self/fd").iterdir()))
    gc.collect()
    return counts | Counter(f"objects: {type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects())


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, list[int]]:
    """What grew, from how much to how much."""

    def momentary(name: str) -> bool:
        return name.startswith("objects: ") or name.endswith("._waiters")

    pairs = {name: [before.get(name, 0), n] for name, n in after.items()}
    return {name: [a, b] for name, (a, b) in pairs.items() if b - a > (BUSY if momentary(name) else 0)}


def growth(ranks: Ranks, folder: Path, overrides: list[str], looks: list[int], plant: bool = False) -> list[Any]:
    """What grew on each rank between the two ``looks`` (steps behind the run).

    ``plant``: two things are made to grow, DeepSpeed's log of collectives and a list of the trainer's.
    """

    def with_logger(config: Config, world_size: int) -> dict[str, Any]:
        return deepspeed_config(config, world_size) | {"comms_logger": {"enabled": False}}

    config = tiny_config(folder, f"training.steps={looks[1] + 1}", *PERIODS, *TINY, *overrides)
    with mock.patch.object(trainer_module, "deepspeed_config", with_logger if plant else deepspeed_config):
        trainer = Trainer(config, ranks)
    step, trainer.planted = trainer.train_step, []
    seen = dict.fromkeys(looks, "")  # as text, which is neither a container nor an object of the collector

    def train_step(stop: StopRequest) -> Any:
        if trainer.progress.step in looks:
            if not any(seen.values()):
                look(trainer)  # makes what the next find made: dictionaries of attributes, caches of type checks
            seen[trainer.progress.step] = json.dumps(look(trainer))
        if plant:
            trainer.planted.append(trainer.progress.step)
        return step(stop)

    trainer.train_step = train_step
    assert trainer.run() == 0
    return ranks.gather(grown(*map(json.loads, seen.values())))


def checks(*cases: list[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    return {" ".join(case): ("growth", {"overrides": case, "looks": LOOKS}) for case in cases}


def test_nothing_grows_in_one_process(tmp_path):
    """Nor is it overlooked if something does: in a second run two things are made to."""
    engine = ["engine.zero_stage=1", "engine.precision=bf16", "training.global_batch_size=1"]
    planted = {"planted": ("growth", {"overrides": engine, "looks": [50, 70], "plant": True})}
    answers = on_ranks(1, tmp_path, checks(engine) | planted, Path(__file__))
    (found,) = answers.pop("planted")
    assert found.pop("trainer.planted") == [50, 70]
    assert found["deepspeed.comm.comm['timers'].timers['all_reduce'].event_timers"] == [100, 140], "two in each step"
    assert [name for name in found if not name.startswith("deepspeed.comm.comm[")] == []
    assert list(answers.values()) == [[{}]]


def test_nothing_grows_on_two_ranks(tmp_path):
    engine = ["engine.zero_stage=2", "engine.precision=bf16"]
    assert list(on_ranks(2, tmp_path, checks(engine), Path(__file__)).values()) == [[{}, {}]]


@pytest.mark.slow
def test_nothing_grows_in_any_engine_or_layout(tmp_path):
    cases = engines("fp32") + engines("bf16", stages=[0, 1, 3]) + engines("bf16", OFFLOAD, stages=[2, 3])
    cases += [[*layout(**sizes), "model.num_layers=2"] for sizes in ({"pipeline": 2}, {"tensor": 2}, {"context": 2})]
    cases += [[*layout(1, expert=2), *MOE], ["engine.activation_checkpointing=full"], ["training.global_batch_size=4"]]
    answers = on_ranks(2, tmp_path, checks(*cases), Path(__file__), timeout=3600)
    assert {case: found for case, found in answers.items() if found != [{}, {}]} == {}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_what_is_left_to_the_defaults_of_deepspeed(tmp_path, stage):
    """Defaults of this release that its configuration leaves out: nothing is measured, nothing printed, and gradients
    are averaged as the trainer expects."""
    read = DeepSpeedConfig(deepspeed_config(tiny_config(tmp_path, f"engine.zero_stage={stage}"), 1))
    assert not read.comms_config.comms_logger_enabled and not read.timers_config.enabled
    assert not (read.wall_clock_breakdown or read.memory_breakdown or read.dump_state or read.steps_per_print)
    assert not (read.monitor_config.enabled or read.flops_profiler_config.enabled or read.autotuning_config.enabled)
    assert not (read.float16_config.enabled or read.torch_autocast_enabled or read.zero_config.round_robin_gradients)
    assert read.gradient_allreduce_op == "mean" and read.managed_gradient_accumulation
    assert not read.prescale_gradients and read.gradient_predivide_factor == 1
    assert read.zero_config.ignore_unused_parameters and read.zero_config.compute_grad_norm


if __name__ == "__main__":
    rank_checks.main(globals())
