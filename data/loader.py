"""The packing loader: sample i of a blend, as a pure function of (prepared data, data section, seed, i).

A text source is an endless line of tokens: all documents of the split in a seeded order, then all of them in another
order, and so on. It is cut into windows of T tokens. The windows that begin in one epoch are visited in a seeded order
of their own, so that neighbouring samples are not neighbours in one file. Every token but a document's first is the
target of exactly one position per epoch.

Nothing here depends on ranks, workers or micro batches, and there is no state: to resume is to ask for the next index.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.blend import Blend
from nsa.data.config import DataConfig, SourceConfig
from nsa.data.permutation import permute, round_keys
from nsa.data.shards import PreparedData, TokenSource
from nsa.data.tasks import IGNORED, as_vocabulary, generator, task_named


@dataclass(frozen=True)
class Sample:
    """One sequence of T tokens, all int64.

    tokens, targets: (T,). starts: (documents,), where each document or piece of one begins; the first is 0.
    num_bytes: bytes of text that the counted targets stand for. source: index into `data.sources`.
    """

    tokens: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    num_bytes: int
    source: int


class Span(NamedTuple):
    """Tokens start..stop-1 (bos and eos included) of a document: its id, and its row in the source's documents.

    For a synthetic source row is the sample's number in the source, document says which episode of it.
    """

    source: str
    document: str
    row: int
    start: int
    stop: int


class SampleStream:
    """An endless sequence of samples; `len` is that of one epoch of its text (for a finite pass, as in validation).

    split "train" blends all sources by weight; "validation" reads the held-out documents of the text sources, and no
    synthetic task, whose bits per byte mean nothing. Samples count from 0; a negative index raises IndexError.
    """

    def __init__(self, prepared: PreparedData, config: DataConfig, split: str, seed: int):
        if split not in ("train", "validation"):
            raise ValueError(f"split must be train or validation, not {split!r}")
        if split == "validation":
            seed = config.seed_of(seed)
        self.prepared, self.sequence_length = prepared, config.sequence_length
        self._members: list[tuple[int, Windows | Episodes]] = []
        weights = []
        for number, source in enumerate(config.sources):
            # The seed of a source hangs on its name: to add a source does not reorder the others.
            name = f"{seed}/{source.name}"
            if source.kind != "synthetic":
                if source.name not in prepared.sources:
                    raise ValueError(f"data source {source.name!r} is not in {prepared.folder}; run prepare again")
                text, lengths = prepared.sources[source.name], prepared.tokenizer.byte_lengths
                self._members.append((number, Windows(text, split, config.sequence_length, lengths, name)))
            elif split == "train":
                self._members.append((number, Episodes(source, prepared.tokenizer, config.sequence_length, name)))
            else:
                continue
            weights.append(source.weight)
        self._blend = Blend(weights)

    def __len__(self) -> int:
        """Samples until each text source was read once or more."""
        shares = [w / sum(self._blend.weights) for w in self._blend.weights]
        needed = [
            math.ceil(member.samples_per_epoch / share)
            for (_, member), share in zip(self._members, shares, strict=True)
            if isinstance(member, Windows)
        ]
        return max(needed)

    def __getitem__(self, index: int) -> Sample:
        member, local = self._blend[index]
        number, reader = self._members[member]
        tokens, targets, starts, num_bytes = reader.sample(local)
        return Sample(tokens, targets, starts, num_bytes, number)

    def locate(self, index: int) -> list[Span]:
        """The documents in sample `index`, in order."""
        member, local = self._blend[index]
        return self._members[member][1].spans(local)


def batch(stream: SampleStream, indices: Sequence[int]) -> dict[str, torch.Tensor | int]:
    """One packed micro batch of m samples of T tokens.

    input_ids, targets: (1, m*T) int64; a target of -100 is not counted (the next token is another document's, or the
    filler of a synthetic task). cu_seqlens: (documents + 1,) int32; a sample's border is a document's border.
    source_ids: (m,) int64. num_bytes: int, bytes of text of the counted targets.
    """
    samples = [stream[i] for i in indices]
    length = stream.sequence_length
    borders = [s.starts + row * length for row, s in enumerate(samples)]
    return {
        "input_ids": torch.from_numpy(np.concatenate([s.tokens for s in samples])[None]),
        "targets": torch.from_numpy(np.concatenate([s.targets for s in samples])[None]),
        "cu_seqlens": torch.from_numpy(np.concatenate([*borders, [len(samples) * length]]).astype(np.int32)),
        "source_ids": torch.tensor([s.source for s in samples]),
        "num_bytes": sum(s.num_bytes for s in samples),
    }


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, int]  # tokens, targets, starts, num_bytes


class Windows:
    """The windows of one text source and split."""

    def __init__(self, source: TokenSource, split: str, length: int, byte_lengths: np.ndarray, seed: str):
        self._source, self._length, self._byte_lengths = source, length, byte_lengths
        self._seed = f"{seed}/{split}"
        self._documents = source.members(split)
        self._lengths = source.lengths(self._documents)
        self._epoch_tokens = int(self._lengths.sum())
        self.samples_per_epoch = -(-self._epoch_tokens // length)
        # An epoch's order is made once and kept: a window's tail may lie in the next epoch, so two are in use.
        self._order = lru_cache(maxsize=2)(self._make_order)

    def sample(self, index: int) -> Arrays:
        pieces = self._pieces(self._window(index), self._length + 1)
        ids = np.concatenate([self._source.read(document, start, stop) for document, start, stop in pieces])
        ids = ids.astype(np.int64)
        lengths = np.array([stop - start for _, start, stop in pieces])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        targets = ids[1:].copy()
        targets[starts[1:] - 1] = IGNORED  # the first token of another document
        counted = targets[targets != IGNORED]
        return ids[:-1], targets, starts[starts < self._length], int(self._byte_lengths[counted].sum())

    def spans(self, index: int) -> list[Span]:
        pieces = self._pieces(self._window(index), self._length)
        return [Span(self._source.name, self._source.document_id(d), d, start, stop) for d, start, stop in pieces]

    def _window(self, index: int) -> int:
        """The window that is visited at `index`: windows are reordered within the epoch in which they begin."""
        epoch = index * self._length // self._epoch_tokens
        first = -(-epoch * self._epoch_tokens // self._length)
        count = -(-(epoch + 1) * self._epoch_tokens // self._length) - first
        return first + int(permute(np.array(index - first), count, round_keys(self._seed, "windows", epoch)))

    def _pieces(self, window: int, length: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of the `length` tokens that begin at the window's beginning."""
        epoch, offset = divmod(window * self._length, self._epoch_tokens)
        pieces = []
        while length:
            order, ends = self._order(epoch)
            at = int(np.searchsorted(ends, offset, side="right"))
            document = int(order[at])
            size = int(self._lengths[document])
            start = offset - int(ends[at]) + size
            stop = min(size, start + length)
            pieces.append((int(self._documents[document]), start, stop))
            length -= stop - start
            offset += stop - start
            if offset == self._epoch_tokens:
                epoch, offset = epoch + 1, 0
        return pieces

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(documents in this epoch's order, where each ends), (n,) int64 both."""
        n = len(self._documents)
        order = permute(np.arange(n), n, round_keys(self._seed, "documents", epoch))
        return order, np.cumsum(self._lengths[order])


class Episodes:
    """Samples of a synthetic task: episodes of many lengths, up to a whole sample, each a document of its own."""

    def __init__(self, source: SourceConfig, tokenizer: BaseTokenizer, length: int, seed: str):
        assert source.task is not None
        self._task, self._vocabulary = task_named(source.task), as_vocabulary(tokenizer)
        self._shortest = self._task.trainable_from(self._vocabulary, length)
        if length < self._shortest:
            raise ValueError(
                f"data source {source.name!r}: task {source.task} needs data.sequence_length to be {self._shortest} or "
                f"more, it is {length}"
            )
        self._source, self._length, self._seed = source, length, seed

    def sample(self, index: int) -> Arrays:
        lengths = self._cut(index)
        episodes = [
            self._task.episode(self._vocabulary, n, self._seed, (index, part), crowded=True)
            for part, n in enumerate(lengths)
        ]
        tokens = np.concatenate([e.tokens for e in episodes])
        targets = np.concatenate([e.targets for e in episodes])
        return tokens, targets, np.concatenate([[0], np.cumsum(lengths)[:-1]]), 0

    def spans(self, index: int) -> list[Span]:
        return [Span(self._source.name, f"{index}/{part}", index, 0, n) for part, n in enumerate(self._cut(index))]

    def _cut(self, index: int) -> list[int]:
        """Lengths of a sample's episodes.

        Short: their density falls as length^-3, each doubling gets half as many tokens. Log-uniform: as length^-1.
        """
        shortest, longest = self._shortest, self._longest(index)
        rng = generator(self._seed, "cut", index)
        cuts = [0]
        while (left := self._length - cuts[-1]) > 0:
            if self._source.lengths == "short":
                length = int(shortest / (1 - rng.random() * (1 - (shortest / longest) ** 2)) ** 0.5)
            else:
                length = min(longest, int(shortest * ((longest + 1) / shortest) ** rng.random()))
            cuts.append(self._length if left - length < shortest else cuts[-1] + length)
        return np.diff(cuts).tolist()

    def _longest(self, index: int) -> int:
        """The longest episode that sample `index` may have: during the curriculum it grows by equal factors."""
        grown = min(1.0, (index + 1) / self._source.curriculum) if self._source.curriculum else 1.0
        return round(self._shortest * (self._length / self._shortest) ** grown)
