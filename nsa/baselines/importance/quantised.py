"""Keys as a sketch of few bits reads them back (Twilight, arXiv 2502.02770, section 4.2)."""

import torch
from torch import Tensor


def quantised(k: Tensor, bits: int) -> Tensor:
    """Keys (..., D) as read back from ``bits`` each, fp32: every key between its own least and greatest number."""
    k = k.float()
    if bits >= 16:
        return k
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(k.dtype).tiny)
    return ((k - low) / step).round() * step + low
