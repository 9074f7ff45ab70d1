"""Prepared data: the same for everyone, split by document, checked when opened, and never half written."""

import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from nsa.data import prepare as module
from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.loader import SampleStream
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData, SourceWriter, TokenSource, write_manifest
from tests.data.corpus import write_corpus

Make = Callable[..., DataConfig]


@pytest.fixture
def copy(prepared: PreparedData, tmp_path: Path) -> Path:
    """Prepared data that a test may damage."""
    return Path(shutil.copytree(prepared.folder, tmp_path / "copy"))


def flip(path: Path, at: int = -10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_every_byte_is_there_once(prepared: PreparedData, corpus: Path) -> None:
    original = {p.read_bytes() for p in corpus.iterdir()}
    train, validation = (dict(prepared.texts(split)) for split in ("train", "validation"))
    assert set(train.values()) | set(validation.values()) == original
    assert len(train) + len(validation) == len(original)
    assert not set(train.values()) & set(validation.values())
    assert train and validation
    entry = prepared.manifest["sources"]["text"]
    assert entry["train"]["bytes"] == sum(map(len, train.values()))
    assert entry["train"]["documents"] == len(train)


def test_ids_lead_back_to_the_files(prepared: PreparedData, corpus: Path) -> None:
    for name, text in prepared.texts("train"):
        assert (corpus / name.removeprefix("text/")).read_bytes() == text


def test_the_second_time_is_instant_and_the_same(
    prepared: PreparedData, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built again"))
    assert prepare(config, 7, progress=False).fingerprint == prepared.fingerprint


def test_workers_and_blend_do_not_change_the_data(prepared: PreparedData, config: DataConfig, tmp_path: Path) -> None:
    changes = {"workers": 2, "sequence_length": 8, "sources": config.sources[:1], "cache_dir": str(tmp_path)}
    again = prepare(config.model_copy(update=changes), 7, progress=False)
    assert again.fingerprint == prepared.fingerprint
    assert again.folder.name == prepared.folder.name


def test_what_determines_the_data_names_the_folder(tmp_path: Path, make_config: Make) -> None:
    corpus = write_corpus(tmp_path / "text", 20)
    config = make_config(corpus)
    folders = {prepare(config, seed, progress=False).folder for seed in (1, 2)}
    folders.add(prepare(make_config(corpus, validation_fraction=0.3), 1, progress=False).folder)
    (corpus / "new.txt").write_text("one more\n")
    folders.add(prepare(config, 1, progress=False).folder)
    assert len(folders) == 4


def test_an_existing_tokenizer(prepared: PreparedData, make_config: Make, corpus: Path) -> None:
    path = prepared.folder / "tokenizer.model"
    data = prepare(make_config(corpus, tokenizer=TokenizerConfig(path=str(path))), 7, progress=False)
    assert data.tokenizer.sha256 == prepared.tokenizer.sha256
    assert data.folder != prepared.folder
    assert data.manifest["files"]["text/tokens-00000.bin"] == prepared.manifest["files"]["text/tokens-00000.bin"]


def test_duplicates_and_empty_documents_are_counted(tmp_path: Path, make_config: Make) -> None:
    corpus = write_corpus(tmp_path / "text", 20)
    (corpus / "again.txt").write_bytes((corpus / "007.txt").read_bytes())
    (corpus / "empty.txt").write_bytes(b"")
    entry = prepare(make_config(corpus), 1, progress=False).manifest["sources"]["text"]
    assert (entry["duplicates"], entry["empty"]) == (1, 1)
    assert entry["train"]["documents"] + entry["validation"]["documents"] == 20


def test_one_text_in_two_sources_is_kept_once(tmp_path: Path, make_config: Make) -> None:
    config = make_config(write_corpus(tmp_path / "a", 30))
    write_corpus(tmp_path / "b", 34)  # the first 30 are the same
    second = SourceConfig(name="second", kind="files", path=str(tmp_path / "b"))
    data = prepare(config.model_copy(update={"sources": [*config.sources, second]}), 1, progress=False)
    assert data.manifest["sources"]["second"]["duplicates"] == 30
    splits = [{text for _, text in data.texts(split)} for split in ("train", "validation")]
    assert not splits[0] & splits[1]


def test_one_document_cannot_be_split(tmp_path: Path, make_config: Make) -> None:
    (tmp_path / "one.txt").write_text("text " * 1000)
    with pytest.raises(ValueError, match="one document per line"):
        prepare(make_config(tmp_path / "one.txt"), 1, progress=False)
    (tmp_path / "one.txt").write_text("")
    with pytest.raises(ValueError, match=r"0 document.*name files that have text") as refused:
        prepare(make_config(tmp_path / "one.txt"), 1, progress=False)
    assert "cut the text" not in str(refused.value)


def test_shards_part_documents_nowhere(tmp_path: Path, prepared: PreparedData) -> None:
    documents = [np.arange(n) % 90 for n in (5, 30, 2, 2, 100, 7)]
    writer = SourceWriter(tmp_path / "s", prepared.vocab_size, shard_tokens=32)
    for i, tokens in enumerate(documents):
        writer.add(f"d{i}", tokens, 3 * i, i == 2)
    entry = writer.close()
    assert [s["tokens"] for s in entry["shards"]] == [35, 104, 7]
    shutil.copyfile(prepared.folder / "tokenizer.model", tmp_path / "tokenizer.model")
    about = {"vocab_size": prepared.vocab_size, "sha256": prepared.tokenizer.sha256}
    write_manifest(tmp_path, {"made_from": {}, "tokenizer": about, "sources": {"s": entry}})
    source = PreparedData(tmp_path, verify=True).sources["s"]
    for i, tokens in enumerate(documents):
        assert np.array_equal(source.read(i), tokens)
        assert np.array_equal(source.read(i, 1, 4), tokens[1:4])
        assert source.document_id(i) == f"d{i}"
    assert source.members("validation").tolist() == [2]


@pytest.mark.parametrize("vocab_size", [1 << 16, (1 << 16) + 1, 1 << 17])
def test_ids_of_a_large_vocabulary_come_back(tmp_path: Path, vocab_size: int) -> None:
    """The highest id too: two bytes hold 65536 ids and no more."""
    tokens = np.array([0, 3, vocab_size - 1, 65535, 1])
    writer = SourceWriter(tmp_path / "s", vocab_size)
    writer.add("d", tokens, 5, False)
    writer.add("e", tokens[::-1], 5, True)
    entry = writer.close()
    source = TokenSource(tmp_path / "s", entry, vocab_size)
    assert source.read(0).tolist() == tokens.tolist() and source.read(1).tolist() == tokens[::-1].tolist()
    assert [source.document_id(i) for i in (0, 1)] == ["d", "e"]
    with pytest.raises(ValueError, match=rf"holds token {vocab_size - 1}, the tokenizer has {vocab_size - 1} pieces"):
        TokenSource(tmp_path / "s", entry, vocab_size - 1)


@pytest.mark.parametrize("name", ["tokens-00000.bin", "documents.npy", "names.txt"])
def test_the_fingerprint_is_that_of_the_content(copy: Path, name: str) -> None:
    """A run is resumed on the data of its fingerprint: of equal sizes and counts, other content has another."""
    before = PreparedData(copy)
    flip(copy / "text" / name)
    manifest = before.manifest
    (copy / "manifest.json").unlink()
    write_manifest(copy, {key: manifest[key] for key in ("made_from", "tokenizer", "sources")})
    after = PreparedData(copy, verify=True)
    assert after.manifest["sources"] == manifest["sources"]
    assert after.fingerprint != before.fingerprint


FILES = ["text/tokens-00000.bin", "text/documents.npy", "text/names.txt", "tokenizer.model"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(copy: Path, name: str) -> None:
    PreparedData(copy, verify=True)
    flip(copy / name)
    with pytest.raises(ValueError, match=rf"{name}.*sha256.*nsa\.data\.prepare"):
        PreparedData(copy, verify=True)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_short_or_gone_is_found(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-2])
    with pytest.raises(ValueError, match=rf"{name}.*the manifest says.*nsa\.data\.prepare"):
        PreparedData(copy)
    (copy / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}.*missing.*nsa\.data\.prepare"):
        PreparedData(copy)
    os.mkfifo(copy / name)  # is not waited for
    with pytest.raises(ValueError, match=rf"{name} is no regular file.*nsa\.data\.prepare"):
        PreparedData(copy)


def test_a_changed_or_cut_manifest_is_found(copy: Path) -> None:
    path = copy / "manifest.json"
    whole = path.read_text()
    path.write_text(whole.replace('"vocab_size": 400', '"vocab_size": 401'))
    with pytest.raises(ValueError, match="manifest was changed"):
        PreparedData(copy)
    path.write_text(whole[:-20])
    with pytest.raises(ValueError, match="no readable manifest"):
        PreparedData(copy)


@pytest.mark.parametrize("left", [0, 1])
def test_a_document_without_tokens_is_found(copy: Path, left: int) -> None:
    """Every one has a begin and an end. Of an empty one a window would be made for ever."""
    records = np.load(copy / "text/documents.npy")
    lengths = np.diff(records["token_end"], prepend=0)
    at = int(lengths[1:].argmin()) + 1
    records["token_end"][at - 1] += lengths[at] - left
    np.save(copy / "text/documents.npy", records)
    with pytest.raises(ValueError, match=r"documents\.npy: offsets do not fit the shards; run"):
        PreparedData(copy)


def test_a_token_beyond_the_vocabulary_is_found_when_read(copy: Path, config: DataConfig) -> None:
    """Also in a shard that was damaged after it was opened, or opened without hashing."""
    path = copy / "text/tokens-00000.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[:] = 400
    tokens.tofile(path)
    stream = SampleStream(PreparedData(copy), config, "validation", 7)
    with pytest.raises(ValueError, match=r"holds token 400, the tokenizer has 400 pieces.*nsa\.data\.prepare"):
        stream[0]


def test_a_model_with_another_vocabulary_is_refused(prepared: PreparedData) -> None:
    prepared.check_vocabulary(400)
    with pytest.raises(ValueError, match=r"model\.vocab_size"):
        prepared.check_vocabulary(399)


def test_damaged_data_are_built_again(tmp_path: Path, make_config: Make, capfd: pytest.CaptureFixture) -> None:
    config = make_config(write_corpus(tmp_path / "text", 20))
    first = prepare(config, 1, progress=False)
    flip(first.folder / "text/tokens-00000.bin")
    second = prepare(config, 1, progress=False)
    said = capfd.readouterr().err
    assert "built again: " in said and "sha256" in said and "python -m nsa.data.prepare" not in said
    assert second.fingerprint == first.fingerprint
    PreparedData(second.folder, verify=True)


def test_a_failure_leaves_nothing(tmp_path: Path, make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = make_config(write_corpus(tmp_path / "text", 20), cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(module, "write_manifest", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(config, 1, progress=False)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".TAG", ".lock"]
    monkeypatch.undo()
    prepare(config, 1, progress=False)


def _prepare_fingerprint(config: DataConfig) -> str:
    return prepare(config, 1, progress=False).fingerprint


def test_processes_do_not_fight(tmp_path: Path, make_config: Make) -> None:
    config = make_config(write_corpus(tmp_path / "text", 30), cache_dir=str(tmp_path / "cache"))
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        results = set(pool.map(_prepare_fingerprint, [config] * 3))
    assert len(results) == 1
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_only_synthetic_sources_are_refused(make_config: Make, corpus: Path) -> None:
    config = make_config(corpus, "mqar")
    with pytest.raises(ValueError, match="at least one source must be text"):
        prepare(config.model_copy(update={"sources": config.sources[1:]}), 1)


def test_the_cache_folder_cannot_be_made(make_config: Make, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.cache_dir"):
        prepare(make_config(corpus, cache_dir=str(corpus / "000.txt" / "cache")), 1)


def test_the_manifest_says_what_it_was_made_from(prepared: PreparedData) -> None:
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["made_from"]["seed"] == 7
    assert manifest["made_from"]["tokenizer"] == {"vocab_size": 400, "train_bytes": 100_000}
    assert manifest["tokenizer"]["sha256"] == manifest["files"]["tokenizer.model"]["sha256"]


@pytest.mark.parametrize(("raised", "code"), [(ValueError("no text"), 2), (KeyboardInterrupt(), 130)])
def test_the_command_has_the_exit_codes_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised, code: int
) -> None:
    def load_config(*_: object) -> None:
        raise raised

    monkeypatch.setattr("nsa.config.load_config", load_config)
    monkeypatch.setattr("sys.argv", ["prepare", "mine.yaml"])
    monkeypatch.delitem(sys.modules, "nsa.data.prepare")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("nsa.data.prepare", run_name="__main__")
    assert ended.value.code == code
    assert capsys.readouterr().err.startswith("error: no text\n" if code == 2 else "interrupted: nothing was written")
