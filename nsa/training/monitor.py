"""Where figures go: metrics.jsonl and TensorBoard, with one curve however often the run was resumed."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """Writes scalars by step to ``<run>/metrics.jsonl`` and ``<run>/tensorboard``.

    Args:
        folder: the run folder. resumed: steps that the run has behind it; what an earlier process logged after them
            is dropped, since it will be logged again.
    """

    def __init__(self, folder: Path, resumed: int) -> None:
        path = folder / "metrics.jsonl"
        kept = _lines_until(path, resumed)
        part = path.with_suffix(".tmp")
        part.write_text("".join(kept))
        part.replace(path)
        self._jsonl = path.open("a")
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed + 1, max_queue=1000)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One line of JSON, and a point of each curve."""
        self._jsonl.write(json.dumps({"step": step} | metrics) + "\n")
        self._jsonl.flush()
        for tag, value in metrics.items():
            self._tensorboard.add_scalar(tag, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        self._jsonl.close()
        self._tensorboard.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of steps up to ``step``; a killed process may have left half a line at the end."""
    kept = []
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for line in text.splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step and line.endswith("\n"):
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return kept
