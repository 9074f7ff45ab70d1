"""Every file in configs/ loads, builds on the meta device and is as large as its name says."""

import re

import pytest
import torch

from nsa.config import load_config
from nsa.models import Decoder, count_parameters
from nsa.stages import stages_of
from tests.conftest import ROOT

ALL = sorted((ROOT / "configs").glob("*.yaml"))
FILES = [path for path in ALL if not stages_of(path)]
STAGES = [(path, stage) for path in ALL for stage in stages_of(path)]
SIZES = {"m": 10**6, "b": 10**9}


def test_the_sizes_of_the_issue_are_there():
    assert {path.stem for path in FILES} >= {"demo", "25m", "125m", "350m", "1b", "3b", "7b", "27b-a5b"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("kind", ["nsa", "dense", "[dense, nsa]"])
def test_builds_on_the_meta_device_and_has_the_size_of_its_name(path, kind):
    config = load_config(path, [f"attention.kind={kind}"])
    with torch.device("meta"):
        decoder = Decoder(config.model, config.attention)
    parameters = sum(p.numel() for p in decoder.parameters())
    assert parameters == count_parameters(config.model, config.attention)["total"]
    named = re.fullmatch(r"(\d+)([mb])(?:-a(\d+)([mb]))?", path.stem)
    if named and kind == "nsa":
        assert parameters == pytest.approx(int(named[1]) * SIZES[named[2]], rel=0.05)
        active = count_parameters(config.model, config.attention)["active"]
        expected = int(named[3]) * SIZES[named[4]] if named[3] else parameters
        assert active == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_a_plain_file_for_people_and_editors(path):
    text = path.read_text()
    config = load_config(path)
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert config.name == path.stem
    assert config.attention.kind == "nsa"
    assert config.data.sequence_length * max(config.evaluation.length_factors) > config.attention.nsa.window
    rows = config.training.micro_batch_size * config.data.sequence_length
    assert rows < 2**31


@pytest.mark.parametrize("path, stage", STAGES, ids=lambda x: getattr(x, "stem", x))
def test_a_stage_builds_and_starts_from_the_one_before(path, stage):
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    config, before = load_config(path, [f"stage={stage}"]), stages_of(path)
    first = stage == before[0]
    assert config.name == f"{path.stem}-{stage}"
    assert config.start_from == (None if first else f"checkpoints/{path.stem}-{before[before.index(stage) - 1]}")
    with torch.device("meta"):
        Decoder(config.model, config.attention)


def test_demo_needs_no_network_and_runs_on_one_or_two_ranks():
    config = load_config(ROOT / "configs/demo.yaml")
    assert {source.kind for source in config.data.sources} == {"builtin", "synthetic"}
    assert config.training.global_batch_size % (2 * config.training.micro_batch_size) == 0
