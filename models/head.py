"""The output head: returns logits, or the loss without keeping all logits in fp32."""

from torch import Tensor, nn
from torch.nn.functional import linear

from nsa import ops


class LanguageModelHead(nn.Linear):
    """hidden (B, T, C) -> logits (B, T, V), or with targets (B, T) the negative log-likelihood (B, T) fp32.

    The loss is that of `nsa.ops.linear_cross_entropy`; a target of -100 is not counted.
    """

    def __init__(self, hidden_size: int, vocab_size: int) -> None:
        super().__init__(hidden_size, vocab_size, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return linear(hidden, self.weight)
        losses = ops.linear_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten())
        return losses.float().view(targets.shape)
