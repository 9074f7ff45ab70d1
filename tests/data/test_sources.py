"""Text comes out of every kind of source as it was put in; what is no text is named, with its place."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from nsa.data import sources
from nsa.data.config import DataConfig, SourceConfig
from nsa.data.prepare import prepare
from nsa.data.sources import documents, find_bad_byte
from tests.data.corpus import write_corpus

TEXTS = ["plain\n", "  é 漢 ▁ \x00 </s>", "", "line\r\nline\u2028", "x" * 100_000]


def source(path: Path | str, **settings: str) -> SourceConfig:
    return SourceConfig(**{"name": "s", "kind": "files", "path": str(path), **settings})


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden").write_bytes(b"\xff")
    for i, text in enumerate(TEXTS):
        (tmp_path / "deep" / f"{i}.txt").write_bytes(text.encode())
    want = [(f"deep/{i}.txt", text.encode()) for i, text in enumerate(TEXTS)]
    assert list(documents(source(tmp_path))) == want
    assert [d.text for d in documents(source(tmp_path / "deep" / "[12].txt"))] == [t.encode() for t in TEXTS[1:3]]
    assert [d.text for d in documents(source(tmp_path / "deep" / "0.txt"))] == [TEXTS[0].encode()]


def test_jsonl_with_rows_that_differ(tmp_path: Path) -> None:
    rows = [{"body": text, "meta": {str(i): i}} for i, text in enumerate(TEXTS)] + [{"body": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    found = list(documents(source(tmp_path, text_field="body")))
    assert [d.text for d in found] == [t.encode() for t in TEXTS] + [b""]
    assert found[3].id == "a.jsonl#3"
    with pytest.raises(ValueError, match="no column 'text'; set text_field to one of: body, meta"):
        list(documents(source(tmp_path)))


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS, "n": [1] * len(TEXTS)}).to_parquet(tmp_path / "a.parquet")
    assert [d.text for d in documents(source(tmp_path))] == [t.encode() for t in TEXTS]
    with pytest.raises(ValueError, match="holds int, not text; set text_field"):
        list(documents(source(tmp_path, text_field="n")))


def test_builtin_is_real_text_in_a_fixed_order() -> None:
    builtin = SourceConfig(name="b", kind="builtin")
    found = list(documents(builtin))
    assert sum(len(d.text) for d in found) > 5_000_000
    assert max(len(d.text) for d in found) > 100_000
    assert [d.id for d in found] == sorted(d.id for d in found)
    assert not any("site-packages" in d.id for d in found)
    assert sources.describe(builtin) == sources.describe(builtin)


def test_a_hub_data_set_without_network() -> None:
    hub = SourceConfig(name="h", kind="hub", path="no-such-owner/no-such-data")
    with pytest.raises(ValueError, match=r"no-such-owner/no-such-data.*\n.*the network"):
        list(documents(hub))


def test_no_file_matches(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file matches"):
        list(documents(source(tmp_path / "*.txt")))


@pytest.mark.parametrize("chunk", [7, 1 << 24])
@pytest.mark.parametrize("at", [0, 5, 6, 7, 13, 40])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\xed\xa0\x80", b"\x80\x80"])
def test_the_first_bad_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, at: int, bad: bytes) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    good = "aé漢😀" * 10
    before = good.encode()[:at].decode(errors="ignore").encode()
    (tmp_path / "f").write_bytes(before + bad + good.encode())
    found = find_bad_byte(tmp_path / "f")
    assert found is not None
    assert (found.position, found.total) == (len(before), len(bad))
    (tmp_path / "f").write_text(good * 50)
    assert find_bad_byte(tmp_path / "f") is None


def test_files_that_are_not_utf8_stop_everything_and_are_all_named(
    tmp_path: Path, make_config: Callable[..., DataConfig]
) -> None:
    corpus = write_corpus(tmp_path / "text", 5)
    (corpus / "latin.txt").write_bytes("ca fé".encode("latin1"))
    (corpus / "utf16.jsonl").write_bytes('{"text": "x"}'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"(?s)2 file.*latin.txt: byte 4 .*utf16.jsonl: byte 0.*iconv") as error:
        prepare(make_config(corpus, cache_dir=str(tmp_path / "cache")), 1, progress=False)
    assert "nothing was written" in str(error.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        list(documents(source(tmp_path)))


def test_only_empty_files(tmp_path: Path, make_config: Callable[..., DataConfig]) -> None:
    for name in ("a.txt", "b.txt", "c.jsonl"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="2 empty"):
        prepare(make_config(tmp_path), 1, progress=False)


@pytest.mark.parametrize("megabytes", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_one_long_line(tmp_path: Path, make_config: Callable[..., DataConfig], megabytes: int) -> None:
    corpus = write_corpus(tmp_path / "text", 10)
    line = b"0123456789 abcdefghij klmno" * (megabytes * 1_000_000 // 27)
    (corpus / "long.txt").write_bytes(line)
    data = prepare(make_config(corpus), 1, progress=False)
    assert line in [text for split in ("train", "validation") for _, text in data.texts(split)]
