"""What identifies data is its content: a corpus may move, change its times, or be gone once it is prepared."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nsa.data import prepare as module
from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData
from tests.data.corpus import write_corpus

Make = Callable[..., DataConfig]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows when data are built."""
    builds: list[str] = []
    build = module._build

    def counted(folder: Path, *rest: object) -> None:
        builds.append(folder.name)
        build(folder, *rest)

    monkeypatch.setattr(module, "_build", counted)
    return builds


@pytest.fixture
def small(prepared: PreparedData, make_config: Make, tmp_path: Path) -> Callable[..., DataConfig]:
    """A configuration with a tokenizer that is there, and a cache of its own."""
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))

    def make(path: Path | str, **changes: object) -> DataConfig:
        return make_config(path, **{"tokenizer": tokenizer, "cache_dir": str(tmp_path / "cache"), **changes})

    return make


def test_a_moved_corpus_is_not_prepared_again(
    tmp_path: Path, small: Make, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Read as a folder, by a glob or as one file; copied with other times; renamed."""
    corpus = write_corpus(tmp_path / "text", 8)
    first = prepare(small(corpus), 1, progress=False)
    moved = Path(shutil.move(corpus, tmp_path / "elsewhere"))
    for where in (moved, f"{moved}/", f"{moved}/*.txt", f"{tmp_path}/else*/*.txt"):
        assert prepare(small(where), 1, progress=False).folder == first.folder
    assert "prepared from the same content" in capsys.readouterr().err
    prepare(small(moved), 1, progress=False)
    assert "same content" not in capsys.readouterr().err, "the second time it is found by its key"
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert prepare(small(moved), 1, progress=False).folder == first.folder
    (moved / "000.txt").rename(moved / "0000.txt")
    assert prepare(small(moved), 1, progress=False).folder == first.folder
    assert len(built) == 1

    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    first = prepare(small(rows), 1, progress=False)
    assert prepare(small(rows.rename(tmp_path / "b.jsonl")), 1, progress=False).folder == first.folder
    assert len(built) == 2


def test_a_moved_glob_has_the_same_fingerprint(tmp_path: Path, small: Make) -> None:
    """Prepared elsewhere, without what was prepared before."""
    write_corpus(tmp_path / "one" / "text", 8)
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    found = {
        prepare(small(f"{tmp_path}/{name}/**/*.txt", cache_dir=f"{tmp_path}/cache-{name}"), 1, False).fingerprint
        for name in ("one", "other")
    }
    assert len(found) == 1


def test_changed_content_is_prepared_again(tmp_path: Path, small: Make, built: list[str]) -> None:
    """Moved and changed; of the same sizes and other text; other settings; files in another order; another suffix."""
    corpus = write_corpus(tmp_path / "text", 8)
    fingerprints = {prepare(small(corpus), 1, progress=False).fingerprint}
    moved = Path(shutil.move(corpus, tmp_path / "moved"))
    text = (moved / "000.txt").read_bytes()
    (moved / "000.txt").write_bytes(text.swapcase())
    fingerprints.add(prepare(small(moved), 1, progress=False).fingerprint)
    fingerprints.add(prepare(small(moved), 2, progress=False).fingerprint)
    (moved / "000.txt").rename(moved / "9.txt")
    fingerprints.add(prepare(small(moved), 1, progress=False).fingerprint)
    (moved / "more.jsonl").write_text('{"text": "x"}\n')
    fingerprints.add(prepare(small(moved), 1, progress=False).fingerprint)
    (moved / "more.jsonl").rename(moved / "more.txt")
    fingerprints.add(prepare(small(moved), 1, progress=False).fingerprint)
    assert len(built) == len(fingerprints) == 6


def test_the_same_rows_read_by_another_column_are_other_data(tmp_path: Path, small: Make, built: list[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "body": "1"}\n{"text": "two", "body": "2"}\n')
    config = small(tmp_path / "a.jsonl")
    other = config.model_copy(update={"sources": [config.sources[0].model_copy(update={"text_field": "body"})]})
    found = {prepare(config, 1, progress=False).fingerprint, prepare(other, 1, progress=False).fingerprint}
    assert len(built) == len(found) == 2


def test_the_corpus_is_gone(
    tmp_path: Path, small: Make, prepared: PreparedData, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The data of the run are found by their fingerprint, else the newest by the corpus's path; never another's."""
    model = Path(shutil.copy(prepared.folder / "tokenizer.model", tmp_path / "own.model"))
    config = small(write_corpus(tmp_path / "text", 8), tokenizer=TokenizerConfig(path=str(model)))
    first = prepare(config, 1, progress=False)
    (tmp_path / "text/000.txt").write_text("changed")
    second = prepare(config, 1, progress=False)
    shutil.rmtree(tmp_path / "text")
    model.unlink()
    assert prepare(config, 1, progress=False).folder == second.folder
    assert "no file matches" in (reported := capsys.readouterr().err) or "own.model" in reported
    assert prepare(config, 1, progress=False, fingerprint=first.fingerprint).folder == first.folder
    for other, seed, fingerprint in ((small(tmp_path / "typo"), 1, None), (config, 2, None), (config, 1, "0" * 64)):
        with pytest.raises(ValueError, match=r"no file matches|own\.model"):
            prepare(other, seed, progress=False, fingerprint=fingerprint)
    assert len(built) == 2
    tokens = first.folder / "text/tokens-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(ValueError, match="sha256"):
        prepare(config, 1, progress=False, fingerprint=first.fingerprint)


def test_a_corpus_that_is_gone_was_read_with_the_same_patterns(
    tmp_path: Path, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of an earlier version do not say with which: they count as made with the usual ones."""

    def reading(**patterns: list[str]) -> DataConfig:
        config = small(tmp_path / "text")
        return config.model_copy(update={"sources": [config.sources[0].model_copy(update=patterns)]})

    write_corpus(tmp_path / "text", 8)
    usual = reading()
    few = reading(include=["00[0-4].txt"])
    made = [prepare(config, 1, progress=False).folder for config in (few, usual)]
    with monkeypatch.context() as patch:
        patch.setattr(module.reuse, "patterns", lambda sources: {})
        old = prepare(usual, 2, progress=False).folder
    shutil.rmtree(tmp_path / "text")
    assert [prepare(config, 1, progress=False).folder for config in (few, usual)] == made
    assert prepare(usual, 2, progress=False).folder == old
    for other, seed in ((reading(exclude=["003.txt"]), 1), (reading(include=["*.txt"]), 1), (few, 2)):
        with pytest.raises(ValueError, match="no file matches"):
            prepare(other, seed, progress=False)


def test_one_of_two_corpora_is_gone(tmp_path: Path, small: Make, built: list[str]) -> None:
    config = small(write_corpus(tmp_path / "text", 8))
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    second = SourceConfig(name="second", kind="files", path=str(tmp_path / "b.jsonl"))
    config = config.model_copy(update={"sources": [*config.sources, second]})
    first = prepare(config, 1, progress=False)
    (tmp_path / "b.jsonl").unlink()
    assert prepare(config, 1, progress=False).folder == first.folder
    assert len(built) == 1


def test_data_of_more_sources_are_not_those_of_fewer(tmp_path: Path, small: Make, built: list[str]) -> None:
    """Where the corpora are gone. Planted: only the sources that are asked for are looked at."""
    config = small(write_corpus(tmp_path / "text", 8))
    write_corpus(tmp_path / "b", 12)
    second = SourceConfig(name="second", kind="files", path=str(tmp_path / "b"))
    both = config.model_copy(update={"sources": [*config.sources, second]})
    folder = prepare(both, 1, progress=False).folder
    for name in ("text", "b"):
        shutil.rmtree(tmp_path / name)
    assert prepare(both, 1, progress=False).folder == folder
    for fewer in ([config.sources[0]], [second], both.sources[::-1]):
        with pytest.raises(ValueError, match="no file matches"):
            prepare(config.model_copy(update={"sources": fewer}), 1, progress=False)
    assert len(built) == 1


@pytest.mark.parametrize("path", ["text/", "./text", "deep/../text"])
def test_a_lost_corpus_under_another_spelling_of_its_path(
    tmp_path: Path, small: Make, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """What pathlib takes for the same path is found; what goes up a folder may be another one."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text", 8)
    folder = prepare(small("text"), 1, progress=False).folder
    shutil.rmtree(tmp_path / "text")
    if ".." in path:
        with pytest.raises(ValueError, match="no file matches"):
            prepare(small(path), 1, progress=False)
    else:
        assert prepare(small(path), 1, progress=False).folder == folder


@pytest.mark.parametrize("manifest", [b"", b"cut {", b"\xff", b"[]", b"{}", b'{"made_from": 1}'])
@pytest.mark.parametrize("lost", [False, True])
def test_a_damaged_manifest_beside_the_data_is_passed_over(
    tmp_path: Path, small: Make, built: list[str], manifest: bytes, lost: bool
) -> None:
    corpus = write_corpus(tmp_path / "text", 8)
    folder = prepare(small(corpus), 1, progress=False).folder
    (tmp_path / "cache/other").mkdir()
    (tmp_path / "cache/other/manifest.json").write_bytes(manifest)
    if lost:
        shutil.rmtree(corpus)
    else:
        corpus = Path(shutil.move(corpus, tmp_path / "moved"))
    assert prepare(small(corpus), 1, progress=False).folder == folder
    assert len(built) == 1


@pytest.mark.parametrize("same", [b"", b"\n", b"\xff", b"/", b"../../elsewhere\n"])
def test_a_damaged_note_of_the_same_content(tmp_path: Path, small: Make, built: list[str], same: bytes) -> None:
    """Nothing outside of the cache is opened or written, and the data are found by their content again."""
    corpus = write_corpus(tmp_path / "text", 8)
    folder = prepare(small(corpus), 1, progress=False).folder
    moved = Path(shutil.move(corpus, tmp_path / "moved"))
    prepare(small(moved), 1, progress=False)
    (note,) = (tmp_path / "cache").glob("*.same")
    note.write_bytes(same)
    assert module.reuse.folder_of(tmp_path / "cache", note.stem).parent == tmp_path / "cache"
    assert prepare(small(moved), 1, progress=False).folder == folder
    assert len(built) == 1


def test_the_order_of_sources_counts(tmp_path: Path, small: Make, built: list[str]) -> None:
    """Of equal documents the first source's is kept: sources in another order are other data."""
    config = small(write_corpus(tmp_path / "a", 8))
    write_corpus(tmp_path / "b", 12)
    for name in ("000.txt", "001.txt"):
        (tmp_path / "b" / name).unlink()
    second = SourceConfig(name="second", kind="files", path=str(tmp_path / "b"))
    both = [*config.sources, second]
    for order in (both, both[::-1]):
        data = prepare(config.model_copy(update={"sources": order}), 1, progress=False)
        assert {name: entry["duplicates"] for name, entry in data.manifest["sources"].items()} == {
            order[0].name: 0,
            order[1].name: 6,
        }
    assert len(built) == 2


def test_damaged_data_of_the_same_content_are_not_used(tmp_path: Path, small: Make, built: list[str]) -> None:
    corpus = write_corpus(tmp_path / "text", 8)
    first = prepare(small(corpus), 1, progress=False)
    moved = Path(shutil.move(corpus, tmp_path / "moved"))
    prepare(small(moved), 1, progress=False)
    (first.folder / "text/names.txt").write_bytes(b"damaged")
    again = prepare(small(moved), 1, progress=False)
    assert again.folder != first.folder and again.fingerprint == first.fingerprint
    assert prepare(small(moved), 1, progress=False).folder == again.folder
    assert len(built) == 2


def test_prepared_data_on_a_disk_that_cannot_be_written(
    tmp_path: Path, small: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(write_corpus(tmp_path / "text", 8))
    first = prepare(config, 1, progress=False)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert prepare(config, 1, progress=False).folder == first.folder
    with pytest.raises(ValueError, match="not writable"):
        prepare(config, 2, progress=False)


def test_a_corpus_that_changes_while_it_is_read(tmp_path: Path, small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size: it is noticed by its time."""
    corpus = write_corpus(tmp_path / "text", 8)
    scan = module.scan

    def slow(*args: object) -> object:
        found = scan(*args)
        (corpus / "000.txt").write_bytes((corpus / "000.txt").read_bytes().swapcase())
        return found

    monkeypatch.setattr(module, "scan", slow)
    with pytest.raises(ValueError, match="changed while it was read"):
        prepare(small(corpus), 1, progress=False)
