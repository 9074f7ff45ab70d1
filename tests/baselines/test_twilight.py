"""Twilight against its definition, its search against sorting, and its bounds."""

from dataclasses import replace

import pytest
import torch
from decoding import Step, attention, decoded
from sessions import HEADS, WIDTH, inputs

from nsa import ops
from nsa.baselines import Budget, Method, Session
from nsa.baselines.importance.quantised import quantised
from nsa.baselines.methods.h2o import H2O
from nsa.baselines.methods.oracle import OracleTopK
from nsa.baselines.methods.quest import Quest
from nsa.baselines.methods.sink_window import SinkWindow
from nsa.baselines.methods.sparq import SparQ
from nsa.baselines.methods.twilight import Twilight
from nsa.baselines.plan import score
from nsa.ops.choose import cover
from nsa.ops.top_p import nucleus

PADDING = torch.tensor([0, 5])


def read_back(key: torch.Tensor, bits: int) -> torch.Tensor:
    low, high, levels = float(key.min()), float(key.max()), 2**bits - 1
    return torch.tensor([low + round((x - low) / (high - low) * levels) * (high - low) / levels for x in key.tolist()])


@pytest.mark.parametrize("bits", [4, 16])
def test_twilight_is_its_definition(bits: int) -> None:
    given, p = inputs(44, layers=1, scale=1.0), 0.7
    base = Quest(page=4, budget=Budget(tokens=20))
    steps, _ = decoded(Twilight(base=base, budget=base.budget, p=p, bits=bits), given, 40, PADDING)
    for step, candidates in zip(steps, decoded(base, given, 40, PADDING)[0], strict=True):
        for row in range(2):
            wanted = [of_head(step, candidates.mask[row, head], row, head, p, bits) for head in range(HEADS)]
            for head in range(HEADS):
                union = wanted[head // 2 * 2] | wanted[head // 2 * 2 + 1]
                assert set(step.mask[row, head].nonzero()[:, 0].tolist()) == union
                out = attention(step, row, head, sorted(union))
                torch.testing.assert_close(step.out[row, head], out, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("base", [Quest(page=4), H2O(), OracleTopK(), SparQ(dims=4)], ids=lambda base: base.name)
@pytest.mark.parametrize("p", [0.0, 0.7, 1.0])
def test_the_operator_chooses_what_the_formula_does(base: Method, p: float) -> None:
    """The same tokens, bit by bit of the sketch; also while H2O evicts, which moves the slots."""
    budget, given = Budget(share=0.5), inputs(60, layers=1)
    steps, _ = decoded(Twilight(base=base, budget=budget, p=p), given, 40, PADDING)
    wholes, _ = decoded(replace(base, budget=budget), given, 40, PADDING)
    assert len(steps) == 20
    for step, whole in zip(steps, wholes, strict=True):
        view, among = step.view, whole.mask[:, :, None]
        assert view.k.shape == whole.view.k.shape, "both see the same slots"
        scores = score(view.q, quantised(view.k, 4), view.scale).masked_fill(~among, -torch.inf)
        chosen = nucleus(torch.nan_to_num(scores.softmax(-1)), p, among)
        assert torch.equal(step.mask, view.per_head(view.per_group(chosen).any(2))[:, :, 0])


def test_the_sketch_follows_the_cache() -> None:
    """It grows by the new tokens, also where a session goes on with its sequences in another order."""
    given = inputs(60, layers=1)
    session, rooms = Session(Twilight(base=Quest(page=4), budget=Budget(share=0.5)), 1, turn=given.turn), set()
    for start, stop in [(0, 20), *((t, t + 1) for t in range(20, 60))]:
        session.attend(0, *given.cut(start, stop)[0], WIDTH**-0.5)
        session.end_prompt()
        if start:
            sketch, whole = session.states[0].rest["sketch"], ops.sketch_keys(session.caches[0].keys)
            for name, kept in sketch.items():
                assert torch.equal(kept[:, :stop], getattr(whole, name)) and kept.shape[1] <= 90
                rooms.add(kept.shape[1])
        if start == 50:
            session = session.take(torch.tensor([1, 0]))
            given = replace(given, layers=[tuple(x.flip(0) for x in layer) for layer in given.layers])
    assert rooms == {21, 44, 90}, "what has no room is sketched anew: a token costs O(1), since the room doubles"


def of_head(step: Step, candidates: torch.Tensor, row: int, head: int, p: float, bits: int) -> set[int]:
    slots = candidates.nonzero()[:, 0].tolist()
    keys = [step.view.k[row, s, head // 2] for s in slots]
    if bits < 16:
        keys = [read_back(key, bits) for key in keys]
    weight = torch.softmax(torch.stack(keys) @ step.view.q[row, 0, head] * WIDTH**-0.5, 0).tolist()
    chosen, mass = set(), 0.0
    for i in sorted(range(len(slots)), key=lambda i: (-weight[i], i)):
        if mass >= p:
            break
        chosen.add(slots[i])
        mass += weight[i]
    return chosen


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.5, 0.95, 0.9999, 1.0])
def test_the_search_finds_what_sorting_finds(p: float) -> None:
    dice = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 65, generator=dice) * torch.rand(200, 1, generator=dice) * 8
    logits[0], logits[1, 1:], logits[2, 40:], logits[3, 5:] = 0.0, -200.0, 0.0, logits[3, 5]
    weights = logits.softmax(-1)
    mask = nucleus(weights, p)
    assert torch.equal(mask, cover(weights, max(p, 1e-12)))
    sums = (weights.double() * mask).sum(-1)
    assert (sums >= p * weights.double().sum(-1) - 1e-12).all()
    if p < 1:
        least = torch.where(mask, weights.double(), torch.inf).amin(-1)
        assert ((sums - least < p) | (mask.sum(-1) == 1)).all(), "none of them can be spared"
    assert not nucleus(torch.zeros(2, 5), p).any()


def test_focused_heads_keep_few_and_diffuse_ones_many() -> None:
    flat = torch.full((1, 40), 1 / 40)
    assert int(nucleus(flat, 0.9).sum()) == 36
    assert torch.equal(nucleus(flat, 0.5).nonzero()[:, 1], torch.arange(20)), "ties go to the lower index"
    assert int(nucleus(torch.tensor([[0.01, 0.97, 0.02]]), 0.9).sum()) == 1


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_with_exact_weights_the_mass_is_p_and_the_error_is_bounded(p: float) -> None:
    """|O - O'| <= 2 tau max |v|. The paper's (1 - p) |V| fails for weights that are normalised again."""
    method = Twilight(budget=Budget(share=1.0), p=p, bits=16)
    for step in decoded(method, inputs(44, layers=1), 40)[0]:
        weights = step.view.scores()[:, :, 0].softmax(-1)
        mass = (weights * step.mask).sum(-1)
        assert (mass >= p - 1e-6).all()
        values = step.view.v.repeat_interleave(2, 2).transpose(1, 2)
        error = (step.out - torch.einsum("bhs,bhsd->bhd", weights, values)).norm(dim=-1)
        assert (error <= 2 * (1 - mass) * values.norm(dim=-1).amax(-1) + 1e-5).all()
        assert not step.mask.all()
    tau = 0.4  # two values, opposite: the error is 2 tau, which is more than tau |V|
    assert 2 * tau > tau * 2**0.5


def test_a_key_read_back_is_near() -> None:
    k = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        step = (k.amax(-1) - k.amin(-1)) / (2**bits - 1)
        assert ((quantised(k, bits) - k).abs().amax(-1) <= step / 2 + 1e-6).all()
        assert len(quantised(k, bits)[0].unique()) <= 2**bits
    assert torch.equal(quantised(torch.full((1, 4), 3.0), 4), torch.full((1, 4), 3.0))
    assert torch.equal(quantised(k, 16), k) and not torch.equal(quantised(k, 15), k)


@pytest.mark.parametrize("base", [OracleTopK(), SparQ(dims=4)])
def test_any_method_that_decodes_gives_candidates(base: object) -> None:
    budget, given = Budget(tokens=20), inputs(43, layers=1)
    steps, _ = decoded(Twilight(base=base, budget=budget, p=0.8), given, 40)
    for step, whole in zip(steps, decoded(replace(base, budget=budget), given, 40)[0], strict=True):
        assert (step.mask <= whole.mask).all() and step.mask.sum() < whole.mask.sum()
        assert step.plan.blend is None
        read = whole.plan.estimate.read + 20 * (WIDTH / 4 + 2)
        assert step.plan.estimate.read == read and step.plan.estimate.pairs == whole.plan.estimate.pairs + 40


def test_settings_name_the_base_and_bad_ones_are_refused() -> None:
    settings = Twilight(base=SinkWindow(num_sinks=2)).settings()
    assert settings["base"] == {"name": "sink_window", "num_sinks": 2} and settings["p"] == 0.95
    for bad in ({"p": 1.5}, {"bits": 1}):
        with pytest.raises(ValueError, match=r"p must|bits"):
            Twilight(**bad)
    assert [Twilight(bits=bits, p=p).bits for bits, p in ((2, 0.0), (16, 1.0))] == [2, 16]
