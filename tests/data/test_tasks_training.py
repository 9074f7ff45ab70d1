"""Synthetic sources: lengths of episodes, the curriculum, and tasks over text."""

from itertools import pairwise

import numpy as np
import pytest
from pydantic import ValidationError

from nsa.data.config import DataConfig, SourceConfig
from nsa.data.loader import Episodes, SampleStream
from nsa.data.shards import PreparedData
from nsa.data.tasks import IGNORED


def lengths(prepared: PreparedData, indices: range, **keys: object) -> list[list[int]]:
    """Lengths of the episodes in samples of 1,024 tokens."""
    source = SourceConfig(name="recall", kind="synthetic", task="mqar_wide", **keys)  # type: ignore[arg-type]
    episodes = Episodes(source, prepared.tokenizer, 1024, "7/recall")
    return [[span.stop for span in episodes.spans(i)] for i in indices]


def test_lengths_are_log_uniform(prepared: PreparedData) -> None:
    """Of the doublings from 32 to 1,024 each has as many episodes; the last of a sample is what is left."""
    found = [n for sample in lengths(prepared, range(300), lengths="log_uniform") for n in sample[:-1]]
    counts = np.histogram(np.log2(found), [5, 6, 7, 8, 9])[0]
    # A long episode ends a sample soon, so that short ones are more often not the last.
    assert counts.max() < 2 * counts.min()
    short = [n for sample in lengths(prepared, range(300)) for n in sample[:-1]]
    counts = np.histogram(np.log2(short), [5, 6, 7, 8, 9])[0]
    assert all(a > 3 * b for a, b in pairwise(counts))


def test_a_curriculum_begins_with_short_episodes(prepared: PreparedData) -> None:
    keys = {"lengths": "log_uniform", "curriculum": 100}
    longest = [max(sample[:-1], default=1024) for sample in lengths(prepared, range(100), **keys)]
    assert max(longest[:10]) <= 32 * 32**0.11 and max(longest[:50]) <= 182 and max(longest[60:]) > 256
    assert all(sum(sample) == 1024 and min(sample) >= 32 for sample in lengths(prepared, range(0, 100, 7), **keys))
    later = range(100, 110)
    assert lengths(prepared, later, **keys) == lengths(prepared, later, lengths="log_uniform")


def test_a_task_over_text_is_a_source(prepared: PreparedData, config: DataConfig) -> None:
    """The tokenizer of these tests has 400 pieces: 512 tokens are too few, and the loader finds out by itself."""
    task = SourceConfig(name="story", kind="synthetic", task="story_retrieval")
    long = config.model_copy(update={"sources": [config.sources[0], task], "sequence_length": 4096})
    stream = SampleStream(prepared, long, "train", 7)
    sample, spans = next((stream[i], stream.locate(i)) for i in range(4) if stream[i].source == 1)
    assert len(sample.tokens) == 4096 and sum(span.stop for span in spans) == 4096
    assert min(span.stop for span in spans) >= 1280
    asked = np.flatnonzero(sample.targets[:-1] != IGNORED)
    assert len(asked) > 10 and np.array_equal(sample.targets[asked], sample.tokens[asked + 1])
    with pytest.raises(ValueError, match=r"story_retrieval needs data\.sequence_length to be 1280 or more"):
        SampleStream(prepared, long.model_copy(update={"sequence_length": 1024}), "train", 7)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "synthetic", "task": "mqar_wid"}, "did you mean 'mqar_wide'"),
        ({"kind": "builtin", "curriculum": 5}, "lengths and curriculum go with kind synthetic only"),
        ({"kind": "synthetic"}, "kind synthetic needs a task: set task"),
        ({"kind": "builtin", "task": "copy"}, "only: set kind: synthetic, or take task out"),
    ],
)
def test_bad_sources(keys: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceConfig(name="x", **keys)
