"""Number of kernel launches of a layer, which limits the speed at short lengths."""

import os

import pytest

pytest.importorskip("triton")
from benchmarks.launches import count, count_step


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not launched")
@pytest.mark.parametrize(("kind", "most"), [("nsa", 78), ("dense", 35)])
def test_launches_of_a_layer(kind: str, most: int) -> None:
    """python benchmarks/launches.py --list prints the launches, for instance after an intended change."""
    forward, backward = count("25m", kind, 256)
    assert forward["rotary.heads_kernel"] >= 1  # the kernels' way was counted
    assert forward.total() + backward.total() <= most, (forward, backward)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not launched")
@pytest.mark.parametrize(("kind", "most"), [("nsa", 14), ("dsa", 25), ("dense", 13)])
def test_launches_of_a_layer_in_a_decoding_step(kind: str, most: int) -> None:
    """python benchmarks/launches.py --decode --list prints them."""
    counts = count_step("25m", kind)
    written = counts["decode.append_kernel"] + counts["compression.newest_kernel"]
    attended = counts["decode.split_kernel"] + counts["native_sparse_decode.chosen_kernel"]
    assert written == attended == 1
    assert counts.total() <= most, counts
