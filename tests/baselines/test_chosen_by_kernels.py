"""Quest and Twilight choose by operators: the kernels' choice is that of the portable path."""

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import decoded
from sessions import inputs

from nsa.baselines import Budget, Method
from nsa.baselines.methods.h2o import H2O
from nsa.baselines.methods.quest import Quest
from nsa.baselines.methods.twilight import Twilight
from nsa.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
METHODS = [
    Quest(budget=Budget(share=0.4), page=4),
    Quest(budget=Budget(tokens=14), page=4, over_group="max"),
    Twilight(base=Quest(page=4), budget=Budget(share=0.5), p=0.7),
    Twilight(base=H2O(), budget=Budget(share=0.5), p=0.7),
]


def counted(name: str, kernel: Callable[..., Any], called: Counter[str]) -> Callable[..., Any]:
    """``kernel``, which counts its calls."""

    def call(*arguments: Any) -> Any:
        called[name] += 1
        return kernel(*arguments)

    return call


@pytest.mark.skipif(INTERPRETED, reason="the test below runs by itself")
def test_in_the_interpreter(run_python: Callable[..., Any]) -> None:
    """In another process, since Triton reads TRITON_INTERPRET when a kernel is defined."""
    done = run_python("-m", "pytest", "-q", __file__, timeout=300, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="runs within test_in_the_interpreter")
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_kernels_choose_what_the_portable_path_does(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """With padding, and so with two budgets in a batch; after evictions."""
    from nsa.ops.kernels import inference_operators as operators

    given, padding, called = inputs(46, layers=2), torch.tensor([0, 5]), Counter[str]()
    expected = decoded(method, given, 40, padding)[0]
    for name in ("quest_pages", "top_p_tokens"):
        monkeypatch.setattr(operators, name, counted(name, getattr(operators, name), called))
    monkeypatch.setattr(dispatch, "_on_gpu", lambda *tensors: True)
    found = decoded(method, given, 40, padding)[0]
    assert len(found) == 12
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.mask, theirs.mask)
    quest = isinstance(method, Quest) or isinstance(method.base, Quest)  # type: ignore[attr-defined]
    assert bool(called["quest_pages"]) == quest
    assert called["top_p_tokens"] == (12 if method.name == "twilight" else 0)
