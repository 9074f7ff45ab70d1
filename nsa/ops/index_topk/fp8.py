"""Rows in fp8 with a scale each, as DeepSeek-V3.2's release keeps the queries and keys of its indexer."""

import torch
from torch import Tensor

from nsa.ops.dispatch import accumulation_dtype

LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = 1e-4  # what the largest value of a row is taken for, if it is smaller


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (.., Di) as values float8_e4m3fn (.., Di) and their scales (..), fp32 (float64 for float64).

    A scale is the smallest power of two that brings the largest value of its row to 448 at most. So values * scale is
    exact in bf16, and rounds to the same values again.
    """
    wide = x.to(accumulation_dtype(x))
    mantissa, exponent = torch.frexp(wide.abs().amax(-1).clamp_min(SMALLEST) / LARGEST)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    return (wide / scale[..., None]).to(torch.float8_e4m3fn), scale


def rounded_to_fp8(x: Tensor) -> Tensor:
    """What `to_fp8` keeps of x, in its dtype."""
    values, scale = to_fp8(x)
    return (values.to(scale.dtype) * scale[..., None]).to(x.dtype)
