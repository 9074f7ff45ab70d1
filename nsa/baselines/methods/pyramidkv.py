"""PyramidKV: SnapKV whose lower layers keep more than the upper ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.baselines.method import Axes
from nsa.baselines.methods.snapkv import SnapKV
from nsa.baselines.plan import View


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Layers keep, beside the window, numbers of tokens that fall in equal steps; their mean is the budget, exactly.

    The last layer keeps 1 / ``beta`` of the mean (more, if the first would keep more than there is).
    """

    beta: float = 20.0

    name = "pyramidkv"
    title = "PyramidKV"
    paper = "arXiv 2406.02069, section 4.2"
    axes = Axes("token", "as SnapKV", "per layer, falling in equal steps", "evicts")
    differs = (
        "differs from the release because layers are rounded by the largest remainder, so that the total is exact "
        "(its floored step keeps 2 % too much), and because there is no fallback to equal layers for short prompts"
    )
    licence = "MIT"
    formula = "k keys and values of the prompt, mean over the layers, and all decoded ones"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"{self.name}: beta must be at least 1, got {self.beta:g}")

    def counts(self, view: View, scores: Tensor, capacity: Tensor, recent: Tensor) -> Tensor:
        rows = zip((capacity - recent).flatten().tolist(), recent.flatten().tolist(), view.seen.tolist(), strict=True)
        counts = [self.layers(mean, near, seen, view.num_layers)[view.layer] for mean, near, seen in rows]
        return torch.tensor(counts, device=scores.device)[:, None]

    def layers(self, mean: int, recent: int, seen: int, number: int) -> list[int]:
        """Tokens of each layer beside the ``recent`` ones; their sum is ``number * mean``."""
        most, least = ends(mean, self.beta, seen - recent)
        exact = [most - (most - least) * layer / max(1, number - 1) for layer in range(number)]
        if number == 1:
            return [mean]
        counts = [int(x) for x in exact]
        by_rest = sorted(range(number), key=lambda layer: counts[layer] - exact[layer])
        for layer in by_rest[: number * mean - sum(counts)]:
            counts[layer] += 1
        return counts


@dataclass(frozen=True, kw_only=True)
class PyramidKVKvpress(PyramidKV):
    """The window is part of what falls; SnapKV if the last layer would keep less than the window."""

    name = "pyramidkv_kvpress"
    title = "PyramidKV as in kvpress"
    paper = "arXiv 2406.02069, section 4.2, as in kvpress"
    differs = (
        "differs from the release of the authors because kvpress counts the window into the steps, rounds each layer, "
        "and becomes SnapKV if the last layer would keep less than a window"
    )
    licence = "Apache-2.0 (kvpress)"

    def layers(self, mean: int, recent: int, seen: int, number: int) -> list[int]:
        capacity = mean + recent
        most, least = ends(capacity, self.beta, seen - recent)
        if not seen >= most >= least >= recent or number == 1:
            return [mean] * number
        return [round(most - (most - least) * layer / (number - 1)) - recent for layer in range(number)]


def ends(mean: float, beta: float, there: int) -> tuple[float, float]:
    """What the first and the last layer keep, if ``mean`` is their mean and there are so many tokens."""
    most = min(2 * mean - mean / beta, there)
    return most, 2 * mean - most
