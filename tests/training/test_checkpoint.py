"""Checkpoint folders: broken ones are found and passed over, and nothing good is lost when a save fails."""

import errno
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import start, train, write_yaml

from nsa.training import checkpoint, saver
from nsa.training.checkpoint import CheckpointError

TENSORS = [("weight", "a.weight", torch.arange(6.0).view(2, 3)), ("exp_avg", "a.weight", torch.ones(2, 3))]


def write(run, step, tensors=TENSORS):
    temporary = run / f"{checkpoint.folder_name(step)}.tmp"
    temporary.mkdir(parents=True)
    entries = checkpoint.write_tensors(temporary, 0, tensors)
    entries["state.json"] = checkpoint.write_json(temporary / "state.json", {"step": step})
    checkpoint.commit(temporary, run / checkpoint.folder_name(step), entries)
    return run / checkpoint.folder_name(step)


def test_what_was_written_is_read(tmp_path):
    folder = write(tmp_path, 5)
    checkpoint.verify(folder)
    weights = checkpoint.load_weights(folder)
    assert list(weights) == ["a.weight"] and weights["a.weight"].equal(TENSORS[0][2])
    assert checkpoint.TensorReader(folder, "optimizer").names() == ["exp_avg.a.weight"]
    assert checkpoint.load_state(folder) == {"step": 5}
    with pytest.raises(CheckpointError, match="step_"):
        checkpoint.load_weights(tmp_path)


def test_large_states_are_split_into_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PART_BYTES", 100)
    tensors = [("weight", f"w{i}", torch.full((30,), float(i))) for i in range(5)]
    folder = write(tmp_path, 1, tensors)
    assert len(list(folder.glob("model-00000-*.safetensors"))) == 5
    assert {name: t[0].item() for name, t in checkpoint.load_weights(folder).items()} == {f"w{i}": i for i in range(5)}


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "flipped bit": (lambda folder: flip(folder / "model-00000-000.safetensors"), "content was changed"),
    "cut short": (lambda folder: truncate(folder / "optimizer-00000-000.safetensors"), "cut short"),
    "file gone": (lambda folder: (folder / "state.json").unlink(), "No such file"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "not written to its end"),
    "half a manifest": (lambda folder: truncate_by(folder / "manifest.json", 20), "cannot be read"),
    "foreign path": (lambda folder: rename_entry(folder), "no file of this folder"),
}


def truncate_by(path, size):
    path.write_bytes(path.read_bytes()[:-size])


def rename_entry(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("state.json", "../state.json"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_reported_and_passed_over(tmp_path, capsys, damage):
    good, bad = write(tmp_path, 9), write(tmp_path, 10)
    harm, message = DAMAGES[damage]
    harm(bad)
    assert checkpoint.latest_complete(tmp_path) == good
    printed = capsys.readouterr().out
    assert "passed over" in printed and "step_00000010" in printed and message in printed


def test_broken_checkpoints_are_set_aside_and_leftovers_removed(tmp_path):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    (tmp_path / "step_00000003.tmp").mkdir()
    checkpoint.set_aside(tmp_path, good)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002.broken"]
    assert not bad.exists()


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest_complete(tmp_path / "absent") is None


def test_the_last_k_are_kept(tmp_path):
    for step in (1, 2, 10, 100_000_000):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_100000000", "step_00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(CheckpointError, match="GiB are free"):
        checkpoint.check_space(tmp_path, 2**30)


def test_tensors_are_exhausted_when_a_write_fails(tmp_path, monkeypatch):
    """Other ranks take part in producing them: a rank that stopped early would leave them waiting."""
    taken = []

    def produce():
        for i in range(4):
            taken.append(i)
            yield "weight", f"w{i}", torch.zeros(100)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "PART_BYTES", 400)
    monkeypatch.setattr(checkpoint, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_tensors(tmp_path, 0, produce())
    assert taken == [0, 1, 2, 3]


FULL_DISK = """
import errno, sys
from nsa.training import checkpoint, saver
write = checkpoint.write_file
def full(path, content):
    if "step_00000006" in str(path) and path.name.startswith("optimizer"):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return write(path, content)
checkpoint.write_file = full
from nsa.train import main
sys.exit(main())
"""


def test_faults_of_a_run_and_its_checkpoints(tmp_path):
    """One run, several misfortunes. The disk is full while step 6 is saved; the checkpoint of step 4 is broken, so that
    of step 2 resumes the run; then another configuration is refused, naming its keys."""
    run = tmp_path / "runs/run"
    process = start(["-c", FULL_DISK, str(write_yaml(tmp_path))])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "step 6 was not written" in output and "No space left" in output and "step_00000004" in output
    names = [p.name for p in checkpoint.checkpoints(run)]
    assert names == ["step_00000004", "step_00000002"] and not list(run.glob("*.tmp"))

    flip(run / "step_00000004/model-00000-000.safetensors")
    resumed = train(tmp_path)
    assert resumed.returncode == 0 and "passed over" in resumed.stdout and "after step 2" in resumed.stdout
    assert (run / "step_00000004.broken").is_dir()
    for path in checkpoint.checkpoints(run):
        checkpoint.verify(path)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6], "the steps that were lost are logged once"

    refused = train(tmp_path, "model.intermediate_size=64", "optimizer.beta2=0.9")
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert "model.intermediate_size: 48 there, 64 now" in refused.stdout and "optimizer.beta2" in refused.stdout


def test_a_rank_lost_while_a_checkpoint_is_written_is_no_error_of_the_disk(tmp_path, monkeypatch):
    """The trainer takes a gloo error for a lost rank (exit code 85), a CheckpointError for something to mend (2)."""

    def lost(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    monkeypatch.setattr(saver.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(saver.messages, "gather", lost)
    alone = SimpleNamespace(rank=0, is_main=True, on_main=lambda call: call())
    writer = saver.Saver(alone, tmp_path, keep_last=1)
    writer.start(saver.Snapshot(step=2, tensors=[], rng={}, state={}, files={}, num_bytes=0))
    with pytest.raises(RuntimeError, match="gloo"):
        writer.wait()
    assert writer.failed, "other ranks hear of it, if they can"
    assert checkpoint.checkpoints(tmp_path) == []
