"""vAttention: its definition, its certificate by seeds, and what the release's sampling does to it."""

import itertools
import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
from decoding import decoded
from sessions import HEADS, inputs

from nsa.baselines import Budget, BudgetError, View
from nsa.baselines.importance.sampling import _half_width as half_width
from nsa.baselines.importance.sampling import sample
from nsa.baselines.method import State
from nsa.baselines.methods.vattention import VAttention
from nsa.baselines.methods.vattention_released import VAttentionReleased
from nsa.ops.choose import mixed

PADDING = torch.tensor([0, 5])
SEEDS = 2000


def test_vattention_is_its_definition() -> None:
    """One row and query at a time, with sums written out; the draws are taken as they are."""
    epsilon, delta, least = 0.1, 0.2, 6
    method = VAttention(
        budget=Budget(tokens=14), epsilon=epsilon, delta=delta, least=least, window=4, page=4, ranking="oracle", seed=3
    )
    z, sizes = NormalDist().inv_cdf(1 - delta / 2), set()
    for step in decoded(method, inputs(83, layers=1, scale=0.5), 80, PADDING)[0]:
        fixed, drawn = (part.keep[:, :, 0] for part in step.plan.parts)
        scores = step.view.scores()[:, :, 0]
        for row in range(2):
            start, last = int(PADDING[row]), step.view.k.shape[1] - 1
            for kv in range(2):
                heads = (2 * kv, 2 * kv + 1)
                mass = sum(scores[row, h].softmax(-1) for h in heads)
                always = {*range(start, start + 4), *range(last - 3, last + 1)}
                order = sorted(set(range(start, last + 1)) - always, key=lambda s, m=mass: (-m[s].item(), s))
                heavy = always | set(order[:6])
                assert set(fixed[row, kv].nonzero()[:, 0].tolist()) == heavy
                rest = [s for s in range(start, last + 1) if s not in heavy]
                number = {s: hashed(last - start, s - start, seed=3) for s in rest}
                rest.sort(key=lambda s, n=number: (n[s], s))
                size = least
                for _ in range(2):  # the spread is measured on the base sample, then on what that asked for
                    wanted = [size]
                    for h in heads:
                        e = scores[row, h].double().exp()
                        some = e[rest[:size]]
                        total = e[sorted(heavy)].sum() + len(rest) * some.mean()
                        need = float(z * len(rest) * some.std() / (epsilon * total)) ** 2
                        wanted.append(math.ceil(need / (1 + need / len(rest))))
                    size = max(wanted)
                assert set(drawn[row, kv].nonzero()[:, 0].tolist()) == set(rest[:size])
                sizes.add(size)
                for h in heads:
                    e = scores[row, h].exp()
                    weight = torch.zeros_like(e)
                    weight[sorted(heavy)] = 1
                    weight[rest[:size]] = len(rest) / size
                    out = (weight * e) @ step.view.v[row, :, kv] / (weight * e).sum()
                    torch.testing.assert_close(step.out[row, h], out, atol=1e-5, rtol=1e-5)
    assert len(sizes) > 3 and min(sizes) < 40


def hashed(query: int, key: int, seed: int) -> int:
    return int(mixed(mixed(torch.tensor(query * 1_000_003 + key)) + seed * 7919))


def trials(
    sigma: float, *, seeds: int = SEEDS, tokens: int = 512, **settings: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Many seeds over the same log-normal weights: relative errors of D (seeds, 2), sizes, sums."""
    dice = torch.Generator().manual_seed(1)
    scores = torch.randn(2, tokens, generator=dice) * torch.tensor([[sigma], [sigma / 2]])
    fixed = torch.zeros(1, 1, tokens, dtype=torch.bool)
    fixed[..., :8] = True
    draw = mixed(torch.arange(seeds)[:, None, None] * 7919 + mixed(torch.arange(tokens)))
    rows = scores.expand(seeds, -1, -1)
    drawn = sample(
        rows, fixed.expand(seeds, -1, -1), (~fixed).expand(seeds, -1, -1), draw,
        ceiling=scores.amax(-1, keepdim=True).expand(seeds, -1, -1), **settings,
    )  # fmt: skip
    weight = fixed + drawn.sampled * (drawn.whole / drawn.size)
    sums = torch.einsum("bgs,hs->bh", weight.double(), scores.double().exp())
    return sums / scores.double().exp().sum(-1) - 1, drawn.size[:, 0, 0], sums


@pytest.mark.parametrize(("bound", "epsilon", "delta"), [
    ("clt", 0.1, 0.2), ("clt", 0.05, 0.05), ("bernstein", 0.3, 0.2), ("hoeffding", 0.3, 0.2),
])  # fmt: skip
def test_the_certificate_holds_as_often_as_it_says(bound: str, epsilon: float, delta: float) -> None:
    """Over 2,000 seeds the sum is right to epsilon for a share of at least 1 - delta, of either head."""
    clt = bound == "clt"
    settings = {"sigma": 0.8, "tokens": 512} if clt else {"sigma": 0.2, "tokens": 1024, "seeds": 500}
    errors, sizes, _ = trials(**settings, epsilon=epsilon, delta=delta, least=64, share=0.01, bound=bound)
    covered = (errors.abs() <= epsilon).double().mean(0)
    tolerance = 3 * math.sqrt(delta * (1 - delta) / SEEDS) if clt else 0
    assert (covered >= 1 - delta - tolerance).all(), covered
    assert sizes.double().mean() < 0.9 * settings["tokens"], "it does not sample all"


@pytest.mark.parametrize("bound", ["bernstein", "hoeffding"])
def test_finite_bounds_double_the_sample_as_their_inequalities_say(bound: str) -> None:
    """Bardenet and Maillard's inequalities for one sample at a time; the least delta of equal shares over the looks.

    Row by row what is fixed has more of the sum: nothing at first, then almost all.
    """
    epsilon, delta, n, rows = 0.3, 0.2, 1016, 200
    scores = torch.randn(rows, 2, 1024, generator=torch.Generator().manual_seed(2)) * 0.2
    scores[..., :8] += torch.linspace(-2, 9, rows)[:, None, None]
    scores[:, 1, 8:] *= torch.rand(rows, 1, generator=torch.Generator().manual_seed(3)) * 2
    fixed = torch.arange(1024).expand(rows, 1, 1024) < 8
    draw = torch.arange(1024).expand(rows, 1, 1024)  # the first ones
    top = scores[..., 8:].amax(-1, keepdim=True) + 0.1
    drawn = sample(
        scores, fixed, ~fixed, draw, epsilon=epsilon, delta=delta, least=32, share=0.0, bound=bound, ceiling=top
    )
    looks, sizes = math.ceil(math.log2(n / 32)) + 1, set()

    def needed(e: torch.Tensor, highest: float) -> int:
        b = 32
        while b < n:
            some = e[8 : 8 + b]
            rho = 1 - (b - 1) / n if b <= n / 2 else (1 - b / n) * (1 + 1 / b)
            if bound == "hoeffding":
                width = highest * math.sqrt(rho * math.log(2 * looks / delta) / (2 * b))
            else:
                log = math.log(10 * looks / delta)
                width = float(some.std()) * math.sqrt(2 * rho * log / b) + (7 / 3 + 3 / 2**0.5) * highest * log / b
            least = float(e[:8].sum()) + n * max(float(some.mean()) - width, 0)
            if n * width <= epsilon * least:
                break
            b = min(2 * b, n)
        return b

    for row in range(rows):
        heads = zip(scores[row].double().exp(), top[row].double().exp().flatten().tolist(), strict=True)
        sizes.add(size := max(needed(e, highest) for e, highest in heads))
        assert int(drawn.size[row]) == size
    assert len(sizes) > 3
    args = {"epsilon": 1e-6, "delta": delta, "least": 32, "share": 0.0, "bound": bound, "ceiling": top}
    drawn = sample(scores, fixed, ~fixed, draw, **args)
    assert (drawn.size == n).all() and torch.equal(drawn.sampled, ~fixed), "never more than there are"


def test_the_ceiling_is_the_highest_bound_of_what_is_left() -> None:
    """By loops over pages of 4. One that is too high is no error: it only costs samples."""
    method, state = VAttention(budget=Budget(tokens=12), window=4, page=4), State(shared={})
    (q, k, v), place = inputs(41, layers=1).layers[0], torch.arange(41).expand(2, 41)
    slots = place[..., None].expand(-1, -1, k.shape[2])
    options = (place[:, :40], slots[:, :40], torch.full((2,), 40), 0.25, 0, 1)
    method.observe(View(q[:, :40], k[:, :40], v[:, :40], *options, True, True), None, state)
    step = View(q[:, 40:], k, v, place[:, 40:], slots, torch.full((2,), 41), 0.25, 0, 1, False, True)
    fixed, residual, highest, _ = method._heavy(step, state)
    assert (fixed ^ residual).all() and (fixed.sum(-1) == 12).all()
    for b, h in itertools.product(range(2), range(HEADS)):
        g, bounds = h // step.group, []
        for token in residual[b, g].nonzero()[:, 0].tolist():
            page = k[b, token // 4 * 4 : token // 4 * 4 + 4, g]
            bounds.append(float(torch.maximum(q[b, 40, h] * page.amin(0), q[b, 40, h] * page.amax(0)).sum()) * 0.25)
        assert float(highest[b, h, 0]) == pytest.approx(max(bounds), rel=1e-5)


@pytest.mark.parametrize("b", [1, 2, 7, 8, 9, 16])
def test_widths_are_those_of_the_inequalities(b: int) -> None:
    """Bardenet and Maillard, corollary 2.5 and theorem 4.3, of 16 numbers; up to half of them has its own factor."""
    n, delta, variance, highest = 16, 0.05, 0.3, 1.7
    given = (torch.tensor(x, dtype=torch.float64) for x in (variance, highest, b, n, delta))
    variances, *others = given
    rho = 1 - (b - 1) / n if b <= n / 2 else (1 - b / n) * (1 + 1 / b)
    kappa = 7 / 3 + 3 / math.sqrt(2)
    hoeffding = highest * math.sqrt(rho * math.log(2 / delta) / (2 * b))
    bernstein = math.sqrt(variance) * math.sqrt(2 * rho * math.log(10 / delta) / b)
    bernstein += kappa * highest * math.log(10 / delta) / b
    assert float(half_width("hoeffding", variances, *others)) == pytest.approx(hoeffding, rel=1e-12)
    assert float(half_width("bernstein", variances, *others)) == pytest.approx(bernstein, rel=1e-12)


def test_one_sided_z_covers_less_than_it_says() -> None:
    """The release takes z of 1 - delta: that is the two-sided one of twice the delta."""
    delta = 0.2
    errors, _, _ = trials(0.8, epsilon=0.05, delta=2 * delta, least=64, share=0.01)
    assert (errors[:, 0].abs() <= 0.05).double().mean() < 1 - delta - 0.1


def test_sums_are_unbiased() -> None:
    """At a fixed size the mean over seeds is the true sum, to four standard errors."""
    errors, sizes, sums = trials(1.0, epsilon=1e9, delta=0.5, least=64, share=0.0)
    assert sizes.eq(64).all()
    assert (errors.mean(0).abs() <= 4 * errors.std(0) / math.sqrt(SEEDS)).all()
    assert sums.std(0).min() > 0


def test_a_finer_certificate_needs_more_and_equal_scores_the_least() -> None:
    def mean(**settings: object) -> float:
        settings = {"epsilon": 0.1, "delta": 0.1, "least": 16, **settings}
        return float(trials(1.0, seeds=50, share=0.01, **settings)[1].double().mean())

    for bound in ("clt", "bernstein", "hoeffding"):
        assert mean(bound=bound, epsilon=0.05) >= mean(bound=bound) >= mean(bound=bound, epsilon=0.4)
        assert mean(bound=bound, delta=0.01) >= mean(bound=bound) >= mean(bound=bound, delta=0.5)
    assert mean(epsilon=0.05) > mean() > mean(epsilon=0.4)
    assert mean(epsilon=0.0) == 504
    assert trials(0.0, seeds=10, epsilon=0.1, delta=0.1, least=16, share=0.1)[1].eq(51).all(), "10 % of 504"


@pytest.mark.parametrize("bound", ["clt", "bernstein", "hoeffding"])
def test_a_sample_of_all_is_dense_attention(bound: str) -> None:
    method = VAttention(budget=Budget(tokens=12), epsilon=1e-9, window=4, page=4, least=4, bound=bound)
    for step in decoded(method, inputs(44, layers=1), 40, PADDING)[0]:
        weights = step.view.scores()[:, :, 0].softmax(-1)
        values = step.view.v.repeat_interleave(2, 2)
        torch.testing.assert_close(step.out, torch.einsum("bhs,bshd->bhd", weights, values), atol=1e-5, rtol=1e-5)


def test_the_range_of_the_rest_is_valid() -> None:
    """No score outside the heavy hitters is above the bound of pages that the certificate counts on."""
    method = VAttention(budget=Budget(tokens=12), window=4, page=4, bound="bernstein")
    (step, *_), states = decoded(method, inputs(61, layers=1), 60, PADDING)
    _, residual, highest, _ = method._heavy(step.view, states[0])
    scores = step.view.scores()[:, :, 0].masked_fill(~step.view.per_head(residual), -torch.inf)
    assert (scores <= highest + 1e-5).all() and residual.any()


def test_draws_differ_by_query_layer_and_seed() -> None:
    given = inputs(64, layers=2, scale=0.1)
    given.layers[1] = given.layers[0]
    steps = {}
    for seed in (0, 1):
        method = VAttention(budget=Budget(tokens=8), window=4, page=4, least=8, epsilon=1.0, seed=seed)
        steps[seed] = decoded(method, given, 62)[0]
    sampled = [s.plan.parts[1].keep[0, 0, 0, :60] for seed in steps for s in steps[seed]]
    assert all(not torch.equal(a, b) for i, a in enumerate(sampled) for b in sampled[:i])


def test_draws_of_the_release_differ_by_layer_and_seed_too() -> None:
    (step,), _ = decoded(VAttentionReleased(budget=Budget(tokens=14), window=4, page=4), inputs(64, layers=1), 63)
    drawn = [
        VAttentionReleased(seed=seed)._drawn(replace(step.view, layer=layer), torch.tensor([[[55]]] * 2), stream)
        for seed, layer, stream in itertools.product((0, 1), repeat=3)
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_sinks_and_window_are_the_least() -> None:
    with pytest.raises(BudgetError, match="8 tokens are the least"):
        decoded(VAttention(budget=Budget(tokens=7), window=4, page=4), inputs(43, layers=1), 40)


@pytest.mark.parametrize("base_share", [0.2, 0.01])
def test_the_release_is_its_definition(base_share: float) -> None:
    """Counts, weights and outputs from its own draws: with replacement, heavy hitters among them."""
    epsilon, delta = 0.2, 0.2
    method = VAttentionReleased(
        budget=Budget(tokens=14),
        epsilon=epsilon,
        delta=delta,
        window=4,
        page=4,
        ranking="oracle",
        base_share=base_share,
    )
    z, overlaps = NormalDist().inv_cdf(1 - delta), 0
    for step in decoded(method, inputs(83, layers=1, scale=0.5), 80, PADDING)[0]:
        scores, fixed = step.view.scores()[:, :, 0], step.plan.parts[0].keep[:, :, 0]
        span = (step.view.seen - 8)[:, None, None]
        base, drawn = (method._drawn(step.view, span, stream) for stream in (0, 1))
        for row in range(2):
            n, heavy_rows = int(span[row]), fixed[row]
            for head in range(HEADS):
                heavy = set(heavy_rows[head // 2].nonzero()[:, 0].tolist())
                e = (scores[row, head].double() - scores[row, head].max()).exp()
                count = max(2, int(base_share * n))
                first = base[row, head, :count].tolist()
                total = e[sorted(heavy)].sum() + e[sorted(set(first))].sum() * n / count
                size = int(min(max((z * float(e[first].std()) * n / (epsilon * float(total))) ** 2, 1), n))
                chosen = set(drawn[row, head, :size].tolist())
                assert all(int(PADDING[row]) + 4 <= s < step.view.k.shape[1] - 4 for s in chosen)
                overlaps += len(chosen & heavy)
                weight = torch.zeros_like(e)
                weight[sorted(chosen)] = n / size
                weight[sorted(heavy)] = 1
                out = (weight * e) @ step.view.v[row, :, head // 2].double() / (weight * e).sum()
                torch.testing.assert_close(step.out[row, head].double(), out, atol=1e-5, rtol=1e-5)
    assert overlaps, "heavy hitters are drawn, too"


def test_bad_settings_are_refused() -> None:
    for bad in ({"delta": 0.0}, {"epsilon": -1.0}, {"bound": "chernoff"}, {"ranking": "none"}, {"least": 0}):
        with pytest.raises(ValueError, match=r"epsilon|bound|window"):
            VAttention(**bad)


@pytest.mark.parametrize("kind", [VAttention, VAttentionReleased])
def test_a_batch_may_have_sequences_too_short_to_sample(kind: type[VAttention]) -> None:
    method = kind(budget=Budget(tokens=8), window=4, page=4, least=4)
    for step in decoded(method, inputs(43, layers=1), 40, torch.tensor([0, 38]))[0]:
        assert torch.equal(step.mask[1], step.view.visible[1].repeat_interleave(2, 0)[:, 0]), "all that there is"
        assert torch.isfinite(step.out).all()
