"""Pass 1 in constant memory decides as a list and a set in memory do."""

import hashlib
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nsa.data import scan as module
from nsa.data import sources
from nsa.data.config import SourceConfig
from nsa.data.files import Document
from nsa.data.scan import DUPLICATE, EMPTY, TRAIN, VALIDATION, choose, scan
from nsa.data.shards import SourceWriter

SOURCES = [SourceConfig(name=name, kind="files", path="unread") for name in "abc"]


def serve(monkeypatch: pytest.MonkeyPatch, texts: dict[str, list[bytes]]) -> None:
    """Let the sources have these texts."""

    def documents(source: SourceConfig, tell: object = None) -> Iterator[Document]:
        return (Document(str(i), text) for i, text in enumerate(texts[source.name]))

    monkeypatch.setattr(sources, "documents", documents)


def defined(texts: list[list[bytes]], seed: int, fraction: float) -> tuple[list[list[int]], list[list[int]]]:
    """Fates and keys of the documents of each source, all in memory."""
    seen: set[bytes] = set()
    fates, keys = [], []
    for source in texts:
        fate, key = [], []
        for text in source:
            digest = hashlib.blake2b(text, digest_size=16, salt=seed.to_bytes(16, "little")).digest()
            key.append(int.from_bytes(digest[:8], "little"))
            held_out = VALIDATION if key[-1] < fraction * 2**64 else TRAIN
            fate.append(EMPTY if not text else DUPLICATE if text in seen else held_out)
            seen.add(text)
        kept = sorted((k, i) for i, k in enumerate(key) if fate[i] in (TRAIN, VALIDATION))
        fate[kept[0][1]], fate[kept[-1][1]] = VALIDATION, TRAIN
        fates.append(fate)
        keys.append(key)
    return fates, keys


def defined_choice(
    texts: list[list[bytes]], fates: list[list[int]], keys: list[list[int]], limit: int
) -> list[list[tuple[int, int]]]:
    training = [(s, i) for s, source in enumerate(fates) for i, fate in enumerate(source) if fate == TRAIN]
    taken: list[list[tuple[int, int]]] = [[] for _ in texts]
    for s, i in sorted(training, key=lambda at: keys[at[0]][at[1]] & 0xFFFFFFFF):
        if limit > 0:
            taken[s].append((i, min(limit, len(texts[s][i]))))
            limit -= len(texts[s][i])
    return [sorted(one) for one in taken]


@pytest.mark.parametrize(("at_once", "sort"), [(7, 5), (1 << 18, 1 << 20)])
@pytest.mark.parametrize("kinds", [3, 5000])
def test_as_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int, sort: int, kinds: int) -> None:
    """However small the pieces are that are read and sorted at once; few kinds of text are nearly all duplicates."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    monkeypatch.setattr(module, "SORTED", sort)
    dice = random.Random(kinds)
    texts = [[b"text %d" % dice.randrange(kinds) * dice.randint(0, 1) for _ in range(n)] for n in (200, 30, 50)]
    for number, source in enumerate(texts):
        source += [b"own %d %d" % (number, i) for i in range(3)]
    serve(monkeypatch, dict(zip("abc", texts, strict=True)))
    scans = scan(SOURCES, 3, 0.3, tmp_path, progress=False)
    fates, keys = defined(texts, 3, 0.3)
    assert [[fate for fate, _ in found.fates()] for found in scans] == fates
    assert [[size for _, size in found.fates()] for found in scans] == [[len(t) for t in source] for source in texts]
    assert [(found.empty, found.duplicates) for found in scans] == [(f.count(EMPTY), f.count(DUPLICATE)) for f in fates]
    for limit in (1, 100, 555, 10**6):
        chosen = [list(zip(*(part.tolist() for part in parts), strict=True)) for parts in choose(scans, limit)]
        assert chosen == defined_choice(texts, fates, keys, limit)
    assert not list(tmp_path.glob("digests*")), "what was sorted is removed"


def test_equal_keys_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digests that differ in their last bytes only: the same key, and no duplicates."""

    class Hash:
        def __init__(self, text: bytes, **_: object) -> None:
            self.text = text

        def digest(self) -> bytes:
            return bytes([9] * 8) + hashlib.sha256(self.text).digest()[:8]

    monkeypatch.setattr(module.hashlib, "blake2b", Hash)
    monkeypatch.setattr(module, "SORTED", 4)
    serve(monkeypatch, {"a": [b"%d" % (i % 20) for i in range(40)]})
    (found,) = scan(SOURCES[:1], 3, 0.3, tmp_path, progress=False)
    want = [VALIDATION] * 20 + [DUPLICATE] * 20  # the lowest key is the first document's, the highest the last's
    want[19] = TRAIN
    assert [fate for fate, _ in found.fates()] == want


def test_memory_does_not_grow_with_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a list of digests, and one of the records of the writer."""
    monkeypatch.setattr(module, "AT_ONCE", 200)
    monkeypatch.setattr(module, "_duplicates", lambda path: iter([]))  # 256 open files, however many documents

    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()

        def documents(source: SourceConfig, tell: object = None) -> Iterator[Document]:
            return (Document(str(i), b"%d" % i) for i in range(count))

        monkeypatch.setattr(sources, "documents", documents)
        tracemalloc.start()
        (found,) = scan(SOURCES[:1], 3, 0.3, folder, progress=False)
        choose([found], 1000)
        writer = SourceWriter(folder / "shards", 100)
        for piece in found.pieces():
            n = len(piece.fate)
            writer.add_all(["name"] * n, np.zeros(3 * n, int), 3 * np.arange(1, n + 1), piece.size, piece.fate == TRAIN)
        writer.close()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(10)  # what is made once
    few, many = peak(1500), peak(4500)
    assert (many - few) / 3000 < 20, f"{few} and {many} bytes"
