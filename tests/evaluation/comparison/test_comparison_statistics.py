"""Statistics against independent definitions: enumeration, formulas, and coverage where the truth is known."""

import itertools
import math

import numpy as np
import pytest

from nsa.evaluation.comparison.reading import statistics
from nsa.evaluation.comparison.reading.statistics import Clusters


def one_seed(sums, counts=None) -> Clusters:
    sums = np.atleast_2d(np.asarray(sums, np.float64))
    return Clusters(sums, np.ones(sums.shape[1], np.int64) if counts is None else np.asarray(counts))


def test_clusters_sum_the_answers_of_each_sample() -> None:
    made = statistics.clusters([np.array([1, 0, 1, 0.5]), np.array([0, 0, 0, 1.0])], np.array([7, 7, 9, 7]))
    np.testing.assert_array_equal(made.sums, [[1.5, 1], [1, 0]])
    np.testing.assert_array_equal(made.counts, [3, 1])
    assert made.mean == pytest.approx(3.5 / 8)
    np.testing.assert_allclose(made.by_seed, [2.5 / 4, 1 / 4])


def test_bootstrap_draws_as_enumeration_does() -> None:
    sums, counts = np.array([3.0, 0.0, 1.0]), np.array([4, 2, 1])
    exact = [sums[list(d)].sum() / counts[list(d)].sum() for d in itertools.product(range(3), repeat=3)]
    drawn = statistics.draw_means(one_seed(sums, counts), 20_000)
    for value in set(exact):
        share = exact.count(value) / len(exact)
        assert np.isclose(drawn, value).mean() == pytest.approx(share, abs=4 * math.sqrt(share / 20_000))
    assert set(np.round(drawn, 9)) == set(np.round(exact, 9))


def test_whole_samples_are_drawn() -> None:
    """50 samples of 20 equal answers are worth 50 answers, not 1,000."""
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(50) < 0.5, 20).astype(np.float64)
    drawn = statistics.draw_means(statistics.clusters([right], np.repeat(np.arange(50), 20)))
    assert drawn.std() == pytest.approx(math.sqrt(right.mean() * (1 - right.mean()) / 50), rel=0.05)


def test_the_same_answers_give_the_same_bits() -> None:
    data = one_seed(np.random.default_rng(1).random((3, 40)))
    first = statistics.draw_means(data)
    statistics.weights.cache_clear()
    np.testing.assert_array_equal(first, statistics.draw_means(data))


def test_intervals_cover_the_truth_with_three_training_seeds() -> None:
    """Seeds, samples and their interaction vary. Three seeds drawn with replacement cover 80 %."""
    rng, covered, repetitions = np.random.default_rng(2), 0, 300
    for _ in range(repetitions):
        sums = 0.3 + rng.normal(0, 0.2, (3, 1)) + rng.normal(0, 0.2, (1, 40)) + rng.normal(0, 0.1, (3, 40))
        low, high = statistics.interval(statistics.draw_means(one_seed(sums), 1000))
        covered += low <= 0.3 <= high
    assert 0.92 <= covered / repetitions <= 0.995


def test_one_seed_adds_no_error_and_more_add_students_t() -> None:
    assert not statistics.seed_errors(np.array([0.4]), 100).any()
    means = np.array([0.2, 0.3, 0.7])
    drawn = statistics.seed_errors(means, 200_000)
    scale = means.std(ddof=1) / math.sqrt(3)
    for level, quantile in ((0.05, -2.920), (0.5, 0.0), (0.975, 4.303)):  # of t with two degrees of freedom
        assert np.quantile(drawn, level) == pytest.approx(quantile * scale, rel=0.05, abs=0.01)


@pytest.mark.parametrize(("samples", "proves"), [(20, False), (100, False), (250, True)])
def test_equal_answers_prove_nothing_before_there_are_enough(samples: int, proves: bool) -> None:
    """The rule of three: of n samples without a loss, the true loss may be 3 / n."""
    assert (statistics.noninferiority_p(one_seed(np.zeros(samples)), 0.02) < 0.05) == proves


def test_noninferiority_rejects_rarely_at_the_margin_and_often_at_no_loss() -> None:
    rng, at_margin, at_none = np.random.default_rng(3), 0, 0
    for _ in range(100):
        noise = rng.choice([-1.0, 0, 1], p=[0.06, 0.9, 0.04], size=500)  # on average the margin is lost
        at_margin += statistics.noninferiority_p(one_seed(noise), 0.02, 1000) < 0.05
        noise = rng.choice([-1.0, 0, 1], p=[0.01, 0.98, 0.01], size=500)
        at_none += statistics.noninferiority_p(one_seed(noise), 0.02, 1000) < 0.05
    assert at_margin <= 9 and at_none >= 80


def test_noninferiority_counts_a_loss_of_just_the_margin_and_never_says_that_it_is_certain() -> None:
    """One of n + 1 samples is the imaginary one; a bootstrap has none of it in a share of about 1 / e."""
    assert statistics.noninferiority_p(one_seed(np.full(50, -0.02)), 0.02) == 1
    assert statistics.noninferiority_p(one_seed(np.zeros(10_000)), 0.02, 1000) == 1 / 1001


def test_another_seed_draws_other_samples_and_other_errors_of_trainings() -> None:
    data = one_seed(np.repeat([[0.2], [0.3], [0.7]], 30, axis=1))  # no differences between samples
    drawn = [statistics.draw_means(data, 100, seed) - data.mean for seed in (1, 2)]
    assert not np.isclose(drawn[0], drawn[1]).any()
    np.testing.assert_array_equal(drawn[0], statistics.draw_means(data, 100, 1) - data.mean)


def binomial_p(heads: int, tosses: int) -> float:
    return sum(math.comb(tosses, k) for k in range(heads, tosses + 1)) / 2**tosses


def test_sign_flips_equal_the_binomial_test() -> None:
    """With differences of one size it is the sign test."""
    values = [1.0] * 9 + [-1.0] * 2 + [0.0] * 5
    assert statistics.greater_p(one_seed(values)) == pytest.approx(binomial_p(9, 11))
    many = [1.0] * 40 + [-1.0] * 25
    assert statistics.greater_p(one_seed(many)) == pytest.approx(binomial_p(40, 65), abs=0.01)
    assert statistics.greater_p(one_seed(np.zeros(5))) == 1


@pytest.mark.parametrize("number", [9, 16])
def test_sign_flips_weigh_samples_by_their_differences(number: int) -> None:
    """All patterns by a loop; with 2^16 of them, random ones come near."""
    values = np.random.default_rng(10).normal(0.4, 1, (2, number)) + 2 / number
    mean = values.mean(0)
    exact = np.mean([np.dot(s, mean) >= mean.sum() - 1e-12 for s in itertools.product((-1, 1), repeat=number)])
    assert 0.01 < exact < 0.3
    assert statistics.greater_p(Clusters(values, np.arange(1, number + 1))) == pytest.approx(exact, abs=0.01)


def test_sign_flips_of_decimal_fractions_count_ties_whatever_the_rounding() -> None:
    """0.1 + 0.2 is not 0.3 in binary, but as many thirds and tenths are as many."""
    dice = np.random.default_rng(12)
    for _ in range(300):
        whole = [int(n) for n in dice.integers(-9, 10, 6)]
        signs = list(itertools.product((1, -1), repeat=6))
        exact = np.mean([sum(s * n for s, n in zip(flip, whole, strict=True)) >= sum(whole) for flip in signs])
        for unit in (10, 3):
            p = statistics.greater_p(one_seed([n / unit for n in whole]))
            assert p == pytest.approx(exact if any(whole) else 1)


def test_noninferiority_is_a_bootstrap_of_samples_and_of_one_that_lost_all() -> None:
    """Samples have one to six answers; the imaginary one has as many as they have on average."""
    rng = np.random.default_rng(8)
    counts = rng.integers(1, 7, 60)
    sums = rng.binomial(counts, 0.06) * -1.0 + rng.binomial(counts, 0.05)
    size = round(counts.mean())
    sums_, counts_ = np.append(sums, -size), np.append(counts, size)
    draws = rng.integers(61, size=(20_000, 61))
    expected = np.mean(sums_[draws].sum(1) / counts_[draws].sum(1) <= -0.035)
    assert 0.05 < expected < 0.95
    assert statistics.noninferiority_p(one_seed(sums, counts), 0.035) == pytest.approx(expected, abs=0.015)


def test_many_equal_signs_are_surer_than_random_flips_can_tell() -> None:
    p = statistics.greater_p(one_seed(np.ones(60)))
    assert 2.0**-60 < p < 1e-10


def test_holm_on_a_known_example() -> None:
    """The example of Holm's method: 0.01, 0.04, 0.03, 0.005 at four tests."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.6, 0.9]) == [1.0, 1.0] and statistics.holm([]) == []


def test_holm_keeps_the_rate_of_any_false_alarm() -> None:
    rng = np.random.default_rng(4)
    rate = np.mean([min(statistics.holm(rng.random(20).tolist())) < 0.05 for _ in range(2000)])
    assert rate == pytest.approx(0.05, abs=0.015)


def test_effective_length() -> None:
    assert statistics.effective_length([512, 1024, 2048], [0.9, 0.765, 0.7], 0.9) == 1024
    assert statistics.effective_length([512], [0.5], 0.9) is None


def test_required_share() -> None:
    shares = np.array([0.05, 0.1, 0.2])
    scores = np.array(
        [
            [0.2, 0.5, 0.9],  # between 0.1 and 0.2
            [0.85, 0.9, 0.9],  # all suffice
            [0.1, 0.1, 0.1],  # above 0.2: towards dense
            [0.9, 0.2, 0.9],  # one lucky budget does not count
            [0.81, 0.9, 0.9],  # just what may be lost
        ]
    )
    found, bound = statistics.required_share(shares, scores, np.full(5, 0.9), 0.1)
    np.testing.assert_array_equal(bound, [False, True, False, False, True])

    def between(low: float, high: float, at_low: float, at_high: float) -> float:
        return low * (high / low) ** ((0.81 - at_low) / (at_high - at_low))

    expected = [between(0.1, 0.2, 0.5, 0.9), 0.05, between(0.2, 1, 0.1, 0.9), between(0.1, 0.2, 0.2, 0.9), 0.05]
    np.testing.assert_allclose(found, expected)


def test_law_of_exact_data_and_its_interval() -> None:
    lengths = np.array([1024, 2048, 4096, 8192])
    tokens = 3 * lengths**0.5
    noise = np.exp(np.random.default_rng(5).normal(0, 0.1, (4000, 4)))
    law = statistics.fit_law(lengths.tolist(), tokens, tokens * noise, tokens[None])
    assert (law.c, law.beta) == (pytest.approx(3), pytest.approx(0.5))
    x = np.log(lengths)
    half = 1.96 * 0.1 / math.sqrt(((x - x.mean()) ** 2).sum())  # of least squares
    assert (law.low, law.high) == (pytest.approx(0.5 - half, abs=0.01), pytest.approx(0.5 + half, abs=0.01))
    wide = statistics.fit_law(lengths.tolist(), tokens, tokens * noise, np.stack([tokens, 2 * lengths**0.7]))
    assert wide.high - wide.low > 1.5 * (law.high - law.low)
