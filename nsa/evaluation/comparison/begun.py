"""What is known of a cell that is not finished: the batches that were answered, so that a kill costs one at most.

A file for each such cell, removed when the cell is written. Its first line says who answered, and the threshold that
was fitted. While it is fitted, each other line is a threshold and what it spends. Later each is a batch: its answers
and figures, and what was counted and how long it took up to there.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from nsa.baselines import Ledger
from nsa.baselines.ledger import Counts
from nsa.evaluation.comparison.answers import Answer
from nsa.untrusted import UntrustedError, parse_json, read_bytes

LIMIT = 2**30  # bytes of the file of a cell


class Begun:
    """The file of a cell, which need not be there.

    Args:
        by: what must be the same for a cell to be gone on with; JSON can hold it.

    Attributes:
        threshold: that was fitted. tried: thresholds while none is, with what each spends. answers, seconds, ledger,
            figures: of all batches so far.
    """

    def __init__(self, path: Path, by: Mapping[str, Any]) -> None:
        self.path, self.by = path, dict(by)
        self.threshold: float | None = None
        self.tried: dict[float, float] = {}
        self.answers: list[Answer] = []
        self.seconds = 0.0
        self.ledger = Ledger()
        self.figures: list[dict[str, Any]] = []
        self._lines: list[dict[str, Any]] = []
        # A process that was killed may have left half a line; what follows damage is answered again.
        with suppress(UntrustedError, OSError, KeyError, TypeError, ValueError, AttributeError):
            head, *batches = read_bytes(path, LIMIT).split(b"\n")[:-1]
            first = parse_json(head, str(path))
            if first["by"] == json.loads(json.dumps(self.by)):
                self.threshold = first["threshold"]
                for line in batches:
                    self._take(parse_json(line, str(path)))

    def _take(self, batch: dict[str, Any]) -> None:
        if "tried" in batch:
            threshold, spent = map(float, batch["tried"])
            self.tried[threshold] = spent
            self._lines.append(batch)
            return
        answers, seconds = [Answer(*answer) for answer in batch["answers"]], float(batch["seconds"])
        ledger, figures = _ledger(batch["ledger"]), list(batch["figures"])
        self.answers, self.seconds, self.ledger = self.answers + answers, seconds, ledger
        self.figures += figures
        self._lines.append(batch)

    def begin(self, threshold: float | None) -> None:
        """Write what is known, from which `keep_trial` or `add` goes on. A second call leaves out trials."""
        self.path.parent.mkdir(exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        lines = [{"by": self.by, "threshold": threshold}, *self._lines]
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.rename(self.path)
        self._lines = []

    def keep_trial(self, threshold: float, spent: float) -> None:
        """Keep what a threshold spends, after ``begin(None)``."""
        self._append({"tried": [threshold, spent]})
        self.tried[threshold] = spent

    def add(self, answers: Sequence[Answer], seconds: float, figures: Sequence[dict[str, Any]]) -> None:
        """Keep a batch, which the ledger has counted.

        Args:
            seconds: that the cell took so far. figures: all so far.
        """
        new = list(figures[len(self.figures) :])
        batch = {
            "answers": [[a.sample, a.query, None if a.score is None else float(a.score)] for a in answers],
            "seconds": seconds,
            "figures": new,
            "ledger": _told(self.ledger),
        }
        self._append(batch)
        self.answers += answers
        self.seconds = seconds
        self.figures += new

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _told(ledger: Ledger) -> dict[str, Any]:
    """For JSON. In order: what is added up in another order has other bits."""
    parts = {"counts": ledger.counts, "beside": ledger.beside}
    told: dict[str, Any] = {
        name: [[*key, {n: x.tolist() for n, x in vars(counts).items()}] for key, counts in part.items()]
        for name, part in parts.items()
    }
    return {**told, "ran": sorted(map(list, ledger.ran))}


def _ledger(told: Mapping[str, Any]) -> Ledger:
    counts, beside = (
        {
            (phase, layer): Counts(**{n: torch.tensor(x, dtype=torch.float64) for n, x in sums.items()})
            for phase, layer, sums in told[name]
        }
        for name in ("counts", "beside")
    )
    return Ledger(counts, beside, {(phase, layer) for phase, layer in told["ran"]})
