"""Stages of training: a dense run, one of its indexer alone, a sparse one; and clipping by sections."""

import pytest


def test_the_indexer_alone_is_trained(one_rank, two_ranks):
    """All other weights keep their fp32 bits, also where the model computes in bf16, and have no moments."""
    for found in (*one_rank[1]["stages"], *two_ranks[1]["stages"]):
        assert found["frozen changed"] == []
        assert found["trained"] == ["indexer"]
        assert found["indexers in moments"]
        losses = found["losses"][1]
        assert losses[-1] < 0.8 * losses[0]
        assert found["validation"][1] == pytest.approx(found["validation"][0], rel=1e-6)  # it attends to all tokens


def test_the_sparse_stage_goes_on(one_rank, two_ranks):
    for found in (*one_rank[1]["stages"], *two_ranks[1]["stages"]):
        assert found["sparse changed"] == 1
        assert found["losses"][2][0] < found["losses"][0][0] - 0.05  # it begins with trained weights


def test_a_stage_is_resumed_bitwise(one_rank, two_ranks):
    """From its middle, and from its start: killed before its first checkpoint."""
    cases = [*one_rank[1]["stages"], *two_ranks[1]["stages"]]
    assert [found["different"] for found in cases] == [[]] * len(cases)


def test_sections_are_clipped_apart(one_rank, two_ranks):
    """Each to the bound; a thousandfold loss of the indexer changes no bit of the model's step."""
    for found in (*one_rank[1]["sections"], *two_ranks[1]["sections"]):
        assert found["same"]
        (model, _), (_, indexer) = found["lengths"]
        assert [model, indexer] == pytest.approx([0.01, 0.01], rel=2e-2)
