"""Trains the siblings of a comparison and then answers, stage by stage: what `bash launch.sh compare` does.

Each training, export and comparison is a process of its own, so that none holds memory of a GPU beside another.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch

from nsa.config import load_config
from nsa.evaluation.comparison.commands import stages_left, untrained
from nsa.evaluation.comparison.config import Training, load
from nsa.training.exit_codes import REQUEUE
from nsa.training.signals import CODES, die_with_parent

LEAST = 0.01  # minutes of a training: a step at least, so that every run gets further
LOOK = 0.1  # seconds between two looks at what runs
STEP = re.compile(r"^step +(\d+/\d+)  \|  loss (\S+)", re.MULTILINE)  # as `nsa.training.console` prints it
SAID = 5  # last lines of a log that are shown if it ended in an error


def run(launch: Path, path: str, overrides: list[str], minutes: float | None, workers: int) -> int:
    """Train what is not trained yet and answer, for each stage that is not finished.

    Args:
        launch: launch.sh, which trains. path, overrides: of the comparison. minutes: begin nothing new after so long.
        workers: trainings at once, at most, and processes that answer at once. 1: one training after the other, each
            on all GPUs; else each on one GPU, which trains ``trainings_per_gpu`` at once.

    Returns:
        The exit code: of what did not end well, or 75 if the time is over, or that of a signal.

    Raises:
        ValueError: a mistake in the configuration.
    """
    if workers > 1 and os.environ.get("HOSTFILE"):
        raise ValueError("several --workers are processes of this machine: unset HOSTFILE, or leave --workers out")
    end = None if minutes is None else time.monotonic() + 60 * minutes
    each = load(path, overrides).trainings_per_gpu
    with Children.attended() as children:
        trainings = Trainings(children, launch, workers, each, end)
        for stage in stages_left(path, overrides) or [""]:
            if stage:
                say(f"stage {stage}")
            if code := trainings.finish(untrained(path, overrides)):
                return code
            say("comparing")
            command = [sys.executable, "-m", "nsa.compare", path, *overrides, "--workers", str(workers)]
            if end is not None:
                command += ["--minutes", str(minutes_left(end))]
            child = children.start(command)
            while child.poll() is None:
                time.sleep(LOOK)
            if code := children.code_of(child):
                return code
    return 0


def say(text: str) -> None:
    """As launch.sh does."""
    print(f"\033[1m== {text}\033[0m", file=sys.stderr, flush=True)


def minutes_left(end: float) -> float:
    return max(0.0, (end - time.monotonic()) / 60)


class Children:
    """Processes that signals to this one are passed on to. They have process groups of their own."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the first signal
        self._started: list[subprocess.Popen[bytes]] = []

    @classmethod
    @contextmanager
    def attended(cls) -> Iterator["Children"]:
        """Within: no signal of `CODES` ends this process. What it starts decides, and ends."""
        children = cls()
        before = {number: signal.getsignal(number) for number in CODES}
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # nohup
                signal.signal(number, children.pass_on)
        try:
            yield children
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        self.asked = self.asked or number
        for child in self._started:
            child.send_signal(number)

    def start(
        self, command: Sequence[str], log: Path | None = None, environment: Mapping[str, str] = MappingProxyType({})
    ) -> "subprocess.Popen[bytes]":
        """A process that ends on a signal, and if this one ends.

        Args:
            log: gets its output; None: it has ours. environment: what it has besides ours.
        """
        child = _start(command, log, environment, partial(die_with_parent, signal.SIGTERM))
        self._started = [*(other for other in self._started if other.poll() is None), child]
        if self.asked is not None:  # a signal that came meanwhile
            child.send_signal(self.asked)
        return child

    def code_of(self, child: "subprocess.Popen[bytes]") -> int:
        """The exit code of one that has ended, as a shell has it; that of a signal to this process if it obeyed."""
        code = child.returncode
        if self.asked is not None and code in (0, -self.asked):
            return CODES[signal.Signals(self.asked)]
        return 128 - code if code < 0 else code


def _start(
    command: Sequence[str], log: Path | None, environment: Mapping[str, str], prepare: Any = None
) -> "subprocess.Popen[bytes]":
    out = None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        out = log.open("ab")
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=None if out is None else subprocess.STDOUT,
            env={**os.environ, **environment},
            process_group=0,
            preexec_fn=prepare,
        )
    finally:
        if out is not None:
            out.close()


@dataclass
class Running:
    """A training that runs. slot: its number among those that run. log: None: it prints where this process does.

    environment: what it has besides ours.
    """

    run: Path
    slot: int
    process: "subprocess.Popen[bytes]"
    log: Path | None
    environment: Mapping[str, str]
    begun: float
    exports: bool = False


class Trainings:
    """Trains and exports, several at once.

    Args:
        children: what is started. launch: launch.sh. workers: trainings at once, of which a GPU has ``each``.
        end: when the time is over, by `time.monotonic`.
    """

    def __init__(self, children: Children, launch: Path, workers: int, each: int, end: float | None) -> None:
        self.children, self.launch, self.end = children, launch, end
        self.gpus = [] if workers == 1 else visible_gpus()
        self.several = workers > 1
        self.most = min(workers, each * len(self.gpus)) if self.gpus else workers
        self.threads = max(1, len(os.sched_getaffinity(0)) // self.most)
        self.began = False

    def finish(self, todo: Sequence[Training]) -> int:
        """Train all of them. One that starts from another, or has its tokenizer, waits for it.

        Returns:
            0, or the exit code of the first that did not end well; then the others are stopped and saved.

        Raises:
            ValueError: trainings wait for one another.
        """
        waiting = {training.run: training for training in todo if training.run is not None}
        running, code = list[Running](), 0
        needs = needed(todo)
        while running or (waiting and not code):
            unfinished = {*waiting, *(one.run for one in running)}
            ready = [run for run in waiting if not needs[run] & unfinished]
            for run in ready:
                if len(running) == self.most or code or self.children.asked is not None:
                    break
                if self.end is not None and minutes_left(self.end) == 0 and self.began:
                    say("the time is over: run the same command again")
                    code = REQUEUE
                    break
                running.append(self._begin(waiting.pop(run), {one.slot for one in running}))
            if not running:
                if waiting and not ready:
                    raise ValueError(f"{', '.join(map(str, waiting))}: each of these trainings starts from another one")
                break
            time.sleep(LOOK)
            for one in [one for one in running if one.process.poll() is not None]:
                ended = self.children.code_of(one.process)
                if not ended and not one.exports:
                    export = [sys.executable, "-m", "nsa.export", str(one.run)]
                    one.process, one.exports = _start(export, one.log, one.environment), True  # no signal interrupts it
                    continue
                running.remove(one)
                self._tell(one, ended)
                if ended not in (0, REQUEUE) and code in (0, REQUEUE) and running:
                    say("the other trainings are stopped, and save")
                    self.children.pass_on(signal.SIGTERM)
                code = ended if code in (0, REQUEUE) and ended else code
        if not code and self.children.asked is not None:
            code = CODES[signal.Signals(self.children.asked)]
        return code

    def _begin(self, training: Training, taken: set[int]) -> Running:
        assert training.run is not None and training.arguments is not None
        slot = min(set(range(self.most)) - taken)
        command = ["bash", str(self.launch), "train", *training.arguments]
        if self.end is not None:
            command.append(f"training.max_hours={max(LEAST, minutes_left(self.end)) / 60:.6f}")
        self.began = True
        log, environment, where = None, dict[str, str](), ""
        if self.several:
            log = training.run.with_name(f"{training.run.name}.log")
            environment["MASTER_PORT"] = ""  # each finds one
            if self.gpus:
                gpu = self.gpus[slot % len(self.gpus)]
                environment["CUDA_VISIBLE_DEVICES"] = gpu
                where = f" on GPU {gpu}"
            elif "OMP_NUM_THREADS" not in os.environ:
                environment["OMP_NUM_THREADS"] = str(self.threads)
            where += f", its output is in {log}"
        say(f"training {training.run}{where}")
        process = self.children.start(command, log, environment)
        return Running(training.run, slot, process, log, environment, time.monotonic())

    def _tell(self, one: Running, code: int) -> None:
        """That it ended, if it did not print by itself."""
        if one.log is None:
            return
        text = one.log.read_text(errors="replace")
        losses = STEP.findall(text)
        last = "" if not losses else f", loss {losses[-1][1]} at step {losses[-1][0]}"
        minutes = (time.monotonic() - one.begun) / 60
        if code == 0:
            say(f"trained and exported {one.run}, {minutes:.1f} min{last}")
            return
        say(f"{one.run} ended with exit code {code}, {minutes:.1f} min{last}")
        if code not in (REQUEUE, CODES[signal.SIGINT]):
            print("\n".join([*text.splitlines()[-SAID:], f"all of it is in {one.log}"]), file=sys.stderr, flush=True)


def visible_gpus() -> list[str]:
    """The GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    if not torch.cuda.is_available():
        return []
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return (named or list(map(str, range(torch.cuda.device_count()))))[: torch.cuda.device_count()]


def needed(trainings: Sequence[Training]) -> dict[Path, set[Path]]:
    """By run folder: the other run folders that its configuration names, or something in them."""
    runs = {training.run: training for training in trainings if training.run is not None}
    found: dict[Path, set[Path]] = {}
    for run, training in runs.items():
        assert training.arguments is not None
        config = load_config(training.arguments[0], training.arguments[1:])
        named = [Path(text).resolve() for text in _texts(config.model_dump(mode="json"))]
        folders = {folder for path in named for folder in (path, *path.parents)}
        found[run] = {other for other in runs if other != run and other.resolve() in folders}
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
