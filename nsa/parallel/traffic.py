"""Counts the bytes that this process sends to others, by what they carry."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Traffic:
    """A counter of bytes sent by the collectives of `nsa.parallel`, without DeepSpeed's.

    Counted is what a ring of n ranks sends: (n - 1) times the part for an all-gather, (n - 1) / n of the whole for a
    reduce-scatter, twice that for an all-reduce. An all-to-all counts what leaves the process.
    """

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()

    def add(self, what: str, num_bytes: int) -> None:
        self._sent[what] += num_bytes

    def add_all(self, sent: Mapping[str, int]) -> None:
        self._sent.update(sent)

    @contextmanager
    def apart(self) -> Iterator[Counter[str]]:
        """Count what is sent in the meantime in the yielded counter instead."""
        outside, self._sent = self._sent, Counter()
        try:
            yield self._sent
        finally:
            self._sent = outside

    def take(self) -> dict[str, int]:
        """Bytes by name since the last call, which are then reset."""
        sent, self._sent = dict(sorted(self._sent.items())), Counter()
        return sent
