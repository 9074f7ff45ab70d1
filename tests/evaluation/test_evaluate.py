"""`python -m nsa.evaluate`, from an export to the files that it writes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from small_run import small_export

from nsa import evaluate as command
from nsa.data.prepare import prepare
from nsa.data.tasks import SET_SIZE
from nsa.evaluation import runner
from nsa.exporting.folder import CONFIG


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("run"), ["dense", "nsa"], max_position=128)


FEW = ["evaluation.recall_samples=3", "evaluation.bpb_samples=4"]


def test_evaluation_writes_all_results(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(exported), *FEW]) == 0
    out = exported.parent / "evaluation"
    assert sorted(path.name for path in out.iterdir()) == ["bits_per_byte.png", "evaluation.json", "recall.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in ("bits_per_byte.png", "recall.png"))
    document = json.loads((out / "evaluation.json").read_text())
    assert document["training"]["step"] == 3
    assert [(c["length"], c["samples"]) for c in document["bits_per_byte"]] == [(64, 4), (256, 1)]
    # The model is untrained: it needs about as many bits as a uniform one, and recalls nothing.
    assert 3 < document["bits_per_byte"][0]["bits_per_byte"] < 12
    rows = {(r["task"], r["factor"]): r for r in document["recall"]}
    assert set(rows) == {(task, f) for task in ("mqar", "passkey", "copy") for f in (1, 2, 4)} - {("passkey", 1)}
    assert {r["yarn_factor"] for r in document["recall"] if r["factor"] < 4} == {1.0}
    assert {r["yarn_factor"] for r in document["recall"] if r["factor"] == 4} == {2.0}  # 256 tokens, trained for 128
    chances = {task: [r["chance"] for r in document["recall"] if r["task"] == task] for task, _ in rows}
    assert set(chances["copy"] + chances["passkey"]) == {1 / SET_SIZE}
    assert chances["mqar"] == sorted(chances["mqar"], reverse=True)  # more pairs in longer episodes
    assert all(r["low"] <= r["accuracy"] <= r["high"] for r in document["recall"])
    text = capsys.readouterr().out
    assert text.count("(YaRN 2)") == 3
    assert "chance" in text


def test_bits_per_byte_are_of_held_out_text(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each length the documents that the training held out, and no others; the figures of the file are these."""
    measure, seen = runner.bits_per_byte.measure, []

    def spy(decoder, stream, samples: int):
        seen.extend((stream.prepared, span) for i in range(samples) for span in stream.locate(i))
        return measure(decoder, stream, samples)

    monkeypatch.setattr(runner.bits_per_byte, "measure", spy)
    config = runner.Decoders(exported).config
    few = config.evaluation.model_copy(update={"recall_samples": 1, "bpb_samples": 4, "length_factors": [1, 2]})
    told = runner.evaluate(exported, tmp_path, config.model_copy(update={"evaluation": few}), lambda text: None)
    assert len(seen) > 4 and all(data.sources[span.source].documents["validation"][span.row] for data, span in seen)
    assert told["training_length"] == 64 and [curve["length"] for curve in told["bits_per_byte"]] == [64, 128]


def test_held_out_text_is_read_in_the_tokens_of_the_model(exported: Path) -> None:
    decoders = runner.Decoders(exported)
    config = decoders.config
    own = runner._prepare(config, decoders.tokenizer, exported / "tokenizer.model")
    assert own.tokenizer.sha256 == decoders.tokenizer.sha256
    # A corpus that gives another tokenizer, as on a machine with another Python.
    section = config.data.tokenizer.model_copy(update={"vocab_size": 390})
    other = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": section})})
    assert prepare(other.data, other.seed, progress=False).tokenizer.sha256 != decoders.tokenizer.sha256
    again = runner._prepare(other, decoders.tokenizer, exported / "tokenizer.model")
    assert again.tokenizer.sha256 == decoders.tokenizer.sha256
    assert [name for name, _ in again.texts("validation")] == [name for name, _ in own.texts("validation")]


def test_recall_needs_no_corpus(exported: Path, tmp_path: Path) -> None:
    """Neither the training's text nor its prepared data: bits per byte are left out, and it is said why."""
    config = runner.Decoders(exported).config
    source = config.data.sources[0].model_copy(update={"path": str(tmp_path / "gone")})
    data = config.data.model_copy(update={"sources": [source], "cache_dir": str(tmp_path / "cache")})
    few = config.evaluation.model_copy(update={"recall_samples": 2, "length_factors": [1]})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/bits_per_byte.png").write_bytes(b"of an evaluation before")
    reported: list[str] = []
    document = runner.evaluate(
        exported, tmp_path / "out", config.model_copy(update={"data": data, "evaluation": few}), reported.append
    )
    assert {row["task"] for row in document["recall"]} == {"mqar", "copy"} and document["bits_per_byte"] == []
    assert any("bits per byte are left out" in text and "no file matches" in text for text in reported)
    assert "no file matches" in document["left_out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["evaluation.json", "recall.png"]


def test_errors_are_reported(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert "is no export" in capsys.readouterr().err
    assert command.main([str(exported), "evaluation.recall_sample=3"]) == 2
    assert "recall_samples" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command.main([str(exported), "--out", str(tmp_path / "file"), "evaluation.recall_samples=4"]) == 2
    assert "--out" in capsys.readouterr().err


def test_overrides_change_what_an_earlier_version_saved(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the export, or named; and a pipe in its place is not waited for."""
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    saved = yaml.safe_load((copy / CONFIG).read_text())
    saved["attention"]["block_size"] = saved["attention"]["nsa"].pop("block_size")
    (copy / CONFIG).write_text(yaml.safe_dump(saved))
    some = ["--out", str(tmp_path / "out"), "evaluation.length_factors=[1]", *FEW]
    assert command.main([str(copy), *some]) == 0
    assert command.main([str(copy), "--config", str(copy / CONFIG), *some]) == 0
    (copy / CONFIG).unlink()
    os.mkfifo(copy / CONFIG)
    capsys.readouterr()
    assert command.main([str(copy), *some]) == 2
    assert f"{CONFIG} is no regular file" in capsys.readouterr().err
