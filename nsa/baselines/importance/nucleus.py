"""The fewest weights that have a share of the whole, found without sorting (Twilight, arXiv 2502.02770, Alg. 1)."""

import torch
from torch import Tensor

BITS = 31  # of a float that is not negative; its bits, read as an integer, have the order of the floats


def nucleus(weights: Tensor, p: float, among: Tensor | None = None) -> Tensor:
    """The fewest of the last dim whose sum is at least ``p`` of the whole, as a mask; ties go to the lower index.

    weights: fp32, not negative, (..., S). Bisection over the bits of a float finds the threshold exactly. At least one
    is chosen where there is any. For 1 all of ``among`` are chosen (a mask that broadcasts), those too that weigh
    nothing in fp32; None: all that weigh something.
    """
    if p >= 1:
        return weights > 0 if among is None else among.expand_as(weights)
    bits, heavy = weights.view(torch.int32), weights.double()
    wanted = p * heavy.sum(-1, keepdim=True)
    low = torch.zeros_like(bits[..., :1])  # the sum of all from `low` on suffices, that from `high` on does not
    high = bits.amax(-1, keepdim=True) + 1
    for _ in range(BITS):
        middle = low + (high - low) // 2
        enough = (heavy * (bits >= middle)).sum(-1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    above, tied = bits > low, bits == low
    missing = wanted - (heavy * above).sum(-1, keepdim=True)
    each = torch.where(tied, heavy, 0).amax(-1, keepdim=True)
    count = torch.where(each > 0, missing / each, 0).ceil()
    count = torch.where(above.any(-1, keepdim=True), count, count.clamp(min=1))
    return (above | (tied & (tied.cumsum(-1) <= count))) & (weights > 0)


def quantised(k: Tensor, bits: int) -> Tensor:
    """Keys (..., D) as read back from ``bits`` each, fp32: every key between its own least and greatest number."""
    k = k.float()
    if bits >= 16:
        return k
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(k.dtype).tiny)
    return ((k - low) / step).round() * step + low
