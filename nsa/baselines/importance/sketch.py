"""Hadamard sketches: short vectors whose products are those of long ones, on average."""

from functools import cache

import torch
from torch import Tensor


@cache
def hadamard_sketch(width: int, size: int, seed: int) -> Tensor:
    """(width, min(size, W)) fp32, the subsampled randomised Hadamard transform: x @ it is the sketch of x (..., width).

    Random signs, an orthonormal Hadamard matrix, ``size`` of its W coordinates without replacement (W: the power of
    two at or above ``width``), times sqrt(W / size). Products of two sketches are unbiased, their variance falls with
    1 / size, and with all coordinates they are exact.
    """
    full = 1 << (width - 1).bit_length()
    matrix = torch.ones(1, 1)
    while len(matrix) < full:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    size = min(size, full)
    dice = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width, 1), generator=dice) * 2 - 1
    # Columns are orthonormal after / sqrt(W); sqrt(W / size) brings it to / sqrt(size).
    return signs * matrix[:width, torch.randperm(full, generator=dice)[:size]] / size**0.5
