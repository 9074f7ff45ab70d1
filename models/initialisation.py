"""First values of a decoder's parameters.

Each is drawn from a generator of its own, seeded by the run's seed and the parameter's name. So a rank draws only what
it holds, one whole parameter at a time, and every layout starts from the same weights.
"""

import hashlib

import torch
from torch import Tensor

from nsa.layers.kinds import KINDS
from nsa.models.config import ModelConfig

# They write to the residual stream (GPT-2): their sum over the layers keeps its size.
INTO_RESIDUAL = ("attention.output.weight", "mlp.down.weight", "shared.down.weight", "experts.down")
KEEPS_SCALE = tuple(module for kind in KINDS for module in kind.keeps_scale)


def first_value(name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The fp32 parameter ``name`` of ``shape``, whole, on ``device``; CPU and GPU draw different numbers.

    Biases 0 (gates start half open), norms 1, the rest normal: with ``config.init_std``, over sqrt(2 layers) where it
    writes to the residual stream; where no norm follows (NSA's compression) such that the input's scale is kept.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    std = config.init_std
    if name.endswith(INTO_RESIDUAL):
        std /= (2 * config.num_layers) ** 0.5
    elif name.endswith("weight") and any(f".attention.{module}." in name for module in KEEPS_SCALE):
        std = shape[1] ** -0.5
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4]))  # a CPU's takes 32 bits
    return torch.empty(shape, device=device).normal_(std=std, generator=generator)
