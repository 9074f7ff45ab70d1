"""Who may ask a run to stop, and what is made of it; the clock is the test's."""

import os
import signal
import sys
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from tiny import start, write_yaml

from nsa.training import signals
from nsa.training.exit_codes import INTERRUPTED, REQUEUE, write_exit_file
from nsa.training.signals import StopRequest

SIGNALS = tuple(signals.CODES)


@pytest.fixture
def request_stop():
    """Makes a `StopRequest`; the handlers of before are there again after the test."""

    def unheard(number, frame):
        raise AssertionError(f"{signal.Signals(number).name} was not heard")

    before = {number: signal.signal(number, unheard) for number in SIGNALS}
    yield StopRequest
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    try:
        signal.raise_signal(number)
    except KeyboardInterrupt:  # would end pytest
        raise AssertionError("it interrupts at once") from None


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=500.0)
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((number, REQUEUE) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)),
        *((number, REQUEUE) for number in (signal.SIGXCPU, signal.SIGALRM)),
        *((number, INTERRUPTED) for number in (signal.SIGINT, signal.SIGQUIT)),
    ],
)
def test_a_signal_asks_for_a_stop(request_stop, number, code):
    stop = request_stop()
    assert stop.asked() == (0, "")
    send(number)
    assert stop.asked() == (code, number.name) == stop.asked()


def test_nohup_holds(request_stop):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = request_stop()
    send(signal.SIGHUP)
    assert stop.asked() == (0, "")


LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, *sys.argv[1:]])
print(child.pid, flush=True)
time.sleep(100)
"""
RANK = """
import time
from nsa.training.signals import StopRequest
stop = StopRequest()
print("asked", stop.asked(), flush=True)
end = time.monotonic() + 20
while stop.asked()[0] == 0 and time.monotonic() < end:
    time.sleep(0.05)
print("asked", stop.asked(), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="where /proc tells of processes")
@pytest.mark.parametrize("names", [["deepspeed"], ["a_shell"], ["launch.sh", "deepspeed"]], ids="/".join)
def test_a_rank_notices_that_its_launcher_is_gone(tmp_path, names):
    """A launcher that is killed cannot pass anything on. A shell in the background may end before its children. Of
    launch.sh and the launcher that it starts, the first one is killed."""
    for name in names:
        (tmp_path / name).write_text(LAUNCHER)
    process = start([*(str(tmp_path / name) for name in names), "-c", RANK], anew=True)
    pids = [int(process.stdout.readline()) for _ in names]
    try:
        assert process.stdout.readline() == "asked (0, '')\n"
        process.kill()
        if names != ["a_shell"]:
            expected = f"asked (75, 'the launcher {names[0]}, process {process.pid}, is gone')\n"
            assert process.stdout.readline() == expected
        else:
            time.sleep(0.5)
            os.kill(pids[-1], 0)
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_process_id_that_was_given_anew_is_no_launcher(request_stop, monkeypatch):
    monkeypatch.setattr(signals, "launchers", lambda: {77: ("deepspeed", "began at 1000")})
    stop = request_stop()
    for seen, code in ((("1", "began at 1000"), 0), (("1", "began at 2000"), REQUEUE), (None, REQUEUE)):
        monkeypatch.setattr(signals, "_process", lambda pid, seen=seen: seen)
        assert stop.asked()[0] == code


BEFORE_THE_FIRST_STEP = """
import signal, sys
from nsa import train
def stopped(*arguments):
    first, *second = sys.argv.pop().split(",")
    try:
        signal.raise_signal(getattr(signal, first))
    finally:  # as a library that cleans up
        for name in second:
            signal.raise_signal(getattr(signal, name))
train._main = stopped
code = train.main()
signal.raise_signal(signal.SIGTERM)  # the process is about to exit
sys.exit(code)
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_has_the_codes_of_others(tmp_path, name, code):
    process = start(["-c", BEFORE_THE_FIRST_STEP, name], NSA_EXIT_FILE=str(tmp_path / "code"))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in output
    assert f"stopped before the first step ({name})" in output
    assert (tmp_path / "code").read_text() == f"{code}\n"
    assert (tmp_path / "code.ranks").read_text() == f"{process.pid}\n"


def test_a_second_signal_before_the_first_step_ends_at_once():
    process = start(["-c", BEFORE_THE_FIRST_STEP, "SIGTERM,SIGINT"])
    assert process.communicate(timeout=60) == ("", None) and process.returncode == 130


def test_a_reader_of_the_output_that_goes_away_ends_a_run_saved(tmp_path):
    """As `| head` does: like a terminal that is closed, and without an error of the interpreter at its exit."""
    process = start(["-m", "nsa.train", str(write_yaml(tmp_path)), "training.steps=400", "checkpoint.every=400"])
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.stdout.close()
    assert process.wait(timeout=60) == REQUEUE
    (saved,) = (tmp_path / "runs/run").glob("step_*/manifest.json")
    assert 1 <= int(saved.parent.name.removeprefix("step_")) < 400


def test_the_first_signal_counts(request_stop):
    stop = request_stop()
    send(signal.SIGUSR1)
    send(signal.SIGINT)
    assert stop.asked() == (REQUEUE, "SIGUSR1")


def test_ctrl_c_twice_interrupts_and_sigterm_twice_does_not(request_stop):
    """Launchers send a SIGTERM of their own after a Ctrl-C: it must not cut the saving short."""
    stop = request_stop()
    send(signal.SIGINT)
    send(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.asked() == (INTERRUPTED, "SIGINT")
    again = request_stop()
    send(signal.SIGTERM)
    send(signal.SIGTERM)
    assert again.asked() == (REQUEUE, "SIGTERM")


def test_the_former_handlers_come_back(request_stop):
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = request_stop()
    assert all(signal.getsignal(number) != before[number] for number in SIGNALS)
    stop.restore()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_the_hours_of_a_job_count_from_its_beginning(request_stop, clock):
    """Not from where training begins: preparing and loading are part of what a scheduler allows."""
    stop = request_stop(hours=1.5, since=100.0)
    clock.now = 100.0 + 1.5 * 3600 - 0.001
    assert stop.asked() == (0, "")
    clock.now = 100.0 + 1.5 * 3600
    assert stop.asked() == (REQUEUE, "training.max_hours")


def test_hours_without_a_beginning_count_from_now(request_stop, clock):
    stop, endless = request_stop(hours=0.5), request_stop()
    clock.now = 500.0 + 1799
    assert stop.asked() == (0, "")
    clock.now = 500.0 + 1801
    assert stop.asked() == (REQUEUE, "training.max_hours")
    clock.now = 1e12
    assert endless.asked() == (0, "")


def test_a_stop_file_is_obeyed_once(request_stop, tmp_path):
    file = tmp_path / "STOP"
    stop, elsewhere = request_stop(file), request_stop()
    stop.forget_file()  # there is none
    assert stop.asked() == (0, "")
    file.touch()
    assert stop.asked() == (REQUEUE, f"the file {file}") and elsewhere.asked() == (0, "")
    elsewhere.forget_file()
    assert file.exists()
    stop.forget_file()
    assert not file.exists() and stop.asked() == (0, "")


def test_who_interrupts_decides_whatever_else_asks(request_stop, clock, tmp_path):
    """A run that is interrupted must not be started again by itself, also where its hours are over."""
    (tmp_path / "STOP").touch()
    stop = request_stop(tmp_path / "STOP", hours=1, since=0.0)
    clock.now = 7200.0
    assert stop.asked() == (REQUEUE, "training.max_hours")
    send(signal.SIGINT)
    assert stop.asked() == (INTERRUPTED, "SIGINT")


def test_rank_0_alone_tells_launch_sh_its_code(tmp_path, monkeypatch):
    path = tmp_path / "code"
    monkeypatch.setenv("NSA_EXIT_FILE", str(path))
    monkeypatch.setenv("RANK", "1")
    write_exit_file(75)
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    write_exit_file(85)
    assert path.read_text() == "85\n"
    monkeypatch.delenv("RANK")
    write_exit_file(75)
    assert path.read_text() == "75\n"
    monkeypatch.setenv("NSA_EXIT_FILE", str(tmp_path / "absent/code"))
    write_exit_file(2)  # a disk that cannot be written is no second fault
    monkeypatch.delenv("NSA_EXIT_FILE")
    write_exit_file(2)
    assert path.read_text() == "75\n"
