"""Documents of a text source, always in the same order: (id, bytes of UTF-8 text)."""

import hashlib
import json
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nsa.data.config import SourceConfig

BUILTIN_SUFFIXES = {".py", ".rst", ".txt"}
JSON_SUFFIXES = {".jsonl", ".ndjson", ".json"}
CHUNK = 1 << 24
NAMED = 10  # bad files named in one error


class Document(NamedTuple):
    """id: says where the text is from (a path, with #row in a table). text: UTF-8, byte for byte as in the source."""

    id: str
    text: bytes


class BadByte(NamedTuple):
    """position: of the first byte that is not UTF-8. total: number of such bytes."""

    position: int
    total: int


def describe(source: SourceConfig) -> dict[str, Any]:
    """What determines the documents, cheap to tell (sizes and times of files, not their content), as JSON data."""
    if source.kind == "builtin":
        root = _stdlib()
        listing = [(p.relative_to(root).as_posix(), p.stat().st_size) for p in _builtin_files()]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return {"kind": "builtin", "python": sys.version.split()[0], "listing": digest}
    if source.kind == "files":
        stats = [(id, path.stat()) for id, path in _files(source)]
        listing_files = [(id, s.st_size, s.st_mtime_ns) for id, s in stats]
        digest = hashlib.sha256(json.dumps(listing_files).encode()).hexdigest()
        return {"kind": "files", "path": source.path, "text_field": source.text_field, "listing": digest}
    return source.model_dump(include={"kind", "path", "subset", "split", "text_field"})


def check(source: SourceConfig) -> None:
    """Raise ValueError that names every local file of the source that is not UTF-8, and where. Reads them all."""
    if source.kind != "files":
        return
    bad = []
    for _, path in _files(source):
        if path.suffix not in (".parquet", ".gz", ".zst", ".xz", ".bz2") and (found := find_bad_byte(path)):
            bad.append(f"  {path}: byte {found.position} is the first of {found.total} that are not UTF-8")
    if bad:
        more = [f"  ... and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
        raise ValueError(
            f"data source {source.name!r}: {len(bad)} file(s) are not UTF-8; nothing was written\n"
            + "\n".join(bad[:NAMED] + more)
            + "\nconvert them (for instance: iconv -f latin1 -t utf-8 OLD > NEW) or take them out of data.sources"
        )


def documents(source: SourceConfig) -> Iterator[Document]:
    """Every document, empty ones too. Raises ValueError where the source cannot be read, saying what to do."""
    if source.kind == "builtin":
        root = _stdlib()
        for path in _builtin_files():
            text = path.read_bytes()
            if _is_utf8(text):  # the standard library tests other encodings with a few files
                yield Document(path.relative_to(root).as_posix(), text)
    elif source.kind == "files":
        for id, path in _files(source):
            table = _table_format(path)
            if table is None:
                yield Document(id, path.read_bytes())
            elif path.stat().st_size:
                with tempfile.TemporaryDirectory() as scratch:  # `datasets` leaves lock files in its cache folder
                    where = {"path": table, "data_files": str(path), "cache_dir": scratch}
                    yield from _rows(source, _load(source, **where, split="train", streaming=True), id)
    elif source.kind == "hub":
        assert source.path is not None
        yield from _rows(source, _load(source, path=source.path, name=source.subset, split=source.split), source.path)
    else:
        raise AssertionError(f"a {source.kind} source has no documents")


def find_bad_byte(path: Path) -> BadByte | None:
    """Where a file stops being UTF-8, or None; in constant memory."""
    first, count, offset, rest = -1, 0, 0, b""
    with path.open("rb") as file:
        while True:
            chunk = file.read(CHUNK)
            data = rest + chunk
            # A character may be cut by the chunk's end: its first bytes (3 at most) wait for the next chunk.
            keep = _unfinished(data) if chunk else 0
            data, rest = data[: len(data) - keep], data[len(data) - keep :]
            start = 0
            while start < len(data):
                try:
                    data[start:].decode() if start else data.decode()
                    break
                except UnicodeDecodeError as error:
                    first = offset + start + error.start if first < 0 else first
                    count += error.end - error.start
                    start += error.end
            offset += len(data)
            if not chunk:
                return BadByte(first, count) if count else None


def _unfinished(data: bytes) -> int:
    """Bytes at the end of `data` that begin a character which is not complete (0 to 3)."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            return back if back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            return 0
    return 0


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _builtin_files() -> list[Path]:
    root = _stdlib()
    skip = {"site-packages", "dist-packages", "__pycache__"}
    found = [
        path
        for path in root.rglob("*")
        if path.suffix in BUILTIN_SUFFIXES and skip.isdisjoint(path.relative_to(root).parts) and path.is_file()
    ]
    if not found:
        raise ValueError(f"no Python sources under {root}: use a source of kind files instead of builtin")
    return sorted(found, key=lambda p: p.relative_to(root).as_posix())


def _files(source: SourceConfig) -> list[tuple[str, Path]]:
    """(id, path) of every file of a `files` source, by id. In a folder: all that are not hidden."""
    assert source.path is not None
    path = Path(source.path).expanduser()
    if path.is_dir():
        hidden = [p for p in path.rglob("*") if any(part.startswith(".") for part in p.relative_to(path).parts)]
        found = {p.relative_to(path).as_posix(): p for p in set(path.rglob("*")) - set(hidden) if p.is_file()}
    elif path.is_file():
        found = {path.name: path}
    else:
        anchor = Path(path.anchor or ".")
        matches = anchor.glob(str(path.relative_to(path.anchor) if path.anchor else path))
        found = {p.as_posix(): p for p in matches if p.is_file()}
    if not found:
        raise ValueError(f"data source {source.name!r}: no file matches {source.path!r}; set its path")
    return sorted(found.items())


def _table_format(path: Path) -> str | None:
    """The `datasets` builder that reads this file; None: the file is one document of plain text."""
    suffixes = set(path.suffixes[-2:])
    if ".parquet" in suffixes:
        return "parquet"
    return "json" if suffixes & JSON_SUFFIXES else None


def _load(source: SourceConfig, **arguments: Any) -> Any:
    import datasets  # takes seconds to import

    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # of many kinds: connection, HTTP, unknown data set, subset or split
        advice = "check its path" if source.kind == "files" else "check path, subset, split and the network"
        raise ValueError(f"data source {source.name!r}: cannot load {source.path!r}: {error}\n{advice}") from error


def _rows(source: SourceConfig, rows: Any, id: str) -> Iterator[Document]:
    """One document per row. A row without text is an empty document."""
    iterator = iter(rows)
    row_number = 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # of the parser (pyarrow) or of `datasets`
            raise ValueError(f"data source {source.name!r}: {id} is broken after row {row_number}: {error}") from error
        if source.text_field not in row:
            raise ValueError(
                f"data source {source.name!r}: {id} has no column {source.text_field!r}; "
                f"set text_field to one of: {', '.join(sorted(row))}"
            )
        text = row[source.text_field]
        if not isinstance(text, str | None):
            raise ValueError(
                f"data source {source.name!r}: row {row_number} of {id}: column {source.text_field!r} holds "
                f"{type(text).__name__}, not text; set text_field"
            )
        yield Document(f"{id}#{row_number}", (text or "").encode("utf-8", "surrogatepass"))
        row_number += 1
