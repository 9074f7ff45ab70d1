"""Pass 1 of the preparation: which documents are empty, duplicate, held out or trained on.

A corpus may have more documents than fit into memory. What is known of each is written to files, in the order of the
documents, and read back a piece at a time; memory holds one bit a document.
"""

import hashlib
import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from nsa.data import sources
from nsa.data.config import SourceConfig
from nsa.data.progress import Progress

TRAIN, VALIDATION, DUPLICATE, EMPTY = range(4)
MAX_DOCUMENT = 1 << 30  # bytes; a longer one would not fit a worker's memory
AT_ONCE = 1 << 18  # records that are read at once
DOCUMENTS = 512  # that are hashed before what is known of them is written
LONG = 1 << 20  # bytes of a document after which progress is told at once
SORTED = 1 << 20  # records that are sorted at once; more are parted into files, one for each value of a byte
# key: a hash of the document's text and the seed, uniform in 0 .. 2^64-1. size: bytes of its text.
RECORD = np.dtype([("key", "<u8"), ("size", "<u8")])
DIGEST = np.dtype([("digest", "u1", 16), ("index", "<u8")])  # index: of the document among those of all sources


class Piece(NamedTuple):
    """Consecutive documents of a source: (n,) arrays. fate: uint8, TRAIN, VALIDATION, DUPLICATE or EMPTY."""

    fate: np.ndarray
    key: np.ndarray
    size: np.ndarray


class Scan:
    """What pass 1 found in one source.

    documents, num_bytes, bad_rows: how many there are. empty, duplicates: how many of the documents are.
    """

    def __init__(self, name: str, path: Path, first: int, fraction: float):
        """path: the source's records. first: index of its first document. fraction: share of them to hold out."""
        self.name, self.documents, self.num_bytes, self.bad_rows = name, 0, 0, 0
        self.empty = self.duplicates = 0
        self._path, self._first = path, first
        self._below = np.uint64(math.ceil(fraction * 2**64))  # keys that are held out
        self._changed: dict[int, int] = {}  # document -> its fate, whatever its key
        self._repeated = np.empty(0, np.uint8)

    def settle(self, repeated: np.ndarray) -> None:
        """Decide on each document. ``repeated``: a bit for each document of all sources, whether it is a duplicate.

        Raises ValueError if there are fewer than two documents.
        """
        self._repeated = repeated
        kept, at = 0, 0
        lowest, highest = (2**64, -1), (-1, -1)  # (key, document)
        for piece in self.pieces():
            self.empty += int((piece.fate == EMPTY).sum())
            self.duplicates += int((piece.fate == DUPLICATE).sum())
            members = np.flatnonzero(piece.fate <= VALIDATION)
            kept += len(members)
            if len(members):
                keys = piece.key[members]
                low, high = int(keys.argmin()), len(keys) - 1 - int(keys[::-1].argmax())
                lowest = min(lowest, (int(keys[low]), at + int(members[low])))
                highest = max(highest, (int(keys[high]), at + int(members[high])))
            at += len(piece.fate)
        if kept < 2:
            todo = "cut the text into several files, or into a JSONL file with one document per line"
            raise ValueError(
                f"data source {self.name!r}: {kept} document(s), not counting {self.empty} empty and "
                f"{self.duplicates} duplicate ones; the held-out split is by document and needs two or more: "
                + (todo if kept else "name files that have text of their own, or take the source out")
            )
        # A small source has both splits all the same.
        self._changed = {lowest[1]: VALIDATION, highest[1]: TRAIN}

    def pieces(self) -> Iterator[Piece]:
        """All documents, in order."""
        at = 0
        for records in _read(self._path, RECORD):
            key, size = records["key"], records["size"]
            fate = np.where(key < self._below, np.uint8(VALIDATION), np.uint8(TRAIN))
            fate[_bits(self._repeated, self._first + at, len(records))] = DUPLICATE
            fate[size == 0] = EMPTY
            for document, changed in self._changed.items():
                if at <= document < at + len(records):
                    fate[document - at] = changed
            yield Piece(fate, key, size)
            at += len(records)

    def fates(self) -> Iterator[tuple[int, int]]:
        """(fate, size) of each document, in order."""
        for piece in self.pieces():
            yield from zip(piece.fate.tolist(), piece.size.tolist(), strict=True)


def scan(texts: list[SourceConfig], seed: int, fraction: float, folder: Path, progress: bool) -> list[Scan]:
    """Read all documents of all sources. ``folder`` holds the records for as long as the scans are used.

    The split depends on a document's text and the seed alone: equal texts are never on both sides. Of equal texts the
    first is kept.

    Raises ValueError if a source cannot be read, or has too few documents or too long ones.
    """
    scans, count = [], 0
    digests = folder / "digests"
    with digests.open("wb") as file:
        for number, source in enumerate(texts):
            scans.append(Scan(source.name, folder / f"records-{number}", count, fraction))
            count = _read_source(source, seed, scans[-1], folder / f"records-{number}", file, count, progress)
    repeated = np.zeros(count // 8 + 1, np.uint8)
    for indices in _duplicates(digests):
        np.bitwise_or.at(repeated, indices >> np.uint64(3), np.uint8(1) << (indices & np.uint64(7)).astype(np.uint8))
    for found in scans:
        found.settle(repeated)
    return scans


def choose(scans: list[Scan], limit: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training documents of each source, ``limit`` bytes of them in all, a random choice (by key) if there are more.

    Returns:
        For each source (n,) the documents, ascending, and (n,) the bytes to take of each: all, but of the last chosen.
    """
    # By the low half of the key: the high half has decided on the split. Equal ones stay in the order of the documents.
    pool = np.empty((0, 4), np.uint64)  # low half, source, document, size
    for number, found in enumerate(scans):
        at = 0
        for piece in found.pieces():
            documents = np.flatnonzero(piece.fate == TRAIN)
            low = piece.key[documents] & np.uint64(0xFFFFFFFF)
            source = np.full(len(documents), number, np.uint64)
            new = np.stack([low, source, (documents + at).astype(np.uint64), piece.size[documents]], 1)
            pool = np.concatenate([pool, new])
            pool = pool[np.argsort(pool[:, 0], kind="stable")]
            pool = pool[: int(np.searchsorted(np.cumsum(pool[:, 3]), limit)) + 1]
            at += len(piece.fate)
    sizes = pool[:, 3].astype(np.int64)
    sizes = np.minimum(sizes, limit - (np.cumsum(sizes) - sizes))
    chosen = []
    for number in range(len(scans)):
        mine = np.flatnonzero((pool[:, 1] == number) & (sizes > 0))
        mine = mine[np.argsort(pool[mine, 2])]
        chosen.append((pool[mine, 2], sizes[mine]))
    return chosen


def _read_source(
    source: SourceConfig, seed: int, found: Scan, path: Path, digests: IO[bytes], count: int, progress: bool
) -> int:
    """Write what is known of each document of a source; ``count`` come before. Returns how many then are."""
    salt = seed.to_bytes(16, "little")
    hashes: list[bytes] = []
    sizes: list[int] = []

    def tell(bad_rows: int, text: str) -> None:
        found.bad_rows += bad_rows
        print(text, file=sys.stderr)

    def flush() -> None:
        """What is known of the documents in ``hashes`` and ``sizes`` goes to the files."""
        nonlocal count
        of_records, of_digests = np.empty(len(sizes), RECORD), np.empty(len(sizes), DIGEST)
        digest = np.frombuffer(b"".join(hashes), np.uint8).reshape(-1, DIGEST["digest"].shape[0])
        of_records["key"], of_records["size"] = digest[:, :8].copy().view("<u8")[:, 0], sizes
        of_digests["digest"], of_digests["index"] = digest, np.arange(count, count + len(sizes))
        records.write(of_records.tobytes())
        digests.write(of_digests[of_records["size"] > 0].tobytes())
        count += len(sizes)
        found.documents += len(sizes)
        found.num_bytes += sum(sizes)
        bar.update(sum(sizes))
        hashes.clear()
        sizes.clear()

    with path.open("wb") as records, Progress(f"read {source.name}", enabled=progress) as bar:
        for document in sources.documents(source, tell):
            size = len(document.text)
            if size > MAX_DOCUMENT:
                raise ValueError(
                    f"data source {source.name!r}: {document.id} has {size} bytes, a document may have "
                    f"{MAX_DOCUMENT}; cut it, for instance into a JSONL file with one document per line"
                )
            hashes.append(hashlib.blake2b(document.text, digest_size=16, salt=salt).digest())
            sizes.append(size)
            if len(sizes) == DOCUMENTS or size > LONG:
                flush()
        flush()
    return count


def _duplicates(path: Path, level: int = 0) -> Iterator[np.ndarray]:
    """(n,) uint64 indices of the digests in a file that came before, in several arrays. Removes the file.

    The records of a file are in the order of the documents. ``level``: leading bytes that all digests share.
    """
    if level == DIGEST["digest"].shape[0]:
        for number, records in enumerate(_read(path, DIGEST)):
            yield records["index"][0 if number else 1 :]
        path.unlink()
    elif path.stat().st_size <= SORTED * DIGEST.itemsize:
        records = np.fromfile(path, DIGEST)
        path.unlink()
        halves = np.ascontiguousarray(records["digest"]).view("<u8")
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: of equal ones the first document comes first
        halves = halves[order]
        yield records["index"][order[1:][(halves[1:] == halves[:-1]).all(1)]]
    else:
        parts: dict[int, Path] = {}
        with ExitStack() as stack:
            files: dict[int, IO[bytes]] = {}
            for records in _read(path, DIGEST):
                byte = records["digest"][:, level]
                records, counts = records[np.argsort(byte, kind="stable")], np.bincount(byte)
                ends = np.cumsum(counts)
                for value in np.flatnonzero(counts).tolist():
                    if value not in files:
                        parts[value] = path.with_name(f"{path.name}-{value:02x}")
                        files[value] = stack.enter_context(parts[value].open("wb"))
                    files[value].write(records[ends[value] - counts[value] : ends[value]].tobytes())
        path.unlink()
        for part in parts.values():
            yield from _duplicates(part, level + 1)


def _read(path: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The records of a file, `AT_ONCE` at a time."""
    with path.open("rb") as file:
        while len(records := np.fromfile(file, dtype, AT_ONCE)):
            yield records


def _bits(bits: np.ndarray, start: int, count: int) -> np.ndarray:
    """(count,) bool: bits start .. start+count-1; those beyond the last are 0."""
    some = np.unpackbits(bits[start // 8 : (start + count) // 8 + 1], bitorder="little")[start % 8 :][:count]
    return np.pad(some, (0, count - len(some))).astype(bool)
