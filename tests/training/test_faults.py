"""Steps that are not finite, ranks that stop, and signals."""

import errno
import json
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tiny import start, write_yaml

from nsa.training import job
from nsa.training.distributed import initialize
from nsa.training.exit_codes import FAULT, INTERRUPTED, REQUEUE, USER
from nsa.training.run_folder import FolderBusyError
from nsa.training.watchdog import Watchdog
from tests.training.conftest import engines


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two_ranks):
    """By a NaN in the loss, or by an infinite gradient under a finite loss; in every stage and precision."""
    losses = []
    for case, steps in zip(engines("fp32") + engines("bf16"), two_ranks[1]["not_finite"], strict=True):
        for fault, step in zip(("loss", "none", "gradient", "none"), steps, strict=True):
            for rank, seen in enumerate(step):
                which = f"{case}, {fault}, rank {rank}: {seen}"
                assert seen["finite"], which
                assert seen["skipped"] == (fault != "none"), which
                assert seen["changed"] == (fault == "none"), which
        assert [step[0]["updates"] for step in steps] == [0, 1, 1, 2], "skipped steps are no updates of AdamW"
        assert [step[0]["rate"] for step in steps[:2]] == [1.5e-3, 3e-3], "but steps of the schedule"
        losses.append([step[0]["loss"] for step in steps[1:]])
    assert all(found == pytest.approx(losses[0], rel=1e-5) for found in losses[1:4]), "all stages go on alike"


ALWAYS_BROKEN = """
import math, sys
from nsa.training.trainer import Trainer
losses = Trainer._losses
Trainer._losses = lambda self, batch: losses(self, batch) * (math.nan if self.progress.step >= 2 else 1)
from nsa.train import main
sys.exit(main())
"""


NCCL_FAILS = """
import sys
import torch.distributed as dist
from nsa.training import trainer
def build_engine(*args):
    raise dist.DistBackendError("NCCL error: Cuda failure 2 'out of memory'")
trainer.build_engine = build_engine
from nsa.train import main
sys.exit(main())
"""


def test_what_nccl_says_is_shown(tmp_path):
    """Not only that a rank may be lost."""
    process = start(["-c", NCCL_FAILS, str(write_yaml(tmp_path))])
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "rank 0: DistBackendError: NCCL error: Cuda failure 2" in output


WAITS = """
import sys, time
from pathlib import Path
from nsa.training import watchdog
watchdog.WORD_SECONDS = 0.5
dog = watchdog.Watchdog(int(sys.argv[3]), world_size=2, run=Path(sys.argv[1]), hang_seconds=0, lost_seconds=120)
watchdog._connect = lambda: watchdog.dist.TCPStore("127.0.0.1", int(sys.argv[2]), is_master=False)
dog.start()
time.sleep(120)  # as a collective operation of NCCL does, whose peer is gone
"""


@pytest.mark.parametrize("stops", [1, 0])
def test_who_waits_for_a_rank_that_stopped_ends_with_its_exit_code(tmp_path, stops):
    """Also where the store of all is gone with that rank. Rank 0 says it, if it has not before."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    process = start(["-c", WAITS, str(tmp_path), str(store.port), str(1 - stops)])
    store.wait([f"beat/{1 - stops}"], timedelta(seconds=60))
    other = Watchdog(rank=stops, world_size=2, run=tmp_path, hang_seconds=0, lost_seconds=120)
    other._store = store
    other.leave_word(USER, "out of memory on the device")
    other.leave_word(FAULT, "what came of that")
    if stops == 0:
        other._store = store = None
    output, _ = process.communicate(timeout=60)
    assert process.returncode == USER
    assert ("error: rank 1 stopped: out of memory on the device\n" in output) == (stops == 1), output


def test_a_process_without_a_gpu_gets_advice(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="LOCAL_RANK is 3, and the process sees 2 GPUs"):
        initialize()


ENDS = {
    "a busy run folder": (FolderBusyError("another process trains"), REQUEUE, "error: another process trains\n"),
    "a mistake": (ValueError("unknown key"), USER, "error: unknown key\n"),
    "no reader": (BrokenPipeError(errno.EPIPE, "Broken pipe"), REQUEUE, ""),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left", b"/runs/a"),
        USER,
        "error (rank 0): /runs/a: No space left.",
    ),
    "no memory": (torch.OutOfMemoryError("tried 3 GiB"), USER, "error (rank 0): out of memory, lower "),
    "no memory for cuBLAS": (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), USER, "error (rank 0): out of memory, lower "),
    "no memory of the host": (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        USER,
        "error (rank 0): out of memory, lower training.micro_batch_size",
    ),
    "no memory of Python": (MemoryError(), USER, "error (rank 0): out of memory, lower "),
    "Ctrl-C twice": (
        KeyboardInterrupt(),
        INTERRUPTED,
        "interrupted while it stopped. The last checkpoint, if there is one, stands",
    ),
    "a fault": (KeyError("a"), FAULT, "Traceback (most recent call last)"),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_exit_code_of_what_ends_a_run(tmp_path, monkeypatch, capsys, end):
    error, code, words = ENDS[end]

    def trainer(config):
        raise error

    monkeypatch.setattr(job, "Trainer", trainer)
    monkeypatch.setenv("NSA_EXIT_FILE", str(tmp_path / "code"))
    assert job.train(None) == code
    assert (tmp_path / "code").read_text() == f"{code}\n"
    printed = capsys.readouterr().err
    assert printed.startswith(words) and bool(printed) == bool(words)
    assert ("Traceback" in printed) == (code == FAULT)


def test_the_run_stops_after_too_many_skipped_steps(tmp_path):
    process = start(["-c", ALWAYS_BROKEN, str(write_yaml(tmp_path)), "training.max_skipped_steps=1"])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in output
    first = next(line for line in output.splitlines() if "step 3: loss nan" in line)
    assert "1 in a row" in first and "samples 8 to 11" in first, output
    assert "error: 2 steps in a row" in output and "the last on samples 12 to 15" in output, output
    assert "older checkpoints" in output and "step_00000002" in output.partition("older checkpoints")[2], output


def test_a_run_whose_end_is_not_finite_is_not_done(tmp_path):
    """Two updates of weights that are infinite are skipped, which is allowed: only the end shows it."""
    keys = ["optimizer.learning_rate=1e30", "training.steps=3", "checkpoint.every=1"]
    for again in (False, True):  # started again, it has nothing to do
        process = start(["-m", "nsa.train", str(write_yaml(tmp_path)), *keys])
        output, _ = process.communicate(timeout=120)
        assert ("step 3/3" in output) is not again
        assert process.returncode == 2 and "Traceback" not in output and "done:" not in output, output
        assert "error: the validation loss after the last step, 3, is nan" in output, output
        older = output.partition("older checkpoints")[2].splitlines()[0]
        assert "step_00000001" in older and "step_00000003" not in older, output


def test_all_ranks_stop_when_one_is_asked_to(two_ranks):
    folder, answers = two_ranks
    assert answers["stopped"] == 3
    assert (folder / "stopped/runs/stopped/step_00000003/manifest.json").is_file()


def test_sigterm_and_sigint_save_and_resume(tmp_path):
    arguments = [
        "training.steps=400",
        "training.validation_every=400",
        "checkpoint.every=400",
        "checkpoint.keep_last=1",
    ]
    run = tmp_path / "runs/run"
    reached = 0
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        process = start(["-m", "nsa.train", str(write_yaml(tmp_path)), *arguments])
        for line in process.stdout:
            if line.startswith("step"):
                break
        time.sleep(0.2)
        process.send_signal(number)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == code, output
        assert f"({number.name}); run the same command to go on" in output
        (saved,) = (p for p in run.glob("step_*") if p.is_dir())
        step = json.loads((saved / "state.json").read_text())["step"]
        assert reached < step < 400
        reached = step
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, reached + 1)), "also those of the life before"
