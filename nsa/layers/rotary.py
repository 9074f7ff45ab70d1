"""Rotary position embedding with YaRN length extension."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.layers.rotary_scaling import RopeScaling


@dataclass(frozen=True)
class Rotary:
    """The angles of rotary position embedding (RoPE, arXiv 2104.09864), extended by YaRN (arXiv 2309.00071).

    `nsa.ops.geometry.RotaryLayout` says which dims of a head are rotated, and which of them are pairs.

    Attributes:
        theta: base of the frequencies.
        trained_range: tokens that the model is trained for; used with YaRN only.
        yarn_factor: length extension, new range / trained range; 1: none.
        beta_fast, beta_slow: frequencies with at least beta_fast rotations over the trained range are kept, those with
            at most beta_slow are divided by the factor.
        scaling: how the frequencies that the model is trained with differ from RoPE's; None: they do not.
    """

    theta: float = 10000.0
    trained_range: int = 1
    yarn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    scaling: RopeScaling | None = None

    def frequencies(self, width: int, device: torch.device | None = None) -> Tensor:
        """Angular frequencies, (width / 2,) fp32, in radians per token, for ``width`` rotated dims.

        RoPE (arXiv 2104.09864, Eq. 15), or those of ``scaling``. With YaRN, frequencies between the two betas are
        interpolated (arXiv 2309.00071, section 3.2).
        """
        if self.scaling is None:
            exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
            frequencies = self.theta**-exponents
        else:
            frequencies = self.scaling.frequencies(self.theta, width, device)
        if self.yarn_factor == 1.0:
            return frequencies
        turns = self.trained_range * frequencies / (2 * math.pi)
        keep = ((turns - self.beta_slow) / (self.beta_fast - self.beta_slow)).clamp(0, 1)
        return frequencies * (keep + (1 - keep) / self.yarn_factor)

    def tables(self, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """cos and sin, each (T, width / 2) fp32, of the angles at ``positions`` (T,) integer.

        They are multiplied by YaRN's attention temperature, and by that of ``scaling``.
        """
        angles = positions[:, None].float() * self.frequencies(width, positions.device)
        return angles.cos() * self.factor, angles.sin() * self.factor

    @property
    def factor(self) -> float:
        """Of the tables: YaRN's attention temperature, and that of ``scaling``."""
        return self.temperature * (1.0 if self.scaling is None else self.scaling.temperature)

    @property
    def temperature(self) -> float:
        """Of YaRN by a factor s: 0.1 ln(s) + 1 (arXiv 2309.00071, Eq. 22). Scores are multiplied by its square."""
        return 0.1 * math.log(self.yarn_factor) + 1.0

    def at(self, positions: Tensor) -> "RotaryTables":
        """The tables of tokens at ``positions`` (T,) integer, for all layers of a decoder."""
        return RotaryTables(self, positions)


class RotaryTables:
    """cos and sin at the positions of a batch. The tables of each width are computed once."""

    def __init__(self, rotary: Rotary, positions: Tensor) -> None:
        self.rotary, self.positions = rotary, positions
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._back: dict[int, RotaryTables] = {}

    def of(self, width: int) -> tuple[Tensor, Tensor]:
        """As `Rotary.tables` for ``width`` dims."""
        if width not in self._made:
            self._made[width] = self.rotary.tables(self.positions, width)
        return self._made[width]

    def back(self, tokens: int) -> "RotaryTables":
        """The tables of the positions ``tokens`` before."""
        if tokens not in self._back:
            self._back[tokens] = self.rotary.at(self.positions - tokens)
        return self._back[tokens]

    def untempered(self, width: int) -> tuple[Tensor, Tensor]:
        """As `of`, without the temperatures: a rotation alone."""
        cos, sin = self.of(width)
        factor = self.rotary.factor
        return (cos, sin) if factor == 1.0 else (cos / factor, sin / factor)
