"""What tests/conftest.py promises of every test: a time limit, numbers that repeat, and no dependence on the order."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import LONG_TIME_LIMIT, ROOT, TIME_LIMIT

HANGS = """
import time
import pytest
import torch  # which the hooks seed: to load it would take the first test's time

@pytest.fixture
def hangs():
    time.sleep(5)

@pytest.mark.time_limit(0.3)
def test_that_hangs():
    try:
        time.sleep(5)
    except Exception:
        pass

@pytest.mark.time_limit(0.3)
def test_whose_fixture_hangs(hangs):
    pass

@pytest.mark.time_limit(0.3)
def test_that_is_in_time():
    pass
"""


def pytest_in(folder: Path, run_python, *arguments: str) -> str:
    """What pytest prints about the tests of ``folder`` under the hooks and settings of this suite."""
    settings = ["-c", str(ROOT / "pyproject.toml"), "-p", "tests.conftest", "-p", "no:cacheprovider"]
    files = [str(folder / argument) for argument in arguments]
    return run_python("-m", "pytest", "-q", *settings, "--rootdir", str(folder), *files).stdout


def test_a_test_that_hangs_fails_and_the_next_one_runs(tmp_path: Path, run_python) -> None:
    (tmp_path / "test_hangs.py").write_text(HANGS)
    output = pytest_in(tmp_path, run_python, "test_hangs.py")
    assert "1 failed, 1 passed, 1 error" in output, output
    assert output.count("not done after its time limit of 0.3 s") >= 2
    assert "FAILED" in output and "test_that_hangs" in output and "ERROR" in output


def test_a_hang_outside_of_python_ends_beyond_every_limit(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("faulthandler_exit_on_timeout") is True
    assert float(pytestconfig.getini("faulthandler_timeout")) > LONG_TIME_LIMIT > TIME_LIMIT > 0


def test_files_may_be_named_in_any_order(tmp_path: Path, run_python) -> None:
    """Also where the command line comes back to a folder whose conftest.py has fixtures."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/conftest.py").write_text("import pytest\n\n@pytest.fixture\ndef seven():\n    return 7\n")
    for name in ("inner/test_a.py", "inner/test_c.py"):
        (tmp_path / name).write_text("def test_it(seven):\n    assert seven == 7\n")
    (tmp_path / "test_b.py").write_text("def test_it():\n    pass\n")
    output = pytest_in(tmp_path, run_python, "inner/test_a.py", "test_b.py", "inner/test_c.py")
    assert "3 passed" in output, output


@pytest.mark.parametrize("turn", range(2))
def test_every_test_draws_the_same_numbers(turn: int) -> None:
    drawn = random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - of the global generators
    torch.manual_seed(0)
    assert drawn == (random.Random(0).random(), np.random.RandomState(0).rand(), torch.rand(()).item())
