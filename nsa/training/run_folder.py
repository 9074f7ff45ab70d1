"""The folder of a run: made, locked and labelled with the configuration."""

import fcntl
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from nsa.config import Config, dump_config, load_saved
from nsa.strict_yaml import parse
from nsa.training.exit_codes import REQUEUE

# What may differ between a checkpoint and the configuration that resumes it: it changes neither what is learned up to
# the checkpoint nor the order of the data. `training.steps` extends or shortens a run (and so the decay ahead).
CHANGEABLE = (
    "name",
    "output_dir",
    "start_from",
    "evaluation",
    "checkpoint",
    "resume",
    "recovery",
    "engine",
    "parallel",
    "data.cache_dir",
    "data.workers",
    "training.steps",
    "training.micro_batch_size",
    "training.validation_every",
    "training.validation_samples",
    "training.log_every",
    "training.probe_every",
    "training.max_skipped_steps",
    "training.max_hours",
)


# Of these: what computes the same with other roundings, so that the run is not bitwise what it would have been.
ROUNDED = (
    "engine.backend",
    "engine.dense_attention",
    "engine.offload_optimizer",
    "engine.precision",
    "engine.zero_stage",
    "parallel",
    "training.micro_batch_size",
)

# Of a source: which rows are read.
WHERE = ("path", "packages", "subset", "split", "text_field", "include", "exclude", "bad_rows")
LOCK_SECONDS = 60.0  # that a run waits for the one before: ranks whose launcher was killed finish a step and save


class FolderBusyError(ValueError):
    """Another process trains in the run folder: the same command may work later."""

    exit_code = REQUEUE


class RunFolder:
    """``<output_dir>/<name>``, locked for this process until it ends (however it ends).

    Raises:
        FolderBusyError: another process trains there, still after `LOCK_SECONDS`.
        ValueError: it cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output_dir) / config.name
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: IO[str] = (self.path / "run.lock").open("a+")
        except OSError as e:
            raise ValueError(
                f"the run folder {self.path} cannot be written ({e.strerror}): set output_dir to a folder that can"
            ) from None
        self._wait_for_lock()
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._lock.flush()

    def _wait_for_lock(self) -> None:
        announced, end = False, time.monotonic() + LOCK_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.seek(0)
                other = f"another process ({self._lock.read().strip() or 'unknown'}) trains in {self.path}"
            if time.monotonic() >= end:
                raise FolderBusyError(
                    f"{other}: run the same command again when it has ended (exit code {REQUEUE}), stop it, or start "
                    "this run under another name (name=...)"
                )
            if not announced:
                print(f"{other}: waiting for its end, at most {LOCK_SECONDS:g} s", flush=True)
                announced = True
            time.sleep(0.2)

    def label(self, config: Config, deepspeed: dict[str, Any]) -> None:
        """Save what the run is: config.yaml and deepspeed.json."""
        for name, text in (("config.yaml", dump_config(config)), ("deepspeed.json", json.dumps(deepspeed, indent=1))):
            part = self.path / f"{name}.tmp"
            part.write_text(text)
            part.replace(self.path / name)

    def close(self) -> None:
        self._lock.close()


def check_same(saved: Path, config: Config, where: Path) -> list[str]:
    """Refuse to resume from a checkpoint of another configuration.

    Args:
        saved: config.yaml of the checkpoint. where: the checkpoint, for the message.

    Returns:
        The differences that ``resume.allow`` names, and those of `ROUNDED` keys, in words.

    Raises:
        ValueError: naming every other key that differs; or it is no configuration.
    """
    before, now = (_compared(c) for c in (load_saved(saved), config))
    changed = {
        key: f"{key}: {before.get(key, 'absent')} there, {now.get(key, 'absent')} now"
        for key in sorted(before.keys() | now.keys())
        if before.get(key, "absent") != now.get(key, "absent")
    }
    different = {key: change for key, change in changed.items() if not _among(key, CHANGEABLE)}
    allowed = [change for key, change in different.items() if key in config.resume.allow]
    allowed += [f"{change} (other roundings)" for key, change in changed.items() if _among(key, ROUNDED)]
    refused = [change for key, change in different.items() if key not in config.resume.allow]
    if refused:
        advice = "\nSet these keys back to resume it, or start a new run under another name (name=...)"
        if all(key.startswith("optimizer.") and key != "optimizer.kind" for key in different):
            advice += f". To change them on purpose: resume.allow=[{', '.join(different)}]"
        raise ValueError(
            f"{where} was written under another configuration:\n"
            + "\n".join(f"  {change}" for change in refused)
            + advice
        )
    return allowed


def record_changes(run: Path, checkpoint: Path, changes: list[str]) -> None:
    """Append what `check_same` let differ to ``<run>/changes.txt``, once, and print it."""
    path = run / "changes.txt"
    known = path.read_text().splitlines() if path.exists() else []
    for change in changes:
        line = f"from {checkpoint.name} on: {change}"
        print(line, flush=True)
        if line not in known:
            with path.open("a") as file:
                file.write(line + "\n")


def _among(key: str, names: Iterable[str]) -> bool:
    """Whether it is one of the keys, or in one of the sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _compared(config: Config) -> dict[str, Any]:
    """The configuration by full key, without where the data come from: the checkpoint knows their fingerprint."""
    tree: Any = parse(dump_config(config), "configuration")
    for source in tree["data"]["sources"]:
        for key in WHERE:
            source.pop(key, None)
    tree["data"]["tokenizer"].pop("path", None)
    return _flatten(tree)


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flatten(value, f"{prefix}.{key}".lstrip(".")).items()}
