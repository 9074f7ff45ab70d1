"""Where figures go: metrics.jsonl and TensorBoard, with one curve however often the run was resumed."""

import json
import math
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

OVERVIEW = {
    "loss": ("train/loss", "validation/loss"),
    "gradient norm": ("train/grad_norm",),
    "tokens per second": ("perf/tokens_per_second",),
    "learning rate": ("train/learning_rate",),
}


class Monitor:
    """Writes scalars by step to ``<run>/metrics.jsonl`` and ``<run>/tensorboard``, there with an overview (`charts`).

    Args:
        folder: the run folder. resumed: steps that the run has behind it; what an earlier process logged after them
            is dropped, since it will be logged again. log_every: steps between two lines.

    Attributes:
        lowest: the lowest validation loss up to now and the first step that had it, from metrics.jsonl; or None.
        latest: the same of the last step that was validated, which may be NaN.
        lost: which lines of the steps before are not there (a file that was cut or changed), in words; or "".
    """

    def __init__(self, folder: Path, resumed: int, log_every: int = 1) -> None:
        path = folder / "metrics.jsonl"
        kept, unreadable = _lines_until(path, resumed)
        self.lost = _lost(kept, unreadable, resumed, log_every)
        part = path.with_suffix(".tmp")
        part.write_text("".join(kept))
        part.replace(path)
        self._jsonl = path.open("a")
        board = folder / "tensorboard"
        _date_back(board)
        self._tensorboard = SummaryWriter(str(board), purge_step=resumed + 1, max_queue=1000)
        before = [json.loads(line) for line in kept]
        self.lowest: tuple[float, int] | None = None
        self.latest: tuple[float, int] | None = None
        for metrics in before:
            self._note_validation(metrics["step"], metrics)
        self._before: set[str] = set().union(*before)
        self._shown: set[str] = set()  # by this process's last layout, which takes the place of all others
        self._hook = threading.excepthook
        threading.excepthook = _say_nothing_of_the_disk(self._hook)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of JSON, and a point of each curve."""
        self._jsonl.write(json.dumps({"step": step} | metrics) + "\n")
        self._jsonl.flush()
        self._note_validation(step, metrics)
        for tag, value in metrics.items():
            self._tensorboard.add_scalar(tag, value, step)
        if not self._shown.issuperset(metrics):
            self._shown.update(metrics, self._before)
            self._tensorboard.add_custom_scalars(charts(self._shown))
        self._tensorboard.flush()

    def _note_validation(self, step: int, metrics: dict[str, Any]) -> None:
        loss = metrics.get("validation/loss")
        if not isinstance(loss, float):
            return
        self.latest = loss, step
        if math.isfinite(loss) and (self.lowest is None or loss < self.lowest[0]):
            self.lowest = loss, step

    def close(self) -> None:
        try:
            self._jsonl.close()
        finally:
            self._tensorboard.close()
            threading.excepthook = self._hook


def charts(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """What TensorBoard shows under *Custom scalars*: section -> chart -> patterns of its curves (`SummaryWriter`).

    What to look at first comes first. A metric of all layers is one chart. Metrics whose names differ in the last word
    share a section. A kind of attention has all of them or none, so that the section is the same in all runs:
    TensorBoard loses charts that are new in a section of a third run.

    Args:
        tags: names of curves, ``group/name`` or ``group/name/layer_XX``.
    """
    found: dict[str, dict[str, list[Any]]] = {"overview": {k: ["Multiline", list(v)] for k, v in OVERVIEW.items()}}
    for metric in sorted({tag.rpartition("/layer_")[0] for tag in tags if "/layer_" in tag}):
        section = f"{metric.rpartition('_')[0] or metric} by layer"
        found.setdefault(section, {})[metric] = ["Multiline", [f"{re.escape(metric)}/layer_.*"]]
    return found


def _lines_until(path: Path, step: int) -> tuple[list[str], int]:
    """The whole lines of steps up to ``step``, and how many cannot be read. A killed process may have left half a line
    at the end."""
    kept, unreadable = [], 0
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            if not line.endswith("\n"):
                continue
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable += 1
    return kept, unreadable


def _lost(kept: list[str], unreadable: int, resumed: int, log_every: int) -> str:
    last = json.loads(kept[-1])["step"] if kept else 0
    losses = [f"{unreadable} of its lines cannot be read"] if unreadable else []
    if last + log_every <= resumed:
        losses.append(f"figures after step {last} up to step {resumed} are lost")
    return f"metrics.jsonl was cut or changed: {' and '.join(losses)}" if losses else ""


def _date_back(board: Path) -> None:
    """Give event files that are not older than now an earlier time in their names: TensorBoard reads them by name, and
    the file of a resumed run must come last, also where the clock went back."""
    latest = int(time.time())
    for path in sorted(board.glob("events.out.tfevents.*"), reverse=True):
        stamp, dot, rest = path.name.removeprefix("events.out.tfevents.").partition(".")
        if not stamp.isdecimal():
            continue
        if int(stamp) >= latest:
            stamp = f"{latest - 1:010d}"
            path.rename(path.with_name(f"events.out.tfevents.{stamp}{dot}{rest}"))
        latest = int(stamp)


def _say_nothing_of_the_disk(before: Any) -> Any:
    """TensorBoard's thread hands an error of the disk to the training thread, which says it: no traceback besides."""

    def hook(raised: threading.ExceptHookArgs) -> None:
        if not (isinstance(raised.exc_value, OSError) and type(raised.thread).__name__ == "_AsyncWriterThread"):
            before(raised)

    return hook
