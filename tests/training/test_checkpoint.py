"""Checkpoint folders: broken ones are found and passed over, and nothing good is lost when a save fails."""

import errno
import hashlib
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tiny import TEXT, start, train, write_yaml

from nsa.training import checkpoint, checkpoint_writer, trainer
from nsa.training.checkpoint import CheckpointError
from nsa.training.spikes import SpikeState
from nsa.training.state import Progress

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


@pytest.mark.parametrize("name", [".DS_Store", "._state.json", "notes.txt", "Thumbs.db", "copies", "model.png"])
def test_a_foreign_file_is_no_damage(tmp_path, name):
    folder = write(tmp_path, 5)
    (folder / name).mkdir() if name == "copies" else (folder / name).write_bytes(b"not ours")
    assert checkpoint.latest_complete(tmp_path) == folder
    assert list(checkpoint.load_weights(folder)) == ["a.weight"]


@pytest.mark.parametrize("name", ["model-00001-000.safetensors", "optimizer-9.safetensors", "rng-00001.json"])
def test_a_foreign_file_that_would_be_read_as_a_part_is_refused(tmp_path, name):
    folder = write(tmp_path, 5)
    shutil.copy(folder / "model-00000-000.safetensors", folder / name)
    with pytest.raises(CheckpointError, match=f"{name}.*not in the manifest"):
        checkpoint.verify(folder)


def of_another_version(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_of_which_none_can_be_used_stop_the_run(tmp_path, damage):
    """Nothing is renamed or removed: a person decides whether to start over."""
    for step in (9, 10):
        DAMAGES[damage][0](write(tmp_path, step))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"(?s)none .* can be used.*step_00000010.*step_00000009.*start over"):
        checkpoint.latest_complete(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_a_later_version_is_not_passed_over(tmp_path):
    """Steps that it holds would be trained again."""
    write(tmp_path, 9)
    of_another_version(write(tmp_path, 10))
    with pytest.raises(checkpoint.FormatError, match="step_00000010: format 2, this version reads 1"):
        checkpoint.latest_complete(tmp_path)


def test_a_broken_checkpoint_that_was_kept_is_never_overwritten(tmp_path):
    good = write(tmp_path, 1)
    for content in ("first", "second", "third"):
        (write(tmp_path, 2) / "state.json").write_text(content)
        checkpoint.set_aside(tmp_path, good)
    kept = {path.name: (path / "state.json").read_text() for path in tmp_path.glob("*.broken*")}
    assert kept == {
        "step_00000002.broken": "first",
        "step_00000002.broken-2": "second",
        "step_00000002.broken-3": "third",
    }


def test_a_tensor_of_another_shape_or_type_is_refused(tmp_path):
    """A run that goes on takes fp32 of its own shapes, and nothing that would be converted to it."""
    save_file({"low": torch.ones(2, 3).bfloat16(), "high": torch.ones(2, 3)}, tmp_path / "model-00000-000.safetensors")
    read = checkpoint.TensorReader(tmp_path, "model")
    assert read("high", torch.Size([2, 3])).equal(torch.ones(2, 3)) and read("low").dtype == torch.bfloat16
    for name, shape in (("high", [3, 2]), ("high", [6]), ("low", [2, 3])):
        with pytest.raises(CheckpointError, match=rf"tensor {name} is .*, not fp32 \({shape[0]}"):
            read(name, torch.Size(shape))
    with pytest.raises(CheckpointError, match="tensor absent is missing"):
        read("absent")


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.latest_complete(tmp_path / "absent") is None


def test_the_newest_before_a_step_has_fewer_steps(tmp_path):
    """A state after 6 steps has read what step 6 read: a rollback before that step must not take it."""
    for step in (4, 6, 7):
        write(tmp_path, step)
    found = {before: checkpoint.latest_complete(tmp_path, before) for before in (None, 8, 7, 6, 5, 4)}
    steps = {before: None if path is None else checkpoint.step_of(path) for before, path in found.items()}
    assert steps == {None: 7, 8: 7, 7: 6, 6: 4, 5: 4, 4: None}


def test_the_last_k_are_kept(tmp_path):
    for step in (1, 2, 10, 100_000_000):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_100000000", "step_00000010"]
    assert len(list(tmp_path.iterdir())) == 2


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(CheckpointError, match=r"takes 1.0 GiB, 1.0 MiB are free, 1.0 GiB are missing"):
        checkpoint.check_space(tmp_path, 2**30)
    with pytest.raises(CheckpointError, match=r"takes 1.1 MiB, 1.0 MiB are free, 97.7 KiB are missing"):
        checkpoint.check_space(tmp_path, 98_039)


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
from nsa.training import checkpoint, checkpoint_writer
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
    of step 2 resumes the run, with another learning rate on purpose and a line of metrics.jsonl lost; then another
    configuration is refused, naming its keys."""
    run = tmp_path / "runs/run"
    process = start(["-c", FULL_DISK, str(write_yaml(tmp_path))])
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "step 6 was not written" in output and "No space left" in output and "step_00000004" in output
    names = [p.name for p in checkpoint.checkpoints(run)]
    assert names == ["step_00000004", "step_00000002"] and not list(run.glob("*.tmp"))

    flip(run / "step_00000004/model-00000-000.safetensors")
    first, _, *later = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([first, *later]))
    resumed = train(tmp_path, "optimizer.learning_rate=2e-3", "resume.allow=[optimizer.learning_rate]")
    assert resumed.returncode == 0 and "passed over" in resumed.stdout and "after step 2" in resumed.stdout
    change = "from step_00000002 on: optimizer.learning_rate: 0.003 there, 0.002 now\n"
    assert change in resumed.stdout and (run / "changes.txt").read_text() == change
    assert "metrics.jsonl was cut or changed: figures after step 1 up to step 2 are lost" in resumed.stdout
    assert (run / "step_00000004.broken").is_dir()
    for path in checkpoint.checkpoints(run):
        checkpoint.verify(path)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 3, 4, 5, 6], "the steps that are done again are logged once"

    kept = (run / "metrics.jsonl").read_bytes()
    for path in checkpoint.checkpoints(run):
        of_another_version(path)
    lost = train(tmp_path)
    assert lost.returncode == 2 and "format 2, this version reads 1" in lost.stdout and "Traceback" not in lost.stdout
    assert (run / "metrics.jsonl").read_bytes() == kept and len(checkpoint.checkpoints(run)) == 3
    for path in checkpoint.checkpoints(run):
        manifest = path / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))

    refused = train(tmp_path, "model.intermediate_size=64", "optimizer.beta2=0.9")
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert "model.intermediate_size: 48 there, 64 now" in refused.stdout and "optimizer.beta2" in refused.stdout


def test_a_rank_lost_while_a_checkpoint_is_written_is_no_error_of_the_disk(tmp_path, monkeypatch, writer_of_one_rank):
    """The trainer takes a gloo error for a lost rank (exit code 85), a CheckpointError for something to mend (2)."""

    def lost(*_: object) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    writer = writer_of_one_rank(tmp_path)
    monkeypatch.setattr(checkpoint_writer.messages, "gather", lost)
    writer.start(snapshot(2, tensors=[]))
    with pytest.raises(RuntimeError, match="gloo"):
        writer.wait()
    assert writer.failed, "other ranks hear of it, if they can"
    assert checkpoint.checkpoints(tmp_path) == []


@pytest.fixture
def writer_of_one_rank(monkeypatch):
    """Makes the `CheckpointWriter` of a run of one rank, without a process group."""
    monkeypatch.setattr(checkpoint_writer.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(checkpoint_writer.messages, "gather", lambda value, group: [value])
    monkeypatch.setattr(checkpoint_writer.messages, "broadcast", lambda value, group: value)
    alone = SimpleNamespace(rank=0, is_main=True, on_main=lambda call: call())
    return lambda run, keep_last=1: checkpoint_writer.CheckpointWriter(alone, run, keep_last)


def snapshot(step, tensors=TENSORS):
    files = {"config.yaml": b"name: run", "tokenizer.model": b"pieces"}
    return checkpoint_writer.Snapshot(
        step, list(tensors), rng={"torch": [1, 2]}, state={"step": step}, files=files, num_bytes=48
    )


WRITTEN = ["model-00000-000.safetensors", "optimizer-00000-000.safetensors", "rng-00000.json", "state.json",
           "config.yaml", "tokenizer.model", "manifest.json"]  # fmt: skip


def test_the_order_of_a_save_survives_a_loss_of_power_at_any_moment(tmp_path, monkeypatch, writer_of_one_rank):
    """What a crash may undo is everything that was not fsynced: contents of files, and names in folders."""
    write(tmp_path, 2)
    events = []

    def record(module, name, before):
        original = getattr(module, name)

        def recorded(*arguments, **named):
            if event := before(*arguments):
                events.append(event)
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, recorded)

    def synced(descriptor):
        status = os.fstat(descriptor)
        names = set(os.listdir(descriptor)) if os.path.isdir(descriptor) else status.st_size  # noqa: PTH112, PTH208
        return "fsync", status.st_ino, names

    record(os, "fsync", synced)
    record(hashlib, "file_digest", lambda file, *_: ("read back", os.fstat(file.fileno()).st_ino, None))
    for name in ("rename", "replace"):
        record(os, name, lambda source, target: ("rename", os.path.basename(source), os.path.basename(target)))  # noqa: PTH119
    record(shutil, "rmtree", lambda path, **_: ("remove", path.name, None))
    writer = writer_of_one_rank(tmp_path)
    writer.start(snapshot(4))
    folder = writer.wait()

    def only(what, of, state):
        (place,) = [i for i, event in enumerate(events) if event == (what, of, state)]
        return place

    named = only("rename", "step_00000004.tmp", "step_00000004")
    assert sorted(path.name for path in folder.iterdir()) == sorted(WRITTEN)
    for path in folder.iterdir():
        written = only("fsync", path.stat().st_ino, path.stat().st_size)
        assert written < named, f"{path.name} is durable before the folder is a checkpoint"
        if path.name != "manifest.json":
            read = only("read back", path.stat().st_ino, None)
            manifest = (folder / "manifest.json").stat()
            assert written < read < only("fsync", manifest.st_ino, manifest.st_size), "vouched for once it was read"
    assert only("fsync", folder.stat().st_ino, set(WRITTEN)) < named, "so are the names of its files"
    of_run = [i for i, event in enumerate(events) if event[:2] == ("fsync", tmp_path.stat().st_ino)]
    (durable,) = (i for i in of_run if "step_00000004" in events[i][2])
    older = [i for i, event in enumerate(events) if event[1] in ("step_00000002", "step_00000002.tmp")]
    assert len(older) == 2 and durable < min(older), "the older one goes when the name of the new one is durable"
    assert events[older[0]] == ("rename", "step_00000002", "step_00000002.tmp"), "and loses its name before its files"


@pytest.mark.parametrize("name", WRITTEN)
def test_a_byte_that_the_disk_changes_is_noticed_before_the_checkpoint_is_one(
    tmp_path, monkeypatch, writer_of_one_rank, name
):
    kept = write(tmp_path, 2)
    written = checkpoint.write_file

    def write_and_flip(path, content):
        entry = written(path, content)
        if path.name == name:
            flip(path)
        return entry

    writer = writer_of_one_rank(tmp_path)
    monkeypatch.setattr(checkpoint, "write_file", write_and_flip)
    writer.start(snapshot(4))
    with pytest.raises(CheckpointError, match=rf"step 4 was not written: .*{name}.*step_00000002"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
    checkpoint.verify(kept)


@pytest.mark.parametrize("name", WRITTEN[:-1])
def test_a_file_that_is_gone_or_cut_when_the_manifest_is_written_is_noticed(
    tmp_path, monkeypatch, writer_of_one_rank, name
):
    """Each rank reads its own files back; rank 0 looks once more when all have."""
    write(tmp_path, 2)
    gather = checkpoint_writer.messages.gather

    def all_have_written(value, group):
        truncate(tmp_path / "step_00000004.tmp" / name)
        return gather(value, group)

    writer = writer_of_one_rank(tmp_path)
    monkeypatch.setattr(checkpoint_writer.messages, "gather", all_have_written)
    writer.start(snapshot(4))
    with pytest.raises(CheckpointError, match=f"{name}.*cut short"):
        writer.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def saved_steps(run):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]


def test_the_checkpoint_that_a_rollback_needs_stays(tmp_path, monkeypatch, writer_of_one_rank):
    """With keep_last 1. Spikes are numbered from 0: only a state after 6 steps or fewer is without number 6. When no
    spike is left in the window, that checkpoint goes."""
    monkeypatch.setattr(trainer, "snapshot", lambda engine, config, ranks, progress, identity: snapshot(progress.step))
    progress = Progress()
    run = SimpleNamespace(
        watchdog=SimpleNamespace(beat=lambda where: None),
        writer=writer_of_one_rank(tmp_path, keep_last=1),
        progress=progress,
        **dict.fromkeys(("engine", "config", "ranks", "identity")),
        _saved=lambda path: None,
    )
    seen = {}
    for step, spikes in ((4, []), (6, []), (7, [6]), (8, [6]), (10, [6, 9]), (12, [9]), (14, [])):
        progress.step, progress.spikes = step, SpikeState(spikes=spikes)
        trainer.Trainer.save(run, wait=True)
        seen[step] = saved_steps(tmp_path)
    assert seen == {4: [4], 6: [6], 7: [7, 6], 8: [8, 6], 10: [10, 6], 12: [12, 6], 14: [14]}


def test_other_data_are_refused_on_resume_and_the_hours_of_a_job_end_it(tmp_path):
    """The fingerprint is that of what is read, whatever the configuration calls it."""
    documents = tmp_path / "documents"
    shutil.copytree(os.path.dirname(TEXT), documents, ignore=shutil.ignore_patterns("__pycache__"))  # noqa: PTH120
    sources = f"data.sources=[{{name: text, kind: files, path: '{documents}/*.py'}}]"
    stopped = train(tmp_path, sources, "data.workers=1", "training.max_hours=1e-6")
    assert stopped.returncode == 75 and "stopped after step 1 of 6 (training.max_hours)" in stopped.stdout
    with (documents / "decoder.py").open("a") as file:
        file.write("# one line more\n")
    refused = train(tmp_path, sources, "data.workers=1")
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert "step_00000001 was trained on other data" in refused.stdout
    assert "Restore them, or start a new run under another name" in refused.stdout
    assert saved_steps(tmp_path / "runs/run") == [1]
