"""Figures from parts: sums are added, not values."""

import json

import pytest
import torch

from nsa.layers.figure import Figure


def test_a_mean_is_of_all_parts():
    """A part over nothing, whose value is 1, changes nothing."""
    first, second = torch.rand(3, 5), torch.rand(2)
    for together in (Figure.added, Figure.joined):
        figure = together([Figure.mean_of(first), Figure.mean_of(torch.empty(0)), Figure.mean_of(second)])
        assert figure.value == pytest.approx(torch.cat((first.flatten(), second)).mean().item())
    assert Figure.mean_of(torch.empty(0)).value == 1 and Figure.mean(0, 0, otherwise=0.0).value == 0


def test_an_entropy_is_of_the_counts_of_all_tokens_and_a_mean_over_heads():
    """Tokens that choose other things, of which a part may not know the last ones."""
    early, late = torch.tensor([[2, 0], [1, 1]]), torch.tensor([[0, 2, 0, 4], [3, 3, 0, 0]])
    figure = Figure.added([Figure(early, entropy=True), Figure(late, entropy=True)])
    shares = [torch.tensor([2.0, 2, 4]) / 8, torch.tensor([4.0, 4]) / 8]
    each = [(-(p * p.log()).sum() / torch.tensor(float(len(p))).log()).item() for p in shares]
    assert figure.value == pytest.approx(sum(each) / 2)
    heads = [Figure(figure.sums[row : row + 1], entropy=True) for row in (0, 1)]
    assert Figure.joined(heads).value == pytest.approx(figure.value)
    assert Figure(torch.tensor([[0, 3]]), entropy=True).value == 0
    fewer = Figure(figure.sums[1:, :2], entropy=True)  # the last things that another rank's heads choose are unknown
    assert Figure.joined([heads[0], fewer]).value == Figure.joined([fewer, heads[0]]).value == figure.value


def test_a_figure_comes_from_another_rank_as_it_is():
    for figure in (Figure.mean(0.1, 3, otherwise=0.0), Figure(torch.tensor([[1, 2], [3, 4]]), entropy=True)):
        again = Figure.from_json(json.loads(json.dumps(figure.to_json())))
        assert torch.equal(again.sums, figure.sums)
        assert (again.entropy, again.otherwise, again.value) == (figure.entropy, figure.otherwise, figure.value)
