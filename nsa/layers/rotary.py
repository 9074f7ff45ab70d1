"""Rotary position embedding with YaRN length extension."""

import math

import torch
from torch import Tensor


def rotary_frequencies(
    head_dim: int,
    theta: float,
    *,
    trained_range: int,
    yarn_factor: float = 1.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device | None = None,
) -> Tensor:
    """Angular frequencies, (head_dim / 2,) fp32, in radians per token.

    RoPE (arXiv 2104.09864, Eq. 15); with ``yarn_factor`` > 1 the frequencies that turn less than ``beta_slow`` times
    over ``trained_range`` tokens are divided by the factor, those that turn more than ``beta_fast`` times are kept,
    and those between are blended (YaRN, arXiv 2309.00071, section 3.2).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = theta**-exponents
    if yarn_factor == 1.0:
        return frequencies
    turns = trained_range * frequencies / (2 * math.pi)
    keep = ((turns - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / yarn_factor)


def rotary_tables(positions: Tensor, frequencies: Tensor, *, yarn_factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin, each (T, head_dim / 2) fp32, of the angles at ``positions`` (T,) integer.

    With ``yarn_factor`` s both carry YaRN's attention temperature 0.1 ln(s) + 1 (arXiv 2309.00071, Eq. 22).
    """
    angles = positions[:, None].float() * frequencies
    temperature = 0.1 * math.log(yarn_factor) + 1.0
    return angles.cos() * temperature, angles.sin() * temperature
