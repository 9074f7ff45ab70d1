"""A thread in every rank that notices hangs and lost ranks, says who it was, and ends the job.

The training thread beats: "step 7: backward of micro batch 1". Each second the watchdog publishes this rank's last
beat in a store that all ranks reach (a connection of its own to torch's rendezvous). Rank 0's watchdog looks at all
ranks, the others' at rank 0.

* A training thread without a beat for ``hang_seconds`` opens an inquest: every rank appends the stacks of its threads
  to ``<run>/stacks/rank-RRRRR.txt`` and reports where it is, rank 0 names the rank that the others wait for, and all
  leave with exit code 85 (`nsa.training.exit_codes`).
* A process that publishes nothing for ``lost_seconds`` is lost (killed, frozen, its machine gone): the same inquest.
* Rank 0 keeps the store. Where it does not answer for ``lost_seconds`` the others say that it is lost, and leave.
* A process that was itself stopped meanwhile (Ctrl-Z) does not count that time.
* A rank that stopped by itself (out of memory, a full disk) has left word. Where the training thread does not notice by
  an error of its collective operation, as with NCCL, it is ended with the exit code of that rank.
* Should even the watchdog not run (code that keeps Python's lock), a timer of `faulthandler` writes the stacks and
  ends the process a minute later.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from nsa.training.exit_codes import LOST, write_exit_file
from nsa.training.timed_store import TimedStore

INTERVAL = 1.0  # seconds between two looks
CALL_SECONDS = 10.0  # that a call of the store may take, at most
ANSWER_SECONDS = 10.0  # that an inquest waits for reports
STARVED_SECONDS = 5.0  # that a wait may take too long on a busy machine
WORD_SECONDS = 10.0  # for the training thread to notice that a rank has stopped; more than `last_words` takes
DEADMAN_SECONDS = 60.0  # beyond hang_seconds: when faulthandler ends a process whose watchdog does not run


class Watchdog:
    """Watches one rank, and with its sisters all of them, from `start` to `close`.

    Args:
        rank, world_size: of this process. run: the run folder.
        hang_seconds: 0: hangs are not looked for. lost_seconds: see above.
    """

    def __init__(self, rank: int, world_size: int, run: Path, hang_seconds: float, lost_seconds: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.hang_seconds, self.lost_seconds = hang_seconds, lost_seconds
        self.stacks = run / "stacks"
        self._interval = min(INTERVAL, hang_seconds / 5 or INTERVAL, lost_seconds / 5)
        self._beat: tuple[int, str, float] = (0, "start", time.monotonic())
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._store: dist.Store | TimedStore | None = None
        self._thread: threading.Thread | None = None
        self._file: IO[str] | None = None
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> last tick, and when it changed
        self._ticks = 0
        self._heard: tuple[int, str] | None = None  # the word of another rank: exit code, message
        self._heard_at = 0.0

    def start(self) -> None:
        """Begin to watch. Every rank must; they need not at the same time."""
        self.stacks.mkdir(exist_ok=True)
        self._file = (self.stacks / f"rank-{self.rank:05d}.txt").open("a")
        if self.world_size > 1:
            self._store = TimedStore(_connect(), min(CALL_SECONDS, self.lost_seconds / 2))
            self._publish()
        self.beat("start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, where: str) -> None:
        """The training thread has got to ``where``. Every rank must call it at the same places."""
        self._beat = (self._beat[0] + 1, where, time.monotonic())

    def close(self) -> None:
        """Watch no more; a file that no stacks were written to goes."""
        if self._thread is None or self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if isinstance(self._store, TimedStore):
            self._store.close()
        faulthandler.cancel_dump_traceback_later()
        assert self._file is not None
        self._file.close()
        path = Path(self._file.name)
        with suppress(OSError):  # the folder is not empty, or another rank was faster
            if path.stat().st_size == 0:
                path.unlink()
                self.stacks.rmdir()

    # ------------------------------------------------------------------------------------------------ last words

    def leave_word(self, code: int, message: str) -> None:
        """Before this rank stops by itself: tell the others why. The first word counts: others may stop for it."""
        if self._store is None:
            return
        with suppress(RuntimeError):  # nobody is left to read it
            self._store.compare_set("word", "", json.dumps([self.rank, code, message]))
            if self.rank == 0:
                time.sleep(3 * self._interval)  # the store may go with this process: let the others look

    def last_words(self, patience: float = 5.0) -> tuple[int, str]:
        """Why a collective operation failed: the exit code and what to say. Takes up to ``patience`` seconds."""
        if self._store is None:
            return LOST, "the connection between the ranks broke"
        try:
            before = self._ticks_of_all()
            end = time.monotonic() + patience
            while time.monotonic() < end:
                if word := self._word():
                    return word
                time.sleep(0.2)
            after = self._ticks_of_all()
            lost = [rank for rank in after if after[rank] == before[rank]]
            where = self._reports(lost, "beat")
        except RuntimeError:
            return self._heard or (LOST, "rank 0 was lost (its process or machine is gone)")
        if not lost:
            return LOST, "the connection between the ranks broke, though all of them live"
        return LOST, f"{_names(lost)} lost (the process or its machine is gone), last seen {_places(where)}"

    def _word(self) -> tuple[int, str] | None:
        """That another rank has left. Kept once it was heard."""
        assert self._store is not None
        if self._heard is None and self._store.check(["word"]):
            rank, code, message = json.loads(self._store.get("word"))
            if rank != self.rank:
                self._heard_at, self._heard = time.monotonic(), (code, f"rank {rank} stopped: {message}")
        return self._heard

    # ----------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        reached = time.monotonic()  # when the store last answered
        while True:
            before = time.monotonic()
            if self._closed.wait(self._interval):
                return
            if (stopped := time.monotonic() - before - self._interval) > self._interval + STARVED_SECONDS:
                reached += stopped
                self._forgive(stopped)
            if self.hang_seconds and self._file is not None:
                faulthandler.dump_traceback_later(self.hang_seconds + DEADMAN_SECONDS, exit=True, file=self._file)
            _, where, since = self._beat
            hangs = self.hang_seconds > 0 and time.monotonic() - since > self.hang_seconds
            if self._store is None:
                if hangs:
                    self._dump_stacks()
                    self._end(f"hung at {where} for {self.hang_seconds:g} s; its stacks are in {self.stacks}")
                continue
            try:
                self._publish()
                if hangs:
                    self._open_inquest(f"rank {self.rank} made no progress for {self.hang_seconds:g} s ({where})")
                if self._word() is None:
                    lost = self._silent(range(self.world_size) if self.rank == 0 else range(1))
                    if lost:
                        self._open_inquest(f"{_names(lost)} lost: no sign of life for {self.lost_seconds:g} s")
                    if self._store.check(["inquest"]):
                        self._inquest()
                reached = time.monotonic()
            except RuntimeError:  # rank 0, or the launcher that keeps the store, is gone or frozen
                gone = self._heard is None and time.monotonic() - reached > self.lost_seconds
                if gone and not self._closed.is_set():
                    self._dump_stacks()
                    self._end(f"rank 0 was lost or frozen: no answer for {self.lost_seconds:g} s (here: {where})")
            if self._heard and time.monotonic() - self._heard_at > WORD_SECONDS and not self._closed.is_set():
                code, message = self._heard
                self._leave(code, f"error: {message}" if self.rank == 0 else "")

    def _forgive(self, seconds: float) -> None:
        """This process was stopped for ``seconds``: nobody else could be seen, and the training did not run."""
        count, where, since = self._beat
        self._beat = (count, where, since + seconds)
        self._seen = {rank: (tick, when + seconds) for rank, (tick, when) in self._seen.items()}

    def _publish(self) -> None:
        assert self._store is not None
        self._ticks += 1
        count, where, _ = self._beat
        report = {"tick": self._ticks, "count": count, "where": where, "waits": self._waits()}
        self._store.set(f"beat/{self.rank}", json.dumps(report))

    def _silent(self, ranks: range) -> list[int]:
        """Those of ``ranks`` that have published nothing for too long. One that has not started is not silent."""
        now, silent = time.monotonic(), []
        for rank, report in self._reports(ranks, "beat").items():
            if self._seen.get(rank, (-1, 0.0))[0] != report["tick"]:
                self._seen[rank] = (report["tick"], now)
            elif now - self._seen[rank][1] > self.lost_seconds:
                silent.append(rank)
        return silent

    def _reports(self, ranks: Any, kind: str) -> dict[int, dict[str, Any]]:
        assert self._store is not None
        return {r: json.loads(self._store.get(f"{kind}/{r}")) for r in ranks if self._store.check([f"{kind}/{r}"])}

    def _ticks_of_all(self) -> dict[int, int]:
        reports = self._reports(range(self.world_size), "beat")
        return {rank: reports.get(rank, {"tick": -1})["tick"] for rank in range(self.world_size) if rank != self.rank}

    def _waits(self) -> bool:
        """Whether the training thread stands in a collective operation: it is others that it waits for."""
        frame = sys._current_frames().get(self._main or 0)
        for _ in range(4):
            if frame is None:
                return False
            if "torch/distributed/" in frame.f_code.co_filename:
                return True
            frame = frame.f_back
        return False

    # ----------------------------------------------------------------------------------------------- the inquest

    def _open_inquest(self, reason: str) -> None:
        if self._store is not None and not self._store.check(["inquest"]):
            self._store.set("inquest", reason)

    def _inquest(self) -> None:
        """Does not return."""
        assert self._store is not None
        reason = self._store.get("inquest").decode()
        self._dump_stacks()
        count, where, _ = self._beat
        self._store.set(f"report/{self.rank}", json.dumps({"count": count, "where": where, "waits": self._waits()}))
        end = time.monotonic() + ANSWER_SECONDS
        if self.rank == 0:
            reports: dict[int, dict[str, Any]] = {}
            while len(reports) < self.world_size and time.monotonic() < end:
                time.sleep(0.1)
                reports = self._reports(range(self.world_size), "report")
            verdict = f"{reason}; {judge(reports, self.world_size)}; stacks of every rank are in {self.stacks}"
            self._store.set("verdict", verdict)
            time.sleep(1)  # the store is gone with this process
            self._end(verdict)
        try:
            while not self._store.check(["verdict"]) and time.monotonic() < end + 1:
                time.sleep(0.1)
            reported = self._store.check(["verdict"])
        except RuntimeError:
            reported = True  # rank 0 has reported it and is gone
        self._end("" if reported else f"{reason}; rank 0 does not answer; stacks are in {self.stacks}")

    def _dump_stacks(self) -> None:
        assert self._file is not None
        _, where, since = self._beat
        now = datetime.now(UTC).isoformat(timespec="seconds")
        age = time.monotonic() - since
        self._file.write(f"{now} rank {self.rank}, process {os.getpid()}: {age:.0f} s at {where}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()

    def _end(self, message: str) -> None:
        again = f"The last checkpoint stands; run the same command again (exit code {LOST})"
        self._leave(LOST, f"error: {message}. {again}" if message else "")

    def _leave(self, code: int, message: str) -> None:
        """The training thread hangs: no exception would reach it."""
        try:
            if message:
                sys.stderr.write(f"{message}\n")
            write_exit_file(code)
            sys.stderr.flush()
            sys.stdout.flush()
        finally:
            os._exit(code)


def judge(reports: dict[int, dict[str, Any]], world_size: int) -> str:
    """Which rank the others wait for: one that does not answer, else the one that is furthest behind, and among equals
    the one that does not stand in a collective operation."""
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        return f"{_names(silent)} lost or frozen: no answer"
    least = min(report["count"] for report in reports.values())
    slow = [rank for rank, report in reports.items() if report["count"] == least]
    slow = [rank for rank in slow if not reports[rank]["waits"]] or slow
    if len(slow) == world_size:
        return f"no rank stands out, all are {_places(reports)}"
    others = [report["where"] for rank, report in reports.items() if rank not in slow]
    return f"slow: {_names(slow, verb=False)}, {_places({r: reports[r] for r in slow})} (others: {others[0]})"


def _names(ranks: list[int], verb: bool = True) -> str:
    names = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
    return f"{names} {'were' if len(ranks) > 1 else 'was'}" if verb else names


def _places(reports: dict[int, dict[str, Any]]) -> str:
    return "at " + (" / ".join(sorted({str(report["where"]) for report in reports.values()})) or "an unknown place")


def _connect() -> dist.Store:
    """An own connection to the store of torch's rendezvous. Raises ValueError if there is none."""
    try:
        store = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=30)
        )
    except (KeyError, RuntimeError) as e:
        raise ValueError(f"the watchdog cannot reach the rendezvous at MASTER_ADDR:MASTER_PORT ({e})") from e
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
