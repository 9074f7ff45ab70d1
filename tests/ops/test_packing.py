"""Positions of documents are computed once for all layers, and again if the boundaries change."""

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
