"""What every test gets: no network, no trace outside the clone, and the marks of what a machine can run."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".venv" / "cache"

# Before torch, DeepSpeed or transformers are imported, here or in a process that a test starts.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=str(CACHE / "huggingface"),
    MPLCONFIGDIR=str(CACHE / "matplotlib"),
    TRITON_HOME=str(CACHE),
    XDG_CACHE_HOME=str(CACHE),
)
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(CACHE / "torch_extensions"))
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))


def _has_gpu() -> bool:
    try:
        return "GPU" in subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout
    except OSError:
        return False


HAS_GPU = _has_gpu()
if not HAS_GPU:
    os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


# Fixtures of a session that start ranks and take minutes: one worker makes them, for all, and one after the other.
SHARED = {"one_rank", "two_ranks", "four_ranks"}
# Files that take longest, longest first: begun last, one of them would leave the other workers without work.
LONG = ["test_kernels.py", "test_kernels_compile.py", "test_examples.py", "test_growth.py", "test_launch.py"]


# Seconds that a test may take with its fixtures; @pytest.mark.time_limit(seconds) sets another limit.
TIME_LIMIT = 660  # longer than a process that a test starts may take
LONG_TIME_LIMIT = 5400  # of tests that share ranks or are slow: these start several


def pytest_configure(config: pytest.Config) -> None:
    # pytest 9.1 loses the fixtures of a folder that the command line comes back to (pytest issue 14971).
    config.args.sort()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep files together, and the tests that share ranks. Here, since pytest-xdist reads the groups right after."""
    item.add_marker(pytest.mark.xdist_group("ranks" if shares_ranks(item) else item.path.name))


def shares_ranks(item: pytest.Item) -> bool:
    return not SHARED.isdisjoint(item.fixturenames)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what cannot or should not run; the tests that share ranks come first, then the files that take long."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    items.sort(key=shares_ranks, reverse=True)
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: run with --slow"))
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed the global generators: what a test draws does not depend on the tests before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries draw from it
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that takes longer than its limit. What hangs outside of Python is ended by faulthandler_timeout."""
    marker = item.get_closest_marker("time_limit")
    seconds = LONG_TIME_LIMIT if shares_ranks(item) or "slow" in item.keywords else TIME_LIMIT
    seconds = marker.args[0] if marker else seconds

    def fail(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"the test is not done after its time limit of {seconds:g} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return (yield)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run_python():
    """Run ``python *arguments`` in the root of the clone; returns the finished process, with its text captured."""

    def run(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run
