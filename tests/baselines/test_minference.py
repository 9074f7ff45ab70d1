"""MInference's pattern per KV head, and the search that finds it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sessions import GROUPS, HEADS, inputs, run
from views import mask_of, view_of

from nsa.baselines import Budget, Session
from nsa.baselines.importance.patterns import CANDIDATES
from nsa.baselines.methods.block_sparse import BlockSparse
from nsa.baselines.methods.minference import MInference
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.search import Calibration, best_patterns, found

BUDGET = Budget(tokens=16)
MIXED = (
    (("vertical_slash", 1, 1), ("block_sparse", 0, 0)),
    (("a_shape", 1, 3), ("vertical_slash", 1, 3)),
    (("block_sparse", 0, 0), ("block_sparse", 0, 0)),
)


def test_each_head_has_the_mask_of_its_own_pattern() -> None:
    view = view_of(65)
    method = MInference(budget=BUDGET, patterns=MIXED, **MInference.small)
    lists = {"num_queries": 16, "sinks": 1, "near": 1}
    columns = VerticalSlash(budget=BUDGET, vertical_share=0.5, **lists)
    third = VerticalSlash(budget=BUDGET, vertical_share=0.25, **lists)
    blocks = BlockSparse(budget=BUDGET, block=8)
    first, second = (mask_of(method, replace(view, layer=layer, num_layers=3)) for layer in (0, 1))
    assert torch.equal(first[0], mask_of(columns, view)[0])
    assert torch.equal(first[1], mask_of(blocks, view)[1])
    assert torch.equal(second[1], mask_of(third, view)[1])
    distance = torch.arange(65)[:, None] - torch.arange(65)
    a_shape = (distance >= 0) & ((distance < 12) | (torch.arange(65) < 4))  # 1 : 3 of 16 tokens
    assert torch.equal(second[0], a_shape)


def test_the_search_finds_what_each_head_looks_at() -> None:
    """One KV head looks at three columns, the other at what is 1, 20 and 21 back."""
    tokens, codes = 96, torch.eye(96)
    k = codes[None, :, None].repeat(1, 1, GROUPS, 1)
    q = torch.zeros(1, tokens, HEADS, tokens)
    q[:, :, : HEADS // GROUPS] = 60 * (codes[40] + codes[50] + codes[60])[None, None, None]
    q[:, :, HEADS // GROUPS :] = 60 * sum(codes.roll(back, 0) for back in (1, 20, 21))[None, :, None]
    patterns = (("a_shape", 1, 1), ("vertical_slash", 5, 1), ("vertical_slash", 1, 5))
    lists = {"num_queries": 16, "sinks": 1, "near": 1}
    view = view_of(tokens, q=q, k=k, v=k)
    assert best_patterns(view, Budget(tokens=6), patterns, **lists) == (patterns[1], patterns[2])
    assert best_patterns(view, Budget(share=1.0), patterns, **lists) == (patterns[0],) * GROUPS, "all equal: the first"


def test_a_session_finds_patterns_for_all_layers_and_they_become_a_method() -> None:
    given = inputs(64, batch=2)
    lists = {"num_queries": 16, "sinks": 1, "near": 1, "block": 8}
    _, session = run(Calibration(find=partial(best_patterns, budget=BUDGET, **lists)), given, prompt=64)
    patterns = found(session)
    assert len(patterns) == 3 and all(set(layer) <= set(CANDIDATES) for layer in patterns)
    best = MInference(budget=BUDGET, patterns=patterns, **lists)
    masses = []
    for method in (best, *(replace(best, patterns=((one,) * GROUPS,) * 3) for one in CANDIDATES)):
        _, session = run(method, given, prompt=64, watch=["prefill"])
        masses.append(torch.tensor([figure["kept_mass"] for figure in session.figures]))
    assert (torch.stack(masses[1:]) <= masses[0] + 1e-5).all()
    assert MInference(**{**best.settings(), "patterns": [[list(p) for p in layer] for layer in patterns]}) == replace(
        best, budget=Budget(share=1.0)
    ), "settings that come from a file are the same"


def test_bad_patterns_are_refused() -> None:
    with pytest.raises(ValueError, match="not 'diagonal'"):
        MInference(patterns=((("diagonal", 1, 1),),))
    with pytest.raises(ValueError, match="at least one column"):
        MInference(patterns=((("vertical_slash", 0, 1),),))
    with pytest.raises(ValueError, match="patterns are of 3 layers with 2 KV heads, the model has 1 with 2"):
        mask_of(MInference(budget=BUDGET, patterns=MIXED), view_of(20))
    with pytest.raises(ValueError, match="in one piece"):
        run(Calibration(find=repr), inputs(20), prompt=20, chunks=(10,))
    given = inputs(20, layers=1)
    session = Session(Calibration(find=repr), 1)
    session.attend(0, *given.cut(0, 10)[0], 1.0)
    with pytest.raises(ValueError, match="in one piece"):  # nobody said that there was more to come
        session.attend(0, *given.cut(10, 20)[0], 1.0)
    with pytest.raises(ValueError, match=r"layers \[0, 1\]"):
        found(Session(Calibration(find=repr), 2))


def test_a_mixture_of_patterns_treats_padding_as_each_pattern_does() -> None:
    method, given, padding = (
        MInference(budget=BUDGET, patterns=MIXED, **MInference.small),
        inputs(60),
        torch.tensor([0, 13]),
    )
    outs = run(method, given, prompt=60, padding=padding)[0]
    for row, start in enumerate(padding.tolist()):
        for mine, alone in zip(outs, run(method, given.row(row, start), prompt=60 - start)[0], strict=True):
            torch.testing.assert_close(mine[row : row + 1, start:], alone, atol=1e-5, rtol=1e-5)


def test_candidates_are_those_of_the_release() -> None:
    """Its patterns of vertical-slash as pairs of columns and diagonals, and the two others."""
    lines = [(30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096)]
    expected = [("vertical_slash", *pair) for pair in lines] + [("a_shape", 100, 800), ("block_sparse", 0, 0)]
    assert list(CANDIDATES) == expected
