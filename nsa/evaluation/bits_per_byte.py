"""Bits per byte of held-out text by position in the document, which shows whether more context helps."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from nsa.data.loader import SampleStream, batch
from nsa.models import Decoder

BATCH_TOKENS = 8192  # tokens of one forward pass


@dataclass(frozen=True)
class Curve:
    """Bits per byte of all counted targets, and by their position in the document.

    Entry i is of the positions ``starts[i]`` .. ``starts[i+1] - 1``, and NaN without text there. Positions count from
    the start of the document, or of the part of it that is in the sample.

    length: tokens per sample. samples: how many. bytes: of the text of all counted targets.
    """

    length: int
    samples: int
    bytes: int
    bits_per_byte: float
    starts: list[int]
    by_position: list[float]


def measure(decoder: Decoder, stream: SampleStream, samples: int) -> Curve:
    """The curve over the first ``samples`` samples of a stream, which validation reads, too."""
    length = stream.sequence_length
    starts = bucket_starts(length)
    nats, counted = np.zeros(len(starts)), np.zeros(len(starts))
    byte_lengths = torch.from_numpy(stream.prepared.tokenizer.byte_lengths)
    device = decoder.embedding.weight.device
    for indices in _micro_batches(samples, max(1, BATCH_TOKENS // length)):
        micro = batch(stream, indices)
        targets, cu_seqlens = micro["targets"], micro["cu_seqlens"]
        assert isinstance(targets, torch.Tensor) and isinstance(cu_seqlens, torch.Tensor)
        with torch.no_grad():
            nll = decoder(micro["input_ids"].to(device), targets.to(device), cu_seqlens.to(device))[0].double().cpu()  # type: ignore[union-attr]
        lengths = cu_seqlens.diff().long()
        position = torch.arange(len(nll)) - cu_seqlens[:-1].long().repeat_interleave(lengths)
        bucket = torch.searchsorted(torch.tensor(starts), position, right=True) - 1
        size = torch.where(targets[0] >= 0, byte_lengths[targets[0].clamp(min=0)], 0).double()
        nats += np.bincount(bucket, nll, len(starts))
        counted += np.bincount(bucket, size, len(starts))
    with np.errstate(divide="ignore", invalid="ignore"):
        by_position = nats / math.log(2) / counted
    by_position[counted == 0] = np.nan
    total = int(counted.sum())
    return Curve(length, samples, total, float(nats.sum() / math.log(2) / max(total, 1)), starts, by_position.tolist())


def bucket_starts(length: int) -> list[int]:
    """Two buckets per octave: 0, 8, 12, 16, 24, 32, 48 ... below ``length``."""
    octaves = [start for k in range(3, length.bit_length()) for start in (2**k, 3 * 2 ** (k - 1))]
    return [0, *(start for start in octaves if start < length)]


def _micro_batches(samples: int, size: int) -> Iterator[range]:
    for first in range(0, samples, size):
        yield range(first, min(first + size, samples))
