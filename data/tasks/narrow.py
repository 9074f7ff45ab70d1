"""Three recall tasks over 16 keys, 16 values and 16 tokens of filler, which the smallest models learn; a wide copy."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from nsa.data.tasks.base import Query, Sample, Task, Vocabulary, generator, id_sets

SENTENCES = [
    "The grass is green. ",
    "The sky is blue. ",
    "The sun is yellow. ",
    "Here we go. ",
    "There and back again. ",
    "The river runs to the sea. ",
    "Snow falls in winter. ",
    "The road is long. ",
]
HIDDEN = "\nThe pass key is ", ". Remember it.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
PASSKEY_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Mqar(Task):
    """bos, key-value pairs, filler; then every key again in another order, after each its value is asked for.

    Crowded: as many pairs as fit, and filler only once the keys run out.
    """

    def pairs(self, vocabulary: Vocabulary, length: int) -> int:
        """Key-value pairs of an episode: they grow as the square root of its length (2 at 32, 11 at 512)."""
        return min(len(id_sets(vocabulary).keys), math.isqrt(length // 4))

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng, ids = generator(*key), id_sets(vocabulary)
        n = self.pairs(vocabulary, length)
        if crowded:
            n = min(len(ids.keys), (length - 1) // 4)
        keys = rng.permutation(ids.keys)[:n]
        values = rng.choice(ids.values, n)
        asked = rng.permutation(n)
        filler = rng.choice(ids.others, length - 1 - 4 * n)
        pairs = np.stack([keys, values], 1).reshape(-1)
        context = np.concatenate([[vocabulary.bos_id], pairs, filler]).astype(np.int64)
        # The value named is that of the key asked for, or by luck that of another.
        chance = 1 / n + (1 - 1 / n) / len(ids.values)
        return Sample(context, tuple(Query(keys[i : i + 1], values[i : i + 1]) for i in asked), chance)


@dataclass(frozen=True, kw_only=True)
class Passkey(Task):
    """A key of a few tokens in a sentence, somewhere in filler text; asked for at the end."""

    beyond = 1

    def least(self, vocabulary: Vocabulary) -> int:
        _, hidden, question = _encoded(vocabulary)
        return max(self.shortest, 1 + sum(map(len, hidden)) + len(question) + 2 * PASSKEY_TOKENS - 1)

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng, values = generator(*key), id_sets(vocabulary).values
        sentences, hidden, question = _encoded(vocabulary)
        answer = rng.choice(values, PASSKEY_TOKENS)
        needle = [*hidden[0], *answer, *hidden[1]]
        room = length - 1 - len(needle) - len(question) - PASSKEY_TOKENS
        filler: list[int] = []
        while len(filler) < room:
            filler += sentences[int(rng.integers(len(sentences)))]
        depth = int(rng.integers(room + 1))
        context = np.array([vocabulary.bos_id, *filler[:depth], *needle, *filler[depth:room]], np.int64)
        return Sample(context, (Query(np.array(question, np.int64), answer),), 1 / len(values))


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """Random tokens, a separator, the same tokens.

    wide: of the values that share out the vocabulary, and not of 16. It teaches what wide recall needs, to find what
    followed a token before, with an answer at every second token.
    """

    wide: bool = False
    beyond = 1

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng, ids = generator(*key), id_sets(vocabulary)
        n = (length - 2) // 2
        values = ids.wide[1] if self.wide else ids.values
        text = rng.choice(values, n)
        pad = rng.choice(ids.others, length - 2 - 2 * n)
        context = np.concatenate([[vocabulary.bos_id], pad, text]).astype(np.int64)
        return Sample(context, (Query(ids.keys[:1], text),), 1 / len(values))


@lru_cache(maxsize=8)
def _encoded(vocabulary: Vocabulary) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Sentences of filler, what is around the key, and the question, in tokens."""
    encode = vocabulary.encode
    return [encode(s) for s in SENTENCES], [encode(s) for s in HIDDEN], encode(QUESTION)
