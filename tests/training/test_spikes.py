"""Loss spikes: judged, skipped, and in the end left out of the data."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import tiny_config

from nsa.config import RecoveryConfig
from nsa.data.loader import Span
from nsa.training.quarantine import TrainingError, roll_back
from nsa.training.spikes import SpikeDetector, SpikeState, batch_number, beyond
from nsa.training.state import Progress


def test_steps_read_the_batches_that_are_not_left_out():
    chance = random.Random(0)
    for _ in range(100):
        left_out = sorted(chance.sample(range(30), chance.randrange(8)))
        expected = [b for b in range(60) if b not in left_out][:40]
        assert [batch_number(step, left_out) for step in range(40)] == expected


def test_a_batch_that_is_left_out_changes_no_step_before_it():
    chance = random.Random(1)
    for _ in range(100):
        left_out = sorted(chance.sample(range(30), 3))
        step = chance.randrange(30)
        later = [*left_out, batch_number(step, left_out)]
        assert all(batch_number(s, later) == batch_number(s, left_out) for s in range(step))


def test_what_is_a_spike():
    window = [2.0, 2.1, 1.9, 2.0]
    deviation = math.sqrt(0.02 / 4)
    assert beyond(2.0 + 6.01 * deviation, window, 6, 4) and not beyond(2.0 + 5.99 * deviation, window, 6, 4)
    assert not beyond(100.0, window, 0, 4), "0 is off"
    assert not beyond(100.0, window, 6, 5), "too few to judge by"
    assert not beyond(math.nan, window, 6, 4) and not beyond(math.inf, window, 6, 4), "another rule's"
    assert not beyond(0.1, window, 6, 4), "downward is no spike"
    assert not beyond(1.05, [1.0] * 10, 6, 4) and beyond(1.07, [1.0] * 10, 6, 4), "a flat curve"


def test_the_budget_and_the_memory():
    detector = SpikeDetector(RecoveryConfig(window=8, max_spikes=2), SpikeState())
    for step in range(20):
        detector.record(step, 1.0 + step % 3, 0.5, spike=False)
    assert len(detector.state.losses) == len(detector.state.grad_norms) == 8
    for step in (20, 21):
        detector.record(step, 50.0, 9.0, spike=True)
        assert not detector.exhausted
    assert 50.0 not in detector.state.losses, "a spike does not raise the mean that the next is measured by"
    for step in range(22, 28):
        detector.record(step, 1.0, 0.5, spike=False)
    detector.record(28, 50.0, 9.0, spike=True)
    assert detector.state.spikes == [21, 28] and not detector.exhausted, "the first is beyond the window"
    detector.state.spikes.append(27)
    detector.record(28, 50.0, 9.0, spike=True)
    assert detector.exhausted
    assert SpikeState(**json.loads(json.dumps(vars(detector.state)))) == detector.state


def test_too_few_steps_are_no_measure():
    """A quarter of the window, or four of a short one."""
    for window, least in ((128, 32), (40, 10), (8, 4)):
        detector = SpikeDetector(RecoveryConfig(window=window, grad_norm_sigma=6), SpikeState())
        for step in range(least):
            assert not detector.loss_spikes(1e6) and not detector.norm_spikes(1e6), step
            detector.record(step, 2.0, 0.5, spike=False)
        assert detector.loss_spikes(1e6) and detector.norm_spikes(1e6)


def test_a_second_rollback_adds_to_what_is_left_out(tmp_path):
    """Steps 9 and 11 (from 0) read batches 11 and 13, since 3 and 9 are left out: their documents are named, and the
    run goes on from a checkpoint of at most 9 steps."""
    asked, spikes = [], SpikeState([2.0], [0.5], [9, 11], [3, 9], rollbacks=1)
    stream = SimpleNamespace(locate=lambda i: [Span("text", f"document {i}", i, 0, 8)])
    ranks = SimpleNamespace(is_main=True, on_main=lambda action: action())
    config = tiny_config(tmp_path, "recovery.max_rollbacks=2")

    def load_before(step):
        asked.append(step)
        return Progress(step=8, updates=8)

    progress, cause = roll_back(spikes, config, ranks, tmp_path, stream, load_before)
    assert asked == [10] and (progress.step, progress.spikes.rollbacks) == (8, 2)
    assert progress.spikes.quarantine == [3, 9, 11, 13]
    assert "(steps 10, 12;" in cause and "batches [11, 13] are quarantined" in cause
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["batch"], line["step"], line["samples"]) for line in lines] == [
        (11, 10, [44, 47]),
        (13, 12, [52, 55]),
    ]
    assert [d["document"] for d in lines[1]["documents"]] == [f"document {i}" for i in range(52, 56)]
    with pytest.raises(TrainingError, match=r"the run went back 2 times already"):
        roll_back(replace(spikes, rollbacks=2), config, ranks, tmp_path, stream, load_before)
    with pytest.raises(TrainingError, match="no good checkpoint from before"):
        roll_back(spikes, config, ranks, tmp_path, stream, lambda step: None)


@pytest.mark.parametrize("launch", ["one_rank", "two_ranks"])
def test_a_rolled_back_run_is_one_that_never_read_the_batches(launch, one_rank, two_ranks):
    """Bitwise: weights, moments, generators, counters. By the loss and by the gradient norm; ZeRO 0, 1 and 3."""
    folder, answers = {"one_rank": one_rank, "two_ranks": two_ranks}[launch]  # named above: so it shares their worker
    for number, case in enumerate(answers["rolled_back"]):
        assert case == {"different": [], "quarantine": [6, 7], "rollbacks": 1}
        run = folder / f"rolled_back/runs/spiky{number}"
        lines = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
        assert [(line["batch"], line["step"], line["samples"]) for line in lines] == [
            (6, 7, [24, 27]),
            (7, 8, [28, 31]),
        ]
        documents = [d for line in lines for d in line["documents"]]
        assert {d["sample"] for d in documents} == set(range(24, 32)) and {d["source"] for d in documents} <= {
            "text",
            "copy",
        }
        steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 11)), "steps that were undone have one point all the same"
