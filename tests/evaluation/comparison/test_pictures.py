"""Nothing in a picture is cut, and no axis is without its name."""

from typing import Any

import numpy as np
import pytest

from nsa.evaluation.comparison import figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(figures, "_png", lambda figure: found.append(figure) or b"")
    yield found
    for figure in found:
        figures.plt.close(figure)


def test_the_highest_marker_has_room(drawn: list[Any]) -> None:
    figures.sinks({"dense": [0.065, 0.068], "nsa": [0.085, 0.071]})
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[1] > 1.05 * 0.085 and axes.get_ylim()[0] == 0


@pytest.mark.parametrize("methods", [1, 3, 5, 6, 11])
def test_the_lowest_map_of_each_column_names_its_axis(methods: int, drawn: list[Any]) -> None:
    figures.kept_mass({f"m{i}": np.full((2, 3), 0.5) for i in range(methods)}, "title")
    maps = [axes for axes in drawn[0].axes if axes.get_visible() and axes.images and axes.get_title()]
    assert len(maps) == methods
    for number, axes in enumerate(maps):
        lowest = number + min(5, methods) >= methods
        assert axes.get_xlabel() == ("KV head" if lowest else "")
