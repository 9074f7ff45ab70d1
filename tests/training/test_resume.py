"""A resumed run is bitwise the run that went through."""

import pytest
from tiny import on_ranks

from nsa.training.batches import StepLoader, sample_indices
from tests.training.conftest import engines


def test_resume_is_bitwise(one_rank, two_ranks):
    """Weights, moments, generators and counters of the last checkpoint, byte by byte: no file differs."""
    assert one_rank[1]["resume"] == [[[]]] * 2
    assert two_ranks[1]["resume"] == [[[]]] * 4


def test_resume_is_bitwise_with_experts(two_ranks):
    """Split over the ranks, with the biases of the router."""
    assert two_ranks[1]["experts"] == [[[]]]


def test_resume_is_bitwise_where_layers_draw(one_rank, two_ranks):
    """Which queries NSA's loss looks at; also where two ranks share what they draw, and layers are recomputed."""
    assert one_rank[1]["drawn"] == [[[]]]
    assert two_ranks[1]["drawn"] == [[[]]]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_resume_is_bitwise_everywhere(tmp_path, world_size):
    """Every ZeRO stage in both precisions, from every step; SGD; activation checkpointing."""
    cases = engines("fp32") + engines("bf16") + engines("fp32", "optimizer.kind=sgd", stages=[1])
    cases += engines("bf16", "engine.activation_checkpointing=full", stages=[3])
    every, after = [[*case, "checkpoint.every=1"] for case in cases], [1, 2, 3, 4, 5]
    found = on_ranks(world_size, tmp_path, {"all": ("resume", {"cases": every, "after": after})})["all"]
    assert found == [[[]] * len(after)] * len(cases)


def test_resume_on_other_ranks_and_stage(one_rank, two_ranks):
    """One process and ZeRO 0 until step 3, two ranks and ZeRO 3 from there: the same curve, on the same samples."""
    assert len(one_rank[1]["to_step_3"]) == 3
    assert two_ranks[1]["elsewhere"] == pytest.approx(one_rank[1]["to_step_6"], rel=1e-5)


def test_samples_of_a_step_do_not_depend_on_ranks():
    for world_size in (1, 2, 3, 4, 6, 12):
        for micro in (1, 2, 3):
            if 12 % (world_size * micro):
                continue
            parts = [sample_indices(5, rank, world_size, 12, micro) for rank in range(world_size)]
            assert sorted(i for part in parts for indices in part for i in indices) == list(range(60, 72))
            assert {len(part) for part in parts} == {12 // (world_size * micro)}


def test_the_loader_reads_one_step_ahead_and_any_step_at_once():
    asked = []

    def read(step):
        asked.append(step)
        return [{"step": step}]

    loader = StepLoader(read)
    assert [loader(s)[0]["step"] for s in (0, 1, 7)] == [0, 1, 7]
    assert loader(8, last=True)[0]["step"] == 8
    loader.close()
    assert asked == [0, 1, 2, 7, 8]
