"""How many tokens to sample for a sum of exponentials that is right to a share epsilon with probability 1 - delta."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 2  # times that the spread is measured: the base sample alone understates it, if weights are skewed
BOUNDS = ("clt", "bernstein", "hoeffding")


class Sample(NamedTuple):
    """sampled (B, G, S) bool. size, whole (B, G, 1) int64: tokens sampled, and tokens that they stand for."""

    sampled: Tensor
    size: Tensor
    whole: Tensor


def sample(
    scores: Tensor,
    fixed: Tensor,
    residual: Tensor,
    draw: Tensor,
    *,
    epsilon: float,
    delta: float,
    least: int,
    share: float,
    bound: str = "clt",
    ceiling: Tensor | None = None,
) -> Sample:
    """Sample of ``residual`` without replacement: the tokens with the least numbers ``draw``, the same for a group.

    The sum D over fixed and residual of exp(score) is estimated; the certificate is about it alone, per query head.
    "clt": b of vAttention's equation with two-sided z, and the correction for a finite population; the spread is
    measured on the base sample, and once more on the sample that it asks for. "bernstein", "hoeffding": bounds of
    Bardenet and Maillard (arXiv 1309.4029, theorem 4.3 and corollary 2.5), valid for any sample; the sample doubles
    until they hold, and delta is shared out over these looks.

    Args:
        scores: (B, H, S) fp32. fixed, residual: (B, G, S) bool. draw: (B, G, S) int64. least, share: of the residual in
            the base sample. ceiling: (B, H, 1): no score of the residual is higher; needed but for "clt".
    """
    whole = residual.sum(-1, keepdim=True)
    order = torch.where(residual, draw, 2**40).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    base = torch.minimum((whole * share).ceil().long().clamp(min=least), whole)
    if epsilon <= 0:
        return Sample(residual, whole, whole)
    spread = _Spread(scores, fixed, residual & (rank < base))
    if bound == "clt":
        z, n, size = NormalDist().inv_cdf(1 - delta / 2), _heads(whole, scores), base
        for _ in range(ROUNDS):
            total, _, variance = spread.of(residual & (rank < size), size, whole)
            need = (z * n / (epsilon * total)) ** 2 * variance
            wanted = torch.where(need > 0, 1 / (1 / need + 1 / n), 0).ceil()
            wanted = wanted.unflatten(1, (len(residual[0]), -1)).amax(2).long()
            size = torch.minimum(torch.maximum(wanted, size), whole)
        return Sample(residual & (rank < size), size, whole)
    assert ceiling is not None
    looks = torch.where(base > 0, whole.double() / base.clamp(min=1), 1).log2().ceil().long() + 1
    size = base
    highest = (ceiling.double() - spread.top).exp()
    for _ in range(int(looks.max())):
        total, mean, variance = spread.of(residual & (rank < size), size, whole)
        width = _half_width(
            bound, variance, highest, _heads(size, scores), _heads(whole, scores), delta / _heads(looks, scores)
        )
        n = _heads(whole, scores)
        lowest = total - n * torch.minimum(width, mean)
        holds = (n * width <= epsilon * lowest).unflatten(1, (len(residual[0]), -1)).all(2)
        size = torch.where(holds, size, torch.minimum(2 * size, whole))
    return Sample(residual & (rank < size), size, whole)


class _Spread:
    """Moments of exp(score) over a sample, in fp64; scores are relative to the highest one known (``top``)."""

    def __init__(self, scores: Tensor, fixed: Tensor, known: Tensor) -> None:
        self.group = scores.shape[1] // fixed.shape[1]
        seen = (fixed | known).repeat_interleave(self.group, 1)
        self.top = scores.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True).double()
        self.exp = (scores.double() - self.top).exp()
        self.fixed = torch.where(fixed.repeat_interleave(self.group, 1), self.exp, 0).sum(-1, keepdim=True)

    def of(self, sampled: Tensor, size: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, 1): estimate of the whole sum; mean and variance (divided by b - 1) of the sample."""
        mask, b = sampled.repeat_interleave(self.group, 1), size.repeat_interleave(self.group, 1)
        mean = torch.where(mask, self.exp, 0).sum(-1, keepdim=True) / b.clamp(min=1)
        variance = torch.where(mask, self.exp - mean, 0).square().sum(-1, keepdim=True) / (b - 1).clamp(min=1)
        return self.fixed + whole.repeat_interleave(self.group, 1) * mean, mean, variance


def _heads(x: Tensor, scores: Tensor) -> Tensor:
    return x.repeat_interleave(scores.shape[1] // x.shape[1], 1).double()


def _half_width(bound: str, variance: Tensor, highest: Tensor, b: Tensor, n: Tensor, delta: Tensor) -> Tensor:
    """Of an interval that holds the mean of n numbers in [0, highest] with probability 1 - delta; both sides."""
    b, n = b.clamp(min=1), n.clamp(min=1)
    rho = torch.where(b <= n / 2, 1 - (b - 1) / n, (1 - b / n) * (1 + 1 / b))
    if bound == "hoeffding":
        return highest * (rho * (2 / delta).log() / (2 * b)).sqrt()
    log = (10 / delta).log()
    return (2 * variance * rho * log / b).sqrt() + (7 / 3 + 3 / math.sqrt(2)) * highest * log / b
