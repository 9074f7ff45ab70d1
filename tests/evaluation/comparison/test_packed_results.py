"""Results in few files: what is written, and what is refused with what to do."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated import MANIFEST, cell, rows_of

from nsa.evaluation.comparison import commands
from nsa.evaluation.comparison.folder import ResultsFolder, read_results
from nsa.evaluation.comparison.reading import packed
from nsa.evaluation.comparison.rows import ResultsError

CELLS = [cell("dense", samples=3), cell("quest", budget=0.25, samples=3)]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Packed, with a cell that was left out."""
    results = ResultsFolder(tmp_path / "results", replace(MANIFEST, planned=3))
    for one in CELLS:
        results.write(rows_of(one), one.figures)
    results.leave_out("dense+h2o@0.1 mqar 64 agnostic", "too small a budget")
    results.finish("now")
    commands.pack(tmp_path / "results", tmp_path / "packed")
    return tmp_path / "packed"


def test_what_was_left_out_is_packed_too(there: Path) -> None:
    assert read_results(there).left_out == {"dense+h2o@0.1 mqar 64 agnostic": "too small a budget"}
    assert {path.name for path in there.iterdir()} == {"manifest.json", "left_out.json", "cells.jsonl.gz"}


def test_the_same_cells_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    cells: dict[str, Any] = {one.id: one for one in CELLS}
    heads: dict[str, Any] = {one.id: {"made": {}} for one in CELLS}
    for name, order in (("one", list(cells)), ("two", list(cells)[::-1])):
        packed.write({number: cells[number] for number in order}, heads, tmp_path, tmp_path / name)
    one, two = ((tmp_path / name / packed.PACKED).read_bytes() for name in ("one", "two"))
    assert one == two
    content = gzip.decompress(one).splitlines()
    assert [json.loads(line)["arm"] for line in content] == [cells[number].arm for number in sorted(cells)]


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda line: {key: value for key, value in line.items() if key != name}


@pytest.mark.parametrize(
    "change",
    [
        without("made"),
        without("answers"),
        lambda line: [line],
        lambda line: {**line, "made": "here"},
        lambda line: {**line, "answers": dict.fromkeys(line["answers"], "abc")},
        lambda line: {**line, "answers": {**line["answers"], "bos": line["answers"]["bos"][:-1]}},
        lambda line: {**line, "answers": {}},
    ],
)
def test_a_line_that_is_no_cell_is_named(change: Callable[[dict[str, Any]], Any], there: Path) -> None:
    path = there / packed.PACKED
    first, second = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    path.write_bytes(gzip.compress(f"{json.dumps(first)}\n{json.dumps(change(second))}\n".encode()))
    with pytest.raises(ResultsError, match=r"damaged: .*cells.jsonl.gz, line 2: no cell\. Bring the file back"):
        read_results(there)


@pytest.mark.parametrize(("limit", "said"), [("LIMIT", "bytes, at most 100 are read"), ("LINE", "line 1")])
def test_a_file_that_is_too_large_is_not_read(
    limit: str, said: str, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor a line, which a small file may unfold to."""
    monkeypatch.setattr(packed, limit, 100)
    with pytest.raises(ResultsError, match=f"damaged: .*{said}"):
        read_results(there)
