"""How many bytes this process sends to others, by what they are."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Traffic:
    """A counter of bytes sent by the collectives of `nsa.parallel`; DeepSpeed's own are not in it.

    An all-gather of n ranks counts (n - 1) times the part, a reduce-scatter (n - 1) / n of the whole, an all-reduce
    both: what a ring sends. An exchange counts what leaves the process.
    """

    def __init__(self) -> None:
        self._sent: Counter[str] = Counter()

    def add(self, what: str, num_bytes: int) -> None:
        self._sent[what] += num_bytes

    def add_all(self, sent: Mapping[str, int]) -> None:
        self._sent.update(sent)

    @contextmanager
    def apart(self) -> Iterator[Counter[str]]:
        """What is sent meanwhile counts in the given counter instead."""
        outside, self._sent = self._sent, Counter()
        try:
            yield self._sent
        finally:
            self._sent = outside

    def take(self) -> dict[str, int]:
        """Bytes by name since the last call."""
        sent, self._sent = dict(sorted(self._sent.items())), Counter()
        return sent
