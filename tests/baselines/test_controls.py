"""What controls attend to in any case."""

import torch
from views import mask_of, view_of

from nsa.baselines import Budget
from nsa.baselines.methods.oracle import OracleTopP
from nsa.baselines.methods.random_tokens import RandomTokens


def test_random_tokens_have_the_querys_own_among_them() -> None:
    mask = mask_of(RandomTokens(budget=Budget(tokens=3)), view_of(60))
    assert mask.diagonal(dim1=1, dim2=2).all() and mask[:, 3:].sum(-1).eq(3).all()


def test_the_whole_mass_is_all_tokens_even_those_whose_share_is_zero() -> None:
    mask = mask_of(OracleTopP(p=1.0), view_of(40, scale=300.0))
    assert torch.equal(mask, torch.ones_like(mask).tril())
