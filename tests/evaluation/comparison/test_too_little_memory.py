"""What workers of a comparison do when the memory of the device is full."""

import gc
import json
import multiprocessing
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakSet

import pytest
import torch
from small_comparison import configured, same, told

from nsa.baselines import Session
from nsa.compare import main
from nsa.evaluation.comparison import commands, workers
from nsa.evaluation.comparison.arms import Place, Unit, units_of
from nsa.evaluation.comparison.cells import Asked, Cells, TimeUpError
from nsa.evaluation.comparison.workers import Worker, Workers


@pytest.fixture(autouse=True)
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take time."""
    monkeypatch.setattr(commands, "write_report", lambda folder: None)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, which takes less time than to import torch again."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(workers, "get_context", lambda kind: context)


def full_for(names: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on these processes have no memory for one sample of 64 tokens."""
    attend = Session.attend

    def attended(self: Session, layer: int, q: torch.Tensor, *more: Any) -> torch.Tensor:
        if self.prompt and q.shape[1] > 50 and multiprocessing.current_process().name in names:
            raise torch.OutOfMemoryError("80 GiB")
        return attend(self, layer, q, *more)

    monkeypatch.setattr(Session, "attend", attended)


@pytest.mark.usefixtures("forked")
def test_others_answer_what_a_worker_without_memory_gives_back(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three: they end, nobody takes their place, and the folder is that of one process."""
    path, found, said, moves = configured(tmp_path, siblings), [], list[str](), list[float]()
    few = ["lengths=[64]", "budgets=[0.5]", "methods=[{name: quest, page: 4}]"]
    ended = list[int]()
    give_back = Workers._give_back

    def given_back(self: Workers, worker: Worker, *more: Any) -> None:
        give_back(self, worker, *more)
        assert worker.process._popen is not None and not worker.process.is_alive() and worker not in self._workers
        assert self.count == 3 - len(ended) - 1
        ended.append(worker.number)

    monkeypatch.setattr(Workers, "_give_back", given_back)
    for count in (1, 3):
        work = commands.work_of(str(path), [f"output_dir={tmp_path}/{count}", *few])
        comparison = work.comparison("cpu", count)
        comparison.say = said.append
        if count == 3:
            full_for(["worker 0", "worker 2"], monkeypatch)
        moves.clear()
        folder = work.folder(comparison)
        comparison.run(folder, moves.append)
        folder.finish("now")
        found.append(told(folder.path))
        assert sum(moves) == pytest.approx(found[0]["planned"])
    assert same(*found) and sorted(ended) == [0, 2]
    lines = [text for text in said if "it ends" in text]
    assert [text.partition(":")[0] for text in lines] == [f"worker {number}" for number in ended]
    assert [text[-7:] for text in lines] == ["2 go on", "1 go on"] and all(
        "mqar 64 agnostic, one" in text for text in lines
    )


@pytest.mark.usefixtures("forked")
def test_the_last_worker_without_memory_ends_the_comparison(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When all that has memory is answered, and nobody else had the memory. The same command goes on once there is."""
    command = [
        str(configured(tmp_path, siblings)),
        "budgets=[0.5]",
        "methods=[{name: quest, page: 4}]",
        "floor=0",
        "watch=false",
    ]
    command += ["siblings.1.name=other", f"siblings.1.export={siblings['dense']}", "--workers", "2"]
    with monkeypatch.context() as patch:
        full_for(["worker 0", "worker 1"], patch)
        assert main(command) == 2
    error = capsys.readouterr().err
    assert error.count("it ends, 1 go on") == error.count("it ends, another begins alone") == 1
    assert "one sample at a time and with no other worker left: end what else uses the GPU" in error
    assert "(80 GiB)" in error

    def lengths() -> list[int]:
        heads = [json.loads(path.read_text()) for path in (tmp_path / "small/cells").glob("*/cell.json")]
        return [head["length"] for head in heads]

    answered = lengths()
    assert main(command) == 0
    assert set(answered) == {48} and len(answered) == lengths().count(48)


def test_what_was_given_back_is_dealt_out_last() -> None:
    """Even where it would take longest."""
    arms: Any = [SimpleNamespace(model=SimpleNamespace(label="a", folder=Path()), chooses=True)]
    long, short, shorter = (Unit(tuple(arms), Place("mqar", length, False)) for length in (640, 64, 32))
    sent: list[Unit] = []
    folder = SimpleNamespace(keep_training=lambda *_: None)
    cells: Any = SimpleNamespace(config=None, folder=folder, time_left=lambda: 1.0)
    few = Workers(2, cells, "cpu", print)
    worker = Worker(0, cast(Any, None), cast(Any, SimpleNamespace(send=sent.append)))
    few._workers, few.count, few._given_back, waiting = [worker], 1, [long], [shorter, short]
    for _ in range(4):
        few._deal(waiting)
        worker.unit = None
    assert sent == [short, shorter, long] and not waiting and not few._given_back
    few._begun, few._given_back, few.count, cells.time_left = True, [long], 2, lambda: 0.0
    with pytest.raises(TimeUpError):  # not all is answered
        few.finish([], print)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("80 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("out of resource: shared memory"), False),
    ],
)
def test_too_little_memory_is_known_by_whoever_says_it(
    error: RuntimeError, memory: bool, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    cells, unit = some_cells(siblings, tmp_path)
    monkeypatch.setattr(Asked, "go_on", fails)
    with pytest.raises(torch.OutOfMemoryError if memory else RuntimeError) as caught:
        cells.finish(unit, lambda part: None)
    assert isinstance(caught.value, torch.OutOfMemoryError) == memory and str(caught.value) == str(error)


def some_cells(siblings: dict[str, Path], out: Path, *overrides: str) -> tuple[Cells, Unit]:
    """A group that is answered together."""
    work = commands.work_of(str(configured(out, siblings)), list(overrides))
    comparison = work.comparison()
    cells = Cells(work.config, work.folder(comparison), lambda *_: None, "cpu", lambda: 999.0)
    (unit, *_) = units_of(list(comparison.arms(comparison.candidates[0], methods=True)), Place("mqar", 64, False))
    assert len(unit.arms) > 2
    return cells, unit


def test_memory_that_was_kept_is_given_back_before_less_is_read(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full until then. Once it is, nothing is halved, in this unit and in the next."""
    cells, unit = some_cells(siblings, tmp_path, "batch_tokens=512", "samples=8")
    emptied, said = [0], list[Any]()
    attend, read = Session.attend, list[int]()

    def attended(self: Session, layer: int, q: torch.Tensor, *more: Any) -> torch.Tensor:
        if self.prompt and layer == 1 and not emptied[0]:
            raise torch.OutOfMemoryError("full")
        read.append(len(q))
        return attend(self, layer, q, *more)

    monkeypatch.setattr(Session, "attend", attended)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(emptied.pop() + 1))
    workers._finish(cells, unit, lambda *what: said.append(what))
    lines = [text for what, text in said if what == workers.SAID]
    assert lines == ["out of memory at dense mqar 64 agnostic: tries again with what was kept given back"]
    assert set(read) == {1, 8} and cells.missing(unit) == ()
    assert emptied == [2], "and once more when the unit was answered, for others"


def test_the_first_cell_is_answered_whatever_the_time_also_after_too_little_memory(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells, unit = some_cells(siblings, tmp_path)
    cells.time_left = lambda: 0.0
    fails, go_on = [torch.OutOfMemoryError("full")], Asked.go_on

    def full_once(self: Asked) -> bool:
        if fails:
            raise fails.pop()
        return go_on(self)

    monkeypatch.setattr(Asked, "go_on", full_once)
    with pytest.raises(TimeUpError):
        workers._finish(cells, unit, lambda *_: None)
    assert len(cells.missing(unit)) == len(unit.arms) - 1


def test_nothing_of_an_answered_unit_waits_for_the_collector(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else torch could not give its memory back between units."""
    cells, unit = some_cells(siblings, tmp_path)
    alive, sessions, begin = list[int](), WeakSet[Session](), Session.begin

    def begun(self: Session, *more: Any) -> None:
        sessions.add(self)
        begin(self, *more)

    monkeypatch.setattr(Session, "begin", begun)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(len(sessions)))
    gc.collect()
    gc.disable()
    try:
        workers._finish(cells, unit, lambda *_: None)
    finally:
        gc.enable()
    assert alive == [0]


class Line:
    """A connection to a worker of this process: units that it is sent, and what it says."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units, self.said = list(units), list[Any]()

    def recv(self) -> Unit:
        if not self.units:
            raise EOFError
        return self.units.pop(0)

    def send(self, what: Any) -> None:
        self.said.append(what)


def full_above(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on there is no memory for more than so many sequences. Those of each prompt that was read."""
    read, attend = list[int](), Session.attend

    def attended(self: Session, layer: int, q: torch.Tensor, *more: Any) -> torch.Tensor:
        if self.prompt and layer == 1 and len(q) > rows:
            raise torch.OutOfMemoryError(f"{len(q)} sequences")
        if self.prompt and layer == 1:
            read.append(len(q))
        return attend(self, layer, q, *more)

    monkeypatch.setattr(Session, "attend", attended)
    return read


@pytest.mark.parametrize(("rows", "tokens"), [(2, 128), (1, 64)])
def test_a_worker_with_too_little_memory_reads_less_at_once(
    rows: int, tokens: int, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eight samples; the next unit begins with what is configured. Answers are those of small batches."""
    monkeypatch.setattr(workers, "die_with_parent", lambda: None)
    monkeypatch.setattr(workers, "ignore", lambda: None)
    path, threads = configured(tmp_path, siblings), torch.get_num_threads()
    found, said, read = [], list[Any](), list[int]()
    for name, batch in (("less", 512), ("few", rows * 64)):
        overrides = [f"output_dir={tmp_path}/{name}", f"batch_tokens={batch}", "samples=8", "lengths=[64]"]
        work = commands.work_of(str(path), overrides)
        comparison = work.comparison()
        model = comparison.candidates[0]
        units = units_of(list(comparison.arms(model, methods=True)), Place("mqar", 64, False))[:3]
        assert [len(unit.arms) > 1 for unit in units] == [True, False, False]
        folder = work.folder(comparison)
        assert folder.manifest.config["batch_tokens"] == batch
        line: Any = Line(units)
        with monkeypatch.context() as patch:
            read = full_above(rows, patch) if name == "less" else read
            workers._work(workers.Start(work.config, folder, "cpu", 1, time.monotonic() + 999, os.getppid()), line)
        said = line.said if name == "less" else said
        found.append({path.parent.name: path.read_text() for path in folder.path.glob("cells/*/answers.jsonl")})
    torch.set_num_threads(threads)
    assert found[0] == found[1] and len(found[0]) > 4
    assert {what for what, *_ in said} <= {workers.PROGRESS, workers.SAID, workers.DONE, workers.LEFT_OUT}
    lines = [text for what, *more in said for text in more if what == workers.SAID]
    assert len(lines) == 3 * (1 + {2: 2, 1: 3}[rows]) and max(read) == rows  # it was halved so often for each unit
    assert lines[-1] == f"out of memory at dense mqar 64 agnostic: tries again with batches of {tokens} tokens"


def test_what_is_tried_again_is_counted_once(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory is full when the second cell of a group has a batch of eight."""
    work = commands.work_of(str(configured(tmp_path, siblings)), ["batch_tokens=512", "samples=8", "queries=4"])
    comparison = work.comparison()
    cells = Cells(work.config, work.folder(comparison), lambda *_: None, "cpu", lambda: 999.0)
    (unit, *_) = units_of(list(comparison.arms(comparison.candidates[0], methods=True)), Place("mqar", 64, False))
    calls, said, go_on = [0], list[Any](), Asked.go_on

    def full(self: Asked) -> bool:
        calls[0] += 1
        if calls[0] == 3:
            raise torch.OutOfMemoryError("full")
        return go_on(self)

    monkeypatch.setattr(Asked, "go_on", full)
    workers._finish(cells, unit, lambda *what: said.append(what))
    parts = [part for what, part in said if what == workers.PROGRESS]
    assert len(unit.arms) > 2 and min(parts) < 0 and sum(parts) == pytest.approx(len(unit.arms))


def test_a_worker_without_memory_for_one_sample_gives_up(
    siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = commands.work_of(str(configured(tmp_path, siblings)), ["batch_tokens=512"])
    comparison = work.comparison()
    cells = Cells(work.config, work.folder(comparison), lambda *_: None, "cpu", lambda: 999.0)
    (unit, *_) = units_of(list(comparison.arms(comparison.candidates[0], methods=True)), Place("mqar", 64, False))
    said: list[Any] = []
    sessions: WeakSet[Session] = WeakSet()
    begin, attend, free = Session.begin, Session.attend, Cells.free

    def full(self: Session, *inputs: Any) -> torch.Tensor:
        """While it decodes, after the prompt was read for all."""
        if not self.prompt:
            raise torch.OutOfMemoryError("full")
        return attend(self, *inputs)

    def begun(self: Session, *more: Any) -> None:
        sessions.add(self)
        begin(self, *more)

    def freed(self: Cells) -> None:
        free(self)
        assert len(sessions) == 0, "what the failed call had read is still in memory"

    monkeypatch.setattr(Session, "begin", begun)
    monkeypatch.setattr(Session, "attend", full)
    monkeypatch.setattr(Cells, "free", freed)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        workers._finish(cells, unit, lambda *what: said.append(what))
    assert [text.split()[-2] for what, text in said if what == workers.SAID] == ["given", "256", "128", "64"]
    assert cells._at_once(None) == 512
