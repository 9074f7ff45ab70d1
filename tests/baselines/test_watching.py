"""What a session measures of attention, against loops over queries."""

import pytest
import torch
from sessions import GROUPS, HEADS, WIDTH, inputs, run

from nsa.baselines import Budget, method_named


@pytest.mark.parametrize("name", ["dense", "sink_window"])
def test_masses_are_means_over_queries_without_padding(name: str) -> None:
    """Of a prompt and of a decoded token: what was kept, by KV head, and what the first four tokens have."""
    given, padding, prompt = inputs(20, layers=1), torch.tensor([0, 7]), 19
    method = method_named(name)(budget=Budget(tokens=6 if name == "sink_window" else 99))
    _, session = run(method, given, prompt=prompt, padding=padding, watch=["prefill", "decode"])
    q, k, _ = given.layers[0]
    assert session.caches[0].positions[1, :, 0].tolist() == [-1] * 7 + list(range(13)), "as a view says of padding"
    assert [figure["prompt"] for figure in session.figures] == [True, False]
    for figure, queries in zip(session.figures, (range(prompt), range(prompt, 20)), strict=True):
        kept: list[list[float]] = [[] for _ in range(GROUPS)]
        first = []
        for row, start in enumerate(padding.tolist()):
            for t in queries:
                for head in range(HEADS):
                    if t < start:
                        continue
                    group = head // (HEADS // GROUPS)
                    mass = (k[row, start : t + 1, group] @ q[row, t, head] * WIDTH**-0.5).softmax(0).tolist()
                    first.append(sum(mass[:4]))
                    near = sum(mass[4:][-2:]) if name == "sink_window" else sum(mass[4:])
                    kept[group].append(first[-1] + near)
        assert figure["sink_mass"] == pytest.approx(sum(first) / len(first), rel=1e-4)
        assert figure["kept_mass"] == pytest.approx([sum(some) / len(some) for some in kept], rel=1e-4)
