"""What a synthetic task is: samples of a context and questions about it, from (seed, task, length, index) alone."""

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np

IGNORED = -100  # target of a position that is not counted

Group = Literal["retrieval", "multi-hop", "aggregation", "copying", "sanity"]
Index = int | tuple[int, ...]


class UnavailableError(ValueError):
    """A task needs a data set that is neither local nor reached: skip the task, and say so."""


class Vocabulary(Protocol):
    """What a task needs of a tokenizer. `nsa.data.base_tokenizer.BaseTokenizer` is one, `HuggingFace` makes one."""

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone: no bos, no eos."""
        ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def ordinary_ids(self) -> np.ndarray:
        """(n,) int64, ascending: ids that stand for text other than a newline."""
        ...

    def __hash__(self) -> int:
        """What is derived from a vocabulary is kept."""
        ...


class Bytes:
    """The smallest vocabulary: byte b is id b, and bos is 256. For a look at a task, without a tokenizer."""

    bos_id = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def ordinary_ids(self) -> np.ndarray:
        return np.array([i for i in range(256) if i != ord("\n")])


class HuggingFace:
    """A tokenizer of transformers as a `Vocabulary`. Without a bos token its eos token begins a document."""

    def __init__(self, tokenizer: Any):
        """Raises ValueError if it has neither."""
        bos = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if bos is None:
            raise ValueError("the tokenizer has no bos and no eos token: set tokenizer.bos_token")
        self.bos_id: int = int(bos)
        self._tokenizer = tokenizer
        self._ordinary: np.ndarray | None = None

    def encode(self, text: str) -> list[int]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return list(self._tokenizer(text, **options)["input_ids"])

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def ordinary_ids(self) -> np.ndarray:
        if self._ordinary is None:
            special = {*self._tokenizer.all_special_ids, *self._tokenizer.get_added_vocab().values()}
            ids = [i for i in range(len(self._tokenizer)) if i not in special]
            texts = self._tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
            good = [i for i, text in zip(ids, texts, strict=True) if text and "\n" not in text and "\ufffd" not in text]
            self._ordinary = np.array(good, np.int64)
        return self._ordinary


@lru_cache(maxsize=8)
def as_vocabulary(tokenizer: Any) -> Vocabulary:
    """The tokenizer itself, if it is a `Vocabulary`; else one of transformers, wrapped."""
    if hasattr(tokenizer, "bos_id") and hasattr(tokenizer, "ordinary_ids"):
        vocabulary: Vocabulary = tokenizer
        return vocabulary
    return HuggingFace(tokenizer)


@dataclass(frozen=True)
class Query:
    """A question about a context.

    tokens: (q,) int64, the question; it follows the context, or an earlier answer. answer: (a,) int64, a >= 1, the
    tokens expected next. accepted: for tasks over text the strings that are looked for in the answer; () over ids.
    """

    tokens: np.ndarray
    answer: np.ndarray
    accepted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sample:
    """context: (c,) int64, begins with bos, which is nowhere else. chance: accuracy without recall (docs/tasks.md)."""

    context: np.ndarray
    queries: tuple[Query, ...]
    chance: float


@dataclass(frozen=True)
class Episode:
    """A sample to train on. tokens, targets: (length,) int64; targets[t] is the token that should follow tokens[t], or
    -100: not asked. chance: accuracy on the answers without recall.
    """

    tokens: np.ndarray
    targets: np.ndarray
    chance: float


def generator(*parts: int | str | tuple) -> np.random.Generator:
    """A random generator named by `parts`, e.g. (seed, task, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


def episode(sample: Sample, length: int) -> Episode:
    """Context, question, answer, question, answer, ... as `length` tokens; only answers are targets.

    The last token may lie beyond the episode: it is a target then and no token. Questions that do not fit are left out;
    what is left over is filled with the context once more, which nothing asks for.

    Raises:
        ValueError: not even the first question fits.
    """
    parts, at = [sample.context], len(sample.context)
    targets = np.full(length, IGNORED, np.int64)
    for query in sample.queries:
        begin, end = at + len(query.tokens), at + len(query.tokens) + len(query.answer)
        if end > length + 1:
            break
        targets[begin - 1 : end - 1] = query.answer
        parts += [query.tokens, query.answer]
        at = end
    if len(parts) == 1:
        raise ValueError(f"an episode of {length} tokens cannot hold a sample of {at} and a question")
    if at < length:
        parts.append(np.resize(sample.context[1:], length - at))
    return Episode(np.concatenate(parts)[:length].astype(np.int64), targets, sample.chance)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task. Its fields say what it is; `dataclasses.replace` changes its parameters.

    source: the paper. scope: how much of the context an answer needs: one place, several places, or most of it.
    over: whether questions and answers are token ids or text. shortest: tokens of the shortest sample; over text it
    hangs on the tokenizer, too: `least` knows.
    """

    name: str
    title: str
    source: str
    group: Group
    scope: Literal["single", "multi", "high"]
    over: Literal["ids", "text"]
    shortest: int
    beyond = 0  # tokens of a sample that an episode of training leaves out: 1, if its last token is a target only

    def sample(self, tokenizer: Any, length: int, seed: int | str, index: Index) -> Sample:
        """The sample that (seed, index) name: the same for whoever asks.

        Context, longest question and its answer have at most `length` tokens, and at least 95 % of them (from 512 on).

        Args:
            tokenizer: a `Vocabulary`, or a tokenizer of transformers.

        Raises:
            ValueError: `length` is too short.
            UnavailableError: the task needs a data set that is not there.
        """
        return self._sample(as_vocabulary(tokenizer), length, seed, index, False)

    def episode(self, tokenizer: Any, length: int, seed: int | str, index: Index, *, crowded: bool = False) -> Episode:
        """The episode of exactly `length` tokens that (seed, index) name. Raises ValueError as `sample` does.

        crowded: ask for more. Many answers in few tokens make a task quick to learn; it is scored with few, far back.
        """
        vocabulary = as_vocabulary(tokenizer)
        return episode(self._sample(vocabulary, length + self.beyond, seed, index, crowded), length)

    def _sample(self, vocabulary: Vocabulary, length: int, seed: int | str, index: Index, crowded: bool) -> Sample:
        if length < (least := self.least(vocabulary) + self.beyond):
            raise ValueError(f"task {self.name}: a sample needs {least} tokens or more, not {length}")
        return self.draw(vocabulary, length, (seed, self.name, length - self.beyond, index), crowded)

    def least(self, vocabulary: Vocabulary) -> int:
        """Tokens of the shortest episode with this vocabulary."""
        return self.shortest

    def trainable_from(self, vocabulary: Vocabulary, length: int) -> int:
        """The length from which on, up to `length`, any episode can be made."""
        return self.least(vocabulary)

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        """The sample itself. key: names its random generator; a task may make it more than once."""
        raise NotImplementedError

    def max_new_tokens(self, query: Query) -> int:
        """Tokens that generation is asked for."""
        return len(query.answer)

    def score(self, query: Query, output: Any) -> float | None:
        """How right an answer is, from 0 to 1. None: it cannot be parsed, which counts as wrong, and is counted.

        output: (n,) generated ids for a task over ids, the generated text for one over text.
        """
        given = np.asarray(output).reshape(-1)[: len(query.answer)]
        if len(given) < len(query.answer):
            return None
        return float(np.array_equal(given, query.answer))

    def final(self, query: Query, output: Any) -> bool:
        """Whether the score stays as it is, whatever is generated after this output."""
        return len(output) >= len(query.answer)


@dataclass(frozen=True)
class IdSets:
    """Disjoint sets of ordinary ids, chosen once per vocabulary: the same for training and evaluation, and every seed.

    keys, values, others: 16 ids each, as the narrow tasks use. wide: (3, n) int64, keys, values and filler that share
    out all ordinary ids.
    """

    keys: np.ndarray
    values: np.ndarray
    others: np.ndarray
    wide: np.ndarray


SET_SIZE = 16  # ids in each of the three narrow sets


@lru_cache(maxsize=8)
def id_sets(vocabulary: Vocabulary) -> IdSets:
    mixed = generator("ids of the synthetic tasks").permutation(vocabulary.ordinary_ids())
    third = len(mixed) // 3
    if third < 2:
        raise ValueError(f"the vocabulary has {len(mixed)} ordinary ids; tasks over ids need 6 or more")
    size = min(SET_SIZE, third)
    wide = mixed[: 3 * third].reshape(3, third)
    return IdSets(mixed[:size], mixed[size : 2 * size], mixed[2 * size : 3 * size], wide)


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean "x"?`, or nothing if none is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
