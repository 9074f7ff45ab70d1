"""A prompt by kernels: plans of blocks and columns mean the same, and the choice is that of the portable path."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from sessions import GROUPS, HEADS, inputs, run
from views import view_of

from nsa import ops
from nsa.baselines import Budget, Method, Part, Plan, prompt
from nsa.baselines.attention import attend, kept
from nsa.baselines.method import State
from nsa.baselines.methods.block_sparse import BlockSparse, BlockSparseFrontier
from nsa.baselines.methods.flexprefill_released import FlexPrefillReleased
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.methods.vertical_slash_blocks import VerticalSlashBlocks
from tests.ops.test_kernels import INTERPRETED

METHODS = (
    BlockSparse(budget=Budget(share=0.4), **BlockSparse.small),
    BlockSparseFrontier(budget=Budget(share=0.5), **BlockSparseFrontier.small),
    VerticalSlashBlocks(budget=Budget(share=0.2), **VerticalSlashBlocks.small),
    VerticalSlashBlocks(budget=Budget(tokens=5), **{**VerticalSlashBlocks.small, "near": 9}),
)
BACKENDS = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="in the interpreter"))]
SIZES = [(65, 1), (33, 2)]
CHOICES = ("pooled_blocks", "vertical_slash_lines")
RELEASED = FlexPrefillReleased(gamma=0.8, **FlexPrefillReleased.small)  # a list for each query head


def by_method(*methods: Method) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("method", methods, ids=lambda method: f"{method.name}, {method.budget}")


@pytest.mark.parametrize("backend", BACKENDS)
@by_method(*METHODS, RELEASED)
def test_blocks_give_what_the_plan_means(method: Method, backend: str) -> None:
    for tokens, batch in SIZES:
        view = view_of(tokens, batch=batch)
        plan = method.prefill_select(view, State())
        assert prompt.can_list(view, plan)
        found, expected = prompt.attend_blocks(view, plan, backend=backend), attend(view, plan)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_blocks_of_a_kv_head_and_columns_of_a_query_head_go_together() -> None:
    """With as many blocks as query heads, which are told apart all the same."""
    view = view_of(4 * HEADS, batch=2)
    blocks, columns = torch.rand(2, GROUPS, HEADS, HEADS) < 0.5, torch.rand(2, HEADS, 1, 4 * HEADS) < 0.3
    plan = Plan((Part(blocks | torch.eye(HEADS, dtype=torch.bool), unit=4, tile=4), Part(columns)))
    assert prompt.can_list(view, plan) and prompt.pairs_of(view, plan) is None
    for ours, theirs in zip(prompt.attend_blocks(view, plan), attend(view, plan), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@by_method(*METHODS)
def test_kernels_choose_what_the_portable_path_chooses(
    method: Method, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tokens, batch in SIZES:
        view = view_of(tokens, batch=batch)
        expected = method.prefill_select(view, State())
        called: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(prompt, "on_gpu", lambda view: True)
            for name in CHOICES:
                patch.setattr(ops, name, partial(_noted, called, name, getattr(ops, name), backend))
            found = method.prefill_select(view, State())
        assert len(called) == 1
        masks = [kept(view, plan, torch.arange(tokens)) for plan in (found, expected)]
        assert torch.equal(*masks) and found.estimate == expected.estimate
        assert torch.equal(prompt.pairs_of(view, found), masks[0].double().sum((2, 3)))


@by_method(*METHODS[:2])
def test_a_prompt_of_few_blocks_keeps_all(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than those that are always in."""
    monkeypatch.setattr(prompt, "on_gpu", lambda view: True)
    view = view_of(3)
    plan = replace(method, budget=Budget(tokens=5)).prefill_select(view, State())
    assert torch.equal(kept(view, plan, torch.arange(3)), view.visible)


@by_method(METHODS[0])
def test_autocast_changes_no_dtype(method: Method) -> None:
    view = view_of(33)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = prompt.attend_blocks(view, method.prefill_select(view, State()))
    assert found.dtype == view.q.dtype == torch.float32


def _noted(called: list[str], name: str, choice: Any, backend: str, *given: Any, **options: Any) -> Any:
    called.append(name)
    return choice(*given, **options, backend=backend)


@by_method(*METHODS, RELEASED)
def test_a_session_answers_a_prompt_by_blocks(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one with padding, and not one that is watched. Answers and the ledger stay what they were."""
    given = inputs(52, layers=2)
    answered: list[int] = []
    real = prompt.attend_blocks

    def noted(view: Any, plan: Any) -> Any:
        answered.append(view.layer)
        return real(view, plan)

    for options, layers in (({}, [0, 1]), ({"padding": torch.tensor([0, 5])}, []), ({"watch": ["prefill"]}, [])):
        expected, before = run(method, given, prompt=48, **options)
        with monkeypatch.context() as patch:
            patch.setattr(prompt, "on_gpu", lambda view: True)
            patch.setattr(prompt, "attend_blocks", noted)
            found, session = run(method, given, prompt=48, **options)
        assert answered == layers
        answered.clear()
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
        assert session.ledger.shares() == before.ledger.shares()


def test_what_is_no_plan_of_blocks() -> None:
    """Single diagonals, drawn keys, a chunk of a prompt."""
    view = view_of(40)
    lines = VerticalSlash(budget=Budget(share=0.3), **VerticalSlash.small).prefill_select(view, State())
    assert not prompt.can_list(view, lines) and not prompt.can_list(view, None)
    keep = torch.ones(1, 2, 5, 5, dtype=torch.bool)
    blocks = Part(keep, unit=8, tile=8)
    assert prompt.can_list(view, Plan((blocks,)))
    assert not prompt.can_list(view, Plan((blocks, blocks)))
    assert not prompt.can_list(view, Plan((Part(keep, 8, 8, log_weight=torch.zeros(1, 2, 40, 40)),)))
    late = view_of(40, q=view.q[:, 8:], query_positions=view.query_positions[:, 8:])
    assert not prompt.can_list(late, Plan((blocks,)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_after_the_queries_are_left_out(backend: str) -> None:
    """A part may keep them: they are not visible."""
    view = view_of(30)
    plan = Plan((Part(torch.ones(1, 2, 4, 4, dtype=torch.bool), unit=8, tile=8),))
    found = prompt.attend_blocks(view, plan, backend=backend)
    torch.testing.assert_close(found, attend(view, None), atol=1e-5, rtol=1e-5)


def test_query_heads_may_have_their_own_lists() -> None:
    view = view_of(33)
    made = torch.Generator().manual_seed(0)
    keep = torch.rand(1, view.q.shape[2], 5, 5, generator=made) < 0.5
    columns = torch.rand(1, view.k.shape[2], 1, 33, generator=made) < 0.2
    plan = Plan((Part(keep, unit=8, tile=8), Part(columns)))
    torch.testing.assert_close(prompt.attend_blocks(view, plan), attend(view, plan), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [1, 8, 45])
def test_pairs_are_counted_without_a_mask(tokens: int) -> None:
    """Of any plan of blocks and columns: rows without their own block, too, and a last block that is a part of one."""
    view, block, dice = view_of(tokens, batch=2), 8, torch.Generator().manual_seed(tokens)
    blocks = -(-tokens // block)
    for share in (0.0, 0.3, 1.0):
        keep = torch.rand(2, GROUPS, blocks, blocks, generator=dice) < share
        columns = torch.rand(2, GROUPS, 1, tokens, generator=dice) < 0.4
        for parts in ((Part(keep, block, block),), (Part(keep, block, block), Part(columns))):
            plan = Plan(parts)
            expected = kept(view, plan, torch.arange(tokens)).sum((2, 3)).double()
            found = prompt.pairs_of(view, plan)
            assert found is not None and torch.equal(found, expected)
