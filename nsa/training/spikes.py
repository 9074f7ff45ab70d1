"""Loss spikes: which steps are skipped, when the run is rolled back, and which batches it then skips.

A step whose loss (or gradient norm) is far above the mean of the last accepted steps is skipped: weights and moments
stay as they are. If too many are skipped, the run is rolled back to a checkpoint from before the first of these
spikes, and never reads their batches again (as PaLM, arXiv 2204.02311, section 5.1; the detector is that of
OLMo-core's SkipStepOptimizer). All decisions are a pure function of losses and norms, which all ranks have. The state
is part of a checkpoint, so a resumed run decides as an uninterrupted one.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

from nsa.config import RecoveryConfig

FLOOR = 0.01  # least deviation, relative to the mean: on a flat curve noise would be many standard deviations


@dataclass
class SpikeState:
    """What the detector remembers.

    Attributes:
        losses, grad_norms: of the last accepted steps, at most ``window``.
        spikes: steps (from 0) within the last ``window`` that were skipped as spikes.
        quarantine: batches that are left out of the data order, ascending.
        rollbacks: how often the run was rolled back.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)
    quarantine: list[int] = field(default_factory=list)
    rollbacks: int = 0

    @classmethod
    def read(cls, saved: Any) -> "SpikeState":
        """From state.json. Raises ValueError or TypeError if it is invalid."""
        state = cls(**saved)
        counts = [*state.spikes, *state.quarantine, state.rollbacks]
        if not all(type(n) is int and n >= 0 for n in counts):
            raise ValueError("spikes, quarantine and rollbacks must be counts")
        if not all(type(x) is float and math.isfinite(x) for x in [*state.losses, *state.grad_norms]):
            raise ValueError("losses and grad_norms must be finite numbers")
        return state


def batch_number(step: int, quarantine: Iterable[int]) -> int:
    """The batch that step ``step`` (from 0) reads: number ``step`` of the batches that are not in ``quarantine``.

    Adding a batch to the quarantine does not change what the steps before that batch read.
    """
    batch = step
    for left_out in sorted(quarantine):
        batch += left_out <= batch
    return batch


def beyond(value: float, window: list[float], sigma: float, least: int) -> bool:
    """Whether a finite ``value`` is more than ``sigma`` standard deviations above the mean of ``window``.

    False if ``window`` has fewer than ``least`` values or ``sigma`` is 0. Also false for a value that is not finite:
    another rule skips such steps.
    """
    if not sigma or len(window) < least or not math.isfinite(value):
        return False
    mean = fmean(window)
    return value > mean + sigma * max(pstdev(window, mean), FLOOR * abs(mean))


class SpikeDetector:
    """Detects spikes by the rules of ``config``. ``state`` may be replaced (after a rollback)."""

    def __init__(self, config: RecoveryConfig, state: SpikeState) -> None:
        self.config, self.state = config, state
        self._least = max(4, config.window // 4)

    def loss_spikes(self, loss: float) -> bool:
        return beyond(loss, self.state.losses, self.config.loss_sigma, self._least)

    def norm_spikes(self, norm: float) -> bool:
        return beyond(norm, self.state.grad_norms, self.config.grad_norm_sigma, self._least)

    def record(self, step: int, loss: float, norm: float, spike: bool) -> None:
        """Remember step ``step`` (from 0), which was either applied or skipped as a ``spike``."""
        state, window = self.state, self.config.window
        state.spikes = [s for s in state.spikes if s > step - window]
        if spike:
            state.spikes.append(step)
        else:
            state.losses = [*state.losses, loss][-window:]
            state.grad_norms = [*state.grad_norms, norm][-window:]

    @property
    def exhausted(self) -> bool:
        """Whether more steps were skipped as spikes than the budget allows."""
        return len(self.state.spikes) > self.config.max_spikes
