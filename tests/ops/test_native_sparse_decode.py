"""NSA of one token per sequence: against `native_sparse_attention`, at lengths that differ within a batch."""

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.ops.geometry import num_compressed
from nsa.ops.native_sparse_decode import _blocks
from tests.ops.decode_cases import SPARSE_CASES, TIES, sparse_case_of


@pytest.mark.parametrize(("case", "ties"), TIES, ids=str)
def test_the_fallback_equals_the_definition(case, ties: bool) -> None:
    inputs, sizes = sparse_case_of(case, torch.float64)
    if ties:
        inputs[1][0].nan_to_num_(0).zero_()
    ours, theirs = (ops.native_sparse_decode(*inputs, **sizes, backend=b) for b in ("torch", "naive"))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", SPARSE_CASES, ids=str)
def test_blocks_are_those_of_the_selection(case) -> None:
    """Each sequence alone, by the operator of prefill."""
    inputs, sizes = sparse_case_of(case, torch.float64)
    q, (k, _), lengths = inputs[0], inputs[1], inputs[5]
    seen = torch.tensor([num_compressed(n, sizes["length"], sizes["stride"]) for n in lengths.tolist()])
    lse = ops.decode_attention(q, k, k, seen.int(), backend="naive")[1]
    found = _blocks(q, k, lse, seen, lengths, inputs[2][0].shape[1], sizes, q.shape[2] ** -0.5)
    for row, tokens in enumerate(lengths.tolist()):
        if tokens == 0:
            assert (found[row] == -1).all()
            continue
        one = q[row, None, None], k[row, None, : int(seen[row])], lse[row, None, :, None]
        expected = ops.select_blocks(*one, **sizes, offset=tokens - 1, backend="naive")
        assert torch.equal(found[row], expected[0, 0])


def _wrong() -> list[tuple[dict[str, Tensor | int | tuple[Tensor, Tensor]], str]]:
    short = torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4)
    return [
        ({"gates": torch.zeros(1, 2, 2)}, "gates must be"),
        ({"kv_cmp": short}, "room for 4"),
        ({"kv_win": (torch.zeros(1, 0, 1, 4), torch.zeros(1, 0, 1, 4))}, "at least 1 slot"),
        ({"kv_win": (short[0], torch.zeros(1, 4, 1, 8))}, "share the heads"),
        ({"num_blocks": 2}, "forced blocks"),
    ]


@pytest.mark.parametrize(("change", "message"), _wrong(), ids=[message for _, message in _wrong()])
def test_mistakes_are_named(change, message: str) -> None:
    memory = torch.zeros(1, 32, 1, 4), torch.zeros(1, 32, 1, 4)
    arguments = {"q": torch.zeros(1, 2, 4), "kv_cmp": memory, "kv_slc": memory, "kv_win": memory}
    arguments |= {"gates": torch.zeros(1, 2, 3), "lengths": torch.ones(1, dtype=torch.int32)}
    sizes = {"length": 4, "stride": 2, "block_size": 8, "num_blocks": 4}
    with pytest.raises(ValueError, match=message):
        ops.native_sparse_decode(**arguments | sizes | change)
