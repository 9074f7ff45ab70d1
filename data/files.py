"""Documents of local files: plain text, JSON and Parquet; text and JSON may be compressed.

Only the text matters. Other columns may have any type, and a different one in each row.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

from nsa.data import binary


def _open_zstd(path: Path, mode: str) -> IO[bytes]:
    import pyarrow  # takes a while to import

    assert mode == "rb"
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
# Archives, arrays, documents and media. Some happen to be valid UTF-8; none is text.
NO_TEXT = {
    *(".zip", ".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".7z", ".rar", ".lz4", ".br", ".z"),
    *(".npy", ".npz", ".pt", ".pth", ".bin", ".safetensors", ".pkl", ".pickle", ".arrow", ".feather", ".orc", ".avro"),
    *(".h5", ".hdf5", ".db", ".sqlite", ".sqlite3", ".pdf", ".doc", ".docx", ".odt", ".epub", ".xls", ".xlsx"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".mp3", ".mp4", ".wav", ".ogg", ".so", ".exe", ".pyc", ".o", ".a"),
}
MOST_COLUMNS = 1000  # different names of columns in a file that are remembered, for a message
ROWS_AT_ONCE = 256  # of Parquet
CHARACTERS_AT_ONCE = 1 << 20  # of a JSON array
FEW_ROWS = 1000  # a .json of fewer rows, none with a text, is no table: a setting, say
SPACE = re.compile(r"[ \t\r\n]+")
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # bytes of a file that are not (PEP 383)
BOM = b"\xef\xbb\xbf"
_decoder = json.JSONDecoder()


class Document(NamedTuple):
    """id: says where the text is from (a path, with #row in a table). text: UTF-8, byte for byte as in the source."""

    id: str
    text: bytes


class BadRow(NamedTuple):
    """A row that cannot be used. place: file and line (or row), from 1. reason: what is wrong with it."""

    place: str
    reason: str


class NoColumnError(ValueError):
    """A file of JSON that is no table of documents."""


def obstacle(path: Path) -> str | None:
    """Why a file cannot be read as text, by its name; None if it can."""
    suffix = path.suffix.lower()
    if suffix in NO_TEXT or (suffix in OPENERS and Path(path.stem).suffix.lower() in (*NO_TEXT, ".parquet")):
        return "is no text, by its name"
    return None


def is_table(path: Path) -> bool:
    """Whether the file holds a document a row; otherwise it is one document of plain text."""
    return is_parquet(path) or _plain_suffix(path) in JSON_SUFFIXES


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() == ".parquet"


def format_of(path: Path) -> str:
    """How the file is read, by its name: "text", ".jsonl" and the like, with ".gz" and the like behind it."""
    packed = path.suffix.lower() if path.suffix.lower() in OPENERS else ""
    return (_plain_suffix(path) if is_table(path) else "text") + packed


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, unpacked.

    Raises:
        ValueError: it is cut off or damaged, cannot be read, or begins as no text does.
    """
    open_file = OPENERS.get(path.suffix.lower(), Path.open)
    try:
        if not path.stat().st_size:  # xz has no such file
            yield io.BytesIO()
            return
        with open_file(path, "rb") as file:
            start = file.read(binary.START)
        if what := binary.kind(start):
            raise ValueError(f"{path} is no text: it {what}")
        with open_file(path, "rb") as file:
            yield file
    except PermissionError as error:
        raise ValueError(no_access(path, error)) from error
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueError(f"{path}: cannot be read to its end ({why}); is it cut off?") from error


def no_access(path: Path, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror}): make it readable, or exclude it"


def read(path: Path, id: str, text_field: str) -> Iterator[Document | BadRow]:
    """Every document of a file, empty ones too, and the rows that are none, in order.

    Raises:
        NoColumnError: a .json of a few rows, none of which has a column ``text_field``; nothing came before.
        ValueError: the file is damaged or no text, or has no column ``text_field`` of text; says what to do.
    """
    if is_parquet(path):
        yield from _parquet(path, id, text_field)
    elif is_table(path):
        yield from _json(path, id, text_field)
    else:
        with opened(path) as file:
            yield Document(id, file.read())


def _plain_suffix(path: Path) -> str:
    """The suffix of the file once it is unpacked."""
    return (Path(path.stem) if path.suffix.lower() in OPENERS else path).suffix.lower()


def _json(path: Path, id: str, text_field: str) -> Iterator[Document | BadRow]:
    """JSON lines, an array of rows, or one row. A row with null for its text, or without any, is an empty document."""
    columns: set[str] = set()  # until there is a text
    has_text = False
    rows = _json_rows(path, text_field)
    if _plain_suffix(path) == ".json":
        rows = _of_table(rows, path, text_field)
    for number, (word, place, row) in enumerate(rows):
        if isinstance(row, dict):
            text = row.get(text_field)
            if isinstance(text, str):  # first: a table has many rows
                has_text = True
                yield Document(f"{id}#{number}", text.encode("utf-8", "surrogatepass"))
            elif text is None:
                if len(columns) < MOST_COLUMNS:
                    columns |= row.keys()
                yield Document(f"{id}#{number}", b"")
            else:
                reason = f"column {text_field!r} holds {type(text).__name__}, not text; set text_field"
                yield BadRow(f"{id}, {word} {place}:", reason)
        elif isinstance(row, ValueError):
            yield BadRow(f"{id}, {word} {place}:", f"is not JSON ({row})")
        else:
            yield BadRow(f"{id}, {word} {place}:", f"is a JSON {type(row).__name__}, not an object with a text")
    if not has_text and columns and text_field not in columns and len(columns) < MOST_COLUMNS:
        raise ValueError(_no_column(path, text_field, columns))


def _no_column(path: Path, text_field: str, columns: set[str] | list[str]) -> str:
    return f"{path} has no column {text_field!r}; set text_field to one of: {', '.join(sorted(columns)) or '(none)'}"


Row = tuple[str, int, Any]  # "line" or "row", its number, and what it holds: a ValueError if it is not JSON


def _of_table(rows: Iterator[Row], path: Path, text_field: str) -> Iterator[Row]:
    """The rows, if one of the first has a text or they are many. Raises NoColumnError."""
    first: list[Row] = []
    columns: set[str] = set()
    for row in rows:
        first.append(row)
        columns |= row[2].keys() if isinstance(row[2], dict) else set()
        if text_field in columns or len(first) == FEW_ROWS:
            yield from chain(first, rows)
            return
    if first:
        raise NoColumnError(_no_column(path, text_field, columns))


def _json_rows(path: Path, text_field: str) -> Iterator[Row]:
    with opened(path) as file:
        start = file.read(binary.START).removeprefix(BOM).lstrip()
    if start.startswith(b"["):
        with opened(path) as file:
            for number, row in enumerate(_array(path, file), 1):
                text = row.get(text_field) if isinstance(row, dict) else None
                escaped = isinstance(text, str) and NOT_UTF8.search(text)
                yield "row", number, ValueError("its text is not UTF-8") if escaped else row
    elif _plain_suffix(path) == ".json" and _first_line_is_part(path):
        yield from _one_object(path, text_field)
    else:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(BOM) if number == 1 else line
                if line and not line.isspace():
                    yield "line", number, _parsed(line)


def _first_line_is_part(path: Path) -> bool:
    """Whether the first line is no JSON by itself, as where one object is printed over several lines."""
    with opened(path) as file:
        line = next((line for line in file if line.removeprefix(BOM).strip()), b"{}")
    return isinstance(_parsed(line.removeprefix(BOM)), ValueError)


def _parsed(line: bytes) -> Any:
    try:
        text = line.decode()
        try:
            value, end = _decoder.raw_decode(text)  # `decode` without its looks for white space
            if text[end:] in ("\n", ""):
                return value
        except json.JSONDecodeError:  # white space comes first, or nothing that is JSON
            pass
        return _decoder.decode(text)
    except UnicodeDecodeError as error:
        return ValueError(f"byte {error.start} is not UTF-8")
    except (ValueError, RecursionError) as error:
        return ValueError(str(error))


def _one_object(path: Path, text_field: str) -> Iterator[Row]:
    """The row of a file that is one object, printed over several lines."""
    with opened(path) as file:
        text = file.read()
    row = _parsed(text.removeprefix(BOM))
    if not isinstance(row, ValueError):
        yield "row", 1, row
    elif json.dumps(text_field).encode() in text:
        raise ValueError(f"{path}: is not JSON ({row})")
    else:  # a setting with comments, say
        raise NoColumnError(_no_column(path, text_field, []))


def _array(path: Path, file: IO[bytes]) -> Iterator[Any]:
    """The values of an array, one at a time: it may be larger than the memory."""
    decode = json.JSONDecoder().raw_decode
    count = 0
    try:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        rest = ""
        while not rest:
            rest = text.read(CHARACTERS_AT_ONCE).lstrip()
        rest = rest[1:].lstrip()
        while not rest and (more := text.read(CHARACTERS_AT_ONCE)):
            rest = more.lstrip()
        ended = rest.startswith("]")
        at = int(ended)
        while not ended:
            try:
                value, end = decode(rest, at)
                end = _after_space(rest, end)
                if rest[end : end + 1] not in {",", "]"}:
                    raise json.JSONDecodeError("Expecting ',' delimiter", rest, end)
                ended = rest[end] == "]"
                at = _after_space(rest, end + 1)
            except json.JSONDecodeError as error:
                # Perhaps it is cut by the end of what was read. Twice as much is tried next.
                cut = error.msg.startswith("Unterminated string") or error.pos > len(rest) - 16
                more = text.read(max(CHARACTERS_AT_ONCE, len(rest) - at)) if cut else ""
                if not more:
                    raise ValueError(f"row {count + 1}: {error.msg}") from error
                rest, at = rest[at:] + more, 0
                at = _after_space(rest, at)
                continue
            yield value
            count += 1
        if (rest[at:] + text.read(CHARACTERS_AT_ONCE)).strip():
            raise ValueError("more follows its array")
        text.detach()
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _parquet(path: Path, id: str, text_field: str) -> Iterator[Document | BadRow]:
    import pyarrow  # takes a while to import
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow
            if text_field not in columns.names:
                raise ValueError(_no_column(path, text_field, columns.names))
            if columns.names.count(text_field) > 1:
                raise ValueError(f"{path} has more than one column {text_field!r}: rename the others")
            kind = columns.field(text_field).type
            kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
            if not _holds_text(pyarrow.types, kind):
                raise ValueError(f"{path}: column {text_field!r} holds {kind}, not text; set text_field")
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[text_field]):
                for text in batch.column(0).cast(kind).cast(pyarrow.large_binary()).to_pylist():
                    if text and not is_utf8(text):
                        yield BadRow(f"{id}, row {number + 1}:", "is not UTF-8")
                    else:
                        yield Document(f"{id}#{number}", text or b"")
                    number += 1
    except PermissionError as error:
        raise ValueError(no_access(path, error)) from error
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


def _holds_text(types: Any, kind: Any) -> bool:
    return any(test(kind) for test in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
