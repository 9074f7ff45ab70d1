"""Who may ask a run to stop: signals, a STOP file, the clock, a launcher or reader that goes away. It then saves its
state and says so by its exit code."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from nsa.training.exit_codes import INTERRUPTED, REQUEUE

# What a terminal, `timeout`, a container, systemd or a batch system sends, and the exit code of a run that it stops.
CODES = {
    signal.SIGTERM: REQUEUE,
    signal.SIGUSR1: REQUEUE,
    signal.SIGUSR2: REQUEUE,
    signal.SIGHUP: REQUEUE,
    signal.SIGXCPU: REQUEUE,
    signal.SIGALRM: REQUEUE,
    signal.SIGINT: INTERRUPTED,
    signal.SIGQUIT: INTERRUPTED,
}
LAUNCHERS = ("deepspeed", "torchrun", "launch.sh", "deepspeed.launcher.launch", "torch.distributed.run")


def _handled() -> list[signal.Signals]:
    """`nohup` has SIGHUP ignored: that stays."""
    return [s for s in CODES if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]


class Stopped(KeyboardInterrupt):
    """A signal, such as Ctrl-C, where there is nothing to save. ``code``: to exit with; ``name``: of the signal."""

    def __init__(self, number: int) -> None:
        self.code, self.name = CODES[signal.Signals(number)], signal.Signals(number).name
        super().__init__(self.name)


def stop_at_once() -> None:
    """From now on a signal raises `Stopped`, a second one ends the process: for the time before the first step."""
    raised: list[Stopped] = []

    def handle(number: int, frame: FrameType | None) -> None:
        stop = Stopped(number)
        if raised:
            os._exit(stop.code)
        raised.append(stop)
        raise stop

    for number in _handled():
        signal.signal(number, handle)


def ignore() -> None:
    """The process is about to exit: no signal changes its code any more."""
    for number in CODES:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when the one that started it ends, however it ends. Linux alone can."""
    if sys.platform == "linux":
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, int(number))


def reader_gone() -> None:
    """Who reads the output went away (`| head`): the same as a terminal that is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(nowhere, stream.fileno())
    signal.raise_signal(signal.SIGHUP)


class StopRequest:
    """Remembers the first request to stop; the trainer asks at the end of each step.

    The signals of `CODES` (Slurm sends SIGUSR1 ahead of a time limit, `--signal=USR1@120`), the appearance of
    ``stop_file``, the end of the ``hours`` and of a launcher ask for a stop that somebody will continue; SIGINT and
    SIGQUIT, which a person at a terminal sends, for one that nobody does.

    A second SIGINT (Ctrl-C twice) interrupts at once. A second SIGTERM does not: launchers send their own after a
    Ctrl-C, and kill for good when their patience (30 s) is over.

    Args:
        stop_file: None: this rank does not look for one. since: `time.monotonic` at the beginning of the job.
    """

    def __init__(self, stop_file: Path | None = None, hours: float | None = None, since: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._stop_file = stop_file
        self._end = None if hours is None else (time.monotonic() if since is None else since) + 3600 * hours
        self._launchers = launchers()
        self._before = {s: signal.signal(s, self._handle) for s in _handled()}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def asked(self) -> tuple[int, str]:
        """The exit code that is asked for and by what; (0, "") while nobody asks."""
        if self.signal is not None:
            return CODES[self.signal], self.signal.name
        if self._end is not None and time.monotonic() >= self._end:
            return REQUEUE, "training.max_hours"
        if self._stop_file is not None and self._stop_file.exists():
            return REQUEUE, f"the file {self._stop_file}"
        for pid, (name, started) in self._launchers.items():
            if (seen := _process(pid)) is None or seen[1] != started:
                return REQUEUE, f"the launcher {name}, process {pid}, is gone"
        return 0, ""

    def restore(self) -> None:
        """Give the signals their former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forget_file(self) -> None:
        """Remove the STOP file: it has been obeyed, and the next run shall train."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)


def launchers() -> dict[int, tuple[str, str]]:
    """The launchers that this process is a child of, by process id: name and time of the start.

    Who reads the exit code of a rank is a launcher. A shell that started it in the background may end before it.
    Empty where there is no /proc.
    """
    found: dict[int, tuple[str, str]] = {}
    pid = os.getppid()
    while (seen := _process(pid)) is not None:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:4]
        names = [name for word in words if (name := word.rpartition("/")[2]) in LAUNCHERS]
        if not names:
            break
        found[pid] = (names[0], seen[1])
        pid = int(seen[0])
    return found


def _process(pid: int) -> tuple[str, str] | None:
    """The parent and the time of the start of a process that runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (fields[1], fields[19])
