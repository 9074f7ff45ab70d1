"""Rolls back after too many loss spikes, and lists the batches that are skipped then: `<run>/quarantine.jsonl`."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from nsa.config import Config
from nsa.data.loader import SampleStream
from nsa.training.distributed import Ranks, ReportedError
from nsa.training.spikes import SpikeState, batch_number
from nsa.training.state import Progress


class TrainingError(ValueError):
    """The run cannot go on."""


def roll_back(
    spikes: SpikeState,
    config: Config,
    ranks: Ranks,
    run: Path,
    stream: SampleStream,
    load_before: Callable[[int], Progress | None],
) -> tuple[Progress, str]:
    """Load a checkpoint from before the spikes and quarantine their batches. Collective.

    Args:
        load_before: loads the newest verified checkpoint with fewer steps than its argument.

    Returns:
        The progress to continue from, with the quarantine in it, and a message about what happened.

    Raises:
        TrainingError: the run was rolled back too often, or there is no such checkpoint.
    """
    recovery, first = config.recovery, spikes.spikes[0]
    bad = {batch_number(step, spikes.quarantine): step for step in spikes.spikes}
    summary = (
        f"{len(bad)} spikes within {recovery.window} steps (steps {', '.join(str(s + 1) for s in spikes.spikes)}; "
        f"recovery.max_spikes is {recovery.max_spikes})"
    )
    ranks.on_main(lambda: write_quarantine(run, stream, bad, config.training.global_batch_size))

    def fail(reason: str) -> TrainingError | ReportedError:
        if not ranks.is_main:
            return ReportedError(reason)
        return TrainingError(
            f"{summary}, {reason}. Lower optimizer.learning_rate, look at the documents named in "
            f"{run / 'quarantine.jsonl'}, or raise recovery.loss_sigma"
        )

    if spikes.rollbacks >= recovery.max_rollbacks:
        raise fail(f"and the run went back {spikes.rollbacks} times already (recovery.max_rollbacks)")
    progress = load_before(first + 1)
    if progress is None:
        raise fail("and there is no good checkpoint from before them")
    progress.spikes.quarantine = sorted({*spikes.quarantine, *bad})
    progress.spikes.rollbacks = spikes.rollbacks + 1
    batches = f"batches {sorted(bad)} are quarantined, {run / 'quarantine.jsonl'} names their documents"
    return progress, f"{summary}; {batches}"


def write_quarantine(run: Path, stream: SampleStream, batches: dict[int, int], batch_size: int) -> None:
    """Append a line for each batch: its number, its step, its samples and the documents in them.

    The file is for the reader only: the trainer uses the list in the checkpoint's state.json.

    Args:
        batches: batch number -> the step (from 0) that read it. batch_size: samples per batch.
    """
    with (run / "quarantine.jsonl").open("a") as file:
        for number, step in sorted(batches.items()):
            samples = range(number * batch_size, (number + 1) * batch_size)
            documents = [span._asdict() | {"sample": i} for i in samples for span in stream.locate(i)]
            line = {"batch": number, "step": step + 1, "samples": [samples[0], samples[-1]], "documents": documents}
            file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
