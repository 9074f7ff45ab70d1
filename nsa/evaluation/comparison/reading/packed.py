"""Results in few files that are small enough for git: what the folder says, and all cells with all answers.

manifest.json, left_out.json, siblings/   as in a results folder; plan.json of a comparison that was stopped, too
cells.jsonl.gz                            one line a cell: what its answers share, and its answers as columns
"""

import gzip
import io
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nsa.evaluation.comparison.rows import OF_ANSWER, Cell, ResultsError
from nsa.untrusted import UntrustedError, parse_json, regular_size

PACKED = "cells.jsonl.gz"
COPIED = ("manifest.json", "left_out.json", "siblings/*.yaml")
LIMIT = 2**28  # bytes of the file
LINE = 2**26  # bytes of a cell


def is_packed(folder: Path) -> bool:
    """Whether the results in this folder are packed."""
    return (folder / PACKED).is_file()


def write(cells: Mapping[str, Cell], heads: Mapping[str, dict[str, Any]], folder: Path, out: Path) -> None:
    """Pack cells. The same cells give the same bytes.

    Args:
        cells: by their ids. heads: by id, what stands in a line beside the cell (origin, made).
        folder: of results. out: another folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    for pattern in COPIED:
        for path in folder.glob(pattern):
            copy = out / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    content = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=content, mtime=0) as file:
        for number in sorted(cells):
            answers = cells[number].answers()
            columns = {name: [answer[name] for answer in answers] for name in OF_ANSWER}
            line = {**cells[number].head(), **heads[number], "answers": columns}
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
    (out / f"{PACKED}.tmp").write_bytes(content.getvalue())
    (out / f"{PACKED}.tmp").rename(out / PACKED)


def read(folder: Path) -> Iterator[tuple[str, dict[str, Any], list[dict[str, Any]]]]:
    """Each cell: where it is in words, what its answers share, its answers.

    Raises:
        ResultsError: the file is damaged; the message says what to do.
    """
    path = folder / PACKED
    again = "Bring the file back (git checkout), or pack the results again"
    try:
        if (size := regular_size(path)) > LIMIT:
            raise UntrustedError(f"{path}: {size} bytes, at most {LIMIT} are read")
        with gzip.open(path) as file:
            number = 0
            while line := file.readline(LINE):
                number += 1
                where = f"{path}, line {number}"
                head = parse_json(line, where)
                yield where, head, _answers(head, where)
    except (UntrustedError, OSError, EOFError, zlib.error) as e:
        raise ResultsError(f"damaged: {e}. {again}") from None


def _answers(head: Any, where: str) -> list[dict[str, Any]]:
    columns = head.pop("answers", None) if isinstance(head, dict) else None
    if not isinstance(columns, dict) or not all(isinstance(column, list) for column in columns.values()):
        raise UntrustedError(f"{where}: no cell")
    if len({len(column) for column in columns.values()}) != 1 or not isinstance(head.get("made"), dict):
        raise UntrustedError(f"{where}: no cell")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
