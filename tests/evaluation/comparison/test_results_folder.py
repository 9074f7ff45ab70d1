"""Results are written whole, gone on with after an interruption, and refused where they cannot be compared."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from simulated import MANIFEST, cell, row, rows_of, write

from nsa.evaluation.comparison.folder import ResultsFolder, read_results
from nsa.evaluation.comparison.rows import ResultsError, cell_id, cell_of

CELLS = [cell("dense", samples=3), cell("quest", budget=0.25, samples=3), cell("quest", budget=0.05, samples=3)]


def equal(one, other) -> bool:
    arrays = ("sample", "query", "score", "parsed", "bos")
    return one.head() == other.head() and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in arrays)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, CELLS)
    results = read_results(tmp_path)
    assert results.manifest.finished == "2026-11-29T13:00:00" and results.manifest.commit == MANIFEST.commit
    read = {one.id: one for one in results.cells}
    assert read.keys() == {one.id for one in CELLS} and all(equal(one, read[one.id]) for one in CELLS)


def test_tables_agree_with_the_answers(tmp_path: Path) -> None:
    write(tmp_path, CELLS)
    table = parquet.read_table(tmp_path / "cells.parquet").to_pylist()
    document = json.loads((tmp_path / "cells.json").read_text())
    assert [{k: v for k, v in line.items() if k != "figures"} for line in document] == table
    for line in table:
        lines = (tmp_path / "cells" / line["cell"] / "answers.jsonl").read_text().splitlines()
        scores = [json.loads(answer)["score"] for answer in lines]
        assert line["answers"] == len(scores) == 12 and line["samples"] == 3
        assert line["score"] == pytest.approx(sum(scores) / len(scores))
        assert set(json.loads(lines[0])) == {"sample", "query", "score", "parsed", "bos"}  # the file stays small


def test_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(MANIFEST, planned=2)
    first = ResultsFolder(tmp_path, manifest)
    first.write(rows_of(CELLS[0]))

    def stop(*_):
        raise KeyboardInterrupt

    rows = rows_of(CELLS[1])
    with monkeypatch.context() as patch:  # between the two files of a cell
        patch.setattr("nsa.evaluation.comparison.rows.Cell.answers", stop)
        with pytest.raises(KeyboardInterrupt):
            first.write(rows)
    assert list((tmp_path / "cells").glob(".unfinished-*/cell.json"))
    with pytest.raises(ResultsError, match=r"1 of 2 cells .* goes on with the others"):
        read_results(tmp_path)
    again = ResultsFolder(tmp_path, replace(manifest, started="later"))
    assert again.manifest.started == manifest.started
    assert again.has("dense", None, "mqar", 1024, True) and not again.has("dense+quest", 0.25, "mqar", 1024, True)
    with pytest.raises(ResultsError, match="half-written: 1 of 2"):
        again.finish("now")
    again.write(rows_of(CELLS[1]))
    again.finish("now")
    assert len(read_results(tmp_path).cells) == 2
    assert not list((tmp_path / "cells").glob(".*"))


@pytest.mark.parametrize(
    ("change", "words"), [({"code": "fedcba987654"}, "two commits"), ({"config": {"a": 1}}, "two configurations")]
)
def test_another_commit_or_configuration_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    write(tmp_path / "one", CELLS)
    with pytest.raises(ResultsError, match=words):
        ResultsFolder(tmp_path / "one", replace(MANIFEST, **change))
    other = ResultsFolder(tmp_path / "other", replace(MANIFEST, planned=1, **change))
    stray = other.write(rows_of(cell("h2o", budget=0.25, samples=3)))
    (other.path / "cells" / stray.id).rename(tmp_path / "one" / "cells" / stray.id)  # copied in by hand
    with pytest.raises(ResultsError, match=f"{words}.*Name another folder"):
        read_results(tmp_path / "one")


def test_damage_is_told_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for there, words in ((".", "no folder of results"), ("none", "is not there"), ("file", "is a file")):
        with pytest.raises(ResultsError, match=words) as refused:
            read_results(tmp_path / there)
        assert "elete" not in str(refused.value), "it may be any folder of the user's"
    (tmp_path / "file").rename(tmp_path / "manifest.json")
    with pytest.raises(ResultsError, match="no valid JSON") as refused:
        read_results(tmp_path)
    assert "elete" not in str(refused.value)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ResultsError, match=r"Name another folder"):
        ResultsFolder(tmp_path, MANIFEST)
    write(tmp_path / "results", CELLS)
    answers = tmp_path / "results" / "cells" / CELLS[0].id / "answers.jsonl"
    answers.write_text(answers.read_text()[:-20])
    with pytest.raises(ResultsError, match=r"half-written: .*line 12.*Delete .*goes on with what is missing"):
        read_results(tmp_path / "results")
    answers.unlink()
    with pytest.raises(ResultsError, match=r"half-written: .*Delete"):
        read_results(tmp_path / "results")


def test_a_cell_is_written_once(tmp_path: Path) -> None:
    results = write(tmp_path, CELLS)
    with pytest.raises(ResultsError, match="there already"):
        results.write(rows_of(CELLS[0]))


def test_ids_tell_cells_apart() -> None:
    keys = [
        ("a+b", 0.1, "t", 512, True, 0), ("a+b", 0.1, "t", 512, True, 1), ("a+b", 0.1, "t", 512, False, 0),
        ("a+b", 0.1, "t", 1024, True, 0), ("a+b", 0.1, "u", 512, True, 0), ("a+b", None, "t", 512, True, 0),
        ("a+b", 0.10000001, "t", 512, True, 0), ("a/b", 0.1, "t", 512, True, 0), ("a_b", 0.1, "t", 512, True, 0),
    ]  # fmt: skip
    ids = [cell_id(*key) for key in keys]
    assert len(set(ids)) == len(ids) and not any("/" in one for one in ids)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one answer"),
        ([row(), row(sample=1, arm="nsa+quest")], "answers of two cells: arm"),
        ([row(), row(sample=1, counted={"reads": 1.0})], "answers of two cells: counted"),
        ([row(), row()], "two answers to query 0"),
        ([row(score=1.5)], r"lie in \[0, 1\]"),
        ([row(score=float("nan"))], r"lie in \[0, 1\]"),
        ([row(parsed=False)], "counts as wrong"),
        ([row(budget=25.0)], "share of dense reads"),
        ([row(budget=0.0)], "share of dense reads"),
        ([row(method="dense")], "write null"),
        ([row(counted={"reads": 0.1})], "lacks attended"),
        ([row(bos=-2)], "BOS"),
        *(([row(counted={**row().counted, "scored": x})], "a share is a number from 0") for x in (-0.1, float("inf"))),
        ([row(length=0)], "must be at least 1"),
        ([row(parameters=0)], "must be at least 1"),
    ],
)
def test_bad_rows_are_refused(rows: list, words: str) -> None:
    with pytest.raises(ResultsError, match=words):
        cell_of(rows)


def test_a_prompt_may_have_no_bos_and_a_tokenizer_none_to_count() -> None:
    assert cell_of([row(bos=0), row(sample=1, bos=None)]).bos.tolist() == [0, -1]


def test_cells_that_were_renamed_or_added_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "one", CELLS)
    stray = write(tmp_path / "other", [cell("h2o", budget=0.25, samples=3)]).path / "cells"
    (stray,) = stray.iterdir()
    stray.rename(tmp_path / "one" / "cells" / stray.name)
    with pytest.raises(ResultsError, match="4 of 3 cells are there"):
        read_results(tmp_path / "one")
    (tmp_path / "one" / "cells" / stray.name).rename(tmp_path / "one" / "cells" / "other")
    with pytest.raises(ResultsError, match=r"holds the cell .*h2o.*: it was renamed"):
        read_results(tmp_path / "one")


def test_what_was_noted_first_stays(tmp_path: Path) -> None:
    """When results were begun and ended, although their lists have grown, and how a sibling was trained."""
    write(tmp_path / "results", CELLS)
    config = {**MANIFEST.config, "methods": [{"name": "quest"}]}
    again = ResultsFolder(tmp_path / "results", replace(MANIFEST, config=config, planned=3, started="later"))
    assert (again.manifest.started, again.manifest.finished) == (MANIFEST.started, None)
    ended = ResultsFolder(tmp_path / "ended", replace(MANIFEST, planned=0))
    assert [ended.finish(at).manifest.finished for at in ("first", "second")] == ["first", "first"]
    for text in ("one", "two"):
        (tmp_path / "config.yaml").write_text(text)
        again.keep_training("dense", tmp_path / "config.yaml")
    assert (tmp_path / "results/siblings/dense.yaml").read_text() == "one"


def test_unknown_figures_are_refused() -> None:
    with pytest.raises(ResultsError, match=r"unknown figures sinks; known are sink_mass"):
        cell_of([row()], {"sinks": [0.1]})


def test_rows_of_any_order_give_the_same_cell() -> None:
    rows = rows_of(CELLS[1])
    assert equal(cell_of(rows[::-1], CELLS[1].figures), CELLS[1])


def test_two_trainings_of_a_sibling_in_one_folder_are_refused(tmp_path: Path) -> None:
    """However they came there; each seed has a training of its own."""
    results = ResultsFolder(tmp_path, replace(MANIFEST, planned=3))
    for one, weights in zip([*CELLS[:2], cell("dense", samples=3, train_seed=1)], "aab", strict=True):
        results.write(rows_of(one), weights=weights)
    results.finish("now")
    assert len(read_results(tmp_path).cells) == 3
    path = tmp_path / "cells" / CELLS[1].id / "cell.json"
    path.write_text(path.read_text().replace('"weights": "a"', '"weights": "b"'))
    with pytest.raises(ResultsError, match=r"two trainings of sibling dense, seed 0 \(weights .*first export back"):
        read_results(tmp_path)


def test_a_finished_cell_is_begun_no_more(tmp_path: Path) -> None:
    results = ResultsFolder(tmp_path, replace(MANIFEST, planned=1))
    begun = results.begun("", "dense", None, "mqar", 1024, True, 0)
    begun.begin(None)
    assert begun.path.is_file()
    results.write(rows_of(CELLS[0]))
    assert not begun.path.exists()
