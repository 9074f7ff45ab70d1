"""Documents of local files: plain text, JSON and Parquet; text and JSON may be compressed.

Only the text matters. Other columns may have any type, and a different one in each row.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Archives, arrays, documents and media. Some happen to be valid UTF-8; none is text.
NO_TEXT = {
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar", ".zst", ".lz4", ".br", ".z"),
    *(".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".pkl", ".pickle", ".arrow", ".feather", ".orc", ".avro"),
    *(".h5", ".hdf5", ".db", ".sqlite", ".sqlite3", ".pdf", ".doc", ".docx", ".odt", ".epub", ".xls", ".xlsx"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4", ".wav", ".ogg", ".so", ".exe", ".pyc", ".o", ".a"),
}
MOST_COLUMNS = 1000  # different names of columns in a file that are remembered, for a message
ROWS_AT_ONCE = 256  # of Parquet


class Document(NamedTuple):
    """id: says where the text is from (a path, with #row in a table). text: UTF-8, byte for byte as in the source."""

    id: str
    text: bytes


class BadRow(NamedTuple):
    """A row that cannot be used. id: file and row, from 0. reason: what is wrong with it."""

    id: str
    reason: str


def obstacle(path: Path) -> str | None:
    """Why a file cannot be read as text, by its name; None if it can."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        return "is compressed with zstd, which cannot be read here: unpack it (zstd -d)"
    if suffix in NO_TEXT or (suffix in OPENERS and Path(path.stem).suffix.lower() in (*NO_TEXT, ".parquet")):
        return "is no text: take it out of the folder, or name it in the source's exclude"
    return None


def is_table(path: Path) -> bool:
    """Whether the file holds a document a row; otherwise it is one document of plain text."""
    return _is_parquet(path) or _plain_suffix(path) in JSON_SUFFIXES


def has_plain_bytes(path: Path) -> bool:
    """Whether the file's text, unpacked, is UTF-8 from its first byte to the last."""
    return not _is_parquet(path)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked. Raises ValueError if it is cut off or damaged, or cannot be read."""
    try:
        if not path.stat().st_size:  # xz has no such file
            yield io.BytesIO()
            return
        with OPENERS.get(path.suffix.lower(), Path.open)(path, "rb") as file:
            yield file
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path}: cannot be read to its end ({why}); is it cut off?") from error


def read(path: Path, id: str, text_field: str) -> Iterator[Document | BadRow]:
    """Every document of a file, empty ones too, and the rows that are none, in order.

    Raises:
        ValueError: the file is damaged, or has no column ``text_field`` of text; says what to do.
    """
    if _is_parquet(path):
        yield from _parquet(path, id, text_field)
    elif is_table(path):
        yield from _json(path, id, text_field)
    else:
        with opened(path) as file:
            yield Document(id, file.read())


def _is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def _plain_suffix(path: Path) -> str:
    """The suffix of the file once it is unpacked."""
    return (Path(path.stem) if path.suffix.lower() in OPENERS else path).suffix.lower()


def _json(path: Path, id: str, text_field: str) -> Iterator[Document | BadRow]:
    """JSON lines, or one array of rows. A row with null for its text, or without any, is an empty document."""
    columns: set[str] = set()
    for number, row in enumerate(_json_rows(path)):
        where = f"{id}#{number}"
        if isinstance(row, ValueError):
            yield BadRow(where, f"is not JSON ({row})")
        elif not isinstance(row, dict):
            yield BadRow(where, f"is a JSON {type(row).__name__}, not an object with a text")
        elif not isinstance(row.get(text_field), str | None):
            kind = type(row[text_field]).__name__
            yield BadRow(where, f"column {text_field!r} holds {kind}, not text; set text_field")
        else:
            if len(columns) < MOST_COLUMNS:
                columns |= row.keys()
            yield Document(where, (row.get(text_field) or "").encode("utf-8", "surrogatepass"))
    if columns and text_field not in columns and len(columns) < MOST_COLUMNS:
        known = ", ".join(sorted(columns))
        raise ValueError(f"{path} has no column {text_field!r}; set text_field to one of: {known}")


def _json_rows(path: Path) -> Iterator[Any]:
    with opened(path) as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if start.startswith(b"["):
            try:
                yield from json.loads(file.read())
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}: is not JSON ({error})") from error
            return
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if not number else line
            if line.strip():
                yield _parsed(line)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _parquet(path: Path, id: str, text_field: str) -> Iterator[Document | BadRow]:
    import pyarrow  # takes a while to import
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            if text_field not in columns.names:
                known = ", ".join(sorted(columns.names))
                raise ValueError(f"{path} has no column {text_field!r}; set text_field to one of: {known}")
            kind = columns.field(text_field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not _holds_text(pyarrow.types, kind):
                raise ValueError(f"{path}: column {text_field!r} holds {kind}, not text; set text_field")
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[text_field]):
                for text in batch.column(0).to_pylist():
                    yield Document(f"{id}#{number}", (text or "").encode())
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


def _holds_text(types: Any, kind: Any) -> bool:
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))
