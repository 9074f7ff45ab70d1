"""Double-P and its clusters against their definitions, and where its approximation is exact."""

import math

import pytest
import torch
from decoding import Step, decoded
from sessions import GROUPS, HEADS, WIDTH, inputs, run
from views import view_of

from nsa.baselines import Budget
from nsa.baselines.importance.clusters import cluster
from nsa.baselines.methods.double_p import DoubleP

PADDING = torch.tensor([0, 5])
SETTINGS = {"recent": 8, "cluster_size": 4, "iterations": 4, "segment": 24, "refresh": 10}


def k_means(keys: torch.Tensor, size: int, iterations: int) -> list[list[int]]:
    """Tokens of each cluster, by loops over keys: spherical, centred, begun with keys spread evenly."""
    centred = keys - keys.mean(0)
    count = -(-len(keys) // size)
    centroids = [centred[c * len(keys) // count] / centred[c * len(keys) // count].norm() for c in range(count)]
    for step in range(iterations):
        members: list[list[int]] = [[] for _ in centroids]
        for i, key in enumerate(centred):
            scores = [float(key @ c) for c in centroids]
            members[scores.index(max(scores))].append(i)
        if step < iterations - 1:
            for c, chosen in enumerate(members):
                if chosen:
                    total = centred[chosen].sum(0)
                    centroids[c] = total / total.norm()
    return members


@pytest.mark.parametrize("seed", range(4))
def test_a_cluster_that_got_no_token_stays_where_it_was_and_ties_go_to_the_first(seed: int) -> None:
    """Two clusters of three begin with one key; so the second of them has no token at first."""
    view = view_of(24, seed=seed)
    view.k[:, 8] = view.k[:, 0]
    made = cluster(view, torch.tensor([0]), torch.tensor([24]), size=8, iterations=3, segment=24)
    for group in range(GROUPS):
        members = [(made.labels[0, :, group] == c + 1).nonzero()[:, 0].tolist() for c in range(3)]
        assert members == k_means(view.k[0, :, group], 8, 3)


def clusters_of(step: Step, row: int, kv: int, stops: list[int]) -> list[list[int]]:
    """Positions of each cluster; clusters were made up to ``stops``, one after the other."""
    keys, found, start = step.view.k[row, int(PADDING[row]) :, kv], [], 4
    for stop in stops:
        while start < stop:
            end = min(stop, start + SETTINGS["segment"])
            found += [[start + i for i in c] for c in k_means(keys[start:end], 4, SETTINGS["iterations"])]
            start = end
    return found


def by_definition(step: Step, row: int, clusters: list[list[int]], kv: int, p1: float, p2: float) -> list[torch.Tensor]:
    """The outputs of the heads of a group, with the sums of section 3 written out."""
    pad = int(PADDING[row])
    keys, values = step.view.k[row, pad:, kv], step.view.v[row, pad:, kv]
    first, second = set(), set()
    for head in (2 * kv, 2 * kv + 1):
        q = step.view.q[row, 0, head] * WIDTH**-0.5
        z = [len(c) * math.exp(float(q @ keys[c].mean(0))) if c else 0.0 for c in clusters]
        mass = 0.0
        for i in sorted(range(len(z)), key=lambda i: (-z[i], i)):
            first |= {i} if mass < p1 * sum(z) else set()
            second |= {i} if mass < p2 * sum(z) else set()
            mass += z[i]
    inside = {t for c in clusters for t in c}
    exact = [t for t in range(len(keys)) if t not in inside or any(t in clusters[i] for i in second)]
    outs = []
    for head in (2 * kv, 2 * kv + 1):
        q = step.view.q[row, 0, head] * WIDTH**-0.5
        top = sum(math.exp(float(q @ keys[t])) * values[t] for t in exact)
        bottom = sum(math.exp(float(q @ keys[t])) for t in exact)
        for i in first - second:
            e = math.exp(float(q @ keys[clusters[i]].mean(0)))
            top, bottom = top + e * values[clusters[i]].sum(0), bottom + e * len(clusters[i])
        outs.append(top / bottom)
    return outs


def test_double_p_is_its_definition() -> None:
    """With padding, two segments, and a run of generated tokens that became clusters."""
    p1, p2 = 0.9, 0.5
    method = DoubleP(p1=p1, p2=p2, **SETTINGS)
    steps, _ = decoded(method, inputs(64, layers=1, scale=1.0), 50, PADDING)
    rough = 0
    for number in (0, 13):
        step = steps[number]
        rough += int((step.plan.terms.scores > -torch.inf).sum())
        for row in range(2):
            prompt = 50 - int(PADDING[row])
            stops = [prompt - 8, prompt - 8 + 10] if number == 13 else [prompt - 8]  # from ten tokens after it on
            for kv in range(2):
                outs = by_definition(step, row, clusters_of(step, row, kv, stops), kv, p1, p2)
                for head, out in zip((2 * kv, 2 * kv + 1), outs, strict=True):
                    torch.testing.assert_close(step.out[row, head], out, atol=1e-5, rtol=1e-5)
    assert rough, "some clusters are attended to by their means"


def test_what_is_kept_of_clusters_is_what_their_tokens_say() -> None:
    given = inputs(64, layers=1)
    (*_, step), states = decoded(DoubleP(**SETTINGS), given, 50, PADDING, chunks=(7, 30))
    rest = states[0].rest
    assert rest["until"].tolist() == [52, 47]
    assert rest["sizes"].shape[1] == 6 + 4 + 3, "of 24, 14 and 10 tokens; no step makes empty ones"
    for row, pad in enumerate(PADDING.tolist()):
        labels = rest["labels"][row]
        assert (labels[4 : 52 - pad] > 0).all() and (labels[:4] == 0).all() and (labels[52 - pad :] == 0).all()
        for kv in range(2):
            for c in range(rest["sizes"].shape[1]):
                members = (labels[:, kv] == c + 1).nonzero()[:, 0] + pad
                assert rest["sizes"][row, c, kv] == len(members)
                torch.testing.assert_close(rest["sums"][row, c, kv], step.view.v[row, members, kv].sum(0))
                if len(members):
                    torch.testing.assert_close(rest["means"][row, c, kv], step.view.k[row, members, kv].mean(0))


@pytest.mark.parametrize("p2", [0.0, 0.6])
def test_identical_keys_in_each_cluster_are_exact(p2: float) -> None:
    """Eight different keys, six times each: the mean is each of them, whatever is attended to as a mean."""
    given = inputs(61, layers=1, scale=1.0)
    q, k, v = given.layers[0]
    for kind in range(8):
        k[:, 4 + 6 * kind : 10 + 6 * kind] = k[:, 4 + 6 * kind : 5 + 6 * kind].clone()
    method = DoubleP(p1=1.0, p2=p2, recent=8, cluster_size=6)
    (*_, step), states = decoded(method, given, 60)
    for row in range(2):
        for head in range(HEADS):
            weight = torch.softmax(k[row, :, head // 2] @ q[row, -1, head] * WIDTH**-0.5, 0)
            torch.testing.assert_close(step.out[row, head], weight @ v[row, :, head // 2], atol=1e-5, rtol=1e-5)
    assert (step.plan.terms.scores > -torch.inf).any() and not step.mask.all()
    assert (states[0].rest["sizes"] == 6).all()


def test_clusters_of_one_token_are_exact_top_p() -> None:
    """Then S1 is what counts: the fewest tokens with the share p1, whatever p2 is."""
    given, p1 = inputs(50, layers=1, groups=4), 0.8
    method = DoubleP(p1=p1, p2=0.3, recent=1, cluster_size=1, num_sinks=0)
    for step in decoded(method, given, 49)[0]:
        for row in range(2):
            for head in range(HEADS):
                scores = step.view.scores()[row, head, 0]
                weight = scores[:-2].softmax(
                    0
                )  # the last two are in no cluster: the window at the prompt's end, and it
                order = weight.sort(descending=True)
                size = int((order.values.cumsum(0) < p1).sum()) + 1
                slots = [*order.indices[:size].tolist(), *range(len(scores) - 2, len(scores))]
                out = scores[slots].softmax(0) @ step.view.v[row, slots, head]
                torch.testing.assert_close(step.out[row, head], out, atol=1e-5, rtol=1e-5)


def test_a_mean_never_has_more_mass_than_its_tokens() -> None:
    """Jensen: s exp(q . mean) <= sum exp(q . k); so the sum of exponentials is at most that of all tokens."""
    for seed in range(3):
        (step,), states = decoded(
            DoubleP(p1=1.0, p2=0.0, recent=8, cluster_size=8), inputs(81, layers=1, seed=seed), 80
        )
        scores, labels = step.view.scores()[:, :, 0], states[0].rest["labels"]
        term = step.plan.terms.scores[:, :, 0]
        for c in range(term.shape[-1]):
            mine = (labels == c + 1).transpose(1, 2).repeat_interleave(2, 1)
            true = scores[..., : mine.shape[-1]].masked_fill(~mine, -torch.inf).logsumexp(-1)
            some = term[..., c] > -torch.inf
            assert (term[..., c] <= true + 1e-5)[some].all()


def test_relative_and_absolute_shares() -> None:
    """p2 of what p1 left is less than p2 of all; p2 above p1 raises p1."""
    given = inputs(61, layers=1, scale=1.0)
    sizes = [
        decoded(DoubleP(p1=p1, p2=p2, relative=relative, **SETTINGS), given, 60)[0][0].mask.sum().item()
        for p1, p2, relative in ((0.6, 0.6, False), (0.6, 0.6, True), (0.2, 0.6, False), (0.6, 1.0, True))
    ]
    assert sizes[1] < sizes[0] == sizes[2] < sizes[3]


@pytest.mark.parametrize("prompt", [1, 5, 12, 13])
def test_short_prompts_have_no_clusters_or_few(prompt: int) -> None:
    given = inputs(prompt + 2, layers=1)
    outs, _ = run(DoubleP(p2=1.0, **SETTINGS), given, prompt=prompt)
    assert torch.isfinite(outs[0]).all()
    torch.testing.assert_close(outs, run(DoubleP(budget=Budget(tokens=1), p2=1.0), given, prompt=prompt)[0])


def test_sinks_are_in_no_cluster_however_short_the_prompt_was() -> None:
    for prompt in (1, 3, 4):
        _, states = decoded(DoubleP(**SETTINGS), inputs(40, layers=1), prompt)
        labels = states[0].rest["labels"]
        assert (labels[:, :4] == 0).all() and (labels[:, 4:22] > 0).all()


def test_clusters_are_paid_for() -> None:
    """10 iterations over 68 tokens and 17 centroids; then 17 centroids with their sizes for a query."""
    (step,), states = decoded(DoubleP(recent=8, cluster_size=4), inputs(81, layers=1), 80)
    number = float((states[0].rest["sizes"] > 0).sum()) / 4
    assert step.plan.estimate.read == number * (WIDTH + 1)
    assert step.plan.estimate.pairs == number * 2
    assert step.plan.estimate.resident == number * (2 * WIDTH + 1) + 81
    _, session = run(DoubleP(recent=8, cluster_size=4), inputs(80, layers=1), prompt=80)
    assert session.ledger.counts["prefill", 0].scored.tolist() == [2 * 10 * 68 * 17] * 2
    for bad in ({"p1": 2.0}, {"cluster_size": 0}):
        with pytest.raises(ValueError, match="must be"):
            DoubleP(**bad)
