"""Stages of training: a dense run, one of what chooses alone, a sparse one; and clipping by sections."""

import pytest


def stages(*launches):
    """DSA's indexer and the compression of NSA's keys."""
    return [found for _, checks in launches for name in ("stages", "stages of nsa") for found in checks[name]]


def test_what_chooses_alone_is_trained(one_rank, two_ranks):
    """All other weights keep their fp32 bits, also where the model computes in bf16, and have no moments."""
    for found in stages(one_rank, two_ranks):
        assert found["frozen changed"] == []
        assert found["trained"] == 1
        assert found["moments of it alone"]
        assert found["validation"][1] == pytest.approx(found["validation"][0], rel=1e-6)  # it attends to all tokens


def test_an_indexer_learns(one_rank, two_ranks):
    for found in (*one_rank[1]["stages"], *two_ranks[1]["stages"]):
        losses = found["losses"][1]
        assert losses[-1] < 0.8 * losses[0]


def test_the_sparse_stage_goes_on(one_rank, two_ranks):
    for found in stages(one_rank, two_ranks):
        assert found["sparse changed"] == 1
        assert found["losses"][2][0] < found["losses"][0][0] - 0.05  # it begins with trained weights


def test_a_stage_is_resumed_bitwise(one_rank, two_ranks):
    """From its middle, and from its start: killed before its first checkpoint."""
    cases = stages(one_rank, two_ranks)
    assert [found["different"] for found in cases] == [[]] * len(cases)


def test_sections_are_clipped_apart(one_rank, two_ranks):
    """Each to the bound, and none that is within it; a thousandfold loss of the indexer changes no bit of the model's
    step."""
    for found in (*one_rank[1]["sections"], *two_ranks[1]["sections"]):
        assert found["same"]
        (model, within), (_, indexer) = found["lengths"]
        assert [model, indexer] == pytest.approx([0.01, 0.01], rel=2e-2)
        assert 0 < within < 1e-3, "a small gradient is not lengthened"
