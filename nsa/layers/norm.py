"""RMSNorm as a module."""

import torch
from torch import Tensor, nn

from nsa import ops


class RMSNorm(nn.Module):
    """The residual stream x + delta and its norm over the last dimension, in fp32, rounded once (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `nsa.ops.add_rms_norm`. Without ``delta`` the residual stream is x."""
        return ops.add_rms_norm(x, self.weight, self.eps, delta)
