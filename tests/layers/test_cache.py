"""Caches: their content, and that a token costs the same at any length."""

import random

import pytest
import torch

from nsa.cache import Rows
from nsa.cache.rows import LEAST
from tests.layers.test_attention_layers import nsa_layer


@pytest.mark.parametrize("kept", [None, 1, 7, 100])
def test_rows_equal_concatenation(kept: int | None) -> None:
    """Against torch.cat, with empty pieces. Tensors that were returned earlier do not change."""
    dice = random.Random(0)
    torch.manual_seed(0)
    rows, expected, given = Rows(), [torch.zeros(2, 0, 3, w) for w in (4, 5)], []
    for _ in range(60):
        tokens = dice.choice([0, 1, 1, 2, 17])
        new = [torch.randn(2, tokens, 3, width) for width in (4, 5)]
        expected = [torch.cat(both, 1) for both in zip(expected, new, strict=True)]
        result = rows.append((new[0], new[1]))
        for ours, theirs in zip(result, expected, strict=True):
            assert torch.equal(ours, theirs)
        given.append((result[0], result[0].clone()))
        if kept is not None:
            surplus = max(0, rows.length - kept)
            rows.drop(surplus)
            expected = [x[:, surplus:] for x in expected]
            assert rows.length == expected[0].shape[1] <= kept
    for view, then in given:
        assert torch.equal(view, then)


def test_memory_is_allocated_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token: memory doubles when full; with a bound on the kept tokens it stays the same."""
    sizes: list[int] = []
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *shape: sizes.append(shape[1]) or empty(x, *shape))
    rows, near = Rows(), Rows()
    token = torch.zeros(1, 1, 1, 2)
    for _ in range(2000):
        rows.append((token, token))
    assert sizes[::2] == [LEAST * 2**i + 2 * i_ for i, i_ in zip(range(6), (0, 1, 3, 7, 15, 31), strict=True)]
    sizes.clear()
    for _ in range(2000):
        near.append((token, token))
        near.drop(max(0, near.length - 10))
    assert set(sizes) == {LEAST}, "as much as before"


def test_a_cache_from_inference_mode_works_outside_of_it() -> None:
    rows, token = Rows(), torch.ones(1, 1, 1, 2)
    with torch.inference_mode():
        rows.append((token, token))
    assert torch.equal(rows.append((token, token))[0], torch.ones(1, 2, 1, 2))


def test_a_long_decoding_equals_the_whole() -> None:
    """Long enough that all memory is reallocated."""
    layer = nsa_layer()
    x = torch.randn(2, 5 * LEAST, 16, dtype=torch.float64)
    cache = layer.new_cache()
    with torch.no_grad():
        parts = [layer(token, cache=cache) for token in x.split(1, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), layer(x))
    assert cache.length == 5 * LEAST
