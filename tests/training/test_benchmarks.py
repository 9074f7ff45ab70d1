"""Benchmarks on a machine without a GPU, and processes of a benchmark whose parent ends."""

import os
import signal
import subprocess
import sys
import time

import pytest
from tiny import start

from tests.conftest import HAS_GPU, ROOT

NEED_A_GPU = (
    *("attention", "decode", "dense_attention", "layer", "models", "scaling", "steady", "training", "tune_attention"),
)

CHILD = """
import time
from benchmarks.measure import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(100)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_benchmark_that_needs_a_gpu_says_so():
    path = ROOT / "benchmarks/training.py"
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr, done.stderr
    for name in NEED_A_GPU:  # a start of each takes ten seconds
        assert "need_gpu(parser)" in (ROOT / f"benchmarks/{name}.py").read_text(), name


def test_a_crossover_is_the_length_from_which_on_a_call_is_faster() -> None:
    pytest.importorskip("triton")
    from benchmarks.decode import crossovers

    ratios = {"quest": {4: 1.2, 8: 0.9, 16: 1.1, 32: 2.0}, "nsa": {4: 3.0, 8: 2.0, 32: 1.0}, "ours": {4: 9.0}}
    rows = [
        {"shape": "B", "batch": 1, "call": call, "tokens": tokens, "over_dense": ratio}
        for call, found in ratios.items()
        for tokens, ratio in found.items()
    ]
    assert {x["call"]: x["faster_from"] for x in crossovers(rows)} == {"quest": 16, "nsa": None}


@pytest.mark.skipif(sys.platform != "linux", reason="what the kernel of Linux does")
def test_no_process_of_a_benchmark_outlives_its_parent():
    parent = start(["-c", PARENT])
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    stat = ROOT.joinpath(f"/proc/{child}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it lives on")
