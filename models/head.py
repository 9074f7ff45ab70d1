"""The output head: logits, or the loss without all logits at once."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 2**26  # logits of one chunk: 256 MiB in fp32


class LanguageModelHead(nn.Linear):
    """hidden (B, T, C) -> logits (B, T, V), or with targets (B, T) the negative log-likelihood (B, T) fp32.

    The loss is computed in chunks of tokens whose logits are recomputed in the backward pass: at no time do the
    logits of more than one chunk exist.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return linear(hidden, self.weight)
        rows, labels = hidden.flatten(0, 1), targets.flatten()
        size = max(1, CHUNK_LOGITS // self.out_features)
        if len(rows) <= size:
            losses = [_losses(rows, labels, self.weight)]
        else:
            losses = [
                checkpoint(_losses, r, t, self.weight, use_reentrant=False)
                for r, t in zip(rows.split(size), labels.split(size), strict=True)
            ]
        return torch.cat(losses).view(targets.shape)


def _losses(rows: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    return cross_entropy(linear(rows, weight).float(), labels, ignore_index=IGNORED, reduction="none")
