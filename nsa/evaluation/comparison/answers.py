"""Asks a model the questions of a task: prompt, then decoding, token by token."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from nsa.data.tasks import Query, Sample, Task, as_vocabulary
from nsa.evaluation.comparison.decoding import Prompts, Reader


class Answer(NamedTuple):
    """The answer to a query of a sample, both by number. score: None if it could not be parsed."""

    sample: int
    query: int
    score: float | None


Item = TypeVar("Item")


def ask(
    reader: Reader,
    tokenizer: Any,
    task: Task,
    samples: Sequence[Sample],
    *,
    aware: bool,
    batch_tokens: int,
    prompts: Prompts | None = None,
    answered: Collection[tuple[int, int]] = (),
) -> Iterator[list[Answer]]:
    """The answers to all queries of the samples, prompts after prompts. Between them the reader holds none.

    The last token of a prompt is decoded like those after it, so that no answer comes out of the prompt's pass alone.

    Args:
        aware: the question is part of the prompt, which is read again for each; else the prompt is the context alone,
            and its questions are decoded after it.
        prompts: reads them, once for all readers that are asked in turns; None: this reader reads them itself.
        answered: queries of samples, both by number, that are not asked again.
    """
    all_pairs = ((i, j) for i, sample in enumerate(samples) for j in range(len(sample.queries)))
    pairs = [pair for pair in all_pairs if pair not in answered]

    def read(ids: Tensor) -> None:
        if prompts is None:
            reader.begin()
            reader.read(ids[:, :-1])
        else:
            reader.follow(prompts.read(ids[:, :-1]))
        reader.end_prompt()

    if aware:
        whole = {pair: np.concatenate([samples[pair[0]].context, query_of(samples, pair).tokens]) for pair in pairs}
        for batch in _batches(pairs, lambda pair: len(whole[pair]), batch_tokens):
            ids = _ids([whole[pair] for pair in batch])
            read(ids)
            found = _generated(reader, tokenizer, task, samples, batch, ids[:, -1:])
            reader.begin()
            yield found
        return
    for few in _batches(list(dict.fromkeys(i for i, _ in pairs)), lambda i: len(samples[i].context), batch_tokens):
        ids = _ids([samples[i].context for i in few])
        read(ids)
        mine, found = [pair for i in few for pair in pairs if pair[0] == i], []
        for group in _batches(mine, lambda pair: len(query_of(samples, pair).tokens), None):
            rows = torch.tensor([few.index(i) for i, _ in group])
            ahead = torch.cat([ids[rows, -1:], _ids([query_of(samples, pair).tokens for pair in group])], 1)
            found += _generated(reader.take(rows), tokenizer, task, samples, group, ahead)
        reader.begin()
        yield found


def query_of(samples: Sequence[Sample], pair: tuple[int, int]) -> Query:
    return samples[pair[0]].queries[pair[1]]


def _generated(
    reader: Reader,
    tokenizer: Any,
    task: Task,
    samples: Sequence[Sample],
    pairs: Sequence[tuple[int, int]],
    ahead: Tensor,
) -> list[Answer]:
    """Decode the tokens ``ahead`` (B, n >= 1), then the most likely ones, until no score can change; score them."""
    queries = [query_of(samples, pair) for pair in pairs]
    for t in range(ahead.shape[1]):
        logits = reader.read(ahead[:, t : t + 1])
    made = logits.argmax(-1)[:, None]
    most = [task.max_new_tokens(query) for query in queries]
    given = _given(tokenizer, task, made, most)
    while made.shape[1] < max(most) and not all(map(task.final, queries, given)):
        made = torch.cat([made, reader.read(made[:, -1:]).argmax(-1)[:, None]], 1)
        given = _given(tokenizer, task, made, most)
    scores = map(task.score, queries, given)
    return [Answer(*pair, score) for pair, score in zip(pairs, scores, strict=True)]


def _given(tokenizer: Any, task: Task, made: Tensor, most: Sequence[int]) -> list[Any]:
    """What is scored of the tokens (B, n) made so far: ids or text, of each row at most so many."""
    rows = [row[:count] for row, count in zip(made.numpy(), most, strict=True)]
    return rows if task.over == "ids" else [as_vocabulary(tokenizer).decode(row.tolist()) for row in rows]


def _batches(items: Sequence[Item], length: Any, tokens: int | None) -> Iterator[list[Item]]:
    """Items of equal length together, at most ``tokens`` of them (None: any number), in order of their length."""
    by_length: dict[int, list[Item]] = {}
    for item in items:
        by_length.setdefault(length(item), []).append(item)
    for size, group in sorted(by_length.items()):
        step = len(group) if tokens is None else max(1, tokens // max(1, size))
        yield from (group[first : first + step] for first in range(0, len(group), step))


def _ids(rows: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows).astype(np.int64))
