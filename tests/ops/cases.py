"""Random inputs of the NSA operators, with unusual shapes."""

import itertools
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

LENGTHS = (1, 2, 17, 63, 129)


@dataclass
class Case:
    """Inputs of `nsa.ops.native_sparse_attention`; every tensor requires a gradient."""

    q: Tensor
    kv_cmp: tuple[Tensor, Tensor]
    kv_slc: tuple[Tensor, Tensor]
    kv_win: tuple[Tensor, Tensor]
    gates: Tensor
    sizes: dict[str, int]
    documents: list[int]
    cu_seqlens: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.q, *self.kv_cmp, *self.kv_slc, *self.kv_win, self.gates]

    @property
    def compression(self) -> dict[str, int]:
        return {key: self.sizes[key] for key in ("length", "stride")}

    @property
    def selection(self) -> dict[str, int]:
        names = ("length", "stride", "block_size", "num_blocks", "num_initial", "num_local")
        return {key: self.sizes[key] for key in names}


@contextmanager
def few_programs() -> Iterator[None]:
    """Run Hopper's persistent kernels in three programs, so that each computes several tiles of small inputs, too."""
    from nsa.ops.kernels.hopper import block_sparse, gradient, ranges, selected, selection

    with ExitStack() as patches:
        for module in (block_sparse, gradient, ranges, selected, selection):
            patches.enter_context(mock.patch.object(module, "multiprocessors", lambda _: 3))
        yield


def cumulative(documents: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32)


def random_case(seed: int, dtype: torch.dtype = torch.float32, packed: bool | None = None) -> Case:
    """A reproducible case. Sizes, group sizes, head dimensions and packing vary with the seed."""
    choose, normal = random.Random(seed), torch.Generator().manual_seed(seed)
    stride = choose.choice([1, 2, 4])
    length = stride * choose.choice([1, 2, 3])
    block_size = max(length, stride * choose.choice([1, 3, 4, 6]))
    num_initial, num_local = choose.choice([0, 1, 2]), choose.choice([0, 1, 2])
    sizes = {
        "length": length,
        "stride": stride,
        "block_size": block_size,
        "num_blocks": max(1, num_initial + num_local + choose.choice([0, 1, 3])),
        "num_initial": num_initial,
        "num_local": num_local,
        "window": choose.choice([1, 7, 40]),
    }
    groups, per_group = choose.choice([1, 2, 3]), choose.choice([1, 2, 3, 6])
    head_dim, v_head_dim = choose.choice([(4, 4), (6, 4), (4, 6)])
    packed = choose.random() < 0.5 if packed is None else packed
    if packed:
        documents = [choose.choice([0, 1, 2, 5, 17, 40]) for _ in range(choose.randint(1, 6))]
        documents[0] = max(documents[0], 1)
        batch = 1
    else:
        documents, batch = [choose.choice(LENGTHS)], choose.choice([1, 2])
    tokens = sum(documents)
    blocks = max(0, (tokens - length) // stride + 1)

    def tensor(count: int, heads: int, width: int) -> Tensor:
        return torch.randn(batch, count, heads, width, dtype=dtype, generator=normal).requires_grad_()

    def pair(count: int) -> tuple[Tensor, Tensor]:
        return tensor(count, groups, head_dim), tensor(count, groups, v_head_dim)

    heads = groups * per_group
    gates = torch.rand(batch, tokens, heads, 3, dtype=dtype, generator=normal).requires_grad_()
    return Case(
        tensor(tokens, heads, head_dim),
        pair(blocks),
        pair(tokens),
        pair(tokens),
        gates,
        sizes,
        documents,
        cumulative(documents) if packed else None,
    )


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed sum of ``out`` with unequal weights."""
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype, device=out.device).view_as(out).sin()
    return list(torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True, materialize_grads=True))
