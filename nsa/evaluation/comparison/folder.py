"""The folder of a comparison's results: written cell by cell, gone on with after an interruption, read by the report.

manifest.json           config, commit, versions, hardware, when it began and ended
cells/ID/cell.json      what all answers of a cell share, with the counts of the ledger
cells/ID/answers.jsonl  one answer a line
left_out.json           cells that cannot be, such as a budget that a method cannot meet, and why
cells.json, cells.parquet   one line a cell, written at the end
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa.evaluation.comparison.rows import Cell, ResultsError, Row, build_cell, cell_id, cell_of, digest, tidy
from nsa.untrusted import UntrustedError, parse_json, read_bytes, read_json

FORMAT = 1
MANIFEST, CELLS, CELL, ANSWERS = "manifest.json", "cells", "cell.json", "answers.jsonl"
LEFT_OUT = "left_out.json"
UNFINISHED = ".unfinished-"  # begins the name of a cell's folder while it is written


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Where results come from.

    config: of the comparison, as JSON. commit: of this project's code. versions: of packages, by name. hardware: in
    words. planned: cells in all. started, finished: ISO 8601; None: not finished.
    """

    config: dict[str, Any]
    commit: str
    versions: dict[str, str]
    hardware: str
    planned: int
    started: str
    finished: str | None = None
    format: int = FORMAT

    @property
    def origin(self) -> str:
        """Results that differ in this are not comparable: the commit, and a digest of the configuration."""
        return f"{self.commit} {digest(self.config)[:12]}"


@dataclass(frozen=True)
class Results:
    """What a finished folder holds. left_out: in words, which cell -> why it cannot be."""

    manifest: Manifest
    cells: list[Cell]
    left_out: Mapping[str, str]


class ResultsFolder:
    """Writes cells. A cell is there whole or not at all: it is written under another name, then renamed."""

    def __init__(self, path: Path | str, manifest: Manifest) -> None:
        """Begin a folder, or go on with one of the same commit and configuration.

        Raises:
            ResultsError: it holds something else; the message says what to do.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ResultsError(f"{path} is a file: name a folder for the results")
        if self.path.is_dir() and any(self.path.iterdir()):
            found = read_manifest(self.path)
            _same_origin(found, manifest, self.path)
            manifest = found
        else:
            (self.path / CELLS).mkdir(parents=True, exist_ok=True)
            _write(self.path / MANIFEST, json.dumps(asdict(manifest), indent=1) + "\n")
        self.manifest = manifest
        for left in (self.path / CELLS).glob(f"{UNFINISHED}*"):
            shutil.rmtree(left)

    def has(
        self, arm: str, budget: float | None, task: str, length: int, question_aware: bool, train_seed: int = 0
    ) -> bool:
        """Whether this cell is finished."""
        return (self.path / CELLS / cell_id(arm, budget, task, length, question_aware, train_seed)).is_dir()

    def write(self, rows: Sequence[Row], figures: Mapping[str, Any] | None = None) -> Cell:
        """Write a finished cell. ``figures``: see `Cell`.

        Raises:
            ResultsError: the rows are no cell, or the cell is there already.
        """
        cell = cell_of(rows, figures)
        final = self.path / CELLS / cell.id
        if final.exists():
            raise ResultsError(f"{final} is there already: ask `has` first, and name arms with other settings apart")
        temporary = final.with_name(f"{UNFINISHED}{cell.id}")
        temporary.mkdir()
        _write(temporary / CELL, json.dumps({**cell.head(), "origin": self.manifest.origin}, indent=1) + "\n")
        _write(temporary / ANSWERS, "".join(json.dumps(answer) + "\n" for answer in cell.answers()))
        temporary.rename(final)
        return cell

    def leave_out(self, what: str, why: str) -> None:
        """Note that a planned cell cannot be, and why."""
        _write(self.path / LEFT_OUT, json.dumps({**_left_out(self.path), what: why}, indent=1) + "\n")

    def finish(self, finished: str) -> Results:
        """Write the tables once all planned cells are there. ``finished``: ISO 8601.

        Raises:
            ResultsError: cells are missing, or come from elsewhere.
        """
        cells = list(_read_cells(self.path, self.manifest))
        left_out = _left_out(self.path)
        if len(cells) + len(left_out) != self.manifest.planned:
            raise ResultsError(_half_written(self.path, len(cells), self.manifest))
        lines = [tidy(cell) for cell in cells]
        _write_parquet(self.path / "cells.parquet", lines)
        whole = [{**line, "figures": cell.figures} for line, cell in zip(lines, cells, strict=True)]
        _write(self.path / "cells.json", json.dumps(whole, indent=1) + "\n")
        self.manifest = Manifest(**{**asdict(self.manifest), "finished": finished})
        _write(self.path / MANIFEST, json.dumps(asdict(self.manifest), indent=1) + "\n")
        return Results(self.manifest, cells, left_out)


def read_results(path: Path | str) -> Results:
    """All cells of a finished folder.

    Raises:
        ResultsError: it is no such folder, it is half written, or its cells come from two commits or configurations.
    """
    path = Path(path)
    manifest = read_manifest(path)
    cells = list(_read_cells(path, manifest))
    left_out = _left_out(path)
    if manifest.finished is None or len(cells) + len(left_out) != manifest.planned:
        raise ResultsError(_half_written(path, len(cells), manifest))
    return Results(manifest, cells, left_out)


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
        raise ResultsError(
            f"{path} has no {MANIFEST}, so it is no folder of results. Name another folder, or delete this one"
        ) from None
    except (UntrustedError, OSError) as e:
        raise ResultsError(f"{path}: {e}. Delete the folder and run the comparison again") from None
    try:
        manifest = Manifest(**found)
    except TypeError as e:
        raise ResultsError(f"{path / MANIFEST} is not this project's ({e}): name another folder") from None
    if manifest.format != FORMAT:
        raise ResultsError(f"{path} has format {manifest.format}, this code reads {FORMAT}: run the comparison again")
    return manifest


def _read_cells(path: Path, manifest: Manifest) -> Iterator[Cell]:
    for folder in sorted((path / CELLS).glob("[!.]*")):
        again = f"Delete {folder} and run the comparison again: it goes on with what is missing"
        try:
            head = read_json(folder / CELL)
            lines = read_bytes(folder / ANSWERS, 2**28).splitlines()
            answers = [parse_json(line, f"{folder / ANSWERS}, line {n}") for n, line in enumerate(lines, 1)]
        except (UntrustedError, OSError) as e:
            raise ResultsError(f"half-written: {e}. {again}") from None
        origin = head.pop("origin", "unknown") if isinstance(head, dict) else "unknown"
        if origin != manifest.origin:
            raise ResultsError(_two(path, folder.name, origin, "the manifest", manifest.origin))
        try:
            cell = build_cell(head, answers, str(folder))
        except ResultsError as e:
            raise ResultsError(f"{e}. {again}") from None
        if cell.id != folder.name:
            raise ResultsError(f"{folder} holds the cell {cell.id}: it was renamed. {again}")
        yield cell


def _same_origin(found: Manifest, manifest: Manifest, path: Path) -> None:
    if found.origin != manifest.origin:
        raise ResultsError(_two(path, "the folder", found.origin, "this run", manifest.origin))


def _two(path: Path, one: str, its: str, other: str, others: str) -> str:
    what = "configurations" if its.split(" ")[0] == others.split(" ")[0] else "commits"
    return (
        f"{path} would hold results of two {what}, which cannot be compared: {one} ({its}) and {other} ({others}). "
        f"Name another folder, or delete this one and run all again"
    )


def _half_written(path: Path, cells: int, manifest: Manifest) -> str:
    return (
        f"{path} is half-written: {cells} of {manifest.planned} cells are there. Run the same command again: "
        f"it skips finished cells and goes on with the others"
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
