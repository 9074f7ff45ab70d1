"""Attention by a mask, and the mass of all queries: against loops over queries and heads in float64.

Without a GPU the kernels run within tests/ops/test_kernels.py::test_in_the_interpreter.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nsa import ops
from tests.ops.test_kernels import DEVICE, INTERPRETED, needs_kernels


class Case(NamedTuple):
    """Sizes. ``lists``: of the mask: 1, KV heads or query heads. ``before``: keys before the first query."""

    tokens: int
    heads: int
    groups: int
    lists: int
    batch: int = 1
    before: int = 0
    width: int = 16


CASES = [
    Case(1, 1, 1, 1),
    Case(17, 4, 2, 2, batch=2),
    Case(130, 4, 2, 1),
    Case(70, 6, 2, 6, batch=2, width=24),
    Case(33, 2, 2, 2, before=40),
    Case(40, 3, 1, 3, batch=2, before=7),
]


def case_of(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and a mask that also allows keys after a query. A tile of keys is not allowed, and one query has none."""
    made = torch.Generator().manual_seed(case.tokens)
    keys = case.before + case.tokens
    sizes = ((case.tokens, case.heads), (keys, case.groups), (keys, case.groups))
    q, k, v = (torch.randn(case.batch, *size, case.width, dtype=dtype, generator=made) for size in sizes)
    mask = torch.rand(case.batch, case.lists, case.tokens, keys, generator=made) < 0.4
    mask[..., 16:32] = False
    mask[0, 0, case.tokens // 2] = False
    return [2 * q, k, v, mask]


def by_loops(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the log-sum-exp of the scores."""
    (batch, tokens, heads, width), (keys, groups) = q.shape, k.shape[1:3]
    out = torch.zeros(batch, tokens, heads, v.shape[3], dtype=torch.float64)
    lse = torch.full((batch, heads, tokens), -torch.inf, dtype=torch.float64)
    for b, t, h in itertools.product(range(batch), range(tokens), range(heads)):
        allowed = mask[b, h * mask.shape[1] // heads, t, : keys - tokens + t + 1]
        seen, group = allowed.nonzero()[:, 0], h * groups // heads
        if len(seen):
            scores = k[b, seen, group].double() @ q[b, t, h].double() * width**-0.5
            out[b, t, h], lse[b, h, t] = scores.softmax(0) @ v[b, seen, group].double(), scores.logsumexp(0)
    return out, lse


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_equals_loops(case: Case, backend: str) -> None:
    inputs = case_of(case)
    torch.testing.assert_close(ops.masked_attention(*inputs, backend=backend), by_loops(*inputs)[0])
    found = ops.masked_attention(*inputs, scale=0.1, return_lse=True, backend=backend)
    torch.testing.assert_close(found, by_loops(inputs[0] * 0.1 * case.width**0.5, *inputs[1:]))


@needs_kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    q, k, v, mask = case_of(case, dtype)
    found = ops.masked_attention(*(x.to(DEVICE) for x in (q, k, v, mask)), return_lse=True, backend="triton")
    assert [x.dtype for x in found] == [dtype, torch.float32]
    close = {"atol": 1e-5, "rtol": 1e-4} if INTERPRETED else {"atol": 2e-2, "rtol": 2e-2}
    for ours, theirs in zip(found, by_loops(q, k, v, mask), strict=True):
        torch.testing.assert_close(ours.double().cpu(), theirs, **close)


@needs_kernels
def test_every_bit_of_a_word() -> None:
    """A query that attends to one key has its value: the last bit of a word is its sign."""
    tokens = 65
    q, k = (
        torch.randn(1, tokens, 1, 16, device=DEVICE).to(torch.float32 if INTERPRETED else torch.bfloat16) for _ in "qk"
    )
    v = torch.arange(tokens, device=DEVICE, dtype=q.dtype)[None, :, None, None].expand(1, tokens, 1, 16).contiguous()
    for key in (0, 15, 31, 62, 63, 64):
        mask = torch.zeros(1, 1, tokens, tokens, dtype=torch.bool, device=DEVICE)
        mask[..., key] = True
        out = ops.masked_attention(q, k, v, mask, backend="triton")
        assert out[0, key:].eq(key).all() and not out[0, :key].any()


def test_what_is_no_mask() -> None:
    q, k, v, mask = case_of(Case(17, 4, 2, 2))
    for wrong, said in (
        (mask.float(), r"mask must be \(B, 1, G or H, T, S\) bool"),
        (mask[:, :, :3], "must have 1 x 17 queries of 17 keys"),
        (mask[0], r"mask must be"),
        (torch.cat([mask, mask[:, :1]], 1), r"mask must be"),
    ):
        with pytest.raises(ValueError, match=said):
            ops.masked_attention(q, k, v, wrong)
    with pytest.raises(ValueError, match="need at least as many keys as queries"):
        ops.masked_attention(q, k[:, :3], v[:, :3], mask[..., :3])


@pytest.mark.gpu
def test_what_the_kernels_do_not_take() -> None:
    q, k, v, mask = (x.cuda() for x in case_of(Case(17, 4, 2, 2), torch.float32))
    with pytest.raises(ValueError, match=r"elements of 16 bits, got 16 and 16 of torch\.float32"):
        ops.masked_attention(q, k, v, mask, backend="triton")
    found = ops.masked_attention(q, k, v, mask).double().cpu()
    torch.testing.assert_close(found, by_loops(*(x.cpu() for x in (q, k, v, mask)))[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "naive", pytest.param("triton", marks=needs_kernels)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_mass(case: Case, backend: str) -> None:
    """Probabilities of the heads of a KV head, added; exactly 0 after the query."""
    dtype = torch.float64 if backend != "triton" else torch.float32
    q, k, *_ = case_of(case, dtype)
    heads, keys = case.heads // case.groups, case.before + case.tokens
    expected = torch.zeros(case.batch, case.groups, case.tokens, keys, dtype=torch.float64)
    for b, g, t, j in itertools.product(*map(range, (case.batch, case.groups, case.tokens, heads))):
        seen = case.before + t + 1
        scores = k[b, :seen, g].double() @ q[b, t, g * heads + j].double() * case.width**-0.5
        expected[b, g, t, :seen] += scores.softmax(0)
    found = ops.attention_mass(q.to(DEVICE), k.to(DEVICE), backend=backend).cpu()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    after = torch.ones(case.tokens, keys, dtype=torch.bool).triu(case.before + 1)
    assert not found[..., after].any()
