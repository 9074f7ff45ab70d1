"""The learning rate as a pure function of the step."""

import math

from nsa.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (from 0) of ``steps``.

    Linear warm-up: step i of w warm-up steps has (i + 1) / w of the peak. Then ``constant`` stays at the peak,
    ``cosine`` falls to the minimum along half a cosine, and ``wsd`` stays at the peak and falls linearly over the last
    ``decay_steps`` (arXiv 2405.18392). The first step of a decay has the peak; the step after the last one would have
    the minimum.
    """
    peak, low = config.learning_rate, config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return peak
    decay = steps - config.warmup_steps if config.schedule == "cosine" else config.decay_steps or max(1, steps // 5)
    progress = min(max((step - (steps - decay)) / decay, 0.0), 1.0)
    falling = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    return low + (peak - low) * falling
