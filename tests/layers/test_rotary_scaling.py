"""Scaled rotary frequencies are those of `transformers`, to the bit."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nsa.layers.rotary import Rotary
from nsa.layers.rotary_scaling import RopeScaling

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
CASES = [
    LLAMA3,
    LLAMA3 | {"factor": 32.0, "low_freq_factor": 0.5},
    LLAMA3 | {"high_freq_factor": 1000.0},
    YARN,
    YARN | {"beta_fast": 64.0, "beta_slow": 2.0},
    YARN | {"beta_fast": 1.001, "beta_slow": 1.0},
    YARN | {"attention_factor": 0.7, "mscale": 3.0, "mscale_all_dim": 2.0},
    YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    YARN | {"factor": 1.0, "mscale": 1.0},
]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize(("theta", "width", "length"), [(1e4, 128, 4096), (5e5, 64, 8192), (50.0, 10, 33), (1e6, 6, 7)])
def test_frequencies_and_factor_are_those_of_transformers(
    case: dict[str, Any], theta: float, width: int, length: int
) -> None:
    """Planted: wavelengths on the wrong side, a ramp not rounded outwards, mscale's fraction upside down."""
    parameters = case | {"original_max_position_embeddings": length, "rope_theta": theta}
    config = LlamaConfig(
        head_dim=width,
        hidden_size=width,
        num_attention_heads=1,
        max_position_embeddings=length * 50,
        rope_parameters=dict(parameters),
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[case["rope_type"]](config, torch.device("cpu"))
    scaling = RopeScaling(original_max_position_embeddings=length, **case)
    rotary = Rotary(theta, scaling=scaling)
    assert torch.equal(rotary.frequencies(width), frequencies)
    assert scaling.temperature == pytest.approx(factor, rel=1e-12)
    angles = torch.arange(5)[:, None] * frequencies
    torch.testing.assert_close(rotary.tables(torch.arange(5), width)[1], angles.sin() * factor)


def test_a_further_extension_divides_the_slow_frequencies_once_more() -> None:
    scaling = RopeScaling(original_max_position_embeddings=100, **LLAMA3)
    plain = Rotary(1e4, 800, scaling=scaling).frequencies(64)
    longer = Rotary(1e4, 800, yarn_factor=4.0, scaling=scaling).frequencies(64)
    assert torch.equal(longer[0], plain[0])
    torch.testing.assert_close(longer[-4:], plain[-4:] / 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (LLAMA3 | {"beta_fast": 32.0}, "beta_fast is for rope_type yarn, not llama3: take it out"),
        (YARN | {"low_freq_factor": 1.0}, "low_freq_factor is for rope_type llama3"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor and high_freq_factor"),
        (LLAMA3 | {"low_freq_factor": 4.0}, r"low_freq_factor \(4.0\) must be below"),
        (YARN | {"beta_slow": 40.0}, r"beta_slow \(40.0\) must be below beta_fast \(32.0\)"),
        (YARN | {"factor": 0.5}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        RopeScaling(original_max_position_embeddings=64, **fields)
