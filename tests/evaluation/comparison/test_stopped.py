"""A comparison that was stopped is reported from the cells that are there, and goes on as if nobody had."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import MANIFEST, cell, rows_of
from small_comparison import configured, same, told

from nsa.compare import main
from nsa.evaluation.comparison import commands
from nsa.evaluation.comparison.folder import ResultsFolder, read_results
from nsa.evaluation.comparison.reading.partial import NOT_ANSWERED, Plan
from nsa.evaluation.comparison.reading.report import write_report
from nsa.evaluation.comparison.rows import ResultsError

CELLS = [
    *(cell("dense", task=task, samples=3) for task in ("mqar", "passkey")),
    *(cell("quest", budget=budget, task=task, samples=3) for task in ("mqar", "passkey") for budget in (0.25, 0.05)),
]
SMALL = ["lengths=[48]", "budgets=[8]"]


def name(one: Any) -> str:
    return f"{one.method}@{one.budget} {one.task}"


def stopped(folder: Path, there: int = 2, plan: bool = True) -> ResultsFolder:
    """Six cells are planned, and so many are there. One is left out alone, and both of quest on passkey together."""
    results = ResultsFolder(folder, replace(MANIFEST, planned=len(CELLS)))
    for one in CELLS[:there]:
        results.write(rows_of(one), one.figures)
    if plan:
        together = [name(one) for one in CELLS[4:]]
        results.keep_plan(Plan({name(one): one.id for one in CELLS}, {"methods on dense passkey": together}))
    results.begun("", "dense+quest", 0.25, "mqar", 1024, True, 0).begin(None)
    return results


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_each_cell_that_is_missing_is_named_and_no_other(tmp_path: Path) -> None:
    results = stopped(tmp_path)
    read = read_results(tmp_path, stopped=True)
    assert read.left_out == dict.fromkeys(map(name, CELLS[2:]), NOT_ANSWERED)
    assert (len(read.cells), read.planned) == (2, 6)
    results.leave_out(name(CELLS[2]), "too small a budget")
    results.leave_out("methods on dense passkey", "dense reaches 0.200, below 0.5")
    assert read_results(tmp_path, stopped=True).left_out == {
        name(CELLS[2]): "too small a budget",
        name(CELLS[3]): NOT_ANSWERED,
        "methods on dense passkey": "dense reaches 0.200, below 0.5",
    }


def test_it_is_refused_without_the_flag_which_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = stopped(tmp_path)
    assert main(["report", str(tmp_path)]) == 2
    assert "2 of 6 cells are there" in (said := capsys.readouterr().err) and "--partial" in said
    with pytest.raises(ResultsError, match="half-written: 2 of 6"):
        results.finish("now")
    assert main(["report", str(tmp_path), "--pack", str(tmp_path / "packed")]) == 2
    assert not (tmp_path / "packed").exists()
    with pytest.raises(SystemExit):
        main(["list", "--partial"])


def test_a_packed_report_is_the_same_and_is_of_an_unfinished_comparison(tmp_path: Path) -> None:
    """Byte by byte, whether from the folder, packed, or read again from there without the flag; the folder stays."""
    folder, out = tmp_path / "results", tmp_path / "packed"
    stopped(folder)
    before = content(folder)
    assert main(["report", str(folder), "--partial", "--pack", str(out)]) == 0
    assert content(folder) == before and any(path.startswith("begun/") for path in before)
    packed = content(out)
    assert main(["report", str(out)]) == 0 and content(out) == packed
    assert main(["report", str(folder), "--partial"]) == 0
    after = content(folder)
    assert {path: after[path] for path in before} == before
    for page in ("report.md", "report.html"):
        assert after[page] == packed[page]
    text = packed["report.md"].decode()
    assert "2 of 6 cells are there, and 4 were not answered" in text[: text.index("## Alarms")]
    assert "None" not in next(line for line in text.splitlines() if "began, ended" in line)
    assert packed["report.html"].decode().count(NOT_ANSWERED) == 4


def test_a_comparison_that_ended_is_reported_and_packed_as_ever(tmp_path: Path) -> None:
    results, out = stopped(tmp_path, there=5), tmp_path / "out"
    assert main(["report", str(tmp_path), "--partial", "--pack", str(out)]) == 0 and (out / "plan.json").exists()
    results.write(rows_of(CELLS[5]), CELLS[5].figures)
    results.finish("now")
    commands.pack(tmp_path, out)
    assert not (out / "plan.json").exists()
    assert read_results(tmp_path, stopped=True).planned is None
    assert "unfinished" not in write_report(tmp_path, partial=True).with_suffix(".md").read_text()


@pytest.mark.parametrize("kept", range(len(CELLS)))
def test_whatever_cell_is_there_alone_is_reported(kept: int, tmp_path: Path) -> None:
    results = stopped(tmp_path, there=0)
    with pytest.raises(ResultsError, match="no cell yet"):
        read_results(tmp_path, stopped=True)
    results.write(rows_of(CELLS[kept]), CELLS[kept].figures)
    assert "1 of 6 cells are there" in write_report(tmp_path, partial=True).with_suffix(".md").read_text()


def test_what_cannot_be_named_is_not_guessed(tmp_path: Path) -> None:
    stopped(tmp_path, plan=False)
    with pytest.raises(ResultsError, match=r"no plan\.json, so the cells that are missing cannot be named"):
        read_results(tmp_path, stopped=True)
    results = stopped(tmp_path, there=0)
    results.write(rows_of(one := cell("h2o", budget=0.25, samples=3)))
    with pytest.raises(ResultsError, match=re.escape(f"does not plan, such as {one.id}")):
        read_results(tmp_path, stopped=True)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "of": "another stage"}))
    with pytest.raises(ResultsError, match="another configuration or stage"):
        read_results(tmp_path, stopped=True)
    path.write_text("{}")
    with pytest.raises(ResultsError, match="damaged"):
        read_results(tmp_path, stopped=True)


def test_a_stopped_run_is_reported_and_goes_on(
    tmp_path: Path, siblings: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is answered at the end, and what is left out, is what was said to be missing: one by one, or together."""
    monkeypatch.setattr(commands, "write_report", lambda *_, **__: None)
    for floor in ("floor=0.0", "floor=1.0"):
        for place in ("stopped", "whole"):
            (tmp_path / floor / place).mkdir(parents=True)
        path, whole = (str(configured(tmp_path / floor / place, siblings)) for place in ("stopped", "whole"))
        folder = tmp_path / floor / "stopped/small"
        assert main([path, *SMALL, floor, "--minutes", "0"]) == 75
        first = read_results(folder, stopped=True)
        assert main(["report", str(folder), "--partial", "--pack", str(tmp_path / floor / "packed")]) == 0
        assert main([path, *SMALL, floor]) == 0 and main([whole, *SMALL, floor]) == 0
        assert same(told(folder), told(tmp_path / floor / "whole/small"))
        last, plan = read_results(folder), json.loads((folder / "plan.json").read_text())
        assert len(first.cells) == 1 and first.planned == 1 + len(first.left_out) == len(plan["cells"])
        new = {one.id for one in last.cells} - {one.id for one in first.cells}
        out = {one for note in last.left_out for one in plan["together"].get(note, [note])}
        assert out <= set(first.left_out) and {plan["cells"][one] for one in set(first.left_out) - out} == new
        assert any(note in plan["together"] for note in last.left_out) == (floor == "floor=1.0")
