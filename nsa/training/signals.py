"""Who may ask a run to stop: signals, a STOP file, the clock. It then saves its state and says so by its exit code."""

import signal
import time
from pathlib import Path
from types import FrameType

from nsa.training.exit_codes import INTERRUPTED, REQUEUE


class StopRequest:
    """Remembers the first request to stop; the trainer asks at the end of each step.

    SIGTERM and SIGUSR1 (which Slurm sends ahead of a time limit, `--signal=USR1@120`), the appearance of ``stop_file``
    and the end of the ``hours`` ask for a stop that somebody will continue; SIGINT for one that nobody does.

    A second SIGINT (Ctrl-C twice) interrupts at once. A second SIGTERM does not: launchers send their own after a
    Ctrl-C, and kill for good when their patience (30 s) is over.

    Args:
        stop_file: None: this rank does not look for one. since: `time.monotonic` at the beginning of the job.
    """

    def __init__(self, stop_file: Path | None = None, hours: float | None = None, since: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._stop_file = stop_file
        self._end = None if hours is None else (time.monotonic() if since is None else since) + 3600 * hours
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self._before = {s: signal.signal(s, self._handle) for s in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def asked(self) -> tuple[int, str]:
        """The exit code that is asked for and by what; (0, "") while nobody asks."""
        if self.signal is not None:
            return (INTERRUPTED if self.signal == signal.SIGINT else REQUEUE), self.signal.name
        if self._end is not None and time.monotonic() >= self._end:
            return REQUEUE, "training.max_hours"
        if self._stop_file is not None and self._stop_file.exists():
            return REQUEUE, f"the file {self._stop_file}"
        return 0, ""

    def restore(self) -> None:
        """Give the signals their former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def forget_file(self) -> None:
        """Remove the STOP file: it has been obeyed, and the next run shall train."""
        if self._stop_file is not None:
            self._stop_file.unlink(missing_ok=True)
