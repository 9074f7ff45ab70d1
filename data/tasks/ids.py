"""Tasks over token ids, with sets of keys and values as wide as the vocabulary allows.

Each asks a number of questions one after the other that takes 4 % of the length or less, so that a sample at its full
length is an episode, too. Crowded: a number of facts between the usual one and the most that fits, drawn evenly over
its logarithm, and all of them asked for.
"""

import math
from dataclasses import dataclass

import numpy as np

from nsa.data.tasks.base import Query, Sample, Task, Vocabulary, generator, id_sets


def _facts(rng: np.random.Generator, usual: int, most: int, crowded: bool) -> int:
    """How many facts a context holds."""
    usual = max(1, min(usual, most))
    return int(math.exp(rng.uniform(math.log(usual), math.log(most + 1)))) if crowded else usual


def _scattered(rng: np.random.Generator, pieces: list[np.ndarray], room: int, filler: np.ndarray) -> np.ndarray:
    """The pieces in their order among single tokens of filler, all orders alike; `room` tokens in all."""
    spare = room - sum(map(len, pieces))
    places = np.sort(rng.choice(len(pieces) + spare, len(pieces), replace=False))
    before = np.diff(places, prepend=-1) - 1  # tokens of filler in front of each piece
    fill, at, parts = rng.choice(filler, spare), 0, []
    for piece, gap in zip(pieces, before.tolist(), strict=True):
        parts += [fill[at : at + gap], piece]
        at += gap
    return np.concatenate([*parts, fill[at:]])


def _context(bos: int, body: np.ndarray) -> np.ndarray:
    return np.concatenate([[bos], body]).astype(np.int64)


def _guess(facts: int, values: int) -> float:
    """Of naming one of the values given: that of the fact asked for, or by luck that of another."""
    return 1 / facts + (1 - 1 / facts) / values


@dataclass(frozen=True, kw_only=True)
class MqarWide(Task):
    """Key-value pairs anywhere in filler, then keys whose values are asked for.

    pairs: None: the square root of the length. gap: the distance of a pair to the questions is drawn with a density of
    gap * distance^(gap - 1): 1.0 is uniform, with 0.01 most pairs are just before the questions. front: all pairs come
    first, as in the source, and gap says nothing.
    """

    pairs: int | None = None
    gap: float = 1.0
    front: bool = False

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng = generator(*key)
        keys, values, others = id_sets(vocabulary).wide
        most = min(len(keys), (length - 1) // 4)
        if (self.pairs or 0) > most:
            raise ValueError(f"task {self.name}: {length} tokens and {len(keys)} keys allow {most} pairs at most")
        n = _facts(rng, self.pairs or math.isqrt(length), most, crowded)
        asked = n if crowded else min(n, max(4, length // 50))
        keys, given = rng.choice(keys, n, replace=False), rng.choice(values, n)
        room = length - 1 - 2 * asked
        slots = room // 2  # of two tokens each; slot 0 is the last
        weights = np.arange(1, slots + 1) ** (self.gap - 1)
        chosen = rng.choice(slots, n, replace=False, p=None if self.gap == 1 else weights / weights.sum())
        body = rng.choice(others, room)
        start = 2 * np.arange(n) if self.front else room - 2 * (chosen + 1)
        body[start], body[start + 1] = keys, given
        order = rng.permutation(n)[:asked]
        queries = tuple(Query(keys[i : i + 1], given[i : i + 1]) for i in order)
        return Sample(_context(vocabulary.bos_id, body), queries, _guess(n, len(values)))


@dataclass(frozen=True, kw_only=True)
class Mqmtar(Task):
    """Multi-query multi-token associative recall: keys and values are of two tokens each, out of 256.

    `key key is value value space` for four fifths of the length, more spaces anywhere; four questions `what key key`.
    """

    queries: int = 4

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng = generator(*key)
        space, equals, what, *rest = id_sets(vocabulary).wide.reshape(-1).tolist()
        alphabet = np.array(rest[:256])
        different = len(alphabet) ** 2
        usual = min(different, (length - 1 - 5 * self.queries) * 4 // 5 // 6)
        n = _facts(rng, usual // 4, min(usual, (length - 1) // 11), True) if crowded else usual
        asked = n if crowded else min(n, self.queries)
        keys, values = (
            alphabet[np.stack(np.divmod(rng.choice(different, n, replace=False), len(alphabet)), 1)] for _ in range(2)
        )
        pieces = [np.array([*k, equals, *v, space]) for k, v in zip(keys, values, strict=True)]
        body = _scattered(rng, pieces, length - 1 - 5 * asked, np.array([space]))
        order = rng.permutation(n)[:asked]
        queries = tuple(Query(np.array([what, *keys[i]]), values[i]) for i in order)
        return Sample(_context(vocabulary.bos_id, body), queries, 1 / n)


@dataclass(frozen=True, kw_only=True)
class Hops(Task):
    """Variable tracking: `name = value`, then `other = name` as often as there are hops, in this order among filler.

    Several chains; the value of the last name of a chain is asked for.
    """

    hops: int

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng = generator(*key)
        names, values, others = id_sets(vocabulary).wide
        equals, what, *filler = others.tolist()
        links = self.hops + 1
        most = min(len(names) // links, (length - 1) // (3 * links + 3))
        if most < 2:
            raise ValueError(f"task {self.name}: {length} tokens and {len(names)} names are too few for two chains")
        n = _facts(rng, max(2, math.isqrt(length) // links), most, crowded)
        asked = n if crowded else min(n, max(2, length // 75))
        chosen = rng.choice(names, (n, links), replace=False)
        given = rng.choice(values, n)
        reached = np.zeros(n, np.int64)
        pieces = []
        for chain in rng.permutation(np.repeat(np.arange(n), links)):
            step = reached[chain]
            before = chosen[chain, step - 1] if step else given[chain]
            pieces.append(np.array([chosen[chain, step], equals, before]))
            reached[chain] += 1
        body = _scattered(rng, pieces, length - 1 - 3 * asked, np.array(filler))
        order = rng.permutation(n)[:asked]
        queries = tuple(Query(np.array([what, chosen[i, -1]]), given[i : i + 1]) for i in order)
        return Sample(_context(vocabulary.bos_id, body), queries, _guess(n, len(values)))


@dataclass(frozen=True, kw_only=True)
class JointRecall(Task):
    """The key is a pair: for each of several contexts a table `context key value key value ...`, with the same keys.

    Asked for: the value of a key in a context.
    """

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng = generator(*key)
        names, values, others = id_sets(vocabulary).wide
        most = min(len(names) // 2, math.isqrt((length - 1) // 6))
        n = _facts(rng, max(2, math.isqrt(math.isqrt(length))), most, crowded)
        asked = n * n if crowded else min(n * n, max(2, length // 75))
        chosen = rng.choice(names, 2 * n, replace=False)
        contexts, keys = chosen[:n], chosen[n:]
        given = rng.choice(values, (n, n))
        pieces = []
        for row, context in enumerate(contexts):
            order = rng.permutation(n)
            table = np.stack([keys[order], given[row, order]], 1).reshape(-1)
            pieces.append(np.array([context, *table]))
        body = _scattered(rng, pieces, length - 1 - 3 * asked, others)
        queries = []
        for cell in rng.permutation(n * n)[:asked]:
            row, column = divmod(int(cell), n)
            queries.append(Query(np.array([contexts[row], keys[column]]), given[row, [column]]))
        return Sample(_context(vocabulary.bos_id, body), tuple(queries), _guess(n, len(values)))


@dataclass(frozen=True, kw_only=True)
class Sort(Task):
    """Tokens out of 16, a separator, the same tokens by ascending id. items: at most so many; filler is before them."""

    items: int = 256

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        rng, ids = generator(*key), id_sets(vocabulary)
        n = min(self.items, (length - 2) // 2)
        text = rng.choice(ids.values, n)
        filler = rng.choice(ids.others, length - 2 - 2 * n)
        body = np.concatenate([filler, text])
        query = Query(ids.keys[1:2], np.sort(text))
        return Sample(_context(vocabulary.bos_id, body), (query,), 1 / len(ids.values))
