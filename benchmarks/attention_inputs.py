"""Shapes, index regimes and operation counts that the attention benchmark and the tile tuner share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads and head dimensions; l 32, d 16, 16 selected blocks of 64, window 512."""

    name: str
    heads: int
    groups: int
    width: int = 128
    v_width: int = 128
    length: int = 32
    stride: int = 16
    block_size: int = 64
    num_blocks: int = 16
    window: int = 512

    @property
    def sizes(self) -> dict[str, int]:
        return {key: getattr(self, key) for key in ("length", "stride", "block_size", "num_blocks", "window")}

    def pairs(self, tokens: int) -> dict[str, float]:
        """(query, key) pairs that each branch and dense attention must score, all heads counted."""
        seen = sum(
            max(0, (t + 1 - self.length) // self.stride + 1) for t in range(self.stride - 1, tokens, self.stride)
        )
        whole = self.block_size * self.num_blocks
        chosen = sum(min(t + 1, whole) for t in range(min(tokens, whole))) + max(0, tokens - whole) * whole
        near = sum(min(t + 1, self.window) for t in range(min(tokens, self.window)))
        near += max(0, tokens - self.window) * self.window
        counts = {"compressed": seen * self.stride, "selected": chosen, "window": near, "dense": tokens**2 / 2}
        return {name: float(count) * self.heads for name, count in counts.items()}

    def flops(self, tokens: int) -> dict[str, float]:
        """Floating-point operations of each stage: two products forward, five backward, one for the importance."""
        forward, backward = 2 * (self.width + self.v_width), 2 * (3 * self.width + 2 * self.v_width)
        result = {}
        for branch, pairs in self.pairs(tokens).items():
            result[f"{branch} forward"], result[f"{branch} backward"] = pairs * forward, pairs * backward
        result["selection"] = self.pairs(tokens)["compressed"] * 2 * self.width
        blocks = self.num_compressed(tokens) * self.groups
        for width in (self.width, self.v_width):  # keys, then values, each with a hidden layer of its width
            product = 2.0 * blocks * width * (self.length * width + width)
            result["compression forward"] = result.get("compression forward", 0) + product
            result["compression backward"] = result.get("compression backward", 0) + 2 * product
        return result

    def num_compressed(self, tokens: int) -> int:
        return (tokens - self.length) // self.stride + 1

    def bytes(self, tokens: int, itemsize: int = 2) -> dict[str, float]:
        """Bytes that each stage must read and write at least, every tensor once."""
        q, out, lse = tokens * self.heads * self.width, tokens * self.heads * self.v_width, 4 * tokens * self.heads
        kv = tokens * self.groups * (self.width + self.v_width)
        blocks = self.num_compressed(tokens) * self.groups
        kv_cmp = blocks * (self.width + self.v_width)
        chosen = 4 * tokens * self.groups * self.num_blocks
        result = {}
        for branch, keys, index in (
            ("compressed", kv_cmp, 0), ("selected", kv, chosen), ("window", kv, 0), ("dense", kv, 0),
        ):  # fmt: skip
            result[f"{branch} forward"] = (q + keys + out) * itemsize + lse + index
            result[f"{branch} backward"] = (2 * (q + keys) + 2 * out) * itemsize + lse + index
        result["selection"] = (q + blocks * self.width) * itemsize + lse + chosen
        result["combine forward"] = (4 * out + 3 * tokens * self.heads) * itemsize
        result["combine backward"] = (4 * out + 3 * tokens * self.heads) * itemsize + 9 * lse
        result["compression forward"] = (kv + kv_cmp) * itemsize
        result["compression backward"] = (2 * kv + kv_cmp) * itemsize
        return {name: float(count) for name, count in result.items()}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("A", 64, 4),
        Shape("B", 32, 8),
        Shape("C", 16, 1),
        Shape("D", 32, 16, 64, 64),
        Shape("E", 32, 16),
        Shape("A192", 64, 4, 192, 128),
        Shape("long", 32, 2),
        *(Shape(f"h{h}", 4 * h, 4) for h in (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 32)),
    )
}

# Amplitudes of normal scores that are constant over 1, 2, 4, .. tokens, and over all. "trained" imitates the number of
# distinct blocks in tiles of neighbouring tokens that was measured in a trained 94M model at 32K tokens: 24.6, 37.3,
# 55.7, 79.6 and 139 for 2, 4, 8, 16 and 64 tokens; this gives 23, 36, 54, 79 and 157.
REGIMES: dict[str, tuple[list[float], float]] = {
    "random": ([1.0], 0.0),
    "coherent": ([0.05, 0, 0, 0, 0, 0, 0, 0, 1.0], 0.0),
    "trained": ([1.0, 0.7, 0.5, 0.5, 0.4, 0.4, 0.4], 1.5),
}


def block_indices(shape: Shape, tokens: int, regime: str, device: str = "cuda", seed: int = 0) -> Tensor:
    """(1, T, G, n) int32: the first, the last two, and the best-scored of the other blocks; ascending, then -1."""
    amplitudes, static = REGIMES[regime]
    generator = torch.Generator(device).manual_seed(seed)
    count, n = (tokens + shape.block_size - 1) // shape.block_size, shape.num_blocks
    result = torch.empty(1, tokens, shape.groups, n, dtype=torch.int32, device=device)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, count, device=device, generator=generator)

    block, chunk = torch.arange(count, device=device), 4096
    for group in range(shape.groups):
        constant = static * noise(1)
        for start in range(0, tokens, chunk):
            stop = min(start + chunk, tokens)
            score = constant.expand(stop - start, -1).clone()
            for level, amplitude in enumerate(amplitudes):
                if amplitude:
                    coarse = noise((stop - start + 2**level - 1) // 2**level)
                    score += amplitude * coarse.repeat_interleave(2**level, 0)[: stop - start]
            own = torch.arange(start, stop, device=device)[:, None] // shape.block_size
            score.masked_fill_((block == 0) | (block > own - 2), torch.inf).masked_fill_(block > own, -torch.inf)
            top = score.topk(min(n, count))
            chosen = top.indices.masked_fill(top.values == -torch.inf, count).sort(-1).values
            chosen = torch.nn.functional.pad(chosen, (0, n - chosen.shape[1]), value=count)
            result[0, start:stop, group] = chosen.masked_fill(chosen == count, -1).int()
    return result


class Inputs:
    """Queries, the three pairs of keys and values, and gates of one sequence; all require gradients.

    Attributes:
        q: (1, T, H, D). pairs: compressed, selected, window, each k (1, S, G, D) and v (1, S, G, Dv).
        gates: (1, T, H, 3).
    """

    def __init__(self, shape: Shape, tokens: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.q = normal(1, tokens, shape.heads, shape.width, dtype=dtype, grad=True)
        self.gates = torch.rand(1, tokens, shape.heads, 3, device="cuda").to(dtype).requires_grad_()
        self.pairs = [
            (
                normal(1, count, shape.groups, shape.width, seed=2 * i + 1, dtype=dtype, grad=True),
                normal(1, count, shape.groups, shape.v_width, seed=2 * i + 2, dtype=dtype, grad=True),
            )
            for i, count in enumerate((shape.num_compressed(tokens), tokens, tokens))
        ]

    @property
    def all(self) -> tuple[Tensor, ...]:
        return (self.q, *(x for pair in self.pairs for x in pair), self.gates)


def distinct_blocks(indices: Tensor, tile: int) -> float:
    """Mean number of distinct blocks of ``tile`` neighbouring tokens, over the last three quarters of the sequence."""
    indices = indices[0, indices.shape[1] // 4 // tile * tile :]
    rows = indices[: len(indices) // tile * tile].unflatten(0, (-1, tile)).transpose(1, 2).flatten(2).sort(-1).values
    fresh = (rows[..., 1:] != rows[..., :-1]).sum(-1) + 1
    return fresh.float().mean().item()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16, grad: bool = False) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator).requires_grad_(grad)
