"""What two results must have in common: fingerprints of code, exports and tokenizers, and the configuration."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from simulated import MANIFEST

from nsa.evaluation.comparison.config import ComparisonConfig
from nsa.evaluation.comparison.identity import code_digest, export_digest, tokenizer_digest
from tests.small_run import small_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("dense"), "dense")


@pytest.fixture
def folder(export: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(export, tmp_path / "export"))


def changed(path: Path, how: Callable[[bytes], bytes] = lambda content: content + b" ") -> None:
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize("digest", [export_digest, code_digest])
def test_the_order_in_which_files_are_listed_changes_nothing(
    digest: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one.py", "two.py", "three.json"):
        (tmp_path / name).write_text(name)
    first, listed, found = digest(tmp_path), Path.iterdir, Path.rglob
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(list(listed(self))[::-1]))
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: iter(list(found(self, pattern))[::-1]))
    assert digest(tmp_path) == first


def test_an_export_is_all_of_its_files_but_its_card(folder: Path) -> None:
    first = export_digest(folder)
    (folder / "README.md").write_text("another card")
    assert export_digest(folder) == first
    for path in [path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"]:
        before = path.read_bytes()
        changed(path)
        assert export_digest(folder) != first, path.name
        path.write_bytes(before)
    assert export_digest(folder) == first
    (folder / "config.json").rename(folder / "configuration.json")
    assert export_digest(folder) != first, "a file of another name is another file"


def test_a_tokenizer_is_its_pieces_in_their_order(folder: Path) -> None:
    """Two pieces that change places: each text has other tokens, and the same pieces are there."""
    first, path = tokenizer_digest(folder), folder / "tokenizer.model"

    def swapped(content: bytes) -> bytes:
        model = ModelProto.FromString(content)
        one, other = model.pieces[300].piece, model.pieces[301].piece
        model.pieces[300].piece, model.pieces[301].piece = other, one
        return bytes(model.SerializeToString())

    changed(path, swapped)
    assert tokenizer_digest(folder) != first
    path.unlink()
    assert tokenizer_digest(folder) == first, "its tokenizer.json says the same"


def test_a_tokenizer_of_another_make_is_all_of_its_files(tmp_path: Path) -> None:
    """Some have no tokenizer.json, some one that no sentencepiece model makes."""
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    (tmp_path / "config.json").write_text("{}")
    first = tokenizer_digest(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert tokenizer_digest(tmp_path) == first
    (tmp_path / "tokenizer.json").write_text("{}")
    second = tokenizer_digest(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert len({first, second, tokenizer_digest(tmp_path)}) == 3


def test_results_of_other_values_of_what_answers_follow_from_are_others() -> None:
    """Of all fields of a configuration but those that no cell depends on."""
    free = {"siblings", "methods", "stages", "output_dir", "batch_tokens", "decode_batch_tokens"}
    config: dict[str, Any] = dict.fromkeys(ComparisonConfig.model_fields, "one")
    first = replace(MANIFEST, config=config).origin
    for name in config:
        other = replace(MANIFEST, config={**config, name: "two"}).origin
        assert (other == first) == (name in free), name
    assert json.loads(json.dumps(config)) == config
    for code in ("bbcdef012345", "abcdef012346"):
        assert replace(MANIFEST, config=config, code=code).origin != first
