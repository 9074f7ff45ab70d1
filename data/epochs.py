"""How often a run reads each text, and a warning where that is too often.

A text source is an endless line of its training documents (`nsa.data.loader`): when all were read, they are read again.
Synthetic tasks are generated from the number of the sample and never repeat, so they have no such figure.
"""

from typing import NamedTuple

from nsa.data.blend import Blend
from nsa.data.config import DataConfig
from nsa.data.shards import PreparedData

# Up to so many readings are about as good as new text (Muennighoff et al. 2023, arXiv 2305.16264).
AS_GOOD_AS_NEW = 4.0


class Reading(NamedTuple):
    """tokens: of the source's training documents. times: how often each of them is read, on average."""

    source: str
    tokens: int
    times: float


def readings(prepared: PreparedData, config: DataConfig, samples: int) -> list[Reading]:
    """Of each text source, in the first ``samples`` samples of a run."""
    counts = Blend([source.weight for source in config.sources]).counts(samples)
    found = []
    for source, count in zip(config.sources, counts, strict=True):
        if source.kind != "synthetic":
            tokens = prepared.manifest["sources"][source.name]["train"]["tokens"]
            found.append(Reading(source.name, tokens, count * config.sequence_length / tokens))
    return found


def describe_readings(prepared: PreparedData, config: DataConfig, steps: int, global_batch_size: int) -> list[str]:
    """A line for each text source of a run of ``steps``, and then a warning for each that is read too often."""
    found = readings(prepared, config, steps * global_batch_size)
    lines = [f"{reading.source}: {_count(reading.tokens)} tokens, read {_times(reading.times)}" for reading in found]
    return lines + [_warning(reading, config, steps) for reading in found if reading.times > AS_GOOD_AS_NEW]


def _warning(reading: Reading, config: DataConfig, steps: int) -> str:
    (source,) = (source for source in config.sources if source.name == reading.source)
    less = AS_GOOD_AS_NEW / reading.times
    advice = ["add text (packages of this source, or another source)" if source.kind == "builtin" else "add text"]
    if fewer := int(steps * less):
        advice.append(f"train fewer steps ({fewer:,} read it {AS_GOOD_AS_NEW:g} times)")
    if others := sum(other.weight for other in config.sources) - source.weight:
        share = less * source.weight / (source.weight + others)
        advice.append(f"lower its weight ({others * share / (1 - share):.2g} reads it {AS_GOOD_AS_NEW:g} times)")
    return (
        f"warning: this run reads {reading.source} {_times(reading.times)}. Up to {AS_GOOD_AS_NEW:g} times are about "
        "as good as new text, later ones are worth less and less (arXiv 2305.16264): the validation loss may rise "
        f"while the training loss falls. You can {', or '.join(advice)}"
    )


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:,.1f} M" if tokens >= 1e6 else f"{tokens:,}"


def _times(times: float) -> str:
    if times < 0.01:
        return "less than 0.01 times"
    return f"{times:,.0f} times" if times >= 100 else f"{times:.3g} times"
