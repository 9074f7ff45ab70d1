"""Text comes out of every kind of source as it was put in; what is no text is named, with its place."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from nsa.data import builtin as builtin_module
from nsa.data import files, sources
from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData, fingerprint
from nsa.data.sources import documents, find_bad_byte
from tests.data.corpus import write_corpus

TEXTS = ["plain\n", "  é 漢 ▁ \x00 </s>", "", "line\r\nline\u2028", "x" * 100_000]


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def source(path: Path | str, **settings: Any) -> SourceConfig:
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


@pytest.mark.parametrize(
    "line",
    [
        b' {"a": 1}\n',
        b'{"a": 1} \r\n',
        b'{"a": [1, NaN]}',
        b"1\x0b\n",
        b"{} {}\n",
        b'"a\n',
        b"\n",
        b"\t",
        b"nul",
        b"[" * 9999,
    ],
    ids=range(10),
)
def test_a_line_is_read_as_json_reads_it(line: bytes) -> None:
    """The short cut for ordinary lines takes no other. Planted: what follows the value is not looked at."""
    try:
        want = repr(json.loads(line))
    except (ValueError, RecursionError) as error:
        want = repr(ValueError(str(error)))
    assert repr(files._parsed(line)) == want


def test_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS, "n": [1] * len(TEXTS)}).to_parquet(tmp_path / "a.parquet")
    assert [d.text for d in documents(source(tmp_path))] == [t.encode() for t in TEXTS]
    with pytest.raises(ValueError, match="holds int64, not text; set text_field"):
        list(documents(source(tmp_path, text_field="n")))


def test_builtin_is_real_text_in_a_fixed_order() -> None:
    builtin = SourceConfig(name="b", kind="builtin")
    found = list(documents(builtin))
    assert sum(len(d.text) for d in found) > 5_000_000
    assert max(len(d.text) for d in found) > 100_000
    assert [d.id for d in found] == sorted(d.id for d in found)
    assert not any("site-packages" in d.id for d in found)
    assert sources.describe(builtin) == sources.describe(builtin)


def test_what_distributions_leave_out_of_the_library_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notices texts that only some installations of a Python version have."""
    everywhere = ["abc.py", "json/decoder.py", "unittest/case.py", "testing.py"]
    for name in [*everywhere, "test/test_abc.py", "json/tests/test_it.py", "idlelib/run.py", "tkinter/__init__.py",
                 "_sysconfigdata__linux.py", "sitecustomize.py", "site-packages/a.py"]:  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(builtin_module, "root", lambda: tmp_path)
    assert [d.id for d in documents(SourceConfig(name="b", kind="builtin"))] == sorted(everywhere)


def test_a_hub_data_set_without_network() -> None:
    hub = SourceConfig(name="h", kind="hub", path="no-such-owner/no-such-data")
    with pytest.raises(ValueError, match=r"no-such-owner/no-such-data.*\n.*the network"):
        list(documents(hub))


HUB = {"path": "some/data", "subset": "en", "split": "test", "text_field": "body"}


def test_what_names_a_hub_data_set_reaches_it_and_the_prepared_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Path, subset, split and column: each is asked for, and data of another one are not taken for these."""
    rows = [{"body": "one", "text": "no"}, {"body": None, "text": "no"}]
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: asked.append(arguments) or rows)
    hub = SourceConfig(name="h", kind="hub", **HUB)
    assert [tuple(d) for d in documents(hub)] == [("some/data#0", b"one"), ("some/data#1", b"")]
    assert asked == [{"path": "some/data", "name": "en", "split": "test"}]
    described = sources.describe(hub)
    for key in HUB:
        assert sources.describe(hub.model_copy(update={key: "other"})) != described, key
        assert key == "path" or key in sources.DETERMINED_BY["hub"], "where the data set is gone, too"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path, name: str) -> None:
    rows = b"\xef\xbb\xbf" + b'{"text": "one"}\n{"text": "\xef\xbb\xbftwo"}\n'
    (tmp_path / name).write_bytes(gzip.compress(rows) if name.endswith("gz") else rows)
    assert [d.text.decode() for d in documents(source(tmp_path / name))] == ["one", "\ufefftwo"]


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
    with pytest.raises(
        ValueError, match=r"(?s)2 file.*latin.txt: byte 4 .*utf16.jsonl is no text: it is UTF-16.*iconv"
    ) as error:
        prepare(make_config(corpus, cache_dir=str(tmp_path / "cache")), 1, progress=False)
    assert "nothing was written" in str(error.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        list(documents(source(tmp_path)))


def test_only_the_text_of_a_row_matters(tmp_path: Path) -> None:
    """Other fields may be of any type, and of another one 10 MB later; texts that look like dates are texts."""
    others = [None, "x", 1, 1.5, [], ["x"], {}, {"deep": [1, "2"]}, 2**70]
    texts = ["2024-01-01", "12", "1e5", "null", "true", "\ud800"] * 20_000
    rows = [{"n": others[i * len(others) // len(texts)], "text": text} for i, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert [d.text for d in documents(source(tmp_path))] == [t.encode("utf-8", "surrogatepass") for t in texts]


def test_rows_without_text_are_empty_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"other": 1}\n{"text": null}\n')
    assert [d.text for d in documents(source(tmp_path))] == [b"one", b"", b""]


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for text in ('[{"text": "one"}, ', "[" * 100_000, '{"other": ' + "[" * 100_000 + "}"):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json"):
            list(documents(source(tmp_path)))


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("bz2", bz2.compress), ("zst", zstd)]
)
def test_compressed_text_is_read_as_text(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress("é one\n".encode()))
    (tmp_path / f"b.jsonl.{suffix}").write_bytes(compress(b'\n{"text": "two"}\n\n{"text": "three"}'))
    (tmp_path / f"c.jsonl.{suffix}").write_bytes(b"")
    assert [(d.id, d.text.decode()) for d in documents(source(tmp_path))] == [
        (f"a.txt.{suffix}", "é one\n"),
        (f"b.jsonl.{suffix}#0", "two"),
        (f"b.jsonl.{suffix}#1", "three"),
    ]
    (tmp_path / f"d.txt.{suffix}").write_bytes(compress(b"\xff"))
    with pytest.raises(ValueError, match=rf"d\.txt\.{suffix}: byte 0 is the first of 1"):
        sources.check(source(tmp_path))
    (tmp_path / f"d.txt.{suffix}").write_bytes(compress(bytes(range(128)) * 99)[:-9])
    with pytest.raises(ValueError, match=rf"d\.txt\.{suffix}: cannot be read to its end"):
        list(documents(source(tmp_path)))


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.tar.zst", "weights.safetensors", "a.npy.xz", "IMAGE.PNG"])
def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(b"valid UTF-8, by chance")
    with pytest.raises(ValueError, match=f"(?s)1 file.*{name} is no text"):
        sources.check(source(tmp_path))
    sources.check(source(tmp_path, exclude=[name]))


def tar(data: bytes, form: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        archive.addfile(info := tarfile.TarInfo("a.txt"), io.BytesIO(data[: info.size or len(data)]))
    return file.getvalue()


def zip_(data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", data)
    return file.getvalue()


LONG = "The quick brown fox. " * 400
BINARY = {
    "a.gz": gzip.compress(tar(LONG.encode())),
    "b.xz": lzma.compress(tar(b"", tarfile.PAX_FORMAT)),
    "c.bz2": bz2.compress(tar(LONG.encode(), tarfile.GNU_FORMAT)),
    "d.zst": zstd(tar(LONG.encode())),
    "v7": bytes(tar(LONG.encode())).replace(b"ustar", b"\0" * 5),
    "e.txt": LONG.encode("utf-16-le"),
    "f.jsonl": json.dumps({"text": LONG}).encode("utf-16-be"),
    "g.txt": "Привет, мир".encode("utf-16-le"),
    "h.md": LONG.encode("utf-32-le"),
    "i.txt": pickle.dumps({"a": [1, LONG]}, 0),
    "j.txt": pickle.dumps([{"name": str(i)} for i in range(9000)], 0),
    "k.txt": pickle.dumps(["text", 1.5, None], 1),
    "l.txt.gz": gzip.compress(pickle.dumps("x", 0)),
    "m.txt": zip_(LONG.encode()),
    "n.json": zip_(b""),
    "o.txt.gz": gzip.compress(gzip.compress(b"text")),
    "p": b"%PDF-1.4\n" + LONG.encode(),
    "q.txt": b"\x08\0\0\0\0\0\0\0{}      " + LONG.encode(),
    "r": bytes(range(128)),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary_data_never_become_a_document(tmp_path: Path, name: str) -> None:
    """Whatever the name says, and where all bytes are valid UTF-8. Planted: no look at the first bytes."""
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / name).write_bytes(BINARY[name])
    with pytest.raises(ValueError, match=rf"(?s)1 file.*{name} is no text: it (is|has|begins as) "):
        sources.check(source(tmp_path))
    with pytest.raises(ValueError, match=rf"{name} is no text"):
        list(documents(source(tmp_path)))


TEXT = [
    LONG,
    "(a + b) * c.",
    "(lisp (code))\n.",
    "aaaa" * 9000,
    "p0\n" * 30_000,
    "(" * 70_000 + "\np0\n",
    "I1",
    "PK is a name",
    "BZh",
    "GGUF is a format",
    "070701 is a number",
    "one\x00two three",
    "\x1b[1mbold\x1b[0m a\ba \f",
    "!<arch",
    "ORCs",
    ".",
]


@pytest.mark.parametrize("number", range(len(TEXT)))
def test_text_that_looks_a_little_like_binary_data_is_text(tmp_path: Path, number: int) -> None:
    (tmp_path / "a.txt").write_text(TEXT[number])
    sources.check(source(tmp_path))
    assert [d.text.decode() for d in documents(source(tmp_path))] == [TEXT[number]]


def test_zstd_of_several_frames_and_cut_off(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(b'{"text": "one"}\n') + zstd(b'{"text": "two"}\n'))
    assert [d.text for d in documents(source(tmp_path))] == [b"one", b"two"]
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LONG.encode())[:-5])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: cannot be read to its end"):
        sources.check(source(tmp_path))


def test_a_line_that_is_not_utf8_is_a_bad_row(
    tmp_path: Path, make_config: Callable[..., DataConfig], prepared: PreparedData
) -> None:
    """In JSON lines, packed ones, an array, and Parquet; the manifest counts it. Lines count blank ones."""
    good = [b'{"text": "number %d", "n": 1}' % i for i in range(400)]
    bad = b'{"text": "ca f\xe9"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n\n" + b"\n".join([good[0], bad, *good[1:100]]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join([*good[100:200], bad])))
    (tmp_path / "c.json").write_bytes(b"[" + b",\n".join([*good[200:300], bad]) + b"]")
    column = pyarrow.array([b"x%d" % i for i in range(99)] + [b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "d.parquet")
    reported: list[tuple[int, str]] = []
    found = list(documents(source(tmp_path, bad_rows=0.02), lambda *args: reported.append(args)))
    assert len(found) == 399 and all(files.is_utf8(d.text) for d in found)
    assert reported[0][0] == 4 and "4 of 403 rows" in reported[0][1]
    for place in ("a.jsonl, line 4:", "b.jsonl.gz, line 101:", "c.json, row 101:", "d.parquet, row 100:"):
        assert f"  {place} " in reported[0][1]
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(tmp_path, cache_dir=str(tmp_path / "cache"), tokenizer=tokenizer)
    config = config.model_copy(update={"sources": [source(tmp_path, bad_rows=0.02)]})
    manifest = prepare(config, 1, progress=False).manifest
    assert manifest["sources"]["s"]["bad_rows"] == 4
    changed = json.loads(json.dumps(manifest))
    changed["sources"]["s"].pop("bad_rows")
    assert fingerprint(changed) == manifest["fingerprint"], "data that were prepared before keep their fingerprint"


def test_json_in_a_folder_that_is_no_table(tmp_path: Path) -> None:
    """Settings of tools are left out and named; where nothing else is there, or it is asked for, it is an error."""
    others = {
        "tsconfig.json": '{\n  // a comment\n  "compilerOptions": {\n    "strict": true,\n  }\n}\n',
        "composer.json": json.dumps({"name": "x", "require": {}}, indent=4),
        "small.json": '{"a": 1}',
        "list.json": '[\n  "a",\n  1\n]',
        "objects.json": json.dumps([{"file": "a.c"}, {"file": "b.c"}], indent=1),
        "number.json": "7\n",
    }
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="no column 'text'"):
        list(documents(source(tmp_path)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/rows.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "sub/pretty.json").write_text(json.dumps({"text": "two"}, indent=2))
    (tmp_path / "sub/pretty-rows.json").write_text(json.dumps([{"text": "three"}, {"text": "four"}], indent=2))
    reported: list[tuple[int, str]] = []
    for path in (tmp_path, tmp_path / "**/*.json*"):
        found = list(documents(source(path), lambda *args: reported.append(args)))
        assert sorted(d.text for d in found) == [b"four", b"one", b"three", b"two"]
        assert reported[-1][0] == 0 and all(name in reported[-1][1] for name in others)
    for name in others:
        with pytest.raises(ValueError, match=f"{name}"):
            list(documents(source(tmp_path / name)))
    (tmp_path / "tsconfig.json").write_text('{\n  "text": "cut off')
    with pytest.raises(ValueError, match=r"tsconfig\.json: is not JSON"):
        list(documents(source(tmp_path)))


@pytest.mark.parametrize("at_once", [1, 3, 1 << 20])
def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(files, "CHARACTERS_AT_ONCE", at_once)
    rows = [{"text": text, "n": n} for text in ('"\\\n é漢😀 ]', "", "x" * 50) for n in (-1.5e3, None, [1, {"a": []}])]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), f"\ufeff \n{json.dumps(rows, ensure_ascii=False)}\n\n"):
        (tmp_path / "a.json").write_text(text)
        assert [d.text.decode() for d in documents(source(tmp_path))] == [row["text"] for row in rows]
    (tmp_path / "a.json").write_text("[ ]\n")
    assert list(documents(source(tmp_path))) == []
    for text in (json.dumps(rows)[:-1], json.dumps(rows) + "x", '[{"text": "a"} {"text": "b"}]', '[{"text": "a"},]'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(ValueError, match=r"a\.json: is not JSON"):
            list(documents(source(tmp_path)))


@pytest.mark.parametrize("glob", [False, True])
def test_what_the_project_writes_is_no_corpus(tmp_path: Path, glob: bool) -> None:
    """Runs, prepared data (also of a cache without its tag), exports and evaluations; hidden and excluded files."""
    own = {
        "run": ("metrics.jsonl", "config.yaml", "step_00000001/state.json"),
        "busy": ("run.lock", "log.txt"),
        "cache/key": ("manifest.json", "tokenizer.model", "text/names.txt"),
        "tagged": ("CACHEDIR.TAG", "deep/names.txt"),
        "export": ("config.json", "tokenizer.json", "README.md"),
        "evaluation": ("evaluation.json", "recall.png"),
        ".": (".git/HEAD", "_temporary/a.txt", "package.json", ".hidden.txt", "deep/_SUCCESS"),
    }
    for name in (f"{folder}/{name}" for folder, names in own.items() for name in names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("no text of the corpus")
    for name in ("a.txt", "deep/b.txt", "deep.txt"):
        (tmp_path / name).write_text("text")
    path = tmp_path / "**/*" if glob else tmp_path
    assert [d.id for d in documents(source(path))] == ["a.txt", "deep.txt", "deep/b.txt"]
    if glob:
        assert [d.id for d in documents(source(tmp_path / "cache/key/*/*"))] == ["text/names.txt"], "it was asked for"
        with pytest.raises(ValueError, match=r"no file matches .* but 1 that are hidden or"):
            list(documents(source(tmp_path / "deep/_*")))


def test_bad_rows_are_left_out_up_to_a_share(tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"t{i}"}) for i in range(1000)]
    rows[3], rows[500] = '{"text": broken', '{"text": 7}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    reported: list[tuple[int, str]] = []
    found = list(documents(source(tmp_path, bad_rows=0.002), lambda *args: reported.append(args)))
    assert [d.id for d in found] == [f"a.jsonl#{i}" for i in range(1000) if i not in (3, 500)]
    ((count, text),) = reported
    assert count == 2 and "2 of 1000 rows cannot be used" in text and "left out" in text
    assert "a.jsonl, line 4: is not JSON" in text and "a.jsonl, line 501: column 'text' holds int" in text
    for share in (0.0, 0.001):
        with pytest.raises(ValueError, match=r"(?s)2 of 1000 rows.*a\.jsonl, line 4: .*bad_rows is 0"):
            list(documents(source(tmp_path, bad_rows=share)))


def test_what_a_folder_holds_beside_its_text(tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "package.json", "_SUCCESS", "_temporary/c.txt", "deep/d.txt", "deep/skip/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "tokens.bin").write_bytes(b"\xff")
    (tmp_path / "cache" / sources.CACHE_TAG).write_text("")

    def ids(**settings) -> list[str]:
        return [d.id for d in documents(source(tmp_path, **settings))]

    assert ids() == ["a.txt", "b.md", "deep/d.txt", "deep/skip/e.txt"]
    assert ids(include=["*.txt"], exclude=["skip"]) == ["_temporary/c.txt", "a.txt", "deep/d.txt"]
    assert ids(include=["deep/*"], exclude=[]) == ["deep/d.txt", "deep/skip/e.txt"]
    (tmp_path / sources.CACHE_TAG).write_text("")  # the folder that was asked for is read all the same
    assert "deep/d.txt" in ids()


def test_a_corpus_that_holds_the_cache_is_prepared(tmp_path: Path, make_config: Callable[..., DataConfig]) -> None:
    corpus = write_corpus(tmp_path / "text", 8)
    config = make_config(corpus, cache_dir=str(corpus / "data" / "cache"))
    first = prepare(config, 1, progress=False)
    assert prepare(config, 1, progress=False).folder == first.folder, "prepared once"


@pytest.mark.parametrize(
    ("column", "reason"), [([b"x"], "holds binary"), ([["x"]], "holds list"), ([None], None), ([], None)]
)
def test_parquet_without_texts(tmp_path: Path, column: list, reason: str | None) -> None:
    table = pyarrow.table({"text": column, "other": [1] * len(column)})
    parquet.write_table(table, tmp_path / "a.parquet")
    if reason is None:
        assert [d.text for d in documents(source(tmp_path))] == [b""] * len(column)
    else:
        with pytest.raises(ValueError, match=rf"a\.parquet: column 'text' {reason}"):
            list(documents(source(tmp_path)))
    bad = pyarrow.array([b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"1 of 1 rows(?s:.*)a\.parquet, row 1: is not UTF-8"):
        list(documents(source(tmp_path)))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as Parquet"):
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
