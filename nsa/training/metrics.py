"""What a step came to, and the figures of it that are logged."""

import math
from dataclasses import dataclass

from nsa.config import Config
from nsa.models import training_flops_per_token
from nsa.training.distributed import Ranks
from nsa.training.performance import memory_gib, peak_flops


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, alike on all ranks.

    Attributes:
        loss: nats per counted target of the global batch.
        grad_norm: global, before clipping. learning_rate: of the step.
        skipped: loss or gradient was not finite, or a spike; weights and moments are as before. spike: the latter.
        data_seconds: waited for the batch. stop: exit code that a rank was asked to stop with, or 0.
        sent: bytes that this rank sent to others of its replica, by what they are.
        figures: of the load of experts and the auxiliary losses of attention.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool
    data_seconds: float
    stop: int
    sent: dict[str, int]
    figures: dict[str, float]
    spike: bool = False


class StepMetrics:
    """The figures of steps of a run.

    Attributes:
        tokens_per_step: of the global batch. flops: per token, forward and backward, by what is counted
            (`nsa.models.training_flops_per_token`). peak: FLOP/s of a device. peak_source: where that is from.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.tokens_per_step = config.training.global_batch_size * config.data.sequence_length
        self.flops = training_flops_per_token(
            config.model, config.attention, config.data.sequence_length, apart=config.train != "all"
        )
        self.peak, self.peak_source = peak_flops(ranks.device, config.engine.precision)
        self.ranks = ranks

    def of(self, result: StepResult, step: int, updates: int, seconds: float, data_seconds: float) -> dict[str, float]:
        """By their tags in TensorBoard.

        Args:
            step, updates: steps of the run so far, and those that changed the weights.
            seconds, data_seconds: of a step, the mean since the last figures; of it, waited for data.
        """
        tokens_per_second = self.tokens_per_step / seconds
        metrics = {
            "train/learning_rate": result.learning_rate,
            "train/tokens": step * self.tokens_per_step,
            "train/skipped_steps": step - updates,
            "perf/tokens_per_second": tokens_per_second,
            "perf/step_seconds": seconds,
            "perf/data_seconds": data_seconds,
            "perf/memory_gib": memory_gib(self.ranks.device),
        }
        for what, num_bytes in result.sent.items():
            metrics[f"comm/{what.replace('/', '_')}_mib"] = num_bytes / 2**20
        if math.isfinite(result.loss) and math.isfinite(result.grad_norm):  # JSON knows no NaN
            metrics |= {"train/loss": result.loss, "train/grad_norm": result.grad_norm} | result.figures
        for kind, flops in self.flops.items():
            metrics[f"perf/mfu_{kind}"] = flops * tokens_per_second / (self.peak * self.ranks.world_size)
        return metrics
