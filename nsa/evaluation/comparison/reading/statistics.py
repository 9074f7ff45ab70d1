"""Paired differences, their intervals and tests, on arrays. Everything is seeded: the same answers give the same bits.

A sample is the unit within one training seed: its answers are correlated, so whole samples are drawn (a cluster
bootstrap). Where an arm was trained several times the training seed is the unit above it. Samples are the same in all
arms and for all training seeds, so differences are paired and both levels are crossed.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
DRAWS = 10_000  # of a bootstrap
FLIPS = 20_000  # random sign patterns, where all would be more
SEED = 20261129


@dataclass(frozen=True)
class Clusters:
    """Scores or differences, summed over the answers of each sample.

    sums: (R, S) float64 of R training seeds and S samples. counts: (S,) int64, answers of each sample.
    """

    sums: Floats
    counts: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Over all answers."""
        return float(self.sums.sum() / (len(self.sums) * self.counts.sum()))

    @property
    def by_seed(self) -> Floats:
        """(R,) means."""
        return self.sums.sum(1) / self.counts.sum()

    def __sub__(self, other: "Clusters") -> "Clusters":
        assert self.sums.shape == other.sums.shape and (self.counts == other.counts).all()
        return Clusters(self.sums - other.sums, self.counts)


def clusters(scores: Sequence[Floats], samples: NDArray[np.int64]) -> Clusters:
    """Clusters of the scores (A,) of each training seed, whose answers belong to ``samples`` (A,)."""
    _, index, counts = np.unique(samples, return_inverse=True, return_counts=True)
    return Clusters(np.stack([np.bincount(index, s, len(counts)) for s in scores]), counts)


@functools.lru_cache(maxsize=8)
def weights(samples: int, draws: int = DRAWS, seed: int = SEED) -> NDArray[np.float32]:
    """How often a bootstrap draws each sample: (draws, samples). The same for all arms, so that they stay paired."""
    rng = np.random.default_rng([seed, samples])
    return rng.multinomial(samples, np.full(samples, 1 / samples), size=draws).astype(np.float32)


def draw_means(of: Clusters, draws: int = DRAWS, seed: int = SEED) -> Floats:
    """Means of bootstrap draws, (draws,).

    Samples are drawn with replacement. Of R training seeds, R > 1, the error is added as Student's t with R - 1 degrees
    of freedom, times the standard error of the seeds' means: seeds drawn with replacement would give intervals that are
    far too narrow, since there are three or so of them.
    """
    w = weights(len(of.counts), draws, seed)
    means = (w @ of.sums.mean(0)) / (w @ of.counts.astype(np.float64))
    return means + seed_errors(of.by_seed, draws, seed)


def seed_errors(by_seed: Floats, draws: int = DRAWS, seed: int = SEED) -> Floats:
    """Errors of a mean over training seeds, (draws,): Student's t times the standard error; 0 for one seed."""
    number = len(by_seed)
    if number < 2:
        return np.zeros(draws)
    rng = np.random.default_rng([seed, number, 1])
    return rng.standard_t(number - 1, draws) * by_seed.std(ddof=1) / math.sqrt(number)


def interval(drawn: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of bootstrap draws."""
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def noninferiority_p(difference: Clusters, margin: float, draws: int = DRAWS, seed: int = SEED) -> float:
    """p of "the mean of ``difference`` is at most -``margin``"; a small p says: not worse by the margin.

    One imaginary sample, in which all was lost, is added. Without it a few samples that all came out equal would prove
    that nothing is ever lost, since a bootstrap of zeros is zero. With it, equal samples suffice from about
    3 / ``margin`` on, as the rule of three demands (150 for 2 points).
    """
    count = max(1, round(float(difference.counts.mean())))
    lost = np.full((len(difference.sums), 1), -float(count))
    guarded = Clusters(np.hstack([difference.sums, lost]), np.append(difference.counts, count))
    drawn = draw_means(guarded, draws, seed)
    return float((1 + (drawn <= -margin + 1e-9).sum()) / (draws + 1))


def greater_p(difference: Clusters, seed: int = SEED) -> float:
    """p of "positive and negative differences of samples are equally likely", against a positive mean.

    The signs of whole samples are flipped: all patterns where there are few samples (the test is exact), else `FLIPS`
    random ones, and then Hoeffding's bound exp(-(sum)^2 / (2 sum of squares)) if it is lower. Only for arms on one
    checkpoint each: several training seeds are averaged first.
    """
    values = difference.sums.mean(0)
    values = values[values != 0]
    if not len(values):
        return 1.0
    observed, slack = values.sum(), 1e-9 * np.abs(values).sum()
    if 2 ** len(values) <= FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        return float((signs @ values >= observed - slack).mean())
    rng = np.random.default_rng([seed, len(values), 2])
    bits = rng.integers(0, 2, (FLIPS, len(values)), np.int8) * 2.0 - 1
    bound = math.exp(-(observed**2) / (2 * (values @ values))) if observed > 0 else 1.0
    return float(min((1 + (bits @ values >= observed - slack).sum()) / (FLIPS + 1), bound))


def holm(p: Sequence[float]) -> list[float]:
    """p adjusted by Holm's method: below a level for false alarms of which at most that share has even one."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def effective_length(lengths: Sequence[int], scores: Sequence[float], base: float, share: float = 0.85) -> int | None:
    """The longest length whose score is at least ``share`` of ``base``; None: there is none (NoLiMa's definition)."""
    return max((n for n, s in zip(lengths, scores, strict=True) if s >= share * base - 1e-12), default=None)


def required_share(shares: Floats, scores: Floats, dense: Floats, tolerance: float) -> tuple[Floats, NDArray[np.bool_]]:
    """The smallest share of dense reads that loses at most ``tolerance`` of dense's score, and whether it is a bound.

    Scores are taken as linear in the logarithm of the share; the full share has dense's score. Only budgets count from
    which on, upwards, all lose so little: one lucky small budget does not.

    Args:
        shares: (K,) ascending, below 1. scores: (N, K). dense: (N,).

    Returns:
        (N,) shares, and (N,) bool: already the smallest share that was measured loses so little.
    """
    row, target = np.arange(len(scores)), (1 - tolerance) * dense
    grid, whole = np.append(shares, 1.0), np.hstack([scores, dense[:, None]])
    keeps = np.logical_and.accumulate((whole >= target[:, None] - 1e-12)[:, ::-1], axis=1)[:, ::-1]
    first = keeps.argmax(1)
    below = np.maximum(first - 1, 0)
    high, low = whole[row, first], whole[row, below]
    part = np.divide(target - low, high - low, out=np.ones(len(scores)), where=high - low > 1e-12)
    logs = np.log(grid)
    return np.exp(logs[below] + part * (logs[first] - logs[below])), first == 0


@dataclass(frozen=True)
class Law:
    """b = c n^beta, tokens needed at length n. low, high: the 95 % interval of beta."""

    c: float
    beta: float
    low: float
    high: float


def fit_law(lengths: Sequence[int], tokens: Floats, drawn: Floats, by_seed: Floats) -> Law:
    """Fit by least squares on logarithms; needs two lengths.

    tokens: (L,). drawn: (draws, L), of a bootstrap. by_seed: (R, L), of each training seed.
    """
    x = np.log(np.asarray(lengths, np.float64))
    middle = x.mean()
    x = x - middle

    def slopes(y: Floats) -> Floats:
        return (np.log(y) @ x) / (x @ x)

    beta = float(slopes(tokens))
    low, high = interval(slopes(drawn) + seed_errors(slopes(by_seed), len(drawn)))
    return Law(float(np.exp(np.log(tokens).mean() - beta * middle)), beta, low, high)
