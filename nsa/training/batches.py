"""Which samples a rank reads in a step, and a loader that prefetches them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

Batch = dict[str, Any]
ON_DEVICE = ("input_ids", "targets", "cu_seqlens")  # what the model reads


def pinned(batch: Batch) -> Batch:
    """The batch with the model's inputs in pinned memory, from which copies to a GPU are asynchronous."""
    return batch | {name: batch[name].pin_memory() for name in ON_DEVICE}


def sample_indices(step: int, rank: int, world_size: int, global_batch: int, micro_batch: int) -> list[range]:
    """Global sample indices of each micro batch of ``rank`` in ``step``.

    Step s reads samples s * global_batch .. (s + 1) * global_batch - 1, whatever the number of ranks.
    """
    per_pass = micro_batch * world_size
    assert global_batch % per_pass == 0
    first = step * global_batch + rank * micro_batch
    return [range(first + p, first + p + micro_batch) for p in range(0, global_batch, per_pass)]


class StepLoader:
    """Reads the micro batches of a step, and prefetches those of the next step in a thread.

    Args:
        read: step -> its micro batches, a pure function.
    """

    def __init__(self, read: Callable[[int], list[Batch]]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(1, "batches")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def __call__(self, step: int, last: bool = False) -> list[Batch]:
        """The micro batches of ``step``. Prefetches the next step, unless this is the ``last``."""
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._pool.submit(self._read, step)
        batches = self._ahead[1].result()
        self._ahead = None if last else (step + 1, self._pool.submit(self._read, step + 1))
        return batches

    def forget(self) -> None:
        """Drop what was prefetched, since the order of the data changed."""
        self._ahead = None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
