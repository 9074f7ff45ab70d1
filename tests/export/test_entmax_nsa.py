"""Entmax attention as an export carries it, against the decoder that was trained."""

from typing import Any

import pytest
import torch

from nsa import ops
from nsa.layers.entmax.config import EntmaxConfig
from nsa.models.hf.entmax_nsa import Entmax
from tests.export.test_modeling_nsa import close, pair, tokens

VARIANTS: list[dict[str, Any]] = [
    {},
    {"scaling": "ssmax", "alpha": 2.0},
    {"scaling": "none", "alpha": 1.2, "nope_heads": 3, "position": "alibi"},
    {"nope_heads": 3},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=range(len(VARIANTS)))
@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "qkv_bias": True, "yarn_factor": 4.0}], ids=["", "options"])
@torch.no_grad()
def test_logits_are_the_decoders(changes: dict[str, Any], options: dict[str, Any]) -> None:
    decoder, exported = pair("entmax", (6, 2, 8, 6), entmax=EntmaxConfig(**changes), **options)
    for length in (1, 17, 70):
        ids = tokens(2, length)
        close(exported(ids).logits, decoder(ids))


@pytest.mark.parametrize("changes", VARIANTS[2:], ids=range(2))
@torch.no_grad()
def test_padding_and_pieces_equal_each_row_alone(changes: dict[str, Any]) -> None:
    _, exported = pair(["entmax", "dense"], (6, 2, 8, 6), entmax=EntmaxConfig(**changes))
    ids, mask, cache, logits = tokens(2, 40), torch.ones(2, 40, dtype=torch.long), None, []
    mask[0, :13] = 0
    for start, stop in ((0, 20), (20, 21), (21, 40)):
        out = exported(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out[1]
        logits.append(out.logits)
    for row in range(2):
        real = mask[row].bool()
        close(torch.cat(logits, 1)[row, real], exported(ids[row : row + 1, real], use_cache=False).logits[0])


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
def test_weights_and_gradients_are_the_operators(alpha: float) -> None:
    """The export has its own code: it carries none of the trainer's."""
    z = torch.randn(20, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    z[3, 5:], z[4] = -torch.inf, -torch.inf
    given = [z.clone().requires_grad_() for _ in range(2)]
    weights = [Entmax.apply(given[0], alpha), ops.entmax(given[1], alpha)]
    torch.testing.assert_close(*weights)
    d = torch.randn(20, 50, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad(p, x, d)[0] for p, x in zip(weights, given, strict=True)))
