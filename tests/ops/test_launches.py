"""At short lengths a step takes as long as its launches do: a layer must not come to need more of them unnoticed."""

import os

import pytest

pytest.importorskip("triton")
from benchmarks.launches import count


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not launched")
@pytest.mark.parametrize(("kind", "most"), [("nsa", 78), ("dense", 35)])
def test_launches_of_a_layer(kind: str, most: int) -> None:
    """After a change that is meant: python benchmarks/launches.py --list says what they are."""
    forward, backward = count("25m", kind, 256)
    assert forward["rotary.heads_kernel"] >= 1  # the kernels' way was counted
    assert forward.total() + backward.total() <= most, (forward, backward)
