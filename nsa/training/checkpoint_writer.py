"""Writing checkpoints beside the training: a step pays for a copy of the state, a thread does the rest.

A `Snapshot` is taken between two steps. A thread of each rank writes this rank's files, fsyncs them and reads them
back; when all ranks have, rank 0's thread writes the manifest, gives the folder its name and removes what is beyond
``checkpoint.keep_last``. Nothing but that rename makes a checkpoint, so a kill at any moment leaves the
earlier ones. An error in the thread is raised by the next `wait`, on all ranks alike: the trainer's steps ask `failed`.
"""

import shutil
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nsa.training import checkpoint, messages
from nsa.training.checkpoint import CheckpointError
from nsa.training.distributed import Ranks, ReportedError

TIMEOUT = timedelta(hours=1)  # for the slowest rank's files
GIVE_UP_SECONDS = 10.0  # that a failed run waits for its thread


@dataclass(frozen=True)
class Snapshot:
    """The state of a run after ``step`` steps, in memory that no step changes.

    Attributes:
        tensors: this rank's share as (key, name, fp32 CPU tensor), see `nsa.training.sharded_state.gather`.
        rng: this rank's generators. state: the content of state.json. files: name and content of rank 0's other files.
        num_bytes: of the tensors of all ranks.
    """

    step: int
    tensors: list[tuple[str, str, Tensor]]
    rng: dict[str, Any]
    state: dict[str, Any]
    files: dict[str, bytes]
    num_bytes: int


class CheckpointWriter:
    """Writes the checkpoints of one run. One is written at a time. All methods but `failed` are collective.

    Args:
        ranks: the processes that train. run: the run folder. keep_last: checkpoints that stay.
    """

    def __init__(self, ranks: Ranks, run: Path, keep_last: int) -> None:
        self._ranks, self._run, self._keep_last = ranks, run, keep_last
        # The thread's own group: its messages must not mix with those of the training thread.
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread: threading.Thread | None = None
        self._step = 0
        self._seconds = 0.0
        self._error: str | None = None  # of all ranks; "" if there is none; None while it is written
        self._lost: RuntimeError | None = None  # of the thread's messages

    @property
    def failed(self) -> bool:
        """Whether the checkpoint in the making is known not to come about."""
        return bool(self._error)

    @property
    def finished(self) -> bool:
        """Whether a checkpoint was written that `wait` has not returned yet."""
        return self._thread is not None and self._error is not None

    def start(self, snapshot: Snapshot, protect: int | None = None) -> None:
        """Begin to write ``snapshot``, after the checkpoint before it.

        Args:
            protect: the newest checkpoint of fewer steps than this stays, whatever ``keep_last`` says.

        Raises:
            CheckpointError: as `wait`; also if there is no room.
        """
        self.wait()
        self._step = snapshot.step
        temporary = self._temporary

        def prepare() -> None:
            checkpoint.check_space(self._run, snapshot.num_bytes)
            temporary.mkdir()

        try:
            self._ranks.on_main(prepare)
        except (OSError, CheckpointError) as e:
            self._fail(str(e))
        self._error = None
        self._thread = threading.Thread(target=self._write, args=(snapshot, protect), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Path | None:
        """Wait for the checkpoint in the making.

        Returns:
            Its folder; None if there is none in the making.

        Raises:
            CheckpointError: it could not be written (disk full, for one); earlier checkpoints are as they were.
                `ReportedError` on the ranks that are not the first.
            RuntimeError: of gloo: a rank was lost meanwhile.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        if self._lost:
            raise self._lost
        if self._error:
            self._fail(self._error)
        return self._final

    def give_up(self) -> None:
        """The run has failed: let a thread that writes come to its end, if it does soon."""
        if self._thread is not None:
            self._thread.join(GIVE_UP_SECONDS)

    @property
    def seconds(self) -> float:
        """From the beginning of the last write to its end."""
        return self._seconds

    @property
    def _final(self) -> Path:
        return self._run / checkpoint.folder_name(self._step)

    @property
    def _temporary(self) -> Path:
        return self._final.with_name(f"{self._final.name}.tmp")

    def _fail(self, error: str) -> None:
        self._error = ""
        if not self._ranks.is_main:
            raise ReportedError("no checkpoint")
        shutil.rmtree(self._temporary, ignore_errors=True)
        newest = next(iter(checkpoint.checkpoints(self._run)), None)
        raise CheckpointError(
            f"the checkpoint of step {self._step} was not written: {error}. Checkpoints saved before are untouched "
            f"({newest.name if newest else 'there is none'}); make room and run the same command again"
        )

    # ------------------------------------------------------------------------------------------------ the thread

    def _write(self, snapshot: Snapshot, protect: int | None) -> None:
        started = time.perf_counter()
        error, entries = "", {}
        try:
            entries = self._write_files(snapshot)
        except OSError as e:
            error = f"rank {self._ranks.rank}: {e.strerror or e} ({e.filename or self._temporary})"
        except Exception as e:  # whatever it is, the training must hear of it
            error = f"rank {self._ranks.rank}: {type(e).__name__}: {e}"
        try:
            written = messages.gather([error, entries], self._group)
            error = "; ".join(error for error, _ in written if error)
            if not error and self._ranks.is_main:
                error = self._commit({name: entry for _, files in written for name, entry in files.items()}, protect)
            error = messages.broadcast(error, self._group)
        except RuntimeError as e:  # of gloo: the training will find out who is lost
            error, self._lost = "the ranks lost each other", e
        self._seconds = time.perf_counter() - started
        self._error = error

    def _write_files(self, snapshot: Snapshot) -> dict[str, dict[str, Any]]:
        """Write this rank's files and read them back; their entries of the manifest."""
        folder, rank = self._temporary, self._ranks.rank
        entries = checkpoint.write_tensors(folder, rank, snapshot.tensors)
        rng = f"rng-{rank:05d}.json"
        entries[rng] = checkpoint.write_json(folder / rng, snapshot.rng)
        if self._ranks.is_main:
            entries["state.json"] = checkpoint.write_json(folder / "state.json", snapshot.state)
            for name, content in snapshot.files.items():
                entries[name] = checkpoint.write_file(folder / name, content)
        checkpoint.verify_files(folder, entries)
        return entries

    def _commit(self, entries: dict[str, dict[str, Any]], protect: int | None) -> str:
        """Make the folder a checkpoint; what went wrong, or ""."""
        try:
            checkpoint.verify_files(self._temporary, entries, content=False)  # each rank has read its own back
            checkpoint.commit(self._temporary, self._final, entries)
            checkpoint.prune(self._run, self._keep_last, protect)
        except (OSError, CheckpointError) as e:
            return str(e)
        return ""
