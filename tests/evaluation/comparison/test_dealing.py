"""In which order the cells of a comparison are dealt out to its workers."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from nsa.compare import main
from nsa.evaluation.comparison import workers
from nsa.evaluation.comparison.arms import Place, Unit
from nsa.evaluation.comparison.cells import TimeUpError
from nsa.evaluation.comparison.workers import Start, Worker, Workers, next_of, shared_out


def test_units_are_dealt_out() -> None:
    """Without methods first, where each kind has the longest first; then what is in memory."""

    class Stub:
        def __init__(self, model: str, chooses: bool) -> None:
            self.model, self.chooses = model, chooses

    def unit(arms: int, model: str, length: int, chooses: bool = True) -> Unit:
        return Unit(tuple(cast(Any, Stub(model, chooses)) for _ in range(arms)), Place("mqar", length, False))

    units = [unit(1, "a", 64), unit(7, "a", 64), unit(1, "b", 64), unit(1, "b", 128), unit(7, "b", 128)]
    dense = [unit(1, "a", 64, False), unit(1, "b", 64, False), unit(1, "b", 128, False)]
    both, order = [*units, *dense], []
    while both:
        order.append(next_of(both, None, None))
        both.remove(order[-1])
    assert order == [dense[2], *dense[:2], units[4], units[1], units[3], units[0], units[2]]
    alone = [units[0], units[2], dense[0], dense[1]]
    assert next_of(alone, cast(Any, "b"), alone[0].place) is dense[1]  # place and sibling are in memory
    assert next_of(alone[:2], cast(Any, "b"), None) is units[2]
    assert next_of(alone[:2], cast(Any, "c"), None) is units[0]
    elsewhere = Unit(units[2].arms, Place("copy", 64, False))
    assert next_of([elsewhere, units[0]], cast(Any, "b"), units[0].place) is units[0]  # the place before the sibling
    # 17 cells for three: at most six together.
    assert [len(u.arms) for u in shared_out(units, 3)] == [1, 6, 1, 1, 1, 6, 1]
    assert [u.place for u in shared_out(units, 3)] == [units[i].place for i in (0, 1, 1, 2, 3, 4, 4)]
    assert shared_out(units, 1) == list(units) and shared_out([], 3) == []


def stand_ins(number: int, time_left: float) -> tuple[Workers, list[Unit], list[str]]:
    """Workers that take units and say nothing; what they are sent, and whose training was kept before."""
    sent, kept = list[Unit](), list[str]()
    folder = SimpleNamespace(keep_training=lambda name, path: kept.append(name))
    cells: Any = SimpleNamespace(
        config=None, folder=folder, time_left=lambda: time_left, missing=lambda unit: unit.arms
    )
    made = Workers(number, cells, "cpu", print)
    made._workers = [Worker(i, cast(Any, None), cast(Any, SimpleNamespace(send=sent.append))) for i in range(number)]
    return made, sent, kept


def one(name: str, length: int) -> Unit:
    model = SimpleNamespace(label=name, folder=Path(name))
    return Unit((cast(Any, SimpleNamespace(model=model, chooses=True)),), Place("mqar", length, False))


def test_who_waits_gets_a_unit_while_there_is_time() -> None:
    """The first of a run in any case. What a worker has in memory is known from then on."""
    units = [one("a", 64), one("b", 32), one("c", 16)]
    few, sent, kept = stand_ins(2, 1.0)
    waiting = list(units)
    few._deal(waiting)
    assert sent == units[:2] and kept == ["a", "b"] and waiting == units[2:]
    assert [(w.unit, w.model, w.place) for w in few._workers] == [(u, u.model, u.place) for u in units[:2]]
    few, sent, _ = stand_ins(2, 0.0)
    few._deal(list(units))
    assert sent == units[:1]


@pytest.mark.parametrize("order", [("time up", "done"), ("done", "time up")])
def test_a_unit_that_time_cut_short_leaves_the_run_unfinished(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of two ends last."""
    few, *_ = stand_ins(2, 1.0)
    for worker, said in zip(few._workers, order, strict=True):
        worker.connection.recv = lambda said=said: (said,)  # type: ignore[method-assign,misc]
    monkeypatch.setattr(workers, "wait", list)
    with pytest.raises(TimeUpError):
        few.finish([one("a", 64), one("b", 64)], lambda part: None)


def test_what_is_there_is_counted_as_done_and_not_dealt_out() -> None:
    few, *_ = stand_ins(2, 1.0)
    arms = cast(Any, ("there", "one", "two"))
    few.cells.missing = lambda unit: unit.arms[1:]  # type: ignore[method-assign]
    moves: list[float] = []
    found = few._missing([Unit(arms, Place("mqar", 64, False))], moves.append)
    assert moves == [1] and [unit.arms for unit in found] == [("one",), ("two",)]


def test_a_worker_takes_its_threads_and_time_and_ends_without_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    made, asked = list[Any](), list[int]()
    monkeypatch.setattr(workers, "die_with_parent", lambda: None)
    monkeypatch.setattr(workers, "ignore", lambda: None)
    monkeypatch.setattr(workers, "Cells", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(workers.time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)

    def ended() -> None:
        raise EOFError

    connection: Any = SimpleNamespace(recv=ended)
    for parent in (os.getppid(), -1):
        workers._work(Start(cast(Any, "config"), cast(Any, "folder"), "cpu", 3, 130.0, parent), connection)
    ((config, folder, _, device, time_left),) = made
    assert asked == [3] and (config, folder, device, time_left()) == ("config", "folder", "cpu", 30.0)


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_workers_is_one_or_more(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["small.yaml", f"--workers={number}"])
    assert "--workers" in capsys.readouterr().err
