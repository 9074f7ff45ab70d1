"""Rotary frequencies of models with a longer range than they were first trained for, as `transformers` computes them.

The section of the configuration computes them itself: its fields have the names of `transformers`' `rope_parameters`.
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nsa.schema import Section

OF_TYPE = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}


class RopeScaling(Section):
    """Rotary frequencies as `transformers` scales them: for models that another trainer extended."""

    rope_type: Literal["llama3", "yarn"] = Field(description="llama3 (Llama 3.1) or yarn (arXiv 2309.00071)")
    factor: float = Field(ge=1, description="slow frequencies are divided by this factor")
    original_max_position_embeddings: int = Field(ge=1, description="context length in tokens before the extension")
    low_freq_factor: float | None = Field(
        None, gt=0, description="llama3: frequencies with fewer rotations over the original range are divided by factor"
    )
    high_freq_factor: float | None = Field(
        None, gt=0, description="llama3: frequencies with more rotations over the original range are kept"
    )
    beta_fast: float | None = Field(
        None, gt=0, description="yarn: rotations over the original range above which frequencies are kept; null: 32"
    )
    beta_slow: float | None = Field(
        None, gt=0, description="yarn: rotations below which frequencies are divided by factor; null: 1"
    )
    attention_factor: float | None = Field(
        None,
        gt=0,
        description="yarn: factor of cos and sin; null: from mscale and mscale_all_dim, or 0.1 ln(factor) + 1",
    )
    mscale: float | None = Field(
        None,
        ge=0,
        description="yarn, with mscale_all_dim only: cos and sin get the factor (0.1 mscale ln(factor) + 1) / "
        "(0.1 mscale_all_dim ln(factor) + 1)",
    )
    mscale_all_dim: float | None = Field(None, ge=0, description="yarn: see mscale")

    @model_validator(mode="after")
    def _consistent(self) -> "RopeScaling":
        for rope_type, names in OF_TYPE.items():
            if rope_type != self.rope_type and (given := [name for name in names if getattr(self, name) is not None]):
                raise ValueError(
                    f"model.rope_scaling.{given[0]} is for rope_type {rope_type}, not {self.rope_type}: take it out"
                )
        if self.rope_type == "llama3":
            if self.low_freq_factor is None or self.high_freq_factor is None:
                raise ValueError(
                    "model.rope_scaling: rope_type llama3 needs low_freq_factor and high_freq_factor "
                    "(Llama 3.1 has 1 and 4)"
                )
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"model.rope_scaling.low_freq_factor ({self.low_freq_factor}) must be below "
                    f"high_freq_factor ({self.high_freq_factor})"
                )
        elif (self.beta_slow or 1.0) >= (self.beta_fast or 32.0):
            raise ValueError(
                f"model.rope_scaling.beta_slow ({self.beta_slow or 1.0}) must be below "
                f"beta_fast ({self.beta_fast or 32.0})"
            )
        return self

    @property
    def temperature(self) -> float:
        """Factor of cos and sin."""
        if self.rope_type == "llama3":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        growth = 0.1 * math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * growth + 1.0) / (self.mscale_all_dim * growth + 1.0)
        return growth + 1.0

    @property
    def sharpness(self) -> float:
        """Factor of MLA's scores beside that of the tables, as in DeepSeek-V3: 1 without ``mscale_all_dim``."""
        if self.rope_type != "yarn" or not self.mscale_all_dim:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2

    def frequencies(self, theta: float, width: int, device: torch.device | None = None) -> Tensor:
        """(width / 2,) fp32 in radians per token, for ``width`` rotated dims of base ``theta`` (above 1 with yarn).

        Operations are in the order of `transformers`, to the same bits.
        """
        powers = theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        return self._llama3(powers) if self.rope_type == "llama3" else self._yarn(powers, theta, width)

    def _llama3(self, powers: Tensor) -> Tensor:
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        assert low is not None and high is not None
        plain = 1.0 / powers
        wavelengths = 2 * math.pi / plain
        smooth = (length / wavelengths - low) / (high - low)
        between = (1 - smooth) * plain / self.factor + smooth * plain
        long, short = wavelengths > length / low, wavelengths < length / high
        return torch.where(long, plain / self.factor, torch.where(short, plain, between))

    def _yarn(self, powers: Tensor, theta: float, width: int) -> Tensor:
        def pair_of(turns: float) -> float:
            """The pair, as a fraction, that turns so often over the original range."""
            length = self.original_max_position_embeddings
            return (width * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(theta))

        first = max(math.floor(pair_of(self.beta_fast or 32.0)), 0)
        last: float = min(math.ceil(pair_of(self.beta_slow or 1.0)), width - 1)
        last = last + 0.001 if first == last else last
        pairs = torch.arange(width // 2, dtype=torch.float32, device=powers.device)
        keep = 1 - ((pairs - first) / (last - first)).clamp(0, 1)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep
