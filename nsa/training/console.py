"""What a run prints: rank 0 speaks."""

from pathlib import Path

from nsa.config import Config
from nsa.data.epochs import describe_readings
from nsa.data.shards import PreparedData
from nsa.layers.kinds import KINDS
from nsa.models import count_parameters
from nsa.training.deepspeed_config import micro_batches_per_step
from nsa.training.distributed import Ranks
from nsa.training.metrics import StepMetrics, StepResult
from nsa.training.signals import reader_gone


class Console:
    """Of a run in ``folder``."""

    def __init__(self, config: Config, ranks: Ranks, folder: Path) -> None:
        self.config, self.ranks, self.folder = config, ranks, folder

    def say(self, text: str) -> None:
        if self.ranks.is_main:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                reader_gone()

    def greet(
        self, layout: str, figures: StepMetrics, dense_attention: str | None, step: int, prepared: PreparedData
    ) -> None:
        """At the start.

        Args:
            layout: how the ranks are dealt out. dense_attention: what computes it; None: no layer asks.
            step: after which the run goes on. prepared: its data.
        """
        config, ranks = self.config, self.ranks
        parameters = count_parameters(config.model, config.attention)
        active = f" ({parameters['active'] / 1e6:.2f} M active)" if config.model.moe else ""
        self.say(
            f"{config.name}: {parameters['total'] / 1e6:.2f} M parameters{active}, "
            f"{ranks.world_size} x {ranks.device.type} ({layout}), "
            f"ZeRO {config.engine.zero_stage}, {config.engine.precision}, "
            f"{micro_batches_per_step(config, ranks.world_size)} micro batches of {config.training.micro_batch_size} "
            f"x {config.data.sequence_length} tokens; peak {figures.peak / 1e12:.3g} TFLOP/s ({figures.peak_source})"
        )
        if dense_attention:
            self.say(f"dense attention: {dense_attention}")
        if limits := limits_of(config):
            self.say(limits)
        if ranks.is_main:
            steps, batch = config.training.steps, config.training.global_batch_size
            self.say("\n".join(describe_readings(prepared, config.data, max(steps, step), batch)))
        if step:
            self.say(f"resumed {self.folder} after step {step}")

    def step(
        self, step: int, result: StepResult, metrics: dict[str, float], lowest: tuple[float, int] | None = None
    ) -> None:
        """A line of a step.

        Args:
            metrics: those of it that were taken, by their tags. lowest: the lowest validation loss so far, and its
                step.
        """
        steps = self.config.training.steps
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        parts.append(f"loss {result.loss:.4f}")
        parts.append(f"lr {result.learning_rate:.2e}  grad {result.grad_norm:.3f}")
        if "perf/tokens_per_second" in metrics:
            left = (steps - step) * metrics["perf/step_seconds"]
            parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tok/s  eta {duration(left)}")
        if "validation/loss" in metrics:
            loss, bits = metrics["validation/loss"], metrics["validation/bits_per_byte"]
            best = f", lowest {lowest[0]:.4f} at step {lowest[1]}" if lowest else ""
            parts.append(f"validation loss {loss:.4f}{best}  bpb {bits:.4f}")
        self.say("  |  ".join(parts))

    def spike(self, step: int, result: StepResult, samples: str, spikes: int) -> None:
        """An update was skipped; ``spikes``: so far in the window."""
        recovery = self.config.recovery
        self.say(
            f"step {step}: loss {result.loss:.4f}, gradient norm {result.grad_norm:.4g}: a spike, the update is "
            f"skipped on all ranks ({samples}; {spikes} spikes, at most {recovery.max_spikes} per {recovery.window} "
            "steps)"
        )

    def not_finite(self, step: int, result: StepResult, samples: str, in_a_row: int) -> None:
        """An update was skipped."""
        self.say(
            f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, the update is skipped on "
            f"all ranks ({samples}; {in_a_row} in a row, at most {self.config.training.max_skipped_steps})"
        )

    def farewell(self, step: int, reason: str) -> None:
        """At the end; ``reason``: why it stopped before its last step."""
        steps = self.config.training.steps
        if step < steps:
            why = f" ({reason})" if reason else ""  # a signal to another rank
            self.say(f"stopped after step {step} of {steps}{why}; run the same command to go on")
        elif step > steps:
            self.say(
                f"nothing to do: {self.folder} has done {step} steps, training.steps is {steps}; "
                "set training.steps higher to go on"
            )
        else:
            self.say(f"done: {steps} steps in {self.folder}")


def limits_of(config: Config) -> str | None:
    """What will not be possible with what a run trains, and what to do; None: all will."""
    if not (kinds := config.attention.not_exportable(config.model.num_layers)):
        return None
    able = [kind.name for kind in KINDS if kind.export is not None]
    return (
        f"note: no export can carry {', '.join(kinds)} yet: nsa.export and nsa.evaluate will refuse "
        "this model. It trains, validates and resumes all the same. If you need an export, take attention.kind "
        + " or ".join(able)
    )


def duration(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
