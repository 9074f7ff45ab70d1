"""SIGTERM and SIGINT ask for a checkpoint and a clean exit."""

import signal
from types import FrameType


class StopRequest:
    """Remembers the first of SIGTERM and SIGINT; the trainer asks at the end of each step.

    A second SIGINT (Ctrl-C twice) interrupts at once. A second SIGTERM does not: launchers send their own after a
    Ctrl-C, and kill for good when their patience (30 s) is over.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number)

    def restore(self) -> None:
        """Give the signals their former handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
