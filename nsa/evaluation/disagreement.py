"""Whether decoding selects what training selects: the index sets of layers that select tokens."""

import torch
from torch import Tensor

from nsa.layers.index_sets import record_index_sets
from nsa.models import Decoder


@torch.no_grad()
def decode_disagreement(decoder: Decoder, input_ids: Tensor, *, prompt: int = 1) -> dict[int, float]:
    """Share of index sets that differ between cached decoding and a forward pass over the whole sequence.

    Sets differ if rounding moves a score across the cut: decoding multiplies matrices of other shapes. A policy that is
    trained on rollouts should replay their sets then (`nsa.layers.index_sets.replay_index_sets`).

    Args:
        input_ids: (B, T) int64. prompt: tokens of the first pass of the decoding; then one token a pass.

    Returns:
        Number of the layer -> share of the B x (T - prompt) sets of single tokens, for each layer that selects.

    Raises:
        ValueError: no layer selects index sets; ``prompt`` is not from 1 to T - 1.
    """
    if not 1 <= prompt < input_ids.shape[1]:
        raise ValueError(f"prompt ({prompt}) must be from 1 to {input_ids.shape[1] - 1}: a token must be decoded")
    with record_index_sets(decoder) as whole:
        decoder(input_ids)
    caches = decoder.new_caches()
    with record_index_sets(decoder) as decoded:
        for piece in (input_ids[:, :prompt], *input_ids[:, prompt:].split(1, 1)):
            decoder(piece, caches=caches)
    return {number: _share(whole[number][:, prompt:], sets[:, prompt:]) for number, sets in decoded.items()}


def _share(sets: Tensor, others: Tensor) -> float:
    """Share of the sets (B, T, K) that differ; the order in a set does not count."""
    return (sets.sort(-1).values != others.sort(-1).values).any(-1).float().mean().item()
