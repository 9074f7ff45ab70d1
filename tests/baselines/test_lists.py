"""A plan as masks and as lists."""

import torch

from nsa.baselines import Part


def test_lists_are_the_mask() -> None:
    """Rows with nothing kept are there, too; members go up within a row."""
    keep = torch.rand(2, 3, 4, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    keep[0, 1, 2] = False
    starts, members, counts = Part(keep, unit=4, tile=2).lists()
    found = torch.zeros_like(keep)
    for b, n, r in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        start, count = int(starts[b, n, r]), int(counts[b, n, r])
        row = members[start : start + count].long()
        assert (row.diff() > 0).all()
        found[b, n, r, row] = True
    assert torch.equal(found, keep) and len(members) == keep.sum() and counts[0, 1, 2] == 0


def test_a_mask_has_the_keys_of_its_units_for_the_queries_of_its_tiles() -> None:
    keep = torch.tensor([[True, False, True], [False, True, False]])[None, None]
    mask = Part(keep, unit=2, tile=3).mask(torch.tensor([0, 2, 3, 5]), 5)
    assert mask[0, 0].tolist() == [[1, 1, 0, 0, 1]] * 2 + [[0, 0, 1, 1, 0]] * 2
    every = Part(keep[:, :, :1]).mask(torch.arange(4), 3)  # one row stands for all
    assert every[0, 0].tolist() == [[1, 0, 1]] * 4
