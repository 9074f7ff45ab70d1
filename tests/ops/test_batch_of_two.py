"""Sums that several programs share, for two sequences: results must equal those of each sequence alone.

Runs in Triton's interpreter, with small tiles. Memory is filled with NaN before the kernels write to it.
"""

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nsa import ops
from tests.ops import test_compression

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs within test_kernels.py::test_in_the_interpreter")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)  # makes torch fill it
    assert torch.zeros(2).new_empty(3).isnan().all() and torch.empty_like(torch.zeros(3)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check(run: Callable[[list[Tensor], str], Tensor], inputs: list[Tensor], weights: int = 0) -> None:
    """Output and gradients of ``run`` equal the reference, and for each sequence those of the sequence alone.

    The last ``weights`` inputs are shared by both sequences: their gradients are the sum of the two.
    """
    apart = len(inputs) - weights
    loss = normal(*run(inputs, "naive").shape, seed=99)

    def results(backend: str, part: slice) -> list[Tensor]:
        tensors = [x[part] if i < apart else x for i, x in enumerate(inputs)]
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = run(tensors, backend)
        return [out.detach(), *torch.autograd.grad(out, tensors, loss[part])]

    both, first, second = slice(0, 2), slice(0, 1), slice(1, 2)
    ours = results("triton", both)
    torch.testing.assert_close(ours, results("naive", both), rtol=1e-4, atol=3e-5)
    alone = list(zip(results("triton", first), results("triton", second), strict=True))
    for i, (together, (one, other)) in enumerate(zip(ours, alone, strict=True)):
        if i <= apart:
            assert torch.equal(together, torch.cat([one, other]))
        else:
            torch.testing.assert_close(together, one + other, rtol=1e-4, atol=3e-5)


def spy_on_shares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of programs that shared a tile of keys, for each call."""
    from nsa.ops.kernels import ranges

    add, shares = ranges._add_splits_of, []
    monkeypatch.setattr(ranges, "_add_splits_of", lambda *args: shares.append(len(args[0])) or add(*args))
    return shares


DENSE = [(17, 32, 1, 16, 24, None), (22, 24, 1, 48, 16, 7)]  # the heads of a group are a power of two, and are not


@interpreted
@pytest.mark.parametrize(("tokens", "heads", "groups", "width", "v_width", "window"), DENSE)
def test_keys_of_dense_attention(tokens, heads, groups, width, v_width, window, monkeypatch) -> None:
    """Fails if a partial sum of dK and dV is written to, or read from, the place of the other sequence's."""
    shares = spy_on_shares(monkeypatch)
    inputs = [normal(2, tokens, heads, width), normal(2, tokens, groups, width, seed=1)]
    inputs.append(normal(2, tokens, groups, v_width, seed=2))
    check(lambda x, backend: ops.dense_attention(*x, window=window, backend=backend), inputs)
    assert shares == [2, 2, 2]


@interpreted
def test_keys_of_compressed_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with four shares, and with KV heads, if all keys are one tile."""
    from nsa.ops.kernels import ranges

    monkeypatch.setattr(ranges, "LONGEST_SUM", 20)  # else the sequence would have to be long
    shares = spy_on_shares(monkeypatch)
    inputs = [normal(2, 40, 4, 16), normal(2, 9, 2, 16, seed=1), normal(2, 9, 2, 16, seed=2)]
    check(lambda x, backend: ops.compressed_attention(*x, length=8, stride=4, backend=backend)[0], inputs)
    assert shares == [4, 4, 4]


@interpreted
@pytest.mark.parametrize("at_once", [1, 2])
def test_keys_of_selected_attention(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if parts of a list are written to, or read from, the place of the other sequence's.

    ``at_once``: number of sequences whose parts fit in the memory for them, and which share a launch.
    """
    from nsa.ops.kernels import selected

    tokens, block_size = 150, 64
    work_items, found = selected.work_items, []
    monkeypatch.setattr(selected, "work_items", lambda *args: found.append(work_items(*args)) or found[-1])
    monkeypatch.setattr(selected, "PART_BYTES", at_once * 2 * block_size * (16 + 16) * 4)  # two parts of a sequence
    inputs = [normal(2, tokens, 2, 16), normal(2, tokens, 1, 16, seed=1), normal(2, tokens, 1, 16, seed=2)]
    # Block 0's list is longer than an item. The tokens also select another block, which differs between sequences.
    choice = torch.zeros(2, tokens, 1, 1, dtype=torch.int32)
    choice[0, 64::9], choice[1, 70::11] = 1, 1
    choice[0, 130::9], choice[1, 128::11] = 2, -1

    def run(x: list[Tensor], backend: str) -> Tensor:
        chosen = choice
        if len(x[0]) == 1:
            chosen = choice[:1] if torch.equal(x[0], inputs[0][:1]) else choice[1:]
        return ops.selected_attention(*x, chosen, block_size=block_size, backend=backend)

    check(run, inputs)
    assert found[0].part_begin.tolist() == [0, 2, 2, 2, 4, 4, 4]


@interpreted
@pytest.mark.parametrize(("rows_per_split", "splits"), [(8, 3), (16, 4)])
def test_weights_of_compression(rows_per_split: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if rows of the second sequence are read from the first, in a range of rows with some of both."""
    from nsa.ops.kernels import compression

    monkeypatch.setattr(compression, "ROWS_PER_SPLIT", rows_per_split)
    monkeypatch.setattr(compression, "MOST_SPLITS", splits)
    inputs = test_compression.inputs_of(2, [23], 3, 16, 24, 20, 4, torch.float32)
    check(lambda x, backend: ops.compress_blocks(*x, length=4, stride=2, backend=backend), inputs, weights=3)
