"""Processes that train and are done harm to.

A life is a process of its own, with its own process group of torch, files and signals; it differs from `python -m
nsa.train` in one thing: it is forked from this process, which has imported torch and DeepSpeed once (two seconds
instead of eight). Faults that cannot be done from outside are injected by a function that the child calls first.
"""

import json
import os
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nsa.training.trainer  # noqa: F401 - imported here, once
from nsa.training import checkpoint

STEPS = 40
CONFIG = """
name: run
model: {vocab_size: 400, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 16,
        intermediate_size: 48, max_position: 128}
attention:
  kind: [nsa, dense]
  nsa: {compress_length: 8, compress_stride: 4, block_size: 8, num_blocks: 4, window: 16}
data: {sequence_length: 64, tokenizer: {vocab_size: 400}, validation_fraction: 0.2, workers: 1}
optimizer: {learning_rate: 3.0e-3, warmup_steps: 2}
training: {global_batch_size: 4, micro_batch_size: 2, validation_every: 10, validation_samples: 4, probe_every: 20}
checkpoint: {every: 2}
engine: {precision: fp32}
"""
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Life:
    """One process that trains. Its output (stdout and stderr) goes to a file."""

    def __init__(
        self, arguments: list[str], log: Path, harm: Callable[[], None] | None = None, **environment: str
    ) -> None:
        self.log, self.code = log, None
        log.write_text("")
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._live(arguments, harm, environment)

    def _live(self, arguments: list[str], harm: Callable[[], None] | None, environment: dict[str, str]) -> None:
        code = 1
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            for name in LAUNCHED:
                os.environ.pop(name, None)
            os.environ.update(environment)
            sys.argv = ["nsa.train", *arguments]
            from nsa.train import main

            if harm is not None:
                harm()
            code = main()
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def over(self) -> bool:
        """Whether it has ended; ``code`` is then its exit code, or minus the signal that killed it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def until(self, condition: Callable[[], bool], seconds: float = 120.0, pause: float = 0.002) -> bool:
        """Wait for a condition; False if the process ended, or so many seconds did, before it held."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if self.over():
                return False
            time.sleep(pause)
        return False

    def until_step(self, step: int = 1) -> bool:
        return self.until(lambda: f"step {step:>2}/{STEPS}" in self.output or self._beyond(step))

    def _beyond(self, step: int) -> bool:
        return any(f"step {s:>2}/{STEPS}" in self.output for s in range(step, STEPS + 1))

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.over():
            os.kill(self.pid, number)

    def end(self, seconds: float = 180.0) -> int:
        """The exit code. A process that does not end by itself is killed: -9."""
        if not self.until(lambda: False, seconds) and not self.over():
            self.kill()
            self.until(lambda: False)
        assert self.code is not None
        return self.code


class Stage:
    """A folder with the configuration of all lives, the data they share and the run that nobody touched."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(CONFIG)
        source = {"name": "text", "kind": "files", "path": f"{sysconfig.get_path('stdlib')}/json/*.py"}
        self.arguments = [str(folder / "tiny.yaml"), f"training.steps={STEPS}", f"data.sources=[{json.dumps(source)}]"]
        self.arguments += [f"data.cache_dir={folder / 'cache'}", *overrides]
        self._lives = 0
        self.expected: dict[int, dict[str, object]] = {}  # by the number of ranks: what an untouched run ends as

    def start(self, output: Path, *overrides: str, harm: Callable[[], None] | None = None, **environment: str) -> Life:
        self._lives += 1
        log = self.folder / f"life-{self._lives}.log"
        return Life([*self.arguments, f"output_dir={output}", *overrides], log, harm, **environment)

    def start_ranks(
        self, output: Path, *overrides: str, harm: dict[int, Callable[[], None]] | None = None
    ) -> list[Life]:
        """Two ranks. ``harm``: by rank."""
        port, lives = free_port(), []
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            lives.append(self.start(output, *overrides, harm=(harm or {}).get(rank), **place))
        return lives

    def reference(self, world_size: int = 1) -> dict[str, object]:
        """What an untouched run ends as."""
        if world_size not in self.expected:
            output = self.folder / f"reference-{world_size}"
            lives = self.start_ranks(output) if world_size == 2 else [self.start(output)]
            codes = [life.end() for life in lives]
            if any(codes):
                raise SystemExit(f"the untouched run failed ({codes}):\n{lives[0].output}")
            self.expected[world_size] = final_state(output / "run")
        return self.expected[world_size]

    @contextmanager
    def fresh(self) -> Iterator[Path]:
        """A folder for the output of one case, gone afterwards."""
        import shutil

        self._lives += 1
        output = self.folder / f"case-{self._lives}"
        try:
            yield output
        finally:
            shutil.rmtree(output, ignore_errors=True)


def final_state(run: Path) -> dict[str, object]:
    """All that the end of a run is: file hashes of its last checkpoint, and the losses of all its steps."""
    last = run / checkpoint.folder_name(STEPS)
    checkpoint.verify(last)
    manifest = json.loads((last / checkpoint.MANIFEST).read_text())["files"]
    hashes = {name: entry["sha256"] for name, entry in manifest.items() if name != "config.yaml"}  # names output_dir
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "train/loss", "train/grad_norm", "validation/loss")
    return {"files": hashes, "metrics": [{key: m.get(key) for key in keys} for m in metrics]}


def steps_of(run: Path) -> list[int]:
    """Steps of the checkpoints that verify, newest first; reports none."""
    good = []
    for path in checkpoint.checkpoints(run):
        try:
            checkpoint.verify(path)
        except checkpoint.CheckpointError:
            continue
        good.append(checkpoint.step_of(path))
    return good


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


__all__ = ["STEPS", "Life", "Stage", "final_state", "steps_of"]
