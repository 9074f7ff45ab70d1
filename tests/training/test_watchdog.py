"""The watchdog by a clock that the test turns: who is said to hang or to be lost, when, and who is not; a real hang."""

import faulthandler
import json
import threading

import pytest
import torch.distributed as dist
from tiny import start

from nsa.training import watchdog
from nsa.training.exit_codes import LOST, USER
from nsa.training.timed_store import TimedStore
from nsa.training.watchdog import Watchdog, judge


class Ended(BaseException):
    """In place of the end of the process."""


class Clock:
    """Time that passes where somebody waits, and what happens meanwhile: ``events`` of (seconds, function)."""

    def __init__(self):
        self.now, self.stop, self.events = 1000.0, float("inf"), []

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        while self.events and self.events[0][0] <= self.now:
            self.events.pop(0)[1]()

    def wait(self, seconds):
        """As `threading.Event.wait`, of an event that is set at ``stop``."""
        self.sleep(seconds)
        return self.is_set()

    def is_set(self):
        return self.now >= self.stop


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog.os, "_exit", leave)
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    return clock


@pytest.fixture
def dog(clock, tmp_path):
    """Makes a watchdog of a run of ``world_size``, not yet started: the test's own thread runs it, by `watch`."""
    dogs = []

    def make(rank=0, world_size=1, hang_seconds=10.0, lost_seconds=60.0, store=None):
        made = Watchdog(rank, world_size, tmp_path, hang_seconds, lost_seconds)
        made.stacks.mkdir(exist_ok=True)
        made._file, made._store, made._closed = (made.stacks / f"rank-{rank:05d}.txt").open("a"), store, clock
        dogs.append(made)
        return made

    yield make
    for made in dogs:
        made._file.close()


def watch(dog, clock, seconds):
    """Let the watchdog look for ``seconds``: the exit code that it ended with and when; None: it did not end."""
    began, clock.stop = clock.now, clock.now + seconds
    try:
        dog._watch()
    except Ended as end:
        return end.args[0], clock.now - began
    return None


def test_a_rank_that_makes_no_progress_ends_when_its_time_is_over(dog, clock, capfd):
    alone = dog()
    for second in range(4, 104, 4):
        clock.events.append((1000.0 + second, lambda: alone.beat("step 7: backward of micro batch 1")))
    code, after = watch(alone, clock, 1000)
    assert code == LOST and 110 < after <= 110 + watchdog.INTERVAL, "ten seconds after the last beat, not before"
    printed = capfd.readouterr().err
    assert "hung at step 7: backward of micro batch 1 for 10 s" in printed and "run the same command again" in printed
    stacks = (alone.stacks / "rank-00000.txt").read_text()
    assert "rank 0" in stacks and "s at step 7: backward of micro batch 1" in stacks and "test_watchdog.py" in stacks


def test_a_rank_that_makes_progress_is_left_alone(dog, clock):
    alone = dog()
    clock.events = [(1000.0 + second, lambda: alone.beat("step")) for second in range(9, 5000, 9)]
    assert watch(alone, clock, 4900) is None


def test_hangs_are_not_looked_for_if_nobody_asks(dog, clock):
    assert watch(dog(hang_seconds=0), clock, 10**5) is None


def test_python_that_keeps_its_lock_is_ended_by_a_timer(dog, clock, monkeypatch):
    """The timer is set anew in each look, so that it runs out only where the watchdog itself does not run."""
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *a, **k: armed.append((clock.now, a, k)))
    alone = dog(hang_seconds=30)
    assert watch(alone, clock, 20) is None
    assert [when for when, *_ in armed] == [1000.0 + second for second in range(1, 20)]
    assert all(a == (30 + watchdog.DEADMAN_SECONDS,) and k == {"exit": True, "file": alone._file} for _, a, k in armed)


def publish(store, rank, tick, **more):
    report = {"tick": tick, "count": 5, "where": "step 3: update", "waits": True} | more
    store.set(f"beat/{rank}", json.dumps(report))


def test_a_rank_without_a_sign_of_life_is_lost(dog, clock, capfd):
    """Rank 1 lives for 30 s and dies; rank 2 lives on; rank 3 never starts, which is not for the watchdog to say."""
    store = dist.HashStore()
    first = dog(world_size=4, hang_seconds=0, lost_seconds=20, store=store)
    publish(store, 1, 0)
    for second in range(1, 500):
        for rank in (1, 2):
            if rank == 2 or second <= 30:
                clock.events.append((1000.0 + second, lambda r=rank, s=second: publish(store, r, s)))
    code, after = watch(first, clock, 400)
    assert code == LOST and 50 < after <= 50 + 2 * watchdog.INTERVAL + watchdog.ANSWER_SECONDS + 2
    assert "rank 1 was lost: no sign of life for 20 s" in capfd.readouterr().err
    assert store.get("inquest") == b"rank 1 was lost: no sign of life for 20 s"


def test_the_others_look_at_rank_0_alone(dog, clock):
    store = dist.HashStore()
    other = dog(rank=1, world_size=3, hang_seconds=0, lost_seconds=20, store=store)
    publish(store, 0, 0)
    publish(store, 2, 0)
    clock.events = [(1000.0 + second, lambda s=second: publish(store, 0, s)) for second in range(1, 100)]
    code, after = watch(other, clock, 1000)
    assert code == LOST and after > 119, "rank 2 was silent from the beginning, rank 0 since 99"
    assert store.get("inquest").startswith(b"rank 0 was lost")


def test_an_inquest_names_the_rank_that_the_others_wait_for(dog, clock, capfd):
    store = dist.HashStore()
    first = dog(world_size=2, hang_seconds=10, lost_seconds=600, store=store)
    first.beat("step 2: update")
    publish(store, 1, 0)

    def answer():
        store.set("report/1", json.dumps({"count": 0, "where": "step 1: data", "waits": False}))

    clock.events = [(1013.0, answer)]
    code, after = watch(first, clock, 100)
    assert code == LOST and after < 10 + 2 * watchdog.INTERVAL + 5, "it did not wait longer than for the answer"
    printed = capfd.readouterr().err
    assert "rank 0 made no progress for 10 s (step 2: update); slow: rank 1, at step 1: data" in printed
    assert "others: step 2: update" in printed
    assert store.get("verdict").decode() in printed


def test_a_rank_hears_the_verdict_and_says_nothing_of_its_own(dog, clock, capfd):
    store = dist.HashStore()
    other = dog(rank=1, world_size=2, hang_seconds=0, lost_seconds=600, store=store)
    store.set("inquest", "rank 0 made no progress")
    clock.events = [(1005.0, lambda: store.set("verdict", "slow: rank 0"))]
    code, after = watch(other, clock, 100)
    assert code == LOST and after < 6 and capfd.readouterr().err == ""
    assert json.loads(store.get("report/1")) == {"count": 0, "where": "start", "waits": False}
    assert (other.stacks / "rank-00001.txt").stat().st_size > 0


def test_where_rank_0_does_not_answer_another_speaks(dog, clock, capfd):
    store = dist.HashStore()
    other = dog(rank=1, world_size=2, hang_seconds=0, lost_seconds=600, store=store)
    store.set("inquest", "rank 1 made no progress")
    code, after = watch(other, clock, 100)
    assert code == LOST and watchdog.ANSWER_SECONDS < after < watchdog.ANSWER_SECONDS + 4
    assert "rank 1 made no progress; rank 0 does not answer" in capfd.readouterr().err


class Unreachable:
    """A store whose keeper is gone."""

    def set(self, *_):
        raise RuntimeError("Connection reset by peer")

    get = check = set


def test_a_store_that_nobody_keeps_means_that_rank_0_was_lost(dog, clock, capfd):
    """It is given time: a moment without it is none."""
    store = dist.HashStore()
    other = dog(rank=1, world_size=2, hang_seconds=0, lost_seconds=20, store=store)

    def becomes(new):
        other._store = new

    clock.events = [(1003.0, lambda: becomes(Unreachable())), (1018.0, lambda: becomes(store))]
    clock.events += [(1050.0, lambda: becomes(Unreachable()))]
    code, after = watch(other, clock, 1000)
    assert code == LOST and 69 <= after < 73
    assert "rank 0 was lost" in capfd.readouterr().err


def test_the_word_of_a_rank_that_stopped_ends_who_does_not_notice(dog, clock, capfd):
    """With that rank's exit code, after the time in which the training thread may notice by itself; rank 0 says it."""
    for rank in (0, 1):
        store = dist.HashStore()
        waiting = dog(rank=rank, world_size=2, hang_seconds=0, store=store)
        other = dog(rank=1 - rank, world_size=2, hang_seconds=0, store=store)
        other.leave_word(USER, "the disk is full")
        other.leave_word(LOST, "what came of that")
        code, after = watch(waiting, clock, 100)
        assert code == USER and watchdog.WORD_SECONDS < after <= watchdog.WORD_SECONDS + 2 * watchdog.INTERVAL
        said = "error: rank 1 stopped: the disk is full\n" if rank == 0 else ""
        assert capfd.readouterr().err == said


def test_ones_own_word_ends_nobody(dog, clock):
    store = dist.HashStore()
    mine = dog(world_size=2, hang_seconds=0, store=store)
    mine.leave_word(USER, "the disk is full")
    assert watch(mine, clock, 200) is None


def test_last_words_tell_the_lost_rank_from_a_broken_connection(dog, clock):
    store = dist.HashStore()
    first = dog(world_size=3, hang_seconds=0, store=store)
    publish(store, 1, 4, where="step 9: update")
    publish(store, 2, 4)
    clock.events = [(1002.0, lambda: publish(store, 2, 5))]
    code, why = first.last_words()
    assert code == LOST and why.startswith("rank 1 was lost") and why.endswith("last seen at step 9: update")
    clock.events = [(clock.now + 2, lambda: publish(store, 1, 6)), (clock.now + 2, lambda: publish(store, 2, 6))]
    assert first.last_words() == (LOST, "the connection between the ranks broke, though all of them live")
    dog(rank=2, world_size=3, store=store).leave_word(USER, "the disk is full")
    assert first.last_words() == (USER, "rank 2 stopped: the disk is full")
    assert dog().last_words() == (LOST, "the connection between the ranks broke")


def report(count, where="step 3: update", waits=False):
    return {"count": count, "where": where, "waits": waits}


def test_judge():
    assert judge({0: report(5), 2: report(5)}, 3) == "rank 1 was lost or frozen: no answer"
    assert judge({1: report(5)}, 4) == "ranks 0, 2, 3 were lost or frozen: no answer"
    behind = {0: report(7), 1: report(7), 2: report(6, "step 3: data")}
    assert judge(behind, 3) == "slow: rank 2, at step 3: data (others: step 3: update)"
    stands = {0: report(7, waits=True), 1: report(7, waits=False), 2: report(7, waits=True)}
    assert judge(stands, 3) == "slow: rank 1, at step 3: update (others: step 3: update)"
    alike = {rank: report(7, waits=True) for rank in range(3)}
    assert judge(alike, 3) == "no rank stands out, all are at step 3: update"
    assert judge({rank: report(7) for rank in range(3)}, 3) == judge(alike, 3)


def test_a_run_that_ends_leaves_no_thread_timer_or_empty_file(tmp_path, monkeypatch):
    cancelled = []
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: cancelled.append(1))
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: None)
    quiet = Watchdog(0, 1, tmp_path, hang_seconds=100, lost_seconds=60)
    quiet.close()  # before it began
    quiet.start()
    assert quiet._thread.is_alive()
    quiet.close()
    assert not quiet._thread.is_alive() and cancelled and not quiet.stacks.exists()
    dog = Watchdog(0, 1, tmp_path, hang_seconds=100, lost_seconds=60)
    dog.start()
    dog._file.write("stacks")
    dog.close()
    assert (dog.stacks / "rank-00000.txt").read_text() == "stacks"


class Frozen:
    """A store whose keeper is stopped: no call returns before ``until`` is set."""

    def __init__(self, store, until):
        self.store, self.until, self.frozen = store, until, False

    def __getattr__(self, name):
        def call(*arguments):
            if self.frozen:
                self.until.wait()
            return getattr(self.store, name)(*arguments)

        return call


def test_a_frozen_rank_0_is_lost(dog, clock, capfd):
    """Its store accepts what is asked and never answers."""
    until = threading.Event()
    frozen = Frozen(dist.HashStore(), until)
    timed = TimedStore(frozen, 0.05)
    other = dog(rank=1, world_size=2, hang_seconds=1000, lost_seconds=20, store=timed)
    clock.events = [(1030.0, lambda: setattr(frozen, "frozen", True))]
    code, after = watch(other, clock, 1000)
    until.set()
    assert code == LOST and 49 <= after < 53
    assert "error: rank 0 was lost or frozen: no answer for 20 s" in capfd.readouterr().err
    timed.close()
    assert not timed._thread.is_alive()


def test_the_watchdog_of_several_ranks_has_a_timed_store(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "_connect", dist.HashStore)
    one_of_two = Watchdog(1, 2, tmp_path, hang_seconds=0, lost_seconds=0.5)
    one_of_two.start()
    one_of_two.close()
    assert isinstance(one_of_two._store, TimedStore) and one_of_two._store._seconds == 0.25


def test_what_a_timed_store_is_asked(dog):
    timed = TimedStore(dist.HashStore(), 30)
    timed.set("a", "1")
    assert timed.get("a") == b"1" and timed.check(["a"]) and not timed.check(["a", "b"])
    timed.compare_set("word", "", "first")
    timed.compare_set("word", "", "second")
    assert timed.get("word") == b"first"
    timed._store = Unreachable()
    with pytest.raises(RuntimeError, match="Connection reset"):
        timed.get("a")
    timed.close()


def test_a_process_that_was_stopped_blames_nobody(dog, clock):
    """Ctrl-Z and fg: all ranks of a job stand still, and go on."""
    store = dist.HashStore()
    first = dog(world_size=2, hang_seconds=30, lost_seconds=20, store=store)
    publish(store, 1, 0)

    def stopped():
        clock.now += 5000

    def lives(second):
        publish(store, 1, second)
        first.beat("step")

    clock.events = [(1010.0, stopped), *((6000.0 + 15 + s, lambda s=s: lives(s)) for s in range(0, 200, 5))]
    assert watch(first, clock, 5150) is None
    clock.events = []
    code, _ = watch(first, clock, 200)
    assert code == LOST, "afterwards it looks again"


def test_a_process_that_was_stopped_gives_the_store_its_time(dog, clock):
    """Rank 0 goes on a moment after this one: that its store did not answer meanwhile is no loss."""
    store = dist.HashStore()
    other = dog(rank=1, world_size=2, hang_seconds=0, lost_seconds=20, store=store)

    def stopped():
        clock.now += 5000
        other._store = Unreachable()

    clock.events = [(1010.0, stopped), (6013.0, lambda: setattr(other, "_store", store))]
    assert watch(other, clock, 5100) is None


HANGS = """
import sys, time
from pathlib import Path
from nsa.training.watchdog import Watchdog
dog = Watchdog(0, world_size=1, run=Path(sys.argv[1]), hang_seconds=1, lost_seconds=60)
dog.start()
dog.beat("step 1: data")

def waits_for_ever():
    time.sleep(50)

waits_for_ever()
"""


def test_a_real_hang(tmp_path):
    code = tmp_path / "code"
    process = start(["-c", HANGS, str(tmp_path)], NSA_EXIT_FILE=str(code))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == LOST and code.read_text() == f"{LOST}\n"
    assert "error: hung at step 1: data for 1 s" in output
    assert "in waits_for_ever" in (tmp_path / "stacks/rank-00000.txt").read_text()
