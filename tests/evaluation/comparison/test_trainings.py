"""What `bash launch.sh compare` starts. Stand-ins for trainings, exports and comparisons say what happens."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_study

from nsa.evaluation.comparison import trainings
from nsa.evaluation.comparison.config import load, trainings_of
from nsa.training.console import Console
from tests.small_run import small_config

# $HAPPENED gets a line for each beginning and end. $ENDS_NAME is the exit code of the training with that name.
LAUNCH = """
name=${3#name=}
echo "begins $* gpu=$CUDA_VISIBLE_DEVICES port=$MASTER_PORT" >>"$HAPPENED"
trap 'echo "asked $name" >>"$HAPPENED"; exit 75' TERM
trap 'echo "asked INT $name" >>"$HAPPENED"; exit 130' INT
echo "step  1/20  |  loss 5.5000  |  lr 1.00e-03  grad 0.100"
echo "step 20/20  |  loss 1.2500  |  lr 1.00e-03  grad 0.100  |  validation loss 6.2946  bpb 5.1777"
for i in $(seq "${LOOPS:-2}"); do sleep 0.1; done
ends=ENDS_${name//[.-]/_}
[[ ${!ends:-0} == 0 ]] || echo "error: what must be fixed"
echo "ends $name" >>"$HAPPENED"
exit "${!ends:-0}"
"""
PYTHON = """#!/bin/bash
echo "begins $*" >>"$HAPPENED"
trap 'exit 75' TERM
sleep 0.05
echo "ends $* gpu=$CUDA_VISIBLE_DEVICES" >>"$HAPPENED"
exit "${ENDS:-0}"
"""


class Started:
    """A comparison of which nothing is trained, in ``folder``."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *siblings: str) -> None:
        self.folder, self.file = folder, folder / "happened"
        monkeypatch.setenv("HAPPENED", str(self.file))
        monkeypatch.delenv("HOSTFILE", raising=False)
        monkeypatch.setenv("MASTER_PORT", "1234")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "all")
        (folder / "launch.sh").write_text(LAUNCH)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(folder / "python"))
        study = small_study.write(folder, siblings)
        self.todo = trainings_of(load(study, [f"output_dir={folder}"]), study)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(trainings, "LOOK", 0.02)
        monkeypatch.setattr(trainings, "untrained", lambda *what: self.todo)
        monkeypatch.setattr(trainings, "stages_left", lambda *what: ["first"])

    def run(self, workers: int = 1, minutes: float | None = None, override: str = "samples=2") -> int:
        return trainings.run(self.folder / "launch.sh", "study.yaml", [override], minutes, workers)

    @property
    def happened(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    def at(self, what: str) -> int:
        """The number of the only line that begins with this, as a whole word."""
        (number,) = [i for i, line in enumerate(self.happened) if f"{line} ".startswith(f"{what} ")]
        return number

    def begins(self, name: str) -> int:
        (number,) = [i for i, line in enumerate(self.happened) if f" name={name} " in line]
        return number

    def when(self, line: str, do: Callable[[], Any]) -> None:
        """Do it once this has happened."""

        def look() -> None:
            while not any(there.startswith(line) for there in self.happened):
                time.sleep(0.02)
            do()

        threading.Thread(target=look, daemon=True).start()


def test_one_after_the_other_then_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On all GPUs, and what they print is seen at once; no time, so no limit."""
    one = Started(tmp_path, monkeypatch, "dense")
    monkeypatch.setattr(trainings, "stages_left", lambda *what: ["first", "second"])
    todo, one.todo = one.todo, []
    monkeypatch.setattr(trainings, "untrained", lambda *what: [] if any("compare" in x for x in one.happened) else todo)
    assert one.run() == 0
    names = [line.split()[0] + " " + line.partition("name=")[2].split()[0] for line in one.happened if "name=" in line]
    assert names == ["begins study-tokenizer", "begins study-dense-1", "begins study-dense-2"]
    assert all(line.endswith("gpu=all port=1234") for line in one.happened if "name=" in line)
    assert not [line for line in one.happened if "max_hours" in line]
    exports = [line for line in one.happened if "nsa.export" in line]
    assert exports == [
        f"{word.replace('*', f'-m nsa.export checkpoints/{name}')}"
        for name in ("study-tokenizer", "study-dense-1", "study-dense-2")
        for word in ("begins *", "ends * gpu=all")
    ]
    last = "-m nsa.compare study.yaml samples=2 --workers 1"
    assert one.happened[-4:] == [f"begins {last}", f"ends {last} gpu=all"] * 2
    out, err = capfd.readouterr()
    assert out.count("loss 1.2500") == 3
    told = ["stage first", *(f"training {t.run}" for t in todo), "comparing", "stage second", "comparing"]
    assert [line[7:-4] for line in err.splitlines()] == told


@pytest.mark.parametrize("each", [1, 2])
def test_several_at_once_wait_for_what_they_start_from(
    each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    several = Started(tmp_path, monkeypatch, "dense", "staged-dense", "staged-indexer")
    monkeypatch.setattr(trainings, "visible_gpus", lambda: ["3", "5"])
    assert several.run(workers=8, override=f"trainings_per_gpu={each}") == 0
    exported, others = several.at("ends -m nsa.export checkpoints/study-tokenizer"), several.todo[1:]
    assert len(others) == 6 and all(several.begins(str(t.run).partition("/")[2]) > exported for t in others)
    for seed in (1, 2):
        before = several.at(f"ends -m nsa.export checkpoints/study-staged-dense-{seed}")
        assert several.begins(f"study-staged-indexer-{seed}") > before
    used: dict[str, set[str]] = {"3": set(), "5": set()}  # by GPU: the runs
    most = 0
    for line in several.happened:
        gpu = line.partition("gpu=")[2].partition(" ")[0]
        if " name=" in line:
            assert len(used[gpu]) < each and line.endswith("port=")
            used[gpu].add(line.partition("name=")[2].partition(" ")[0])
            most = max(most, sum(map(len, used.values())))
        elif line.startswith("ends -m nsa.export"):
            used[gpu].remove(line.partition("checkpoints/")[2].partition(" ")[0])
    assert most == 2 * each
    assert several.happened[-1] == f"ends -m nsa.compare study.yaml trainings_per_gpu={each} --workers 8 gpu=all"
    out, err = capfd.readouterr()
    log = tmp_path / "checkpoints/study-dense-1.log"
    assert out == "" and log.read_text().count("loss 1.2500") == 1
    assert err.count("loss 1.2500 at step 20/20") == 7 and "training checkpoints/study-dense-1 on GPU " in err
    assert "trained and exported checkpoints/study-staged-indexer-2" in err


def test_the_time_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each training gets what is left; without any left, one begins all the same."""
    timed = Started(tmp_path, monkeypatch, "dense")
    assert timed.run(minutes=6) == 0
    hours = [float(line.partition("max_hours=")[2].split()[0]) for line in timed.happened if "max_hours" in line]
    assert len(hours) == 3 and all(0.08 < hour <= 0.1 for hour in hours) and hours == sorted(hours, reverse=True)
    assert 5 < float(timed.happened[-1].partition("--minutes ")[2].partition(" ")[0]) <= 6
    timed.file.unlink()
    assert timed.run(minutes=0) == 75
    assert "max_hours=0.000167 " in timed.happened[0] and len([x for x in timed.happened if "name=" in x]) == 1
    timed.file.unlink()
    monkeypatch.setenv("ENDS_study_dense_1", "75")  # the time was over in it
    assert timed.run() == 75
    assert not [line for line in timed.happened if "study-dense-2" in line or "nsa.compare" in line]
    monkeypatch.delenv("ENDS_study_dense_1")
    monkeypatch.setenv("ENDS", "2")
    timed.todo = []
    assert timed.run() == 2


def test_if_one_fails_the_others_are_saved_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    failing = Started(tmp_path, monkeypatch, "dense")
    failing.todo = failing.todo[1:]
    monkeypatch.setenv("ENDS_study_dense_1", "85")
    (tmp_path / "launch.sh").write_text(LAUNCH.replace("${LOOPS:-2}", "$([[ $name == *-2 ]] && echo 200 || echo 2)"))
    assert failing.run(workers=2) == 85
    assert failing.at("asked study-dense-2") > failing.at("ends study-dense-1")
    assert not [line for line in failing.happened if "nsa" in line.split()[1]]
    err = capfd.readouterr().err
    assert "checkpoints/study-dense-1 ended with exit code 85" in err and "error: what must be fixed" in err
    assert "all of it is in checkpoints/study-dense-1.log" in err
    assert "checkpoints/study-dense-2 ended with exit code 75" in err


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_is_passed_on(
    workers: int, number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Started(tmp_path, monkeypatch, "dense")
    asked.todo = asked.todo[1:]
    monkeypatch.setenv("LOOPS", "200")
    before = signal.getsignal(number)
    asked.when("begins train", lambda: (time.sleep(0.3), os.kill(os.getpid(), number)))
    assert asked.run(workers=workers) == code
    assert len([line for line in asked.happened if line.startswith("asked")]) == workers
    assert len([line for line in asked.happened if line.startswith("begins")]) == workers
    assert signal.getsignal(number) == before


def test_an_export_is_not_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Started(tmp_path, monkeypatch, "dense")
    asked.when("begins -m nsa.export", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert asked.run() == 75
    assert asked.happened[-1] == "ends -m nsa.export checkpoints/study-tokenizer gpu=all"


def test_trainings_that_wait_for_one_another_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    around = Started(tmp_path, monkeypatch, "dense")
    one, other = around.todo[1:]
    assert one.arguments is not None and other.arguments is not None
    one.arguments.append(f"start_from={other.run}")
    other.arguments.append(f"start_from={tmp_path}/checkpoints/../{one.run}/step_00000002")
    around.todo = [one, other]
    with pytest.raises(ValueError, match="each of these trainings starts from another one"):
        around.run()
    assert not around.happened


def test_the_line_of_a_step_is_that_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is read from what the console prints, so that both change together."""
    ranks: Any = type("Ranks", (), {"is_main": True})
    result: Any = type("Result", (), {"loss": 1.25, "learning_rate": 1e-3, "grad_norm": 0.1})
    Console(small_config(tmp_path), ranks, tmp_path).step(2, result, {})
    assert trainings.STEP.findall("before\n" + capsys.readouterr().out) == [("2/3", "1.2500")]


def test_several_machines_have_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    several = Started(tmp_path, monkeypatch, "dense")
    monkeypatch.setenv("HOSTFILE", "hosts")
    with pytest.raises(ValueError, match="unset HOSTFILE"):
        several.run(workers=2)


@pytest.mark.parametrize(("named", "there", "found"), [("", 2, ["0", "1"]), ("4, 6", 2, ["4", "6"]), ("", 0, [])])
def test_gpus_that_may_be_used(named: str, there: int, found: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings.torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(trainings.torch.cuda, "device_count", lambda: there)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert trainings.visible_gpus() == found
