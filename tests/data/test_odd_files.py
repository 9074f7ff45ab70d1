"""Files as users have them: links, damage, byte order marks, other encodings. Nothing is lost without a word."""

import bz2
import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from nsa.data import scan, sources
from nsa.data.config import SourceConfig
from nsa.data.sources import documents, find_bad_byte


def source(path: Path | str, **settings: Any) -> SourceConfig:
    return SourceConfig(**{"name": "s", "kind": "files", "path": str(path), **settings})


def bad_bytes(data: bytes) -> list[int]:
    """Positions of the bytes that no character of UTF-8 holds (Unicode 3.9, table 3-7, read from the left)."""
    found, at = [], 0
    while at < len(data):
        for size in (1, 2, 3, 4):
            try:
                if len(data[at : at + size].decode()) == 1:
                    at += size
                    break
            except UnicodeDecodeError:
                pass
        else:
            found.append(at)
            at += 1
    return found


@pytest.mark.parametrize("chunk", [5, 64, 1 << 24])
def test_bad_bytes_are_counted_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Planted: bytes counted by error and not by number; the first of each chunk; a character cut by a chunk."""
    monkeypatch.setattr(sources, "CHUNK", chunk)
    dice = random.Random(chunk)
    for _ in range(60):
        parts = [b"a", "é漢😀".encode(), b"\xe9", b"\xf0\x9f", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90", b"\x80" * 3]
        data = b"".join(dice.choices(parts, k=dice.randrange(1, 40)))
        (tmp_path / "f").write_bytes(data)
        want = bad_bytes(data)
        assert find_bad_byte(tmp_path / "f") == ((want[0], len(want)) if want else None), data


@pytest.mark.time_limit(60)
def test_text_of_another_encoding_is_refused_at_once(tmp_path: Path) -> None:
    """Nearly every byte is wrong. Planted: the rest of the file is decoded again after each, which takes an hour."""
    (tmp_path / "a.txt").write_bytes("привет мир ".encode("cp1251") * 700_000)
    with pytest.raises(ValueError, match=r"a\.txt: byte 0 is the first of 6300000 that are not UTF-8"):
        sources.check(source(tmp_path))


def test_links_of_a_folder(tmp_path: Path) -> None:
    """A link to a file is the file; one to a folder, to nothing or to itself is named, unless it is excluded."""
    corpus, other = tmp_path / "corpus", tmp_path / "other"
    for path in (corpus / "deep", other):
        path.mkdir(parents=True)
    (other / "x.txt").write_text("linked")
    (corpus / "a.txt").symlink_to(other / "x.txt")
    for name, target in (("deep/wiki", other), ("circle", "circle"), ("gone.txt", "nowhere"), (".venv", other)):
        (corpus / name).symlink_to(target)
    told: list[tuple[int, str]] = []
    found = list(documents(source(corpus), lambda *args: told.append(args)))
    assert [tuple(d) for d in found] == [("a.txt", b"linked")]
    ((count, text),) = told
    assert count == 0 and "files alone): circle, deep/wiki, gone.txt; make" in text
    told.clear()
    list(documents(source(corpus, include=["*.txt"], exclude=["circle"]), lambda *args: told.append(args)))
    assert "files alone): deep/wiki, gone.txt; make" in told[0][1], "text may lie in a folder that no pattern names"
    told.clear()
    list(documents(source(corpus, exclude=["circle", "wiki", "gone*"]), lambda *args: told.append(args)))
    assert not told
    with pytest.raises(ValueError, match=r"no file matches .*corpus/deep', and these are links .*: wiki; set its path"):
        list(documents(source(corpus / "deep")))


def test_a_source_is_named_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        list(documents(source(tmp_path / "none")))
    assert str(error.value).count("data source 's'") == 1


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(sources.os, "scandir", scandir)
    with pytest.raises(ValueError, match=rf"'s': {tmp_path} cannot be read \(Permission denied\): make it readable"):
        list(documents(source(tmp_path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is not called cut off: it is whole, and the reader may not open it."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    (tmp_path / name).write_text("text")
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(parquet, "ParquetFile", refuse)
    with pytest.raises(ValueError, match=rf"{name} cannot be read .*Permission denied.*: make it readable") as error:
        list(documents(source(tmp_path)))
    assert "cut off" not in str(error.value)
    with pytest.raises(ValueError, match=rf"'s': .*{name} cannot be read .*: make it readable"):
        sources.content(source(tmp_path))


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress)])
def test_damage_inside_of_a_packed_file(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    """At every third byte: an error that names the file, or the very text. Planted: one library's error let through."""
    text = json.dumps({"text": "".join(random.Random(0).choices("abcdefgh", k=400))}).encode()
    packed, path = compress(text), tmp_path / f"a.jsonl.{suffix}"
    places, refused = range(0, len(packed), 3), 0
    for at in places:
        path.write_bytes(packed[:at] + bytes([packed[at] ^ 0x55]) + packed[at + 1 :])
        try:
            assert [d.text for d in documents(source(path))] == [json.loads(text)["text"].encode()], at
        except ValueError as error:
            assert path.name in str(error), at
            refused += 1
    assert refused > 0.9 * len(places)


def test_a_packed_file_with_its_name_in_capitals(tmp_path: Path) -> None:
    row = b'{"text": "one"}'
    packed = {"GZ": gzip.compress(row), "XZ": lzma.compress(row), "BZ2": bz2.compress(row)}
    packed["ZST"] = pyarrow.compress(row, codec="zstd", asbytes=True)
    for suffix, data in packed.items():
        (tmp_path / f"A.JSONL.{suffix}").write_bytes(data)
    assert [d.text for d in documents(source(tmp_path))] == [b"one"] * 4


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("start", [b"\xef\xbb\xbf\r\n\r\n", b"\xef\xbb\xbf \n", b"\r\n"])
def test_a_first_line_of_white_space(tmp_path: Path, name: str, start: bytes) -> None:
    (tmp_path / name).write_bytes(start + b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    assert [tuple(d) for d in documents(source(tmp_path))] == [(f"{name}#0", b"one"), (f"{name}#1", b"two")]


def test_a_file_that_is_only_a_byte_order_mark(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.json"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf")
    assert list(documents(source(tmp_path))) == []


def test_a_table_with_texts_may_have_rows_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"other": 1}\n')
    assert [d.text for d in documents(source(tmp_path))] == [b"one", b""]


def test_parquet_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has more than one column 'text': rename"):
        list(documents(source(tmp_path)))


def test_rows_left_out_are_told_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By pass 1 of the preparation, on stderr. Planted: no print."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n{"text": "two"}\n')
    (found,) = scan.scan([source(tmp_path / "a.jsonl", bad_rows=0.5)], 1, 0.5, tmp_path, progress=False)
    assert (found.documents, found.bad_rows, found.num_bytes) == (2, 1, 6)
    assert "a.jsonl, line 2: is not JSON" in capsys.readouterr().err


def test_a_document_that_is_too_long_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "MAX_DOCUMENT", 5)
    (tmp_path / "a.jsonl").write_text('{"text": "12345"}\n{"text": "x"}\n')
    assert scan.scan([source(tmp_path / "a.jsonl")], 1, 0.5, tmp_path, progress=False)[0].documents == 2
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": "123456"}\n')
    with pytest.raises(ValueError, match=r"'s': a\.jsonl#1 has 6 bytes, a document may have 5; cut it"):
        scan.scan([source(tmp_path / "a.jsonl")], 1, 0.5, tmp_path, progress=False)


def test_how_a_file_is_read_is_part_of_its_content(tmp_path: Path) -> None:
    """Its other name is not. Planted: the suffix of what is not packed, and none of what is."""

    def content(name: str) -> str | None:
        path = tmp_path / name
        path.write_bytes(gzip.compress(b'{"text": "one"}\n', mtime=0))
        found = sources.content(source(path))
        path.unlink()
        return found

    alike = [["a.txt", "b.md", "c", "d.TXT"], ["a.jsonl", "b.JSONL"], ["a.jsonl.gz", "b.jsonl.GZ"], ["a.jsonl.xz"]]
    alike += [["a.txt.gz", "b.gz"], ["a.json"], ["a.parquet"]]
    assert all(len({content(name) for name in names}) == 1 for names in alike)
    assert len({content(names[0]) for names in alike}) == len(alike)


@pytest.mark.parametrize("name", ["a.parquet", "A.PARQUET"])
def test_parquet_without_the_column(tmp_path: Path, name: str) -> None:
    parquet.write_table(pyarrow.table({"body": ["x"], "n": [1]}), tmp_path / name)
    assert [tuple(d) for d in documents(source(tmp_path, text_field="body"))] == [(f"{name}#0", b"x")]
    with pytest.raises(ValueError, match=rf"{name} has no column 'text'; set text_field to one of: body, n$"):
        list(documents(source(tmp_path)))


def test_a_hub_data_set_without_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: [{"body": "x", "n": 1}])
    with pytest.raises(ValueError, match=r"'h': some/data has no column 'text'; set text_field to one of: body, n$"):
        list(documents(SourceConfig(name="h", kind="hub", path="some/data")))


def test_a_line_that_is_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\r\n\r\n{"text": "caf\xe9"}\r\n')
    with pytest.raises(ValueError, match=r"1 of 2 rows(?s:.*)a\.jsonl, line 3: is not JSON \(byte 13 is not UTF-8\)"):
        list(documents(source(tmp_path)))
