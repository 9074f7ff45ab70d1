"""Initial values of a decoder's parameters.

Each parameter is drawn from its own generator, seeded by the run's seed and the parameter's name. So a rank draws only
the parameters that it holds, one whole parameter at a time, and every layout starts from the same weights.
"""

import hashlib

import torch
from torch import Tensor

from nsa.layers.kinds import KINDS
from nsa.models.config import ModelConfig

# These write to the residual stream. They are scaled such that its size does not grow with the layers (GPT-2).
INTO_RESIDUAL = ("attention.output.weight", "mlp.down.weight", "shared.down.weight", "experts.down")
KEEPS_SCALE = tuple(module for kind in KINDS for module in kind.keeps_scale)


def first_value(name: str, shape: torch.Size, config: ModelConfig, seed: int, device: torch.device) -> Tensor:
    """The whole parameter ``name`` of ``shape`` in fp32 on ``device``. CPU and GPU draw different numbers.

    Biases (so gates start half open) and sinks are 0, norms 1. The rest is normal with standard deviation
    ``config.init_std``, divided by sqrt(2 layers) for weights that write to the residual stream. Weights without a norm
    after them (NSA's compression) keep the scale of their input.
    """
    if name.endswith(("bias", "sink")):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    std = config.init_std
    if name.endswith(INTO_RESIDUAL):
        std /= (2 * config.num_layers) ** 0.5
    elif name.endswith("weight") and any(f".attention.{module}." in name for module in KEEPS_SCALE):
        std = shape[1] ** -0.5
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4]))  # the CPU generator takes 32 bits
    return torch.empty(shape, device=device).normal_(std=std, generator=generator)
