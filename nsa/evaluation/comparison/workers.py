"""Answers cells in several processes at once, spread over the GPUs of this machine.

The process that starts them deals out units of work, and alone writes what they share: cells that are left out, and how
siblings were trained. A worker writes its cells. Which cells there are, and what they say, does not depend on who
answers them.
"""

import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Any, Self

import torch

from nsa.evaluation.comparison.arms import Place, Unit
from nsa.evaluation.comparison.cells import Cells, TimeUpError
from nsa.evaluation.comparison.config import ComparisonConfig
from nsa.evaluation.comparison.folder import ResultsFolder
from nsa.evaluation.comparison.models import Candidate
from nsa.exporting.folder import CONFIG
from nsa.training.memory import is_memory
from nsa.training.signals import die_with_parent, ignore

# What a worker says: of a unit that it answers, and how that ended.
PROGRESS, LEFT_OUT, SAID = "progress", "left out", "said"
DONE, TIME_UP, MISTAKE, MEMORY, FAULT = "done", "time up", "mistake", "memory", "fault"


class WorkerLostError(Exception):
    """A worker was killed from outside; everything that was answered is written."""


@dataclass(frozen=True)
class Start:
    """What a worker is started with. threads: of the CPU. end: when the time is over, by `time.monotonic`."""

    config: ComparisonConfig
    folder: ResultsFolder
    device: str
    threads: int
    end: float
    parent: int


@dataclass
class Worker:
    """A process. unit: that it answers; None: it waits. model, place: of its last unit, still in its memory.

    alone: whether there was no other since it got its unit.
    """

    number: int
    process: SpawnProcess
    connection: Connection
    unit: Unit | None = None
    model: Candidate | None = None
    place: Place | None = None
    alone: bool = False


@dataclass
class Workers:
    """Within a ``with``: so many processes, which are killed at its end; with a count of 1 this process answers.

    A process without memory for one sample ends. Others get its cells when all else is dealt out, at last one alone.

    Args:
        cells: of this process. device: "cuda" (worker i computes on GPU i modulo their number) or another one for all.
        say: called with what happens, in words.
    """

    count: int
    cells: Cells
    device: str
    say: Callable[[str], None]
    _begun: bool = False
    _workers: list[Worker] = field(default_factory=list)
    _given_back: list[Unit] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._start = Start(
            config=self.cells.config,
            folder=self.cells.folder,
            device=self.device,
            threads=max(1, torch.get_num_threads() // self.count),
            end=time.monotonic() + self.cells.time_left() if self.count > 1 else 0.0,
            parent=os.getpid(),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in self._workers:
            worker.process.kill()  # a cell is there whole or not at all
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()

    def finish(
        self, units: Sequence[Unit], progress: Callable[[float], None], then: Callable[[], Sequence[Unit]] = list
    ) -> None:
        """Answer what is missing.

        Args:
            progress: called with how many cells more are done or left out, parts of cells included.
            then: called whenever some of them are answered. Returns what else is to be answered.

        Raises:
            TimeUpError: no time is left; not before the first cell of a run is done.
            WorkerLostError: a worker was killed.
            torch.OutOfMemoryError: a worker had too little memory for one sample, and there was no other.
            ValueError: what a worker raised.
        """
        if self.count == 1:
            while units:
                for unit in units:
                    self.cells.finish(unit, progress)
                units = then()
            return
        waiting, whole = self._missing(units, progress), True
        while True:
            waiting += self._missing(then(), progress)
            self._deal(waiting)
            busy = [worker for worker in self._workers if worker.unit is not None]
            if not busy:
                break
            ready = wait([worker.connection for worker in busy])
            for worker in (worker for worker in busy if worker.connection in ready):
                whole = self._hear(worker, progress) and whole
        if waiting or self._given_back or not whole:
            raise TimeUpError

    def _missing(self, units: Sequence[Unit], progress: Callable[[float], None]) -> list[Unit]:
        """What is missing of them, shared out."""
        found = []
        for unit in units:
            missing = self.cells.missing(unit)
            progress(len(unit.arms) - len(missing))
            found += [Unit(missing, unit.place)] if missing else []
        return shared_out(found, self.count)

    def _deal(self, waiting: list[Unit]) -> None:
        """Give units to workers that have none, while there is time; what was given back comes last."""
        while (units := waiting or self._given_back) and (not self._begun or self.cells.time_left() > 0):
            worker = next((worker for worker in self._workers if worker.unit is None), None)
            if worker is None and len(self._workers) < self.count:
                worker = self._started(len(self._workers))
            if worker is None:
                return
            self._begun = True
            worker.unit = unit = next_of(units, worker.model, worker.place)
            worker.model, worker.place, worker.alone = unit.model, unit.place, len(self._workers) == 1
            units.remove(unit)
            self.cells.folder.keep_training(unit.model.label, unit.model.folder / CONFIG)
            try:
                worker.connection.send(unit)
            except OSError:
                raise self._lost(worker) from None

    def _hear(self, worker: Worker, progress: Callable[[float], None]) -> bool:
        """Take one message of a worker. Returns False if the time was over before it had answered its unit."""
        try:
            what, *said = worker.connection.recv()
        except (EOFError, OSError):
            raise self._lost(worker) from None
        if what == PROGRESS:
            progress(*said)
        elif what == LEFT_OUT:
            self.cells.leave_out(*said)
        elif what == SAID:
            self.say(f"worker {worker.number}: {said[0]}")
        elif what == MISTAKE:
            raise ValueError(*said)
        elif what == MEMORY:
            self._give_back(worker, said[0], progress)
        elif what == FAULT:
            raise RuntimeError(f"worker {worker.number} failed:\n{said[0]}")
        else:
            worker.unit = None
        return bool(what != TIME_UP)

    def _give_back(self, worker: Worker, why: str, progress: Callable[[float], None]) -> None:
        """One without memory for one sample ends, so that others have its memory.

        Raises:
            torch.OutOfMemoryError: there was no other.
        """
        assert worker.unit is not None
        self._workers.remove(worker)
        worker.process.join(10)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        if worker.alone:
            raise torch.OutOfMemoryError(why)
        self._given_back += self._missing([worker.unit], progress)
        self.count = len(self._workers) or 1
        rest = f"{self.count} go on" if self._workers else "another begins alone"
        self.say(
            f"worker {worker.number}: out of memory at {worker.unit.model.label} {worker.unit.place}, one sample at a "
            f"time: it ends, {rest}"
        )

    def _started(self, number: int) -> Worker:
        context = get_context("spawn")  # this process may have threads, which a forked one would lack
        mine, its = context.Pipe()
        device = self.device
        if device == "cuda":
            device = f"cuda:{number % torch.cuda.device_count()}"
        start = Start(**{**vars(self._start), "device": device})
        process = context.Process(target=_work, args=(start, its), name=f"worker {number}")
        process.start()
        its.close()  # so that its end is seen here
        worker = Worker(number, process, mine)
        for other in self._workers:
            other.alone = False
        self._workers.append(worker)
        return worker

    def _lost(self, worker: Worker) -> WorkerLostError:
        worker.process.join(10)
        code = worker.process.exitcode
        how = f"exit code {code}"
        if code is not None and code < 0:
            how = f"signal {signal.Signals(-code).name}"
        return WorkerLostError(
            f"worker {worker.number} was killed ({how}). If the machine ran out of memory, start fewer --workers than "
            f"{self.count}, or lower batch_tokens. Finished cells are written: run the same command again"
        )


def shared_out(units: Sequence[Unit], workers: int) -> list[Unit]:
    """Units of at most as many cells as a worker has on average: else all others would wait for a large one."""
    most = ceil(sum(len(unit.arms) for unit in units) / workers)
    return [
        Unit(unit.arms[first : first + most], unit.place) for unit in units for first in range(0, len(unit.arms), most)
    ]


def next_of(units: Sequence[Unit], model: Candidate | None, place: Place | None) -> Unit:
    """Which unit comes next: one without a method first, then what takes longest, then what this worker has in memory.

    So methods can begin everywhere, and the last to be dealt are small. How long a unit takes is estimated by its
    cells and the length of their samples.

    Args:
        units: those that wait, at least one. model, place: of the worker's last unit; None: it had none.
    """
    return min(
        units,
        key=lambda unit: (
            any(arm.chooses for arm in unit.arms),
            -len(unit.arms) * unit.place.length,
            unit.place != place,
            unit.model != model,
        ),
    )


def _work(start: Start, connection: Connection) -> None:
    """What a worker does: answers units until the process that started it ends, or it has no memory for one sample."""
    die_with_parent()
    ignore()  # of a signal the other process decides
    if os.getppid() != start.parent:
        return
    torch.set_num_threads(start.threads)

    def send(what: str, *said: Any) -> None:
        connection.send((what, *said))

    def note(what: str, why: str) -> None:
        send(LEFT_OUT, what, why)

    cells = Cells(start.config, start.folder, note, start.device, lambda: start.end - time.monotonic())
    while True:
        try:
            unit = connection.recv()
        except EOFError:
            return
        try:
            if start.device.startswith("cuda"):
                torch.cuda.set_device(start.device)  # which takes memory
            _finish(cells, unit, send)
            send(DONE)
        except TimeUpError:
            send(TIME_UP)
        except ValueError as error:
            send(MISTAKE, str(error))
        except Exception as error:
            if is_memory(error):
                send(MEMORY, str(error))
                return
            send(FAULT, traceback.format_exc())


def _finish(cells: Cells, unit: Unit, send: Callable[..., None]) -> None:
    """Answer a unit. If the memory is full, once again with what was kept given back, then in smaller batches.

    Raises:
        torch.OutOfMemoryError: it is too small for one sample.
    """
    freed = False
    try:
        while (full := _memory_full(cells, unit, send)) is not None:
            # Only here, where no frame of the failed call is left, is its memory free.
            cells.free()
            how = "with what was kept given back"
            if freed:
                if (tokens := cells.read_less(unit)) is None:
                    raise torch.OutOfMemoryError(full)
                how = f"with batches of {tokens} tokens"
            freed = True
            send(SAID, f"out of memory at {unit.model.label} {unit.place}: tries again {how}")
    finally:
        cells.read_all()
        torch.cuda.empty_cache()  # other processes may need what the next unit does not


def _memory_full(cells: Cells, unit: Unit, send: Callable[..., None]) -> str | None:
    """Answer a unit. What torch says if there is too little memory."""
    try:
        cells.finish(unit, lambda part: send(PROGRESS, part))
    except torch.OutOfMemoryError as error:
        return str(error)
    return None
