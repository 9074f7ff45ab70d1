"""A comparison that several processes answer at once is the one that a single process answers."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from small_comparison import configured, same, told

from nsa.compare import main
from nsa.evaluation.comparison import commands, workers
from nsa.evaluation.comparison.arms import Place, Unit
from nsa.evaluation.comparison.cells import Cells, TimeUpError
from nsa.evaluation.comparison.folder import read_results
from nsa.evaluation.comparison.workers import Worker, WorkerLostError, Workers, shared_out


@pytest.fixture(autouse=True)
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take time."""
    monkeypatch.setattr(commands, "write_report", lambda folder: None)


@pytest.fixture(scope="module")
def whole(siblings: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Answered by one process."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "write_report", lambda folder: None)
        patch.setattr(Workers, "_started", None)  # no other process
        assert main([str(configured(out, siblings)), f"output_dir={out}/results"]) == 0
    found = told(out / "results/small")
    assert len([name for name in found if name.endswith("answers.jsonl")]) == found["planned"] - 4 > 45
    assert len(json.loads(found["left_out.json"])) == 4 and "siblings/nsa.yaml" in found
    return found


def changed(found: dict[str, Any]) -> list[tuple[str, Any, int]]:
    """Cells in which leaks were looked for: arm, budget, length."""
    heads = [json.loads(text) for name, text in found.items() if name.endswith("cell.json")]
    return [(head["arm"], head["budget"], head["length"]) for head in heads if "changes" in head["figures"]]


def test_two_workers_that_are_killed_and_stopped_give_what_one_process_gives(
    siblings: dict[str, Path],
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """First a worker is killed, then the time is over at once, then they go on. Only the last ones import torch again:
    the others are forked, which takes less time."""
    command = [str(configured(tmp_path, siblings)), f"output_dir={tmp_path}/results", "--workers", "2"]
    folder, hear, started = tmp_path / "results/small", Workers._hear, list[Worker]()

    def heard(self: Workers, worker: Worker, *more: Any) -> bool:
        """Which kills one that answers, after the first cells."""
        started[:] = self._workers
        if len(list((folder / "cells").glob("[!.]*"))) > 2 and len(started) == 2:
            os.kill(worker.process.pid or 0, signal.SIGKILL)
            while worker.connection.poll(5):  # what it has said so far
                with suppress(EOFError):
                    worker.connection.recv()
                    continue
                break
        return hear(self, worker, *more)

    forked = get_context("fork")
    with monkeypatch.context() as patch:
        patch.setattr(workers, "get_context", lambda kind: forked)
        patch.setattr(Workers, "_hear", heard)
        assert main(command) == 85
    error = capsys.readouterr().err
    assert (
        "was killed (signal SIGKILL)" in error
        and "fewer --workers than 2" in error
        and "run the same command again" in error
    )
    assert len(started) == 2 and not any(process.process.is_alive() for process in started if process.process._popen)
    there = set((folder / "cells").glob("[!.]*"))
    assert len(there) > 2

    begun, start = list[int](), Workers._started
    with monkeypatch.context() as patch:
        patch.setattr(workers, "get_context", lambda kind: forked)
        patch.setattr(Workers, "_started", lambda self, number: begun.append(number) or start(self, number))
        assert main([*command, "--minutes", "0"]) == 75
    assert begun == [0], "one unit is begun, and no second one"
    more = set((folder / "cells").glob("[!.]*"))
    assert len(more) > len(there) and there < more, "each run gets further"
    assert len(more) < whole["planned"] - 4

    assert main(command) == 0
    assert same(told(folder), whole)
    assert read_results(folder).manifest.finished is not None
    monkeypatch.setattr(Workers, "_started", None)
    assert main(command) == 0, "a finished comparison starts no process"


def test_the_order_of_answers_changes_nothing(
    siblings: dict[str, Path], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backwards, with an interruption: leaks are looked for in more cells than in the end say so."""

    def backwards(
        self: Workers, units: Sequence[Unit], progress: Callable[[int], None], then: Callable[[], Sequence[Unit]]
    ) -> None:
        while units:
            for unit in [part for one in units for part in shared_out([one], 3)][::-1]:
                self.cells.finish(unit, progress)
                if self.cells.time_left() < 0:
                    raise TimeUpError
            units = then()

    monkeypatch.setattr(Workers, "finish", backwards)
    path = configured(tmp_path, siblings)
    looks = iter(range(60))
    work = commands.work_of(str(path), [f"output_dir={tmp_path}/results"])
    comparison = work.comparison()
    with pytest.raises(TimeUpError):
        comparison.run(work.folder(comparison), lambda cells: None, lambda: 60 - next(looks, 100))
    assert main([str(path), f"output_dir={tmp_path}/results"]) == 0
    assert same(told(tmp_path / "results/small"), whole)
    arms = [arm for arm, budget, length in changed(whole)]
    assert len(arms) == len(set(arms)) >= 9 and {length for *_, length in changed(whole)} == {48}


def test_methods_at_a_place_begin_when_its_dense_runs_have_ended(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[set[int]] = []

    def finish(
        self: Workers, units: Sequence[Unit], progress: Callable[[int], None], then: Callable[[], Sequence[Unit]]
    ) -> None:
        asked.append({unit.place.length for unit in then()})
        for length in (64, 48):
            *some, last = [unit for unit in units if unit.place.length == length]
            for unit in some:
                self.cells.finish(unit, progress)
            asked.append({unit.place.length for unit in then()})
            self.cells.finish(last, progress)
            asked.append({unit.place.length for unit in then()})

    monkeypatch.setattr(Workers, "finish", finish)
    work = commands.work_of(str(configured(tmp_path, siblings)), [])
    comparison = work.comparison()
    comparison.run(work.folder(comparison), lambda cells: None)
    assert asked == [set(), set(), {64}, set(), {48}]


def test_what_comes_up_while_others_answer_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one process and by several, which are stand-ins here: each answers what it has been given."""
    arms: Any = [SimpleNamespace(model="dense"), SimpleNamespace(model="nsa")]
    first, second, third = (Unit((arm,), Place("mqar", 64, False)) for arm in (*arms, arms[0]))
    for count in (1, 2):
        done: list[Unit] = []
        cells: Any = SimpleNamespace(
            config=None,
            folder=None,
            time_left=lambda: 1.0,
            missing=lambda unit: unit.arms,
            finish=lambda unit, progress, done=done: done.append(unit),
        )
        new = iter([[second], [third]] if count == 1 else [[], [second], [third]])

        def deal(self: Workers, waiting: list[Unit], done: list[Unit] = done) -> None:
            self._workers[:] = [Worker(0, cast(Any, None), cast(Any, None), unit=unit) for unit in waiting[:1]]
            done += waiting[:1]
            del waiting[:1]

        def hear(self: Workers, worker: Worker, progress: Callable[[int], None]) -> bool:
            worker.unit = None
            return True

        monkeypatch.setattr(Workers, "_deal", deal)
        monkeypatch.setattr(Workers, "_hear", hear)
        monkeypatch.setattr(workers, "wait", list)
        Workers(count, cells, "cpu", print).finish([first], lambda cells: None, lambda new=new: next(new, []))  # type: ignore[misc]
        assert done == [first, second, third]


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(siblings: dict[str, Path], tmp_path: Path) -> None:
    path = configured(tmp_path, siblings)
    path.write_text(path.read_text().replace("samples: 2", "samples: 400"))  # longer than this test
    command = [sys.executable, "-m", "nsa.compare", str(path), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    cells = tmp_path / "small/cells"
    while process.poll() is None and not list(cells.glob("[!.]*")):
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    process.kill()
    process.wait()
    assert len(found) == 2
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in found)


# ---------------------------------------------------------------------------------------------- what a worker says


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        ((workers.MISTAKE, "two trainings"), ValueError, "two trainings"),
        ((workers.FAULT, "Traceback"), RuntimeError, "worker 3 failed:\nTraceback"),
    ],
)
def test_what_a_worker_raises_is_raised_here(said: Any, kind: type[Exception], text: str) -> None:
    mine, its = Pipe()
    its.send(said)
    with pytest.raises(kind, match=text):
        Workers._hear(cast(Any, None), Worker(3, cast(Any, None), mine), lambda number: None)


def test_a_worker_that_says_no_more_was_killed() -> None:
    class Process:
        exitcode = -9

        def join(self, timeout: float) -> None: ...

    class Two:
        count = 2
        _lost = Workers._lost

    mine, its = Pipe()
    its.close()
    with pytest.raises(WorkerLostError, match=r"worker 1 was killed \(signal SIGKILL\)"):
        Workers._hear(cast(Any, Two()), Worker(1, cast(Any, Process()), mine), lambda number: None)


def test_a_mistake_of_a_worker_is_sent(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what `_work` says of units that end in different ways. Without memory it takes no more."""
    work = commands.work_of(str(configured(tmp_path, siblings)), [])
    comparison = work.comparison()
    start = workers.Start(work.config, work.folder(comparison), "cpu", 1, 0.0, os.getppid())
    prepared: list[str] = []
    monkeypatch.setattr(workers, "die_with_parent", lambda: prepared.append("ends with its parent"))
    monkeypatch.setattr(workers, "ignore", lambda: prepared.append("hears no signal"))
    full = [torch.OutOfMemoryError("full")] * 2  # before and after it gave back what it kept
    ends = iter([None, TimeUpError(), ValueError("wrong"), KeyError("fault"), *full])

    def finish(self: Cells, unit: Unit, progress: Callable[[int], None]) -> None:
        progress(len(unit.arms))
        self.leave_out("a cell", "why")
        if (end := next(ends)) is not None:
            raise end

    monkeypatch.setattr(Cells, "finish", finish)
    mine, its = Pipe()
    model = comparison.candidates[0]
    unit = Unit(tuple(comparison.arms(model, methods=False)), Place("mqar", 64, False))
    for _ in range(6):
        mine.send(unit)
    threads = torch.get_num_threads()
    said: list[Any] = []
    closes = its.recv

    def received() -> Any:
        if not its.poll(0):
            raise EOFError
        return closes()

    its.recv = received  # type: ignore[method-assign]
    workers._work(start, its)
    torch.set_num_threads(threads)
    assert prepared == ["ends with its parent", "hears no signal"]
    while mine.poll(0):
        said.append(mine.recv())
    assert [what for what, *_ in said] == [
        *("progress", "left out", "done", "progress", "time up", "progress", "mistake", "progress", "fault"),
        *("progress", "said", "progress", "memory"),
    ]
    assert said[1] == ("left out", "a cell", "why") and said[6][1] == "wrong" and said[-1] == ("memory", "full")
    assert "KeyError: 'fault'" in said[8][1]


@pytest.mark.parametrize("gpus", [1, 3])
def test_workers_are_spread_over_the_gpus(
    gpus: int, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[str, int]] = []

    class Process:
        def __init__(self, args: tuple[workers.Start, Any], **_: Any) -> None:
            begun.append((args[0].device, args[0].threads))

        def start(self) -> None: ...

    work = commands.work_of(str(configured(tmp_path, siblings)), [])
    comparison = work.comparison()
    cells = Cells(work.config, work.folder(comparison), lambda *_: None, "cpu", lambda: 1.0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(workers, "get_context", lambda kind: type("", (), {"Pipe": Pipe, "Process": Process}))
    four = Workers(4, cells, "cuda", print)
    for number in range(4):
        four._started(number)
    assert begun == [(f"cuda:{number % gpus}", 2) for number in range(4)]
