"""The decoder and its parts."""

from nsa.models.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from nsa.models.decoder import Decoder
from nsa.models.decoding import DecodingSteps, generate
from nsa.models.sizes import count_parameters, training_flops_per_token

__all__ = [
    "AttentionConfig",
    "Decoder",
    "DecodingSteps",
    "MoEConfig",
    "ModelConfig",
    "RopeConfig",
    "count_parameters",
    "generate",
    "training_flops_per_token",
]
