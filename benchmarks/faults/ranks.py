"""What happens to one rank of two, and requests to stop."""

import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.lives import Life, Stage, final_state, steps_of
from nsa.training import spikes
from nsa.training.trainer import Trainer

Row = dict[str, object]


def nan_on_one_rank(stage: Stage) -> Row:
    """A NaN in rank 1's loss at step 5: the update is skipped on both, the run ends."""

    def harm() -> None:
        _at_step(4, lambda losses: losses * math.nan)

    with stage.fresh() as output:
        lives = stage.start_ranks(output, harm={1: harm})
        codes = [life.end() for life in lives]
        said = "step 5: loss nan" in lives[0].output and "skipped on all ranks" in lives[0].output
        return _row("NaN on one rank", codes == [0, 0] and said and 40 in steps_of(output / "run"), lives)


def hung_rank(stage: Stage) -> Row:
    """Rank 1 sleeps in the forward pass of step 5: stacks of both ranks, the slow one named, exit code 85 on both."""

    def harm() -> None:
        _at_step(4, lambda losses: (time.sleep(1000), losses)[1])

    with stage.fresh() as output:
        lives = stage.start_ranks(output, "recovery.hang_seconds=4", harm={1: harm})
        codes = [life.end() for life in lives]
        stacks = [path.read_text() for path in sorted((output / "run/stacks").glob("rank-*.txt"))]
        named = "slow: rank 1, at step 5: micro batch 0" in lives[0].output
        found = (len(stacks) == 2 and "all_reduce" in stacks[0] and "in harm" in stacks[1]) or "<lambda>" in stacks[1]
        again = _goes_on(stage, output)
        return _row("a hung rank", codes == [85, 85] and named and found and again, lives)


def frozen_rank(stage: Stage, rank: int) -> Row:
    """A rank is stopped (SIGSTOP): no thread of it runs. The other names it and leaves with 85 soon after."""
    with stage.fresh() as output:
        lives = stage.start_ranks(
            output,
            "recovery.lost_seconds=4",
            "recovery.hang_seconds=20",
            "training.steps=400",
            "optimizer.schedule=constant",
        )
        lives[0].until(lambda: "step   4/" in lives[0].output)
        lives[rank].kill(signal.SIGSTOP)
        code = lives[1 - rank].end(45)
        lives[rank].kill()
        lives[rank].end()
        named = f"error: rank {rank} was lost" in lives[1 - rank].output
        return _row(f"rank {rank} frozen", code == 85 and named, lives)


def killed_rank(stage: Stage, rank: int) -> Row:
    """A rank is killed (SIGKILL): the other says which and leaves with 85; the same command goes on to an equal end."""
    with stage.fresh() as output:
        lives = stage.start_ranks(output)
        lives[0].until_step(4)
        lives[rank].kill()
        code = lives[1 - rank].end(90)
        lives[rank].end()
        named = f"rank {rank} was lost" in lives[1 - rank].output
        again = _goes_on(stage, output)
        return _row(f"rank {rank} killed", code == 85 and named and again, lives)


def nothing_unpickles(stage: Stage) -> Row:
    """Two ranks train to the end; whichever library looks up a class for an unpickler ends the process."""

    def harm() -> None:
        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "pickle.find_class":
                os.write(2, f"unpickles {arguments}\n".encode())
                os._exit(99)

        sys.addaudithook(hook)

    with stage.fresh() as output:
        lives = stage.start_ranks(output, harm={0: harm, 1: harm})
        codes = [life.end() for life in lives]
        return _row("two ranks watched for unpickling", codes == [0, 0], lives)


def user_error_on_one_rank(stage: Stage) -> Row:
    """Rank 1 finds something that the user must mend: both stop with 2, and its message is shown."""

    def harm() -> None:
        def broken(losses: torch.Tensor) -> torch.Tensor:
            raise ValueError("a shard holds token 7000, the tokenizer has 400 pieces")

        _at_step(4, broken)

    with stage.fresh() as output:
        lives = stage.start_ranks(output, harm={1: harm})
        codes = [life.end() for life in lives]
        shown = "holds token 7000" in lives[0].output
        return _row("a user's error on one rank", codes == [2, 2] and shown, lives)


def stop_requests(stage: Stage) -> list[Row]:
    """SIGTERM, SIGUSR1, a STOP file, the wall clock: saved within 30 s, exit code 75; Ctrl-C 130. Then an equal end."""

    def touch(life: Life, run: Path) -> None:
        (run / "STOP").touch()

    requests: dict[str, tuple[Callable[[Life, Path], None], list[str], int]] = {
        "SIGTERM": (lambda life, run: life.kill(signal.SIGTERM), [], 75),
        "SIGUSR1": (lambda life, run: life.kill(signal.SIGUSR1), [], 75),
        "a STOP file": (touch, [], 75),
        "training.max_hours": (lambda life, run: None, ["training.max_hours=0.0005"], 75),
        "SIGINT (Ctrl-C)": (lambda life, run: life.kill(signal.SIGINT), [], 130),
    }
    rows = []
    for name, (ask, overrides, expected) in requests.items():
        with stage.fresh() as output:
            life = stage.start(output, *overrides)
            life.until_step(1)
            ask(life, output / "run")
            began = time.monotonic()
            code, seconds = life.end(60), time.monotonic() - began
            step = max(steps_of(output / "run"), default=0)
            said = f"stopped after step {step} of 40" in life.output
            again = stage.start(output).end() == 0 and final_state(output / "run") == stage.reference()
            rows.append(_row(name, code == expected and said and seconds < 30 and again, [life]))
    return rows


def spikes_roll_back(stage: Stage) -> Row:
    """Batches 20 to 22 have ten times the loss: skipped, then rolled back and quarantined; the run ends, and equals one
    that never read them."""

    def harm() -> None:
        read, losses = Trainer._read_step, Trainer._losses

        def marked(self: Trainer, step: int) -> list[Any]:
            number = spikes.batch_number(step, self.progress.spikes.quarantine)
            return [b | {"bad": number in (20, 21, 22)} for b in read(self, step)]

        Trainer._read_step = marked  # type: ignore[method-assign]
        Trainer._losses = lambda self, b: losses(self, b) * (10 if b.get("bad") else 1)  # type: ignore[method-assign]

    def never() -> None:
        harm()
        init = Trainer.__init__

        def quarantined(self: Trainer, *arguments: Any) -> None:
            init(self, *arguments)
            self.progress.spikes.quarantine, self.progress.spikes.rollbacks = [20, 21, 22], 1

        Trainer.__init__ = quarantined  # type: ignore[method-assign]

    rules = ["recovery.window=16", "recovery.max_spikes=2"]
    with stage.fresh() as output, stage.fresh() as other:
        life = stage.start(output, *rules, harm=harm)
        code = life.end()
        code |= stage.start(other, *rules, harm=never).end()
        same = code == 0 and final_state(output / "run") == final_state(other / "run")
        named = (output / "run/quarantine.jsonl").is_file() and "batches [20, 21, 22] are quarantined" in life.output
        return _row("a loss spike of three batches", same and named, [life])


def _at_step(step: int, change: Callable[[torch.Tensor], Any]) -> None:
    losses = Trainer._losses

    def harm(self: Trainer, micro_batch: Any) -> torch.Tensor:
        values = losses(self, micro_batch)
        return change(values) if self.progress.step == step and torch.is_grad_enabled() else values

    Trainer._losses = harm  # type: ignore[method-assign]


def _goes_on(stage: Stage, output: Path) -> bool:
    codes = [life.end() for life in stage.start_ranks(output)]
    return codes == [0, 0] and final_state(output / "run") == stage.reference(2)


def _row(fault: str, ok: bool, lives: list[Life]) -> Row:
    outcomes = ", ".join(f"exit code {life.code}" for life in lives)
    tracebacks = any("Traceback" in life.output for life in lives)
    print(f"{fault}: {'as documented' if ok and not tracebacks else 'NOT as documented'} ({outcomes})", flush=True)
    if not ok or tracebacks:
        for life in lives:
            print(f"--- process {life.pid} of {os.getpid()}\n{life.output[-3000:]}", flush=True)
    good = ok and not tracebacks
    return {"fault": fault, "times": 1, "as documented": int(good), "outcome": outcomes, "ok": good}
