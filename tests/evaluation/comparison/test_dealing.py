"""In which order the cells of a comparison are dealt out to its workers."""

from typing import Any, cast

import pytest

from nsa.compare import main
from nsa.evaluation.comparison.arms import Place, Unit
from nsa.evaluation.comparison.workers import next_of, shared_out


def test_units_are_dealt_out() -> None:
    """Without methods first, where each kind has the longest first; then what is in memory."""

    class Stub:
        def __init__(self, model: str, chooses: bool) -> None:
            self.model, self.chooses = model, chooses

    def unit(arms: int, model: str, length: int, chooses: bool = True) -> Unit:
        return Unit(tuple(cast(Any, Stub(model, chooses)) for _ in range(arms)), Place("mqar", length, False))

    units = [unit(1, "a", 64), unit(7, "a", 64), unit(1, "b", 64), unit(1, "b", 128), unit(7, "b", 128)]
    dense = [unit(1, "a", 64, False), unit(1, "b", 64, False), unit(1, "b", 128, False)]
    both, order = [*units, *dense], []
    while both:
        order.append(next_of(both, None, None))
        both.remove(order[-1])
    assert order == [dense[2], *dense[:2], units[4], units[1], units[3], units[0], units[2]]
    alone = [units[0], units[2], dense[0], dense[1]]
    assert next_of(alone, cast(Any, "b"), alone[0].place) is dense[1]  # place and sibling are in memory
    assert next_of(alone[:2], cast(Any, "b"), None) is units[2]
    assert next_of(alone[:2], cast(Any, "c"), None) is units[0]
    # 17 cells for three: at most six together.
    assert [len(u.arms) for u in shared_out(units, 3)] == [1, 6, 1, 1, 1, 6, 1]
    assert [u.place for u in shared_out(units, 3)] == [units[i].place for i in (0, 1, 1, 2, 3, 4, 4)]
    assert shared_out(units, 1) == list(units) and shared_out([], 3) == []


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_number_of_workers_is_one_or_more(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["small.yaml", f"--workers={number}"])
    assert "--workers" in capsys.readouterr().err
