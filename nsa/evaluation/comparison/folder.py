"""The folder of a comparison's results: written cell by cell, gone on with after an interruption, read by the report.

manifest.json           config, code, commit, versions, hardware, when it began and ended
cells/ID/cell.json      what all answers of a cell share, with the counts of the ledger, and where it was made
cells/ID/answers.jsonl  one answer a line
begun/ID.jsonl          batches of a cell that is not finished (`begun.Begun`)
siblings/NAME.yaml      how a sibling was trained
plan.json               the planned cells, by which those that are missing are named (`reading.partial`)
left_out.json           cells that cannot be, such as a budget that a method cannot meet, and why
cells.json, cells.parquet   one line a cell, written at the end
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nsa.evaluation.comparison.begun import Begun
from nsa.evaluation.comparison.reading import packed, partial
from nsa.evaluation.comparison.rows import Cell, ResultsError, Row, build_cell, cell_id, cell_of, digest, tidy
from nsa.untrusted import UntrustedError, parse_json, read_bytes, read_json

FORMAT = 2
MANIFEST, CELLS, CELL, ANSWERS = "manifest.json", "cells", "cell.json", "answers.jsonl"
SIBLINGS = "siblings"
BEGUN = "begun"
LEFT_OUT = "left_out.json"
UNFINISHED = ".unfinished-"  # begins the name of a cell's folder while it is written
GROWS = ("siblings", "methods", "stages")  # of a configuration: lists that may grow, since no cell depends on them
# Results with other values of these can be compared.
FREE = (*GROWS, "output_dir", "batch_tokens", "decode_batch_tokens")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Where results come from.

    config: of the comparison, as JSON. code: a fingerprint of what answers depend on (`identity.code_digest`). commit:
    of this project. versions: of packages, by name. hardware: in words; of these three each cell has its own. planned:
    cells in all. stage: of the configuration's stages, from 0. started, finished: ISO 8601; None: not finished.
    """

    config: dict[str, Any]
    code: str
    commit: str
    versions: dict[str, str]
    hardware: str
    planned: int
    started: str
    finished: str | None = None
    stage: int = 0
    format: int = FORMAT

    @property
    def origin(self) -> str:
        """Results that differ in this are not comparable: the code, and a digest of the configuration."""
        return f"{self.code} {digest({k: v for k, v in self.config.items() if k not in FREE})[:12]}"

    @property
    def made(self) -> dict[str, Any]:
        """What each cell says of where it was made."""
        return {"commit": self.commit, "versions": self.versions, "hardware": self.hardware}

    @property
    def asks(self) -> str:
        """A fingerprint of what the planned cells follow from."""
        return digest([self.origin, self.stage, {name: self.config.get(name) for name in GROWS}])[:12]


@dataclass(frozen=True)
class Results:
    """What a folder holds.

    left_out: in words, which cell -> why it cannot be, or that it was not answered. made: by cell, where. planned:
    cells of a comparison that was stopped; None: it ended.
    """

    manifest: Manifest
    cells: list[Cell]
    left_out: Mapping[str, str]
    made: Mapping[str, dict[str, Any]]
    planned: int | None = None


class ResultsFolder:
    """Writes cells. A cell is there whole or not at all: it is written under another name, then renamed."""

    def __init__(self, path: Path | str, manifest: Manifest) -> None:
        """Begin a folder, or go on with one of the same code and configuration, whose lists may have grown.

        Raises:
            ResultsError: it holds something else; the message says what to do.
        """
        self.path, self.made = Path(path), manifest.made
        if self.path.exists() and not self.path.is_dir():
            raise ResultsError(f"{path} is a file: name a folder for the results")
        if self.path.is_dir() and any(self.path.iterdir()) and not self._only_begun():
            found = read_manifest(self.path)
            _same_origin(found, manifest, self.path)
            if (found.config, found.stage) == (manifest.config, manifest.stage):
                manifest = found
            else:
                manifest = replace(manifest, started=found.started)
        self.manifest = manifest
        (self.path / CELLS).mkdir(parents=True, exist_ok=True)
        self._write_manifest()
        for left in (self.path / CELLS).glob(f"{UNFINISHED}*"):
            shutil.rmtree(left)
        self.weights = _weights(self.path)

    def _only_begun(self) -> bool:
        """Whether it was interrupted before there was anything in it."""
        names = {path.name for path in self.path.iterdir()}
        return names <= {CELLS, f"{MANIFEST}.tmp"} and not any((self.path / CELLS).glob("*"))

    def _write_manifest(self) -> None:
        _write(self.path / MANIFEST, json.dumps(asdict(self.manifest), indent=1) + "\n")

    def plan(self, cells: int) -> None:
        """So many cells are to be there, left out ones included."""
        if cells != self.manifest.planned:
            self.manifest = replace(self.manifest, planned=cells)
            self._write_manifest()

    def keep_plan(self, plan: partial.Plan) -> None:
        """Keep which cells are planned, so that those that are missing can be named."""
        _write(self.path / partial.PLAN, json.dumps(plan.told(self.manifest.asks), indent=1) + "\n")

    def has(
        self, arm: str, budget: float | None, task: str, length: int, question_aware: bool, train_seed: int = 0
    ) -> bool:
        """Whether this cell is finished."""
        return self._place(arm, budget, task, length, question_aware, train_seed).is_dir()

    def _place(self, *key: Any) -> Path:
        return self.path / CELLS / cell_id(*key)

    def begun(self, weights: str, *key: Any) -> Begun:
        """What is known of a cell that is not finished. ``key``: as of `has`. ``weights``: as of `write`."""
        by = {"origin": self.manifest.origin, "made": {**self.made, "weights": weights}, "cell": key}
        return Begun(self._begun(*key), by)

    def forget(self, *key: Any) -> None:
        """What is known of a cell is not needed any more. ``key``: as of `has`."""
        self._begun(*key).unlink(missing_ok=True)

    def _begun(self, *key: Any) -> Path:
        return self.path / BEGUN / f"{cell_id(*key)}.jsonl"

    def check_weights(self, model: str, train_seed: int, weights: str) -> None:
        """Raises ResultsError if there are results of another training of this sibling and seed."""
        if (there := self.weights.setdefault((model, train_seed), weights)) != weights:
            raise ResultsError(_retrained(self.path, model, train_seed, there, weights))

    def cell(
        self, arm: str, budget: float | None, task: str, length: int, question_aware: bool, train_seed: int = 0
    ) -> Cell | None:
        """This cell; None: it is not finished. Raises ResultsError if it is damaged."""
        if not self.has(arm, budget, task, length, question_aware, train_seed):
            return None
        return _read_cell(self._place(arm, budget, task, length, question_aware, train_seed), self.manifest)[0]

    def write(self, rows: Sequence[Row], figures: Mapping[str, Any] | None = None, weights: str = "") -> Cell:
        """Write a finished cell. ``figures``: see `Cell`. ``weights``: fingerprint of the sibling's.

        Raises:
            ResultsError: the rows are no cell, the cell is there already, or others are of other weights.
        """
        cell = cell_of(rows, figures)
        self.check_weights(cell.model, cell.train_seed, weights)
        final = self.path / CELLS / cell.id
        if final.exists():
            raise ResultsError(f"{final} is there already: ask `has` first, and name arms with other settings apart")
        temporary = final.with_name(f"{UNFINISHED}{cell.id}")
        temporary.mkdir()
        made = {**self.made, "weights": weights}
        head = {**cell.head(), "origin": self.manifest.origin, "made": made}
        _write(temporary / CELL, json.dumps(head, indent=1) + "\n")
        _write(temporary / ANSWERS, "".join(json.dumps(answer) + "\n" for answer in cell.answers()))
        temporary.rename(final)
        (self.path / BEGUN / f"{cell.id}.jsonl").unlink(missing_ok=True)
        return cell

    def drop_figure(
        self,
        name: str,
        arm: str,
        budget: float | None,
        task: str,
        length: int,
        question_aware: bool,
        train_seed: int = 0,
    ) -> None:
        """Take a figure out of a finished cell, if it has it."""
        path = self._place(arm, budget, task, length, question_aware, train_seed) / CELL
        with suppress(UntrustedError, OSError, KeyError, TypeError):  # a damaged cell is told of when it is read
            head = read_json(path)
            if name in head["figures"]:
                del head["figures"][name]
                _write(path, json.dumps(head, indent=1) + "\n")

    def keep_training(self, name: str, config: Path) -> None:
        """Keep a copy of the configuration that a sibling was trained with, if it has one."""
        copy = self.path / SIBLINGS / f"{name}.yaml"
        if config.is_file() and not copy.exists():
            copy.parent.mkdir(exist_ok=True)
            _write(copy, config.read_text())

    def leave_out(self, what: str, why: str) -> None:
        """Note that a planned cell cannot be, and why."""
        left = {**self.left_out(), what: why}
        _write(self.path / LEFT_OUT, json.dumps(left, indent=1, sort_keys=True) + "\n")

    def left_out(self) -> dict[str, str]:
        """Which cells cannot be -> why, in words."""
        return _left_out(self.path)

    def finish(self, finished: str) -> Results:
        """Write the tables once all planned cells are there. ``finished``: ISO 8601.

        Raises:
            ResultsError: cells are missing, or come from elsewhere.
        """
        results = _read(self.path, self.manifest)
        lines = [tidy(cell) for cell in results.cells]
        _write_parquet(self.path / "cells.parquet", lines)
        whole = [{**line, "figures": cell.figures} for line, cell in zip(lines, results.cells, strict=True)]
        _write(self.path / "cells.json", json.dumps(whole, indent=1) + "\n")
        self.manifest = replace(self.manifest, finished=self.manifest.finished or finished)
        self._write_manifest()
        shutil.rmtree(self.path / BEGUN, ignore_errors=True)
        return replace(results, manifest=self.manifest)


def read_results(path: Path | str, stopped: bool = False) -> Results:
    """All cells of a finished folder, or of one that `nsa.evaluation.comparison.reading.packed` wrote.

    Args:
        path: the folder. stopped: the comparison may have been stopped; what is missing is then left out. A packed
            folder says by itself if it was.

    Raises:
        ResultsError: it is no such folder, it is half written, or its cells come from two commits or configurations, or
            two trainings of a sibling.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if manifest.finished is None and (stopped or packed.is_packed(path)):
        results = _there(path, manifest)
        left_out, planned = partial.missing(path, manifest.asks, results.made, results.left_out, manifest.commit)
        return replace(results, left_out=left_out, planned=planned)
    results = _read(path, manifest)
    if manifest.finished is None:
        raise ResultsError(_half_written(path, len(results.cells), manifest))
    return results


def _read(path: Path, manifest: Manifest) -> Results:
    """Raises ResultsError unless all cells are there or left out."""
    results = _there(path, manifest)
    if len(results.cells) + len(results.left_out) != manifest.planned:
        raise ResultsError(_half_written(path, len(results.cells), manifest))
    return results


def _there(path: Path, manifest: Manifest) -> Results:
    cells, made = [], {}
    weights: dict[tuple[str, int], str] = {}
    for cell, of_cell in read_cells(path, manifest):
        cells.append(cell)
        made[cell.id] = of_cell
        its = of_cell.get("weights", "")
        if (there := weights.setdefault((cell.model, cell.train_seed), its)) != its:
            raise ResultsError(_retrained(path, cell.model, cell.train_seed, there, its))
    return Results(manifest, cells, _left_out(path), made)


def _weights(path: Path) -> dict[tuple[str, int], str]:
    """Of each sibling and training seed, by the cells that are there."""
    found = {}
    for folder in (path / CELLS).glob("[!.]*"):
        with suppress(UntrustedError, OSError, KeyError, TypeError):  # a damaged cell is told of when it is read
            head = read_json(folder / CELL)
            found[head["model"], head["train_seed"]] = head["made"]["weights"]
    return found


def _left_out(path: Path) -> dict[str, str]:
    try:
        found: dict[str, str] = read_json(path / LEFT_OUT)
    except FileNotFoundError:
        return {}
    except (UntrustedError, OSError) as e:
        raise ResultsError(f"{path}: {e}. Delete {path / LEFT_OUT} and run the comparison again") from None
    return found


def read_manifest(path: Path) -> Manifest:
    """The manifest of a results folder. Raises ResultsError."""
    try:
        found = read_json(path / MANIFEST)
    except FileNotFoundError:
        if not path.exists():
            raise ResultsError(f"{path} is not there. Name a folder of results") from None
        raise ResultsError(f"{path} has no {MANIFEST}, so it is no folder of results. Name another folder") from None
    except NotADirectoryError:
        raise ResultsError(f"{path} is a file. Name a folder of results") from None
    except (UntrustedError, OSError) as e:
        raise ResultsError(
            f"{path}: {e}. Name another folder, or run the comparison again with a new output_dir"
        ) from None
    if isinstance(found, dict) and found.get("format") != FORMAT:
        there = found.get("format")
        raise ResultsError(f"{path} has format {there}, this code reads {FORMAT}: run the comparison again")
    try:
        return Manifest(**found)
    except TypeError as e:
        raise ResultsError(f"{path / MANIFEST} is not this project's ({e}): name another folder") from None


def read_cells(path: Path, manifest: Manifest) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell, and where it was made. Raises ResultsError."""
    if packed.is_packed(path):
        yield from (
            (_cell(path, where, head, answers, manifest), head["made"]) for where, head, answers in packed.read(path)
        )
        return
    for folder in sorted((path / CELLS).glob("[!.]*")):
        yield _read_cell(folder, manifest)


def _read_cell(folder: Path, manifest: Manifest) -> tuple[Cell, dict[str, Any]]:
    again = f"Delete {folder} and run the comparison again: it goes on with what is missing"
    try:
        head = read_json(folder / CELL)
        lines = read_bytes(folder / ANSWERS, 2**28).splitlines()
        answers = [parse_json(line, f"{folder / ANSWERS}, line {n}") for n, line in enumerate(lines, 1)]
    except (UntrustedError, OSError) as e:
        raise ResultsError(f"half-written: {e}. {again}") from None
    if not isinstance(head, dict):
        raise ResultsError(f"half-written: {folder / CELL} is no object. {again}")
    made = head.get("made", {})
    try:
        cell = _cell(folder.parent.parent, str(folder), head, answers, manifest)
    except Mixed:
        raise
    except ResultsError as e:
        raise ResultsError(f"{e}. {again}") from None
    if cell.id != folder.name:
        raise ResultsError(f"{folder} holds the cell {cell.id}: it was renamed. {again}")
    return cell, made


def _cell(path: Path, where: str, head: dict[str, Any], answers: list[Any], manifest: Manifest) -> Cell:
    """Raises Mixed if it is of other results, ResultsError if it is no cell."""
    origin = head.get("origin", "unknown")
    if origin != manifest.origin:
        raise Mixed(_two(path, Path(where).name, origin, "the manifest", manifest.origin))
    return build_cell({k: v for k, v in head.items() if k not in ("origin", "made")}, answers, where)


class Mixed(ResultsError):
    """Cells of results that cannot be compared."""


def _same_origin(found: Manifest, manifest: Manifest, path: Path) -> None:
    """Raises ResultsError unless ``manifest`` goes on with ``found``."""
    if found.origin != manifest.origin:
        back = ""
        if found.code != manifest.code:
            back = f"; or go back to that code to go on (git checkout {found.commit.rstrip('+')})"
        raise Mixed(_two(path, "the folder", found.origin, "this run", manifest.origin) + back)
    for name in GROWS:
        new = _names(manifest.config, name)
        if gone := [item for item in _names(found.config, name) if item not in new]:
            raise Mixed(
                f"{path} was begun with more {name} ({', '.join(gone)}): these lists may grow, but not shrink. Name "
                "another folder, or put them back"
            )


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    """What tells the items of a list of the configuration apart: a method by its settings, a sibling by its seeds."""
    items = config.get(key, [])
    if key == "methods":
        return [" ".join([item["name"], *(f"{k}={v}" for k, v in item.items() if k != "name")]) for item in items]
    return [f"{item['name']} {seed}".strip() for item in items for seed in item.get("seeds") or [""]]


def _two(path: Path, one: str, its: str, other: str, others: str) -> str:
    what = "configurations" if its.split(" ")[0] == others.split(" ")[0] else "commits"
    return (
        f"{path} would hold results of two {what}, which cannot be compared: {one} ({its}) and {other} ({others}). "
        f"Name another folder, or delete this one and run all again"
    )


def _retrained(path: Path, model: str, seed: int, one: str, other: str) -> str:
    return (
        f"{path} would hold results of two trainings of sibling {model}, seed {seed} (weights {one} and {other}), "
        "which cannot be compared. Bring its first export back, or name another folder"
    )


def _half_written(path: Path, cells: int, manifest: Manifest) -> str:
    stopped = (
        "" if manifest.finished else ". For a report of what is there: python -m nsa.compare report FOLDER --partial"
    )
    return (
        f"{path} is half-written: {cells} of {manifest.planned} cells are there. Run the same command again: "
        f"it skips finished cells and goes on with the others{stopped}"
    )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _write_parquet(path: Path, lines: list[dict[str, Any]]) -> None:
    import pyarrow  # slow to import, and needed at the end only
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(lines), path)
