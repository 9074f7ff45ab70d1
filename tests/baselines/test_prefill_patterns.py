"""MInference's patterns, each against loops written from the paper."""

import math
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, inputs, run
from torch import Tensor
from views import GROUP, SCALE, best, mask_of, softmax, view_of

from nsa.baselines import Budget, BudgetError, Method
from nsa.baselines.importance.blocks import pooled
from nsa.baselines.methods.block_sparse import BlockSparse, BlockSparseFrontier
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.methods.vertical_slash_blocks import VerticalSlashBlocks
from nsa.ops.naive import masked_attention


def block_sparse_by_loops(q: Tensor, k: Tensor, block: int, count: int, first: int = 0, near: int = 0) -> Tensor:
    """q (T, g, D), k (T, D) of one KV head -> (T, T) bool."""
    tokens = len(k)
    blocks = [range(s, min(s + block, tokens)) for s in range(0, tokens, block)]
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i, queries in enumerate(blocks):
        mass = [0.0] * (i + 1)
        for head in range(q.shape[1]):
            mean = q[list(queries), head].mean(0)
            scores = [float(mean @ k[list(blocks[j])].mean(0)) * SCALE for j in range(i + 1)]
            mass = [m + p for m, p in zip(mass, softmax(scores), strict=True)]
        for j in range(i + 1):
            if j < first or i - j <= near:
                mass[j] = math.inf
        for j in best(mass, count):
            for query in queries:
                mask[query, [key for key in blocks[j] if key <= query]] = True
    return mask


@pytest.mark.parametrize("tokens", [1, 17, 64, 65])
@pytest.mark.parametrize("kind", [BlockSparse, BlockSparseFrontier])
def test_block_sparse_is_its_loops(kind: type[BlockSparse], tokens: int) -> None:
    """64 is a multiple of the block: the releases count an empty block more there."""
    view, method = view_of(tokens), kind(budget=Budget(tokens=33), block=8)
    found = mask_of(method, view)
    for group in range(GROUPS):
        q = view.q[0, :, group * GROUP : (group + 1) * GROUP]
        wanted = block_sparse_by_loops(q, view.k[0, :, group], 8, 4, method.first, method.near)
        assert torch.equal(found[group], wanted)


def test_a_mean_is_of_the_tokens_that_a_block_has() -> None:
    """Not of empty places after the last token, nor of padding, which moves no border."""
    x = torch.randn(1, 12, 1, 4, generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(12) - 2).clamp(min=-1)[None]
    means, counts = pooled(x, positions, 4, 4)
    wanted = torch.stack([x[0, 2:6, 0].mean(0), x[0, 6:10, 0].mean(0), x[0, 10:, 0].mean(0)])
    torch.testing.assert_close(means[0, 0, :3], wanted)
    assert counts.tolist() == [[[4, 4, 2, 0]]] and means[0, 0, 3].tolist() == [0.0] * 4, "nor one of nothing"


def test_a_block_whose_mean_is_aligned_is_found_and_one_token_alone_is_not() -> None:
    """The known fault of means: one key among eight is diluted; a bound, such as Quest's, would see it."""
    view = view_of(64, scale=1.0)
    k = 0.3 * torch.randn(1, 64, GROUPS, WIDTH, generator=torch.Generator().manual_seed(1))
    q = torch.ones_like(view.q)
    for length, seen in ((8, True), (1, False)):
        keys = k.clone()
        keys[:, 16:24] -= 0.5
        keys[:, 16 : 16 + length] = 2.0
        method = BlockSparse(budget=Budget(tokens=16), block=8)
        assert mask_of(method, view_of(64, q=q, k=keys))[:, 63, 16].all() == seen


def test_a_budget_below_the_forced_blocks_is_refused() -> None:
    with pytest.raises(BudgetError, match="48 tokens are the least"):
        mask_of(BlockSparseFrontier(budget=Budget(tokens=40)), view_of(64))


def vertical_slash_by_loops(q: Tensor, k: Tensor, last: int, v: int, s: int, sinks: int, near: int) -> Tensor:
    """q (T, g, D), k (T, D) of one KV head -> (T, T) bool."""
    tokens = len(k)
    vertical, slash = [0.0] * tokens, [0.0] * tokens
    for head in range(q.shape[1]):
        for i in range(max(0, tokens - last), tokens):
            for j, p in enumerate(softmax([float(q[i, head] @ k[j]) * SCALE for j in range(i + 1)])):
                vertical[j] += p
                slash[i - j] += p
    vertical = [math.inf if j < sinks else mass for j, mass in enumerate(vertical)]
    slash = [math.inf if o < near else mass for o, mass in enumerate(slash)]
    columns, diagonals = set(best(vertical, v)), set(best(slash, s))
    rows = range(tokens)
    return torch.tensor([[j <= i and (j in columns or i - j in diagonals) for j in rows] for i in rows])


@pytest.mark.parametrize(("tokens", "budget"), [(2, 16), (17, 16), (65, 16), (64, 25)])
def test_vertical_slash_is_its_loops(tokens: int, budget: int) -> None:
    view = view_of(tokens)
    method = VerticalSlash(budget=Budget(tokens=budget), num_queries=16, vertical_share=0.4, sinks=2, near=3)
    found, lines = mask_of(method, view), min(budget, tokens)
    v, s = (tokens, tokens) if lines == tokens else (round(0.4 * lines), lines - round(0.4 * lines))
    for group in range(GROUPS):
        q = view.q[0, :, group * GROUP : (group + 1) * GROUP]
        assert torch.equal(found[group], vertical_slash_by_loops(q, view.k[0, :, group], 16, v, s, 2, 3))


def test_one_column_and_one_diagonal_are_recovered() -> None:
    """Keys that all queries point to, and keys that each query finds 20 back."""
    tokens, column, back = 64, 7, 20
    codes = torch.eye(tokens)
    k = codes[None, :, None].expand(1, -1, GROUPS, -1)
    q = 60 * codes.roll(back, 0) + 62 * codes[column]
    q = q[None, :, None].expand(1, -1, HEADS, -1)
    method = VerticalSlash(budget=Budget(tokens=3), num_queries=16, vertical_share=0.34, sinks=0, near=1)
    columns, diagonals = method.chosen(view := view_of(tokens, q=q, k=k), view.scores(torch.arange(48, 64)))
    assert columns.nonzero()[:, 2].tolist() == [column] * GROUPS
    assert diagonals.nonzero()[:, 2].tolist() == [0, back] * GROUPS


def test_whatever_the_share_of_columns_there_is_a_column_and_a_diagonal() -> None:
    for share, split in ((0.99, (15, 1)), (0.01, (1, 15)), (0.5, (8, 8))):
        method = VerticalSlash(budget=Budget(tokens=16), vertical_share=share)
        assert [int(number) for number in method.split(view_of(40))] == list(split)
    with pytest.raises(BudgetError, match="2 tokens are the least"):
        mask_of(VerticalSlash(budget=Budget(tokens=1)), view_of(40))


def test_few_diagonals_are_the_nearest_and_never_without_the_query_itself() -> None:
    """The release forces 100 by infinity and takes any of them if it has room for fewer."""
    method = VerticalSlash(budget=Budget(tokens=40), vertical_share=0.25)
    view = view_of(120)
    columns, diagonals = method.chosen(view, view.scores(torch.arange(56, 120)))
    assert columns[0, 0].nonzero().flatten().tolist() == list(range(10))
    assert diagonals[0, 0].nonzero().flatten().tolist() == list(range(30))


@pytest.mark.parametrize("tokens", [63, 64, 70])
def test_the_form_of_blocks_is_every_block_that_a_diagonal_crosses(tokens: int) -> None:
    settings: dict[str, Any] = {"num_queries": 16, "vertical_share": 0.5, "sinks": 2, "near": 1}
    settings["budget"] = Budget(tokens=10)
    view = view_of(tokens)
    form = mask_of(VerticalSlash(**settings), view)
    columns, diagonals = VerticalSlash(**settings).chosen(view, view.scores(torch.arange(tokens - 16, tokens)))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    wanted = columns[0, :, None] & (distance >= 0)
    for group in range(GROUPS):
        line = diagonals[0, group]
        for row in range(0, tokens, 8):
            for key in range(0, tokens, 8):
                wanted[group, row : row + 8, key : key + 8] |= any(
                    line[d] for d in range(max(0, row - key - 7), row - key + 8) if d < tokens
                )
    wanted &= distance >= 0
    found = mask_of(VerticalSlashBlocks(**settings, block=8), view)
    assert torch.equal(found, wanted)
    assert (form <= found).all() and not torch.equal(form, found)


@pytest.mark.parametrize("kind", [BlockSparse, VerticalSlash])
def test_outputs_are_attention_to_what_loops_choose(kind: type[Method]) -> None:
    given = inputs(48, batch=1, layers=1)
    small: dict[str, Any] = {"block": 8} if kind is BlockSparse else {"num_queries": 16, "sinks": 2, "near": 3}
    out = run(kind(budget=Budget(tokens=16), **small), given, prompt=48)[0][0]
    q, k, v = given.layers[0]
    for group in range(GROUPS):
        heads = slice(group * GROUP, (group + 1) * GROUP)
        one = q[0, :, heads], k[0, :, group]
        mask = (
            block_sparse_by_loops(*one, 8, 2) if kind is BlockSparse else vertical_slash_by_loops(*one, 16, 2, 14, 2, 3)
        )
        wanted = masked_attention(q[:, :, heads], k[:, :, [group]], v[:, :, [group]], mask, SCALE)[0]
        torch.testing.assert_close(out[:, :, heads], wanted, atol=1e-5, rtol=1e-5)
