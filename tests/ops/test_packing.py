"""Positions of documents are computed once for all layers, and again if the boundaries change."""

import gc
import weakref

import torch

from nsa import ops
from nsa.ops.geometry import Documents, window_ranges
from tests.ops.cases import cumulative


def test_packing_is_computed_once_for_all_layers() -> None:
    cu_seqlens = cumulative([3, 4])
    first = Documents.of(7, 0, cu_seqlens, cu_seqlens.device)
    assert Documents.of(7, 0, cu_seqlens, cu_seqlens.device) is first
    assert first.query_document.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_packing_is_recomputed_if_boundaries_change() -> None:
    cu_seqlens = cumulative([3, 4])
    Documents.of(7, 0, cu_seqlens, cu_seqlens.device)
    cu_seqlens.copy_(torch.tensor([0, 5, 7]))
    assert Documents.of(7, 0, cu_seqlens, cu_seqlens.device).query_document.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_packing_in_inference_mode() -> None:
    with torch.inference_mode():
        cu_seqlens = cumulative([3, 4])
        assert Documents.of(7, 0, cu_seqlens, cu_seqlens.device).lengths.tolist() == [3, 4]


def test_a_packing_cached_in_inference_mode_works_in_training() -> None:
    q = torch.randn(1, 23, 2, 4, requires_grad=True)
    with torch.inference_mode():
        ops.dense_attention(q, q, q, window=5)
        first = Documents.of(23, 0, None, q.device)
    assert not first.bounds.is_inference() and not window_ranges(first, 5).first.is_inference()


def test_documents_of_queries_that_lie_apart() -> None:
    """Those of the same queries among all of them; and how many queries lie before each document."""
    cu_seqlens, rows = cumulative([3, 0, 5, 4, 0]), [1, 2, 4, 7]
    whole = Documents.of(12, 0, cu_seqlens, cu_seqlens.device)
    there = Documents.at(torch.tensor(rows).int(), 12, cu_seqlens)
    assert there.query_position.tolist() == rows and there.query_document.tolist() == [0, 0, 2, 2]
    assert there.query_local.tolist() == whole.query_local[rows].tolist() == [1, 2, 1, 4]
    assert there.query_bounds.tolist() == [0, 2, 2, 4, 4, 4]
    assert whole.query_bounds.tolist() == cu_seqlens.tolist()
    part = Documents.of(6, 4, cu_seqlens, cu_seqlens.device)
    assert part.query_bounds.tolist() == [0, 0, 0, 4, 6, 6]


def test_places_are_forgotten_with_their_tensor() -> None:
    """Each pass draws others, so what is kept of them must not keep them."""
    positions = torch.tensor([1, 2, 4]).int()
    assert Documents.at(positions, 12, None) is Documents.at(positions, 12, None)
    gone = weakref.ref(positions)
    del positions
    gc.collect()
    assert gone() is None
