"""Disks: full, failing, or returning other bytes than were written."""

import errno
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults.lives import Stage, final_state, steps_of
from nsa.data.shards import PreparedData
from nsa.training import checkpoint
from nsa.training.trainer import Trainer

FILES = {
    "weights": "model-00000-000.safetensors",
    "moments": "optimizer-00000-000.safetensors",
    "generators": "rng-00000.json",
    "counters": "state.json",
    "configuration": "config.yaml",
    "tokenizer": "tokenizer.model",
    "manifest": "manifest.json",
}
SHARDS = {
    "token shard": "text/tokens-00000.bin",
    "document table": "text/documents.npy",
    "document names": "text/names.txt",
    "tokenizer": "tokenizer.model",
    "manifest": "manifest.json",
}


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size))


HARMS = {"bit flip": flip, "truncation": truncate}


def stop_at(step: int) -> Callable[[], None]:
    """The child asks itself to stop before ``step`` + 1."""

    def harm() -> None:
        train_step = Trainer.train_step

        def asked(self: Trainer, stop: object) -> object:
            if self.progress.step == step - 1:
                signal.raise_signal(signal.SIGTERM)
            return train_step(self, stop)  # type: ignore[arg-type]

        Trainer.train_step = asked  # type: ignore[method-assign]

    return harm


def damaged_checkpoints(stage: Stage, repeats: int, seed: int) -> list[dict[str, object]]:
    """Each kind of file of the newest checkpoint: it is passed over, that before it resumes the run to an equal end."""
    chance, rows = random.Random(seed), []
    with stage.fresh() as begun:
        stage.start(begun, harm=stop_at(20)).end()
        newest = checkpoint.checkpoints(begun / "run")[0]
        for kind, name in FILES.items():
            for harm_name, harm in HARMS.items():
                good = 0
                for _ in range(repeats):
                    with stage.fresh() as output:
                        shutil.copytree(begun, output)
                        harm(output / "run" / newest.name / name, chance)
                        life = stage.start(output)
                        ended = life.end() == 0 and final_state(output / "run") == stage.reference()
                        reported = "passed over" in life.output and "resumed" in life.output
                        kept = (output / "run" / f"{newest.name}.broken").is_dir()
                        good += ended and reported and kept and "Traceback" not in life.output
                rows.append(_row(f"{harm_name}, checkpoint: {kind}", repeats, good, "it is skipped; identical end"))
    return rows


def damaged_figures(stage: Stage, repeats: int, seed: int) -> dict[str, object]:
    """metrics.jsonl: lines that are no JSON any more are dropped, the run goes on and its weights are the same."""
    chance, good = random.Random(seed), 0
    with stage.fresh() as begun:
        stage.start(begun, harm=stop_at(20)).end()
        for i in range(2 * repeats):
            with stage.fresh() as output:
                shutil.copytree(begun, output)
                (flip, truncate)[i % 2](output / "run/metrics.jsonl", chance)
                life = stage.start(output)
                ended = life.end() == 0 and "Traceback" not in life.output
                good += ended and final_state(output / "run")["files"] == stage.reference()["files"]
    return _row("bit flip or truncation: metrics.jsonl", 2 * repeats, good, "lines dropped; identical weights")


def damaged_shards(stage: Stage, repeats: int, seed: int) -> list[dict[str, object]]:
    """Each kind of file of the prepared data, between two lives: made anew, the same, and the run goes on. A flip in
    what the manifest records for people alone (``made_from``) changes nothing and goes unnoticed."""
    chance, rows = random.Random(seed), []
    with stage.fresh() as begun:
        stage.start(begun, harm=stop_at(20)).end()
        (prepared,) = (p for p in (stage.folder / "cache").iterdir() if p.is_dir())
        for kind, name in SHARDS.items():
            for harm_name, harm in HARMS.items():
                good = 0
                for _ in range(repeats):
                    with stage.fresh() as output:
                        shutil.copytree(begun, output)
                        harm(prepared / name, chance)
                        intact = _intact(prepared)
                        life = stage.start(output)
                        ended = life.end() == 0 and final_state(output / "run") == stage.reference()
                        good += ended and intact != ("built again" in life.output) and "Traceback" not in life.output
                rows.append(_row(f"{harm_name}, prepared data: {kind}", repeats, good, "prepared again; identical end"))
    return rows


def _intact(prepared: Path) -> bool:
    try:
        PreparedData(prepared, verify=True)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------- a full disk


def full_disk(stage: Stage) -> list[dict[str, object]]:
    """Each write of a save fails in turn: exit code 2, the disk named, earlier checkpoints good, no rest of the failed
    one; with room again the run ends equal."""
    cases: list[tuple[str, Callable[[], None]]] = [
        (f"disk full: {kind}", _no_space(name)) for kind, name in FILES.items()
    ]
    cases += [("disk error (EIO) at fsync", _failing_fsync), ("file size limit (the kernel's EFBIG)", _limited)]
    rows = []
    for name, harm in cases:
        with stage.fresh() as output:
            life = stage.start(output, harm=harm)
            code, good = life.end(), steps_of(output / "run")
            said = "error: " in life.output and "Traceback" not in life.output
            clean = not list((output / "run").glob("*.tmp"))
            ended = stage.start(output).end() == 0 and final_state(output / "run") == stage.reference()
            fine = code == 2 and bool(good) and said and clean and ended
            rows.append(_row(name, 1, int(fine), "exit code 2, error message; earlier checkpoints good; identical end"))
            if not fine:
                print(f"{name}: {code=} {good=} {said=} {clean=} {ended=}\n{life.output}", flush=True)
    return rows


def _no_space(name: str) -> Callable[[], None]:
    def harm() -> None:
        write = checkpoint.write_file

        def full(path: Path, content: bytes) -> dict[str, object]:
            if path.name == name and "step_00000006" in str(path):
                path.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(path, content)

        checkpoint.write_file = full

    return harm


def _failing_fsync() -> None:
    calls, fsync = [0], os.fsync

    def failing(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 30:  # in the fourth save or so
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    os.fsync = failing


def _limited() -> None:
    """No file beyond 20 kB can be written from step 7 on, by the kernel's word."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train_step = Trainer.train_step

    def limited(self: Trainer, stop: object) -> object:
        if self.progress.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return train_step(self, stop)  # type: ignore[arg-type]

    Trainer.train_step = limited  # type: ignore[method-assign]


def _row(fault: str, times: int, good: int, outcome: str) -> dict[str, object]:
    print(f"{fault}: {good} of {times} as documented ({outcome})", flush=True)
    return {"fault": fault, "times": times, "as documented": good, "outcome": outcome, "ok": good == times}
