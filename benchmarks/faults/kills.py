"""SIGKILL, again and again, at random moments; the run must end as the one that nobody touched."""

import random
import time
from collections import Counter
from pathlib import Path

from benchmarks.faults.lives import Life, Stage, final_state, steps_of


def campaign(stage: Stage, kills: int, seed: int) -> dict[str, object]:
    """Half of the kills aim at a save (they wait for its temporary folder, then up to 40 ms more), half come at any
    moment of the second after the first step. After each the newest checkpoint must verify. A run that reaches its end
    must equal the untouched one; then the next begins, until there were enough kills."""
    chance = random.Random(seed)
    expected = stage.reference()
    seen: Counter[str] = Counter()
    runs = equal = lost = 0
    while seen.total() < kills:
        runs += 1
        with stage.fresh() as output:
            newest = 0
            while (moment := _life(stage, output, chance)) != "done":
                seen[moment] += 1
                good = steps_of(output / "run")
                lost += max(good, default=0) < newest  # a checkpoint that was there is not there any more
                newest = max(good, default=0)
                print(f"kill {seen.total()}: during {moment}; run {runs} resumes from step {newest}", flush=True)
                if seen.total() >= kills + 30:
                    break  # it makes no progress
            same = moment == "done" and final_state(output / "run") == expected
            equal += same
            print(f"run {runs} is done: {'bitwise equal' if same else 'DIFFERENT'}", flush=True)
    ok = equal == runs and not lost
    return {
        "fault": f"SIGKILL ({seen['save']} during saves, {seen['steps']} during steps)",
        "times": seen.total(),
        "as documented": seen.total() if ok else seen.total() - lost - (runs - equal),
        "outcome": f"{equal} of {runs} runs identical to the undisturbed one, {lost} checkpoints lost",
        "ok": ok,
    }


def _life(stage: Stage, output: Path, chance: random.Random) -> str:
    """One life and its death: "steps", "save", or "done" if it got to its end first."""
    life = stage.start(output)
    life.until(lambda: "step " in life.output)
    run = output / "run"
    if chance.random() < 0.5:
        for _ in range(chance.randrange(1, 4)):  # not always the first save
            _until_save(life, run)
        time.sleep(chance.uniform(0, 0.04))
    else:
        time.sleep(chance.uniform(0, 1))
    life.kill()
    code = life.end()
    if code == 0:
        return "done"
    if code != -9:
        raise SystemExit(f"the run failed by itself ({code}):\n{life.output}")
    return "save" if list(run.glob("step_*.tmp")) else "steps"


def _until_save(life: Life, run: Path) -> None:
    """Wait for the beginning of a save."""
    for wanted in (False, True):
        life.until(lambda wanted=wanted: bool(list(run.glob("step_*.tmp"))) == wanted, pause=0.0005)


def sigterm_during_saves(stage: Stage, times: int, seed: int) -> dict[str, object]:
    """SIGTERM while a checkpoint is being written: another one is saved, exit code 75, and the run goes on from it."""
    chance = random.Random(seed)
    good, slowest = 0, 0.0
    for _ in range(times):
        with stage.fresh() as output:
            life = stage.start(output)
            for _ in range(chance.randrange(1, 5)):
                _until_save(life, output / "run")
            began = time.monotonic()
            life.kill(15)
            code = life.end()
            slowest = max(slowest, time.monotonic() - began)
            said = f"stopped after step {max(steps_of(output / 'run'), default=0)} of" in life.output
            equal = stage.start(output).end() == 0 and final_state(output / "run") == stage.reference()
            good += code == 75 and said and equal
    print(f"SIGTERM during a save: {good} of {times} as documented, slowest stop {slowest:.1f} s", flush=True)
    return {
        "fault": "SIGTERM during a save",
        "times": times,
        "as documented": good,
        "outcome": f"exit code 75, its step saved, identical end; slowest stop {slowest:.1f} s",
        "ok": good == times and slowest < 30,
    }
