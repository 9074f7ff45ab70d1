"""Documents of a text source, always in the same order: (id, bytes of UTF-8 text)."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from nsa.data import builtin, files
from nsa.data.config import SourceConfig
from nsa.data.files import BadRow, Document
from nsa.data.progress import Progress

CACHE_TAG = "CACHEDIR.TAG"  # bford.info/cachedir: a folder with this file holds nothing of its own
# By kind, what beside its path determines the documents of a source.
DETERMINED_BY = {"builtin": ("packages",), "files": ("text_field",), "hub": ("subset", "split", "text_field")}
# Folders that hold nothing of a corpus, by what is in them: caches, prepared data, runs, exports and evaluations.
OWN = (
    (CACHE_TAG,),
    ("manifest.json", "tokenizer.model"),
    ("metrics.jsonl", "config.yaml"),
    ("run.lock",),
    ("config.json", "tokenizer.json"),
    ("evaluation.json", "recall.png"),
)
CHUNK = 1 << 24
NAMED = 10  # bad files or rows named in one error
HOPELESS = 1000  # rows that are all bad, after which no more are read
Tell = Callable[[int, str], None]


class BadByte(NamedTuple):
    """position: of the first byte that is not UTF-8. total: number of such bytes."""

    position: int
    total: int


def describe(source: SourceConfig) -> dict[str, Any]:
    """What determines the documents, cheap to tell (sizes and times of files, not their content), as JSON data."""
    if source.kind == "builtin":
        python = sys.version.split()[0]
        if source.packages:
            digest = _listing(_python_files(source))
            return {"kind": "builtin", "python": python, "listing": digest, "packages": source.packages}
        listing = [(id, path.stat().st_size) for id, path in _python_files(source)]
        digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        return {"kind": "builtin", "python": python, "listing": digest}
    if source.kind == "files":
        path = str(Path(source.path or ""))
        # Ids once were paths, of a glob's files.
        whole = not Path(path).exists()
        digest = _listing((file.as_posix() if whole else id, file) for id, file in _files(source))
        return {
            "kind": "files",
            "path": path,
            "text_field": source.text_field,
            "listing": digest,
        }
    return source.model_dump(include={"kind", "path", "subset", "split", "text_field"})


def _listing(found: Iterable[tuple[str, Path]]) -> str:
    """sha256 of the JSON of [[name, size, time of the last change], ...]."""
    digest, before = hashlib.sha256(b"["), ""
    for name, path in found:
        status = path.stat()
        digest.update(f"{before}{json.dumps([name, status.st_size, status.st_mtime_ns])}".encode())
        before = ", "
    digest.update(b"]")
    return digest.hexdigest()


def content(source: SourceConfig, progress: bool = False) -> str | None:
    """sha256 of what a source's files hold, in turn, wherever they lie. Reads them all.

    None for a source that is not of kind `files` and names no packages. How a file is read counts (its suffix), its
    name does not.
    """
    if source.kind != "files" and not source.packages:
        return None
    found = _files(source) if source.kind == "files" else _python_files(source)
    digest = hashlib.sha256()
    with Progress(f"hash {source.name}", enabled=progress) as bar:
        for _, path in found:
            try:
                with path.open("rb") as file:
                    of_file = hashlib.file_digest(file, "sha256").hexdigest()
                    bar.update(file.tell())
            except OSError as error:
                raise ValueError(f"data source {source.name!r}: {files.no_access(path, error)}") from error
            digest.update(f"{files.format_of(path)} {of_file}\n".encode())
    return digest.hexdigest()


def check(source: SourceConfig) -> None:
    """Raise ValueError that names every local file of the source that is no text or not UTF-8.

    Plain text is read whole. Of tables the beginning is read: a row that is not UTF-8 is a bad row.
    """
    if source.kind != "files":
        return
    bad: list[str] = []
    count = 0
    for _, path in _files(source):
        if why := _trouble(path):
            count += 1
            if len(bad) < NAMED:
                bad.append(f"  {why}")
    if bad:
        more = [f"  ... and {count - NAMED} more"] if count > NAMED else []
        raise ValueError(
            f"data source {source.name!r}: {count} file(s) cannot be read as text; nothing was written\n"
            + "\n".join(bad + more)
            + "\nconvert them to UTF-8 (for instance: iconv -f latin1 -t utf-8 OLD > NEW), "
            "take them out of the folder, or name them in the source's exclude"
        )


def _trouble(path: Path) -> str | None:
    if why := files.obstacle(path):
        return f"{path} {why}"
    if files.is_parquet(path):
        return None
    try:
        if files.is_table(path):
            with files.opened(path):
                return None
        byte = find_bad_byte(path)
    except ValueError as error:
        return str(error)
    return byte and f"{path}: byte {byte.position} is the first of {byte.total} that are not UTF-8"


def documents(source: SourceConfig, tell: Tell | None = None) -> Iterator[Document]:
    """Every document, empty ones too.

    Args:
        tell: called with the number of rows that were left out and a text that names some, if there are any.

    Raises:
        ValueError: the source cannot be read, or more rows than ``bad_rows`` allows; says what to do.
    """
    if source.kind == "builtin":
        for id, path in _python_files(source):
            text = path.read_bytes()
            if files.is_utf8(text):  # the standard library tests other encodings with a few files
                yield Document(id, text)
    elif source.kind == "files":
        yield from _good(source, _of_files(source, tell), tell)
    elif source.kind == "hub":
        assert source.path is not None
        rows = _load(source, path=source.path, name=source.subset, split=source.split)
        yield from _good(source, _rows(source, rows, source.path), tell)
    else:
        raise AssertionError(f"a {source.kind} source has no documents")


def _of_files(source: SourceConfig, tell: Tell | None) -> Iterator[Document | BadRow]:
    """The rows of all files. In a folder a .json that is no table is left out, if another file has documents."""
    is_one_file = Path(source.path or "").is_file()
    read, left_out = 0, []
    no_files: list[str] = []
    try:
        for id, path in _files(source, no_files):
            try:
                yield from files.read(path, id, source.text_field)
                read += 1
            except files.NoColumnError as error:
                if is_one_file:
                    raise
                left_out.append((id, error))
        if left_out and not read:
            raise left_out[0][1]
    except ValueError as error:
        begin = f"data source {source.name!r}: "
        raise ValueError(begin + str(error).removeprefix(begin)) from error
    if left_out and tell:
        names = _some([id for id, _ in left_out])
        tell(0, f"data source {source.name!r}: left out for want of a column {source.text_field!r}: {names}")
    if no_files and tell:
        advice = "make a folder that is linked to a source of its own, or exclude it"
        tell(
            0,
            f"data source {source.name!r}: left out as no files (links are followed to files alone): "
            f"{_some(no_files)}; {advice}",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _good(source: SourceConfig, rows: Iterator[Document | BadRow], tell: Tell | None) -> Iterator[Document]:
    """The documents among ``rows``, if nearly all are; of the others the first few are named."""
    count, bad = 0, 0
    named: list[str] = []
    for row in rows:
        count += 1
        if isinstance(row, Document):
            yield row
            continue
        bad += 1
        if len(named) < NAMED:
            named.append(f"  {row.place} {row.reason}")
        if bad == count == HOPELESS:
            break
    if not bad:
        return
    named += [f"  ... and {bad - NAMED} more"] if bad > NAMED else []
    text = f"data source {source.name!r}: {bad} of {count} rows cannot be used\n" + "\n".join(named)
    if bad > source.bad_rows * count:
        raise ValueError(f"{text}\nfix them, or allow a larger share of them: bad_rows is {source.bad_rows:g}")
    if tell:
        tell(bad, f"{text}\nthey are left out")


def find_bad_byte(path: Path) -> BadByte | None:
    """Where a file's text, unpacked, stops being UTF-8, or None; in constant memory."""
    first, count, offset, rest = -1, 0, 0, b""
    with files.opened(path) as file:
        while True:
            chunk = file.read(CHUNK)
            data = rest + chunk
            # A character may be cut by the chunk's end: its first bytes (3 at most) wait for the next chunk.
            keep = _unfinished(data) if chunk else 0
            data, rest = data[: len(data) - keep], data[len(data) - keep :]
            try:
                data.decode()
            except UnicodeDecodeError as error:
                first = offset + error.start if first < 0 else first
                count += len(data) - len(data.decode(errors="ignore").encode())  # one by one, it would take hours
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


def _python_files(source: SourceConfig) -> list[tuple[str, Path]]:
    """(id, path) of every file of a `builtin` source. Raises ValueError if a package is not there."""
    try:
        return builtin.files(source.packages)
    except ValueError as error:
        raise ValueError(f"data source {source.name!r}: {error}") from error


def _files(source: SourceConfig, no_files: list[str] | None = None) -> Iterator[tuple[str, Path]]:
    """(id, path) of every file of a `files` source, by id: its path below the folder, or below a glob's fixed part.

    Of a folder and of a glob all that are not hidden, excluded, or in a folder that this project wrote (`OWN`).
    ``no_files`` gets what else a folder holds, unless it is hidden or excluded: links to folders, broken links.

    Raises ValueError if there is none, or a folder cannot be read.
    """
    assert source.path is not None
    path = Path(source.path).expanduser()
    count = left_out = 0
    no_files = [] if no_files is None else no_files
    if path.is_file():
        yield path.name, path
        return
    for id, file in _below(path) if path.is_dir() else _matches(path):
        if file is None:
            if not _shut_out(source, id):
                no_files.append(id)
        elif _wanted(source, id):
            count += 1
            yield id, file
        else:
            left_out += 1
    if not count:
        beside = f" but {left_out} that are hidden or that include and exclude leave out" if left_out else ""
        beside += f", and these are links to folders, or broken: {_some(no_files)}" if no_files else ""
        raise ValueError(f"data source {source.name!r}: no file matches {source.path!r}{beside}; set its path")


def _below(root: Path, prefix: str = "") -> Iterator[tuple[str, Path | None]]:
    """(id, path) of all in a folder; without the path of what is no file: a link to a folder, a broken link."""
    try:
        with os.scandir(root) as found:
            entries = {f"{e.name}/" if e.is_dir(follow_symlinks=False) else e.name: e for e in found}
    except OSError as error:
        raise ValueError(files.no_access(root, error)) from error
    if prefix and _is_own(entries.keys()):
        return
    for name in sorted(entries):  # a/b comes after a.txt, as in a list of all ids
        if name.endswith("/"):
            if not name.startswith("."):
                yield from _below(root / name, prefix + name)
        else:
            yield prefix + name, root / name if _is_file(entries[name]) else None


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a circle of links, say
        return False


def _matches(pattern: Path) -> Iterator[tuple[str, Path]]:
    parts = pattern.parts
    fixed = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), len(parts))
    if fixed == len(parts):
        return
    root, own = Path(*parts[:fixed]), {}
    matches = {p.relative_to(root).as_posix(): p for p in root.glob("/".join(parts[fixed:])) if p.is_file()}
    for id, path in sorted(matches.items()):
        folders = [folder for folder in path.parents if folder.is_relative_to(root) and folder != root]
        for folder in folders:
            if folder not in own:
                own[folder] = _is_own([file.name for file in folder.iterdir()])
        if not any(own[folder] for folder in folders):
            yield id, path


def _is_own(names: Collection[str]) -> bool:
    """Whether a folder with these files is one that the project (or another that tags its caches) wrote."""
    return any(all(name in names for name in own) for own in OWN)


def _wanted(source: SourceConfig, id: str) -> bool:
    """Whether a file of a folder belongs to the source. ``id``: its path within the folder."""
    return not _shut_out(source, id) and (not source.include or _is_named(id, source.include))


def _shut_out(source: SourceConfig, id: str) -> bool:
    return any(part.startswith(".") for part in id.split("/")) or _is_named(id, source.exclude)


def _is_named(id: str, patterns: list[str]) -> bool:
    return any(fnmatch(text, pattern) for pattern in patterns for text in (id, *id.split("/")))


def _load(source: SourceConfig, **arguments: Any) -> Any:
    import datasets  # takes seconds to import

    try:
        return datasets.load_dataset(**arguments)
    except Exception as error:  # of many kinds: connection, HTTP, unknown data set, subset or split
        advice = "check path, subset, split and the network"
        raise ValueError(f"data source {source.name!r}: cannot load {source.path!r}: {error}\n{advice}") from error


def _rows(source: SourceConfig, rows: Any, id: str) -> Iterator[Document | BadRow]:
    """One document per row of a data set. A row without text is an empty document."""
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
        if isinstance(text, str | None):
            yield Document(f"{id}#{row_number}", (text or "").encode("utf-8", "surrogatepass"))
        else:
            kind = type(text).__name__
            yield BadRow(
                f"{id}, row {row_number + 1}:", f"column {source.text_field!r} holds {kind}, not text; set text_field"
            )
        row_number += 1
