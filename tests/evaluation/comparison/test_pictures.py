"""Nothing in a picture is cut, and no axis is without its name."""

from typing import Any

import numpy as np
import pytest

from nsa.baselines import METHODS
from nsa.evaluation.comparison.reading import figures

NAMES = [method.name for method in METHODS if method.phases]


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


def test_the_names_of_all_methods_fit_beside_one_panel(drawn: list[Any]) -> None:
    """And no two methods look the same."""
    curves = [figures.Curve(name, [(0.125, 0.4), (0.25, 0.6)]) for name in [*NAMES, "own"]]
    figures.fronts({("retrieval", 64): curves}, {("retrieval", 64): 0.95}, "reads", "title")
    figure = drawn[0]
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(curves) + 1
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert box.x0 > figure.axes[0].get_window_extent().x1
    looks = {tuple(sorted((k, str(v)) for k, v in figures.style(sorted(NAMES), name).items())) for name in NAMES}
    without_lines = {tuple(pair for pair in look if pair[0] != "linestyle") for look in looks}
    assert len(without_lines) == len(NAMES)


def test_a_sibling_that_is_always_beaten_is_in_the_legend(drawn: list[Any]) -> None:
    points = [(0.1, 0.5, "dense", True), (0.2, 0.4, "nsa", False)]
    figures.frontiers({("retrieval", 64): points}, {("retrieval", 64): 0.95}, ["dense", "nsa"], "reads")
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} == {"dense", "nsa", "dense run"}
