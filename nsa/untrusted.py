"""Reads files that may come from others: checkpoints, exports, prepared data.

Nothing here runs code from a file. A file must be regular, inside the folder that it is listed in, and of a bounded
size if it is read whole. It must also be unambiguous: JSON with duplicate keys is rejected, since two readers could
take different values.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

JSON_LIMIT = 64 * 2**20  # bytes of a JSON file
HEADER_LIMIT = 32 * 2**20  # bytes of a safetensors header; a tensor takes about 150
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

AGAIN = "it is cut short or damaged; copy it from its origin, or write it, again"


class UntrustedError(ValueError):
    """A file is invalid, and nothing of it was used."""


def inside(folder: Path, name: Any) -> Path:
    """The path of file ``name`` (it may have subfolders) of ``folder``.

    Raises:
        UntrustedError: the name leads out of the folder.
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name or not name.isprintable():
        raise UntrustedError(f"{folder}: {name!r} is no name of a file")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise UntrustedError(f"{folder}: {name!r} leads out of the folder")
    path = folder
    for part in parts:
        path /= part
        if path.is_symlink():
            raise UntrustedError(f"{path} is a link; copy what it points to (cp -L)")
    return path


def regular_size(path: Path, *, follow: bool = False) -> int:
    """Bytes of a regular file, since a pipe would be waited for without end, and a device has no end.

    Args:
        follow: a link to a regular file is one, too.

    Raises:
        UntrustedError: it is a link, pipe, device or folder.
        OSError: it is absent.
    """
    status = path.stat() if follow else path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise UntrustedError(f"{path} is no regular file")
    return status.st_size


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes. Raises UntrustedError, OSError."""
    size = regular_size(path)
    if size > limit:
        raise UntrustedError(f"{path}: {size} bytes, at most {limit} are read")
    # The file may have been replaced since the check, so links are not followed.
    with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
        return file.read(limit + 1)[:limit]


def parse_json(text: bytes, name: str) -> Any:
    """Parse strict JSON: no duplicate keys, no very deep nesting, no numbers of thousands of digits.

    Raises:
        UntrustedError: the text is not strict JSON; ``name`` is for the message.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise UntrustedError(f"{name}: no valid JSON ({e})") from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> Any:
    """The value in a JSON file. Raises UntrustedError, OSError."""
    return parse_json(read_bytes(path, limit), str(path))


def check_safetensors(path: Path) -> dict[str, dict[str, Any]]:
    """The validated header of a safetensors file (name -> dtype, shape, data_offsets).

    Raises:
        UntrustedError: it is not a regular file, or its header is huge, ambiguous or does not match the file exactly.
        OSError: it cannot be read.
    """
    size = regular_size(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_LIMIT, size - 8):
            raise UntrustedError(f"{path}: a header of {length} bytes in a file of {size}: {AGAIN}")
        header = parse_json(file.read(length), f"{path}: header")
    if not isinstance(header, dict):
        raise UntrustedError(f"{path}: header is no object")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        try:
            width, shape, (start, stop) = SIZES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            elements = 1
            for extent in shape:
                elements *= extent
            sound = all(type(n) is int and n >= 0 for n in (*shape, start, stop)) and stop - start == elements * width
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise UntrustedError(f"{path}: the header's entry of {name[:100]!r} is not sound")
        spans.append((start, stop))
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise UntrustedError(f"{path}: tensors overlap or leave a gap")
        end = stop
    if end != size - 8 - length:
        raise UntrustedError(f"{path}: tensors of {end} bytes by the header, {size - 8 - length} in the file: {AGAIN}")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(k for k in keys if keys.count(k) > 1)[:100]!r}")
    return unique
