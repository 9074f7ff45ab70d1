"""The model of step times: its error on what was measured, and what must hold whatever its constants."""

import math

import pytest

from nsa.config import ConfigError, load_config
from nsa.layouts import GPUS, Layout, check, estimate, impossible, layouts, main, search
from tests.conftest import ROOT

H200 = GPUS["H200"]


@pytest.fixture(scope="module")
def config():
    return load_config(ROOT / "configs/7b.yaml", ["engine.zero_stage=1"])


def test_the_stated_error():
    errors = [abs(predicted / measured - 1) for *_, measured, predicted in check()]
    assert len(errors) == 16 and max(errors) < 0.2 and sum(errors) / 16 < 0.1


def test_layouts_are_all_of_them_and_the_best_fits(config):
    assert all(math.prod((x.tp, x.cp, x.pp, x.dp)) == 16 for x in layouts(16)) and len(set(layouts(16))) == 35
    found = search(config, 16, H200)
    assert found[0].fits and found[0].step_seconds == min(e.step_seconds for e in found if e.fits)
    assert not any(impossible(config, e.layout) for e in found)
    with pytest.raises(ConfigError, match="no layout of 7 GPUs"):
        search(config, 7, H200)


def test_traffic_is_that_of_the_axes(config):
    alone = estimate(config, Layout(1, 1, 1, 1), H200)
    assert not any(alone.links.values())
    assert estimate(config, Layout(2, 1, 1, 1), H200).links["tensor"] > 0
    context = estimate(config, Layout(1, 2, 1, 1), H200)
    assert context.links["context"] > 0 and context.links["data"] > 0, "context is folded into data parallelism"
    pipeline = estimate(config, Layout(1, 1, 2, 1), H200)
    assert pipeline.links["pipeline"] > 0 and pipeline.memory["weights"] < alone.memory["weights"]


def test_the_command(capsys):
    assert main([str(ROOT / "configs/1b.yaml"), "--gpus", "8", "--gpu", "H100"]) == 0
    assert "tokens/s" in capsys.readouterr().out
