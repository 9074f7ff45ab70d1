"""Loss spikes: judged, skipped, and in the end left out of the data."""

import json
import math
import random

import pytest

from nsa.config import RecoveryConfig
from nsa.training.spikes import SpikeDetector, SpikeState, batch_number, beyond


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
