"""A store of torch's rendezvous whose calls end, whatever became of the process that keeps it."""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist


class TimedStore:
    """The calls of ``store`` that the watchdog needs. A thread makes them, one after the other.

    A call to a process that is frozen, or whose machine is gone, is never answered: TCPStore's own timeout is about
    keys that are not there.

    Args:
        seconds: that a call may take.

    Raises:
        RuntimeError: by each call: the store does not answer, or what the store raised.
    """

    def __init__(self, store: dist.Store, seconds: float) -> None:
        self._store, self._seconds = store, seconds
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], queue.SimpleQueue[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="store", daemon=True)
        self._thread.start()

    def set(self, key: str, value: str) -> None:
        self._call(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """Of a key that is there."""
        return self._call(lambda: self._store.get(key))

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of ``keys`` are there."""
        return self._call(lambda: self._store.check(list(keys)))

    def compare_set(self, key: str, expected: str, value: str) -> None:
        self._call(lambda: self._store.compare_set(key, expected, value))

    def close(self) -> None:
        """End the thread, if it can be: one that waits for an answer stays."""
        self._asked.put(None)
        self._thread.join(self._seconds)

    def _call(self, call: Callable[[], Any]) -> Any:
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._asked.put((call, answer))
        try:
            value, error = answer.get(timeout=self._seconds)
        except queue.Empty:
            raise RuntimeError(f"the store did not answer for {self._seconds:g} s") from None
        if error is not None:
            raise error
        return value

    def _serve(self) -> None:
        while (asked := self._asked.get()) is not None:
            call, answer = asked
            try:
                answer.put((call(), None))
            except Exception as e:  # whatever it is belongs to the caller
                answer.put((None, e))
