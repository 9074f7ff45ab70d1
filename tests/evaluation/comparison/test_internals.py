"""What the report says of bytes and of kept attention, by arithmetic on planted figures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from simulated import cell

from nsa.evaluation.comparison.reading import figures, internals
from nsa.evaluation.comparison.reading.analysis import Table
from nsa.evaluation.comparison.reading.pages import Grid, Picture
from nsa.evaluation.comparison.rows import Cell

SMALL, LARGE, KV = 10_000_000, 100_000_000, 40_000_000  # parameters; bytes of a dense step


def sized(model: str, parameters: int, method: str, budget: float | None, right: int) -> Cell:
    made = cell(method, model, budget, parameters=parameters)
    score = (np.arange(200) < right).astype(np.float64)
    return replace(made, score=score, figures={**made.figures, "kv_bytes": KV})


def test_bytes_are_of_weights_by_sequence_and_of_the_counted_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each sibling what none of its others beats: at as many bytes the better one, at one score the cheaper."""
    drawn: dict[int, dict[str, list[tuple[float, float]]]] = {}

    def draw(curves: dict[str, list[tuple[float, float]]], batch: int) -> bytes:
        drawn[batch] = curves
        return b""

    monkeypatch.setattr(figures, "iso_cost", draw)
    made = [
        sized("small", SMALL, "dense", None, 170), sized("large", LARGE, "dense", None, 190),
        sized("large", LARGE, "quest", 0.25, 180), sized("large", LARGE, "sparq", 0.25, 175),
        sized("large", LARGE, "twilight", 0.5, 180), sized("large", LARGE, "h2o", 0.5, 185),
        sized("large", LARGE, "random", 0.1, 200), sized("large", LARGE, "oracle_topk", 0.1, 200),
    ]  # fmt: skip
    section = internals.iso_cost(Table(made))
    assert [part.name for part in section.parts if isinstance(part, Picture)] == ["isocost-1", "isocost-64"]
    for batch, curves in drawn.items():
        expected = {
            "small (10M)": [(2 * SMALL / batch + KV, 0.85)],
            "large (100M)": [(2 * LARGE / batch + KV * s, y) for s, y in ((0.25, 0.9), (0.5, 0.925), (1, 0.95))],
        }
        assert {name: sorted(points) for name, points in curves.items()} == expected


@pytest.mark.parametrize(("ratio", "shown"), [(1.19, False), (1.21, True)])
def test_siblings_of_almost_one_size_are_of_one(ratio: float, shown: bool) -> None:
    made = [sized("small", SMALL, "dense", None, 170), sized("large", round(SMALL * ratio), "dense", None, 190)]
    section = internals.iso_cost(Table(made))
    assert any(isinstance(part, Picture) for part in section.parts) == shown
    assert ("Not shown: all siblings are of one size." in section.parts) != shown


def test_kept_mass_is_told_of_the_budget_in_the_middle_with_its_least_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean over tasks, at the longest length."""
    maps: dict[str, Any] = {}
    monkeypatch.setattr(figures, "kept_mass", lambda means, title: maps.update(means) or b"")
    mass = np.array([[0.9, 0.8], [0.3, 0.7], [0.5, 0.6]])
    made = [cell("dense"), cell("dense", length=4096)]
    for budget in (1.0, 0.25, 0.1, 0.05):
        for length, task, more in ((1024, "mqar", 0.0), (4096, "mqar", -0.1), (4096, "passkey", 0.1)):
            like = cell("quest", budget=budget, length=length, task=task)
            kept = mass + more if (budget, length) == (0.1, 4096) else mass * 0
            made.append(replace(like, figures={**like.figures, "kept_mass": kept.tolist()}))
    section = internals.internals(Table(made))
    (grid,) = (part for part in section.parts if isinstance(part, Grid))
    assert grid.lines == [["quest", f"{mass.mean():.3f}", "0.300", "1, 0"]]
    np.testing.assert_allclose(maps["quest"], mass)
    assert any("budget 10 %, 4,096 tokens" in part.caption for part in section.parts if isinstance(part, Picture))
