"""Recall tasks, made on the fly from (seed, index): how far back, and how exactly, a model can look things up.

mqar     multi-query associative recall (Arora et al. 2023, arXiv 2312.04927): key-value pairs, filler, then every key
         again in another order; after each key its value is asked for.
passkey  a key of a few tokens in a sentence, somewhere in filler text; asked for at the end (Mohtashami and Jaggi 2023,
         arXiv 2305.16300).
copy     random tokens, a separator, the same tokens.

Only answers are targets. Keys, values and filler are drawn from three sets of token ids, disjoint, chosen once per
vocabulary: they are the same for training and evaluation, and for every seed.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from nsa.data.base_tokenizer import BaseTokenizer

IGNORED = -100  # target of a position that is not counted
SET_SIZE = 16  # ids in each of the three sets
TaskName = Literal["mqar", "passkey", "copy"]

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


@dataclass(frozen=True)
class Episode:
    """tokens, targets: (length,) int64; targets[t] is the token that should follow tokens[t], or -100: not asked.

    chance: accuracy on the answers without recall. mqar: of naming one of the values given, whatever the key; passkey
    and copy: of naming any value.
    """

    tokens: np.ndarray
    targets: np.ndarray
    chance: float


def generator(*parts: int | str | tuple) -> np.random.Generator:
    """A random generator named by `parts`, e.g. (seed, task, index)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))


class Task:
    """One task over one vocabulary."""

    def __init__(self, name: TaskName, tokenizer: BaseTokenizer):
        if name not in get_args(TaskName):
            raise ValueError(f"unknown task {name!r}: one of {', '.join(get_args(TaskName))}")
        self.name = name
        self._bos = tokenizer.bos_id
        ordinary = tokenizer.ordinary_ids()
        mixed = generator("ids of the synthetic tasks").permutation(ordinary)
        size = min(SET_SIZE, len(mixed) // 3)
        self.keys, self.values, self.others = mixed[:size], mixed[size : 2 * size], mixed[2 * size : 3 * size]
        self._sentences = [tokenizer.encode(s) for s in SENTENCES]
        self._hidden = [tokenizer.encode(s) for s in HIDDEN]
        self._question = tokenizer.encode(QUESTION)
        frame = 1 + sum(map(len, self._hidden)) + len(self._question) + 2 * PASSKEY_TOKENS - 1
        self.shortest = max(32, frame) if name == "passkey" else 32

    def generate(self, length: int, seed: int | str, index: int | tuple[int, ...], *, crowded: bool = False) -> Episode:
        """The episode of exactly `length` tokens that (seed, index) name. Raises ValueError if it is too short.

        crowded: mqar has as many pairs as fit, and filler only once the keys run out. Many answers in few tokens make
        it quick to learn; it is scored with few pairs far back.
        """
        if length < self.shortest:
            raise ValueError(f"task {self.name}: an episode needs {self.shortest} tokens or more, not {length}")
        rng = generator(seed, self.name, length, index)
        if self.name == "mqar":
            tokens, targets = self._mqar(length, rng, crowded)
        else:
            tokens, targets = (self._passkey if self.name == "passkey" else self._copy)(length, rng)
        assert len(tokens) == length == len(targets)
        return Episode(tokens, targets, self._chance(int((targets != IGNORED).sum())))

    def _chance(self, answers: int) -> float:
        if self.name != "mqar":
            return 1 / len(self.values)
        # The value named is that of the key asked for, or by luck that of another.
        return 1 / answers + (1 - 1 / answers) / len(self.values)

    def pairs(self, length: int) -> int:
        """Key-value pairs of an mqar episode: they grow as the square root of its length (2 at 32, 11 at 512)."""
        return min(len(self.keys), math.isqrt(length // 4))

    def _mqar(self, length: int, rng: np.random.Generator, crowded: bool) -> tuple[np.ndarray, np.ndarray]:
        """bos, pairs, filler, and the pairs in another order."""
        n = self.pairs(length)
        if crowded:
            n = min(len(self.keys), (length - 1) // 4)
        keys = rng.permutation(self.keys)[:n]
        values = rng.choice(self.values, n)
        asked = rng.permutation(n)
        filler = rng.choice(self.others, length - 1 - 4 * n)
        pairs = np.stack([keys, values], 1).reshape(-1)
        recalled = np.stack([keys[asked], values[asked]], 1).reshape(-1)
        tokens = np.concatenate([[self._bos], pairs, filler, recalled]).astype(np.int64)
        targets = np.full(length, IGNORED, np.int64)
        targets[length - 2 * n :: 2] = values[asked]
        return tokens, targets

    def _passkey(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        key = rng.choice(self.values, PASSKEY_TOKENS)
        needle = [*self._hidden[0], *key, *self._hidden[1]]
        asked = [*self._question, *key[:-1]]
        room = length - 1 - len(needle) - len(asked)
        filler: list[int] = []
        while len(filler) < room:
            filler += self._sentences[int(rng.integers(len(self._sentences)))]
        depth = int(rng.integers(room + 1))
        tokens = np.array([self._bos, *filler[:depth], *needle, *filler[depth:room], *asked], np.int64)
        targets = np.full(length, IGNORED, np.int64)
        targets[length - PASSKEY_TOKENS :] = key
        return tokens, targets

    def _copy(self, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        n = (length - 1) // 2
        text = rng.choice(self.values, n)
        pad = rng.choice(self.others, length - 1 - 2 * n)
        tokens = np.concatenate([[self._bos], pad, text, [self.keys[0]], text[:-1]]).astype(np.int64)
        targets = np.full(length, IGNORED, np.int64)
        targets[length - n :] = text
        return tokens, targets
