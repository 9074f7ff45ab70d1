"""alpha-entmax and its attention: the definition against independent ones, its lemmas, and the fallback against it."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nsa import ops
from nsa.ops.entmax import adasplash
from nsa.ops.entmax.threshold import bisected_threshold, centred, newton_threshold, sorted_threshold
from tests.ops.cases import cumulative, gradients

ALPHAS = [1.5, 2.0, 1.3]
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@each_alpha
def test_weights_are_those_of_the_threshold(alpha: float) -> None:
    """The definition: p = [(alpha - 1) z - tau]_+^(1 / (alpha - 1)) for one tau of each row, and the sum is 1."""
    z = normal(7, 60) * torch.logspace(-2, 2, 7, dtype=torch.float64)[:, None]
    p = ops.entmax(z, alpha)
    torch.testing.assert_close(p.sum(-1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (p[2:] == 0).any() and (p >= 0).all()
    tau = (alpha - 1) * z - p ** (alpha - 1)
    inside = p > 0
    largest, smallest = tau.where(inside, -torch.inf).amax(-1), tau.where(inside, torch.inf).amin(-1)
    torch.testing.assert_close(largest, smallest)
    assert ((alpha - 1) * z <= largest[:, None] + 1e-12)[~inside].all(), "a key above the threshold has no weight"


@each_alpha
def test_first_and_second_derivatives(alpha: float) -> None:
    z = (1.5 * normal(2, 5, 2)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ops.entmax(z, alpha, dim=1), (z,))
    assert torch.autograd.gradgradcheck(lambda z: ops.entmax(z, alpha, dim=1), (z,))


def test_two_is_the_projection_onto_the_simplex() -> None:
    """Sparsemax (arXiv 1602.02068): the nearest point of the simplex, by its conditions of optimality."""
    z = 2 * normal(50, 23)
    p = ops.entmax(z, 2)
    towards = torch.eye(23, dtype=torch.float64)  # no corner is nearer: (z - p) (corner - p) <= 0
    assert ((z - p) @ towards - ((z - p) * p).sum(-1, keepdim=True) <= 1e-12).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=torch.float64))


def test_near_one_is_softmax() -> None:
    z = normal(5, 40)
    torch.testing.assert_close(ops.entmax(z, 1.0001), z.softmax(-1), rtol=0, atol=3e-4)
    assert (ops.entmax(z, 1.0001) > 0).all()


@each_alpha
def test_keys_below_the_threshold_change_no_bit(alpha: float) -> None:
    """Attention does not disperse: they get exactly 0, wherever they stand and however many they are."""
    z = 3 * normal(20, 50, dtype=torch.float32)
    p = ops.entmax(z, alpha)
    below = (z.where(p > 0, torch.inf).amin(-1, keepdim=True) - 1 / (alpha - 1)).expand(-1, 3000) - 0.01
    more = torch.cat((below[:, :1000], z, below), -1)
    found = ops.entmax(more, alpha)
    assert torch.equal(found[:, 1000:1050], p)
    assert (found[:, :1000] == 0).all() and (found[:, 1050:] == 0).all()


@each_alpha
def test_two_levels_share_as_the_lemma_says(alpha: float) -> None:
    """k equal keys have all of it iff the others are lower by k^(1 - alpha) / (alpha - 1)."""
    for k in (1, 2, 7):
        gap = k ** (1 - alpha) / (alpha - 1)
        for factor, shared in ((1.001, True), (0.98, False)):
            z = torch.cat((torch.zeros(k), torch.full((30,), -gap * factor))).double()
            p = ops.entmax(z, alpha)
            assert bool((p[k:] == 0).all()) == shared
            if shared:
                torch.testing.assert_close(p[:k], torch.full((k,), 1 / k, dtype=torch.float64), rtol=0, atol=1e-12)


@each_alpha
def test_the_support_shrinks_as_scores_grow(alpha: float) -> None:
    z = normal(30, 80)
    sizes = torch.stack([(ops.entmax(scale * z, alpha) > 0).sum(-1) for scale in (0.1, 0.5, 1, 2, 5, 50)])
    assert (sizes.diff(dim=0) <= 0).all() and (sizes[0] > sizes[-1]).all()


@each_alpha
def test_masked_rows_and_no_keys(alpha: float) -> None:
    z = normal(3, 6)
    z[1], z[2, 2:] = -torch.inf, -torch.inf
    p = ops.entmax(z.requires_grad_(), alpha)
    assert (p[1] == 0).all() and (p[2, 2:] == 0).all() and p[2].sum().item() == pytest.approx(1)
    assert (torch.autograd.grad(p.square().sum(), z)[0][1] == 0).all()
    assert ops.entmax(torch.zeros(4, 0), alpha).shape == (4, 0)
    assert torch.equal(ops.entmax(torch.zeros(5, 1), alpha), torch.ones(5, 1))


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("spread", [1e-3, 1, 30])
def test_all_ways_find_the_same_threshold(alpha: float, spread: float) -> None:
    """Also for ties, and for one key."""
    for z in (spread * normal(20, 300), (normal(20, 300) * 3).round(), normal(20, 1)):
        w = centred(z, alpha)
        exact = sorted_threshold(w, alpha)
        torch.testing.assert_close(bisected_threshold(w, alpha), exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(newton_threshold(w, alpha), exact, rtol=0, atol=1e-12)
        torch.testing.assert_close(newton_threshold(w.float(), alpha).double(), exact, rtol=0, atol=2e-6)


# (documents, or one length; batch; KV heads; query heads of each)
SHAPES = [
    ([1], 1, 1, 1),
    ([17], 2, 3, 2),
    ([63], 2, 1, 3),
    ([129], 1, 3, 1),
    ([9, 0, 1, 40, 1, 0, 12], 1, 3, 2),
]


@pytest.mark.parametrize("alpha", [*ALPHAS, 1.02])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape[0])))
def test_the_fallback_equals_the_definition(shape: tuple, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, in tiles of 16 queries, with scaled scores and slopes and without."""
    monkeypatch.setattr("nsa.ops.tiles.MAX_ROWS", 16)
    documents, batch, groups, per_group = shape
    tokens, heads = sum(documents), groups * per_group
    q, k, v = (
        normal(batch, tokens, heads, 6),
        normal(batch, tokens, groups, 6, seed=1),
        normal(batch, tokens, groups, 4),
    )
    factors = 0.5 + 2 * normal(batch, tokens, heads, seed=2).abs()
    inputs = [x.requires_grad_() for x in (q, k, v, factors)]
    slopes = 1 / torch.arange(1, heads + 1)
    for extras in ({}, {"logit_scale": factors, "slopes": slopes, "scale": 0.7}):
        options = {"alpha": alpha, "cu_seqlens": cumulative(documents) if len(documents) > 1 else None, **extras}
        wanted, found = (ops.entmax_attention(q, k, v, **options, backend=name) for name in ("naive", "torch"))
        torch.testing.assert_close(found, wanted)
        for ours, theirs in zip(gradients(found, inputs), gradients(wanted, inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_the_definition_is_a_sum_over_the_visible_keys() -> None:
    """Query by query, with plain loops."""
    q, k, v = normal(1, 12, 4, 6), normal(1, 12, 2, 6, seed=1), normal(1, 12, 2, 4)
    factors, slopes = normal(1, 12, 4, seed=3).abs(), torch.tensor([1.0, 0.5, 0.25, 0.0])
    out = ops.entmax_attention(
        q, k, v, cu_seqlens=cumulative([5, 7]), logit_scale=factors, slopes=slopes, backend="naive"
    )
    for t in range(12):
        for h in range(4):
            keys = range(0 if t < 5 else 5, t + 1)
            z = [factors[0, t, h] * (q[0, t, h] @ k[0, s, h // 2]) / 6**0.5 - slopes[h] * (t - s) for s in keys]
            p = ops.entmax(torch.stack(z), 1.5)
            torch.testing.assert_close(out[0, t, h], p @ v[0, list(keys), h // 2])


def test_alibi_cuts_off_at_a_distance() -> None:
    """With equal scores and slope m, weights are 0 from distance 1 / ((alpha - 1) m) on (score 0 at the query)."""
    q, k = torch.zeros(1, 60, 1, 4), torch.zeros(1, 60, 1, 4)
    v = torch.eye(60)[None, :, None]
    p = ops.entmax_attention(q, k, v, slopes=torch.tensor([0.25]), backend="torch")[0, :, 0]
    distance = torch.arange(60)[:, None] - torch.arange(60)
    assert (p[distance >= 8] == 0).all() and (p.diagonal() > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_accumulated_in_fp32(dtype: torch.dtype) -> None:
    inputs = [normal(1, 130, heads, 8, seed=heads).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, wanted = ops.entmax_attention(*inputs, backend="torch"), ops.entmax_attention(*exact, backend="naive")
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=tolerance)
    weights = normal(*out.shape, seed=5)
    found, expected = ((o.double() * weights).sum() for o in (out, wanted))
    for ours, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, exact), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < 10 * tolerance * theirs.norm()


def test_decoding_sees_the_last_queries() -> None:
    q, k, v = normal(2, 20, 4, 6), normal(2, 20, 2, 6, seed=1), normal(2, 20, 2, 4)
    slopes = torch.tensor([1.0, 0.5, 0.1, 0.0])
    whole = ops.entmax_attention(q, k, v, slopes=slopes)
    torch.testing.assert_close(ops.entmax_attention(q[:, 13:], k, v, slopes=slopes), whole[:, 13:])


def test_the_library_is_called_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that takes heads first and scales by D ** -0.5: the kernels of the GPU are not tested here."""

    def stand_in(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert all(x.is_contiguous() for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return ops.entmax_attention(q, k, v, scale=0.25, backend="naive").transpose(1, 2)

    monkeypatch.setitem(sys.modules, "adasplash", SimpleNamespace(adasplash_v2=stand_in))
    q, k, v = normal(1, 64, 4, 16), normal(1, 64, 2, 16, seed=1), normal(1, 64, 2, 16, seed=2)
    found = adasplash.attend(q, k, v, 0.4)
    torch.testing.assert_close(found, ops.entmax_attention(q, k, v, scale=0.4, backend="naive"))


def test_what_the_library_cannot_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adasplash, "installed", lambda: True)
    assert adasplash.obstacle(*[torch.zeros(1, 64, 2, 16)] * 3, 1.5, None, None) == "it needs a CUDA device"
    monkeypatch.setattr(adasplash, "on_gpu", lambda *tensors: True)
    good = torch.zeros(1, 64, 2, 16)
    assert adasplash.obstacle(good, good, good, 1.5, None, None) is None
    for q, k, alpha, cu_seqlens, slopes, why in (
        (good, good, 1.3, None, None, "alpha 1.5 alone"),
        (good, good, 1.5, None, torch.ones(2), "no ALiBi"),
        (good, good, 1.5, cumulative([30, 34]), None, "no packed documents"),
        (good[:, :1], good, 1.5, None, None, "as many queries as keys"),
        (good[..., :8], good[..., :8], 1.5, None, None, "no heads of 8 / 8"),
        (good[:, :48], good[:, :48], 1.5, None, None, "power of two"),
    ):
        assert why in str(adasplash.obstacle(q, k, k, alpha, cu_seqlens, slopes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.0}, "above 1 and at most 2"),
        ({"alpha": 2.5}, "above 1 and at most 2"),
        ({"slopes": torch.ones(2)}, r"slopes must be \(4,\)"),
        ({"logit_scale": torch.ones(1, 5)}, r"logit_scale must be \(1, 5, 4\)"),
        ({"backend": "triton"}, "no kernel"),
        ({"backend": "fast"}, "must be one of"),
        ({"backend": "adasplash"}, "adasplash"),
    ],
)
def test_bad_arguments_are_refused(changes: dict, message: str) -> None:
    q, k = torch.zeros(1, 5, 4, 8), torch.zeros(1, 5, 2, 8)
    with pytest.raises(ValueError, match=message):
        ops.entmax_attention(q, k, k, **changes)
