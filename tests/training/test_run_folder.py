"""The run folder: one process at a time, and only with the configuration it began with."""

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import free_port, start, tiny_config, write_yaml

from nsa.config import ConfigError, dump_config, load_config, load_saved
from nsa.config_history import OF_NSA
from nsa.training import run_folder
from nsa.training.run_folder import FolderBusyError, RunFolder, check_same
from nsa.training.state import trained_on


def test_a_second_run_in_the_folder_waits_and_says_again(tmp_path, monkeypatch, capsys):
    """Ranks whose launcher was killed still save; a restart meanwhile is no mistake."""
    config = tiny_config(tmp_path)
    first, now = RunFolder(config), [0.0]

    def sleep(seconds):
        now[0] += seconds
        if now[0] > 1000:
            first.close()

    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with pytest.raises(FolderBusyError, match=r"another process \(process \d+ on .*\) trains in .*again.*code 75"):
        RunFolder(config)
    assert run_folder.LOCK_SECONDS <= now[0] < run_folder.LOCK_SECONDS + 1
    assert capsys.readouterr().out.count("waiting for its end") == 1
    now[0] = 990
    RunFolder(config).close()
    assert 1000 < now[0] < 1001, "it goes on when the other has ended"


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written .*output_dir"):
        RunFolder(tiny_config(tmp_path, f"output_dir={tmp_path / 'file'}"))


def write_config(folder):
    path = folder / "config.yaml"
    path.write_text(dump_config(tiny_config(folder)))
    return path


def test_what_may_change_on_resume(tmp_path):
    saved = write_config(tmp_path)
    free = ["training.steps=9", "training.micro_batch_size=2", "engine.zero_stage=3", "checkpoint.every=5", "name=b"]
    assert check_same(saved, tiny_config(tmp_path, *free), tmp_path) == [
        "engine.zero_stage: 0 there, 3 now (other roundings)",
        "training.micro_batch_size: 1 there, 2 now (other roundings)",
    ]
    assert check_same(saved, tiny_config(tmp_path, "training.steps=9", "checkpoint.every=5"), tmp_path) == []
    (change,) = check_same(saved, tiny_config(tmp_path, "parallel.tensor=2"), tmp_path)
    assert change.startswith("parallel.tensor: 1 there, 2 now")
    (change,) = check_same(saved, tiny_config(tmp_path, "engine.precision=bf16"), tmp_path)
    assert change.startswith("engine.precision: fp32 there, bf16 now")


def test_a_corpus_may_move(tmp_path):
    """Its content is compared by the fingerprint of the prepared data, wherever it lies; its share is no content."""
    saved = write_config(tmp_path)
    check_same(saved, tiny_config(tmp_path, "data.sources.0.path=/elsewhere/", "data.sources.0.bad_rows=0"), tmp_path)
    with pytest.raises(ValueError, match=r"data\.sources"):
        check_same(saved, tiny_config(tmp_path, "data.sources.0.weight=2"), tmp_path)


# Sections and keys that change neither what was learned up to a checkpoint nor the order of the data.
FREE = {"name", "output_dir", "start_from", "data.cache_dir", "data.workers"}
FREE |= {f"training.{key}" for key in ("steps", "micro_batch_size", "validation_every", "validation_samples")}
FREE |= {f"training.{key}" for key in ("log_every", "probe_every", "max_skipped_steps", "max_hours")}
FREE_SECTIONS = ("evaluation", "checkpoint", "resume", "recovery", "engine", "parallel")


def test_every_other_key_is_compared(tmp_path, monkeypatch):
    """Of the whole configuration, one after the other: a new key is compared until somebody says that it may change."""
    saved, config = write_config(tmp_path), tiny_config(tmp_path)
    now, free = run_folder._compared(config), set()
    for key in now:
        both = iter((now | {key: "another value"}, now))
        monkeypatch.setattr(run_folder, "_compared", lambda _, both=both: next(both))
        try:
            check_same(saved, config, tmp_path)
            free.add(key)
        except ValueError as error:
            assert f"  {key}: another value there" in str(error)
    assert free == {key for key in now if key in FREE or key.startswith(tuple(f"{name}." for name in FREE_SECTIONS))}
    assert now.keys() >= FREE and {"seed", "train", "data.seed", "data.validation_fraction", "model.mla"} <= now.keys()
    compared = {"name", "kind", "weight", "task", "lengths", "curriculum"}
    assert [source.keys() for source in now["data.sources"]] == [compared] * 2, "of a source: not where its rows lie"


@pytest.mark.parametrize(
    "override",
    ["seed=7", "model.num_layers=4", "attention.nsa.window=8", "data.sequence_length=32",
     "training.global_batch_size=8", "optimizer.learning_rate=1e-3", "data.tokenizer.vocab_size=390"],
)  # fmt: skip
def test_what_may_not(tmp_path, override):
    saved = write_config(tmp_path)
    with pytest.raises(ValueError, match=override.split("=")[0]):
        check_same(saved, tiny_config(tmp_path, override), tmp_path)


def test_what_resume_allow_names_may_change_on_purpose(tmp_path, capsys):
    """And nothing else; it is said, and kept in the run folder, once."""
    saved = write_config(tmp_path)
    changed = ["optimizer.learning_rate=1e-3", "optimizer.schedule=constant"]
    with pytest.raises(ValueError, match=r"resume\.allow=\[optimizer.learning_rate, optimizer.schedule\]"):
        check_same(saved, tiny_config(tmp_path, *changed), tmp_path)
    with pytest.raises(ValueError, match=r"optimizer\.schedule: cosine there") as refused:
        check_same(saved, tiny_config(tmp_path, *changed, "resume.allow=[optimizer.learning_rate]"), tmp_path)
    assert "learning_rate: 0.003" not in str(refused.value)
    both = "resume.allow=[optimizer.learning_rate, optimizer.schedule]"
    changes = check_same(saved, tiny_config(tmp_path, *changed, both), tmp_path)
    assert changes == [
        "optimizer.learning_rate: 0.003 there, 0.001 now",
        "optimizer.schedule: cosine there, constant now",
    ]
    assert check_same(saved, tiny_config(tmp_path, both), tmp_path) == []
    for _ in range(2):
        run_folder.record_changes(tmp_path, tmp_path / "step_00000004", changes)
        assert capsys.readouterr().out.count("optimizer.learning_rate: 0.003 there, 0.001 now") == 1
    lines = [f"from step_00000004 on: {change}" for change in changes]
    assert (tmp_path / "changes.txt").read_text().splitlines() == lines
    for key in ("optimizer.kind", "seed", "optimizer"):
        with pytest.raises(ConfigError, match=r"resume\.allow"):
            tiny_config(tmp_path, f"resume.allow=[{key}]")


def test_the_run_folder_is_found_as_by_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    for given, meant in (("~/runs", "home/runs"), ("$SCRATCH/a", "scratch/a"), ("${SCRATCH}/a", "scratch/a")):
        assert tiny_config(tmp_path, f"output_dir={given}").output_dir == str(tmp_path / meant)
    data = tiny_config(
        tmp_path, "data.cache_dir=~/cache", "data.sources.0.path=$SCRATCH/*.py", "data.tokenizer.path=~/a.model"
    ).data
    assert data.cache_dir == str(tmp_path / "home/cache") and data.tokenizer.path == str(tmp_path / "home/a.model")
    assert data.sources[0].path == str(tmp_path / "scratch/*.py")
    for wrong, words in (("$ABSENT/runs", r"environment has no \$ABSENT"), ("~nobody-here/runs", "no such user")):
        with pytest.raises(ConfigError, match=words):
            tiny_config(tmp_path, f"output_dir={wrong}")


def as_before_2026_11_29(saved: Path) -> None:
    """Rewrite a saved configuration as it was when NSA's sizes stood beside attention.kind."""
    tree = yaml.safe_load(saved.read_text())
    attention = tree["attention"]
    attention |= {key: value for key, value in attention.pop("nsa").items() if key in OF_NSA}  # others are newer
    assert attention["compress_length"] == 8
    saved.write_text(yaml.safe_dump(tree))


def test_a_checkpoint_of_the_earlier_schema_is_resumed(tmp_path):
    saved = write_config(tmp_path)
    as_before_2026_11_29(saved)
    check_same(saved, tiny_config(tmp_path), tmp_path)
    assert load_saved(saved) == tiny_config(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown key attention.block_size; the nearest valid one is attention.nsa"):
        load_config(saved)
    with pytest.raises(ValueError, match=r"attention.nsa.window: 16 there, 8 now"):
        check_same(saved, tiny_config(tmp_path, "attention.nsa.window=8"), tmp_path)


def test_a_port_in_use_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port()))
        taken.listen()
        process = start(["-m", "nsa.train", str(write_yaml(tmp_path))], 0, 2, taken.getsockname()[1])
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in output
    assert "free port" in output and str(taken) not in output


def test_the_data_of_the_newest_checkpoint_are_known(tmp_path):
    """By what `prepare` finds them where the corpus is gone. A checkpoint that is not sound is passed over."""
    assert trained_on(tmp_path) is None
    for step, text in ((1, '{"data": "one"}'), (2, '{"data": "two"}'), (3, "damaged")):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}/state.json").write_text(text)
    assert trained_on(tmp_path) == "two"
