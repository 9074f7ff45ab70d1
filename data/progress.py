"""Progress that a person can read: a bar on a terminal, a plain line every few seconds anywhere else."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS = 5.0


class Progress:
    """Counts bytes (or other units) of one task on stderr. Use as a context manager; `enabled=False` is silent."""

    def __init__(self, task: str, total: int | None = None, unit: str = "B", enabled: bool = True):
        self.task, self.total, self.unit, self.done = task, total, unit, 0
        self._start = self._said = time.monotonic()
        self._plain = enabled and not sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=task, unit=unit, unit_scale=True, disable=not enabled or self._plain)

    def update(self, count: int) -> None:
        self.done += count
        self._bar.update(count)
        if self._plain and time.monotonic() - self._said >= SECONDS:
            self._say()

    def _say(self) -> None:
        self._said = time.monotonic()
        of = f" of {tqdm.format_sizeof(self.total)}{self.unit}" if self.total else ""
        seconds = self._said - self._start
        done = tqdm.format_sizeof(self.done)
        print(f"{self.task}: {done}{self.unit}{of} in {seconds:.0f} s", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._plain and kind is None:
            self._say()
