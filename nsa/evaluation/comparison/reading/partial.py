"""A comparison that was stopped: which of its cells are missing, by the plan that was written when it began."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa.evaluation.comparison.rows import ResultsError
from nsa.untrusted import UntrustedError, read_json

PLAN = "plan.json"
NOT_ANSWERED = "not answered: the comparison was stopped"


@dataclass(frozen=True)
class Plan:
    """cells: in words, as they are left out -> id. together: a note that leaves out many cells -> these, in words."""

    cells: Mapping[str, str]
    together: Mapping[str, list[str]]

    def told(self, asks: str) -> dict[str, Any]:
        """For JSON. ``asks``: a fingerprint of what the plan follows from."""
        return {"of": asks, "cells": dict(self.cells), "together": dict(self.together)}


def missing(
    path: Path, asks: str, there: Collection[str], left_out: Mapping[str, str], commit: str
) -> tuple[dict[str, str], int]:
    """What was left out, with each planned cell that is neither there nor left out; and how many cells were planned.

    Args:
        path: of the results. asks: a fingerprint of what the plan follows from. there: ids of cells. left_out: in
            words, which cell or cells -> why. commit: that began the results.

    Raises:
        ResultsError: no cell is there, or what is missing cannot be said.
    """
    if not there:
        raise ResultsError(f"{path} holds no cell yet, so there is nothing to report: run the comparison")
    plan = _read(path, asks, commit)
    if stray := sorted(set(there) - set(plan.cells.values())):
        raise ResultsError(f"{path} holds cells that {PLAN} does not plan, such as {stray[0]}: take them out")
    covered = {cell for note in left_out for cell in plan.together.get(note, [note])}
    new = [cell for cell, number in plan.cells.items() if number not in there and cell not in covered]
    return {**left_out, **dict.fromkeys(new, NOT_ANSWERED)}, len(plan.cells)


def _read(path: Path, asks: str, commit: str) -> Plan:
    try:
        found = read_json(path / PLAN)
        plan, of = Plan(found["cells"], found["together"]), found["of"]
        if not all(isinstance(part, dict) for part in (plan.cells, plan.together)):
            raise TypeError("no object")
    except FileNotFoundError:
        raise ResultsError(
            f"{path} has no {PLAN}, so the cells that are missing cannot be named: the code that began it wrote none. "
            f"Go on with the comparison until all cells are there (git checkout {commit.rstrip('+')})"
        ) from None
    except (UntrustedError, OSError, KeyError, TypeError) as e:
        raise ResultsError(f"{path / PLAN} is damaged ({e}). Run the comparison again: it writes this file") from None
    if of != asks:
        raise ResultsError(
            f"{path / PLAN} is of another configuration or stage than the manifest. Run the comparison again: it "
            "writes this file"
        )
    return plan
