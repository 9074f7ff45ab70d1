"""RULER's synthetic tasks (Hsieh et al. 2024, arXiv 2404.06654): needles, variables, common and frequent words.

Completion style: a question ends with the beginning of its answer. Needle and noise are the paper's; instructions,
words and essays are written here. Sizes grow in single steps, so that short lengths are filled, too.

Differs from the release because of its quirk: there a shuffle is seeded anew for each sample, so that needles and words
have the same order of places in every sample of a size, which a fixed pattern may exploit. `strict_upstream=True` does
as the release does.
"""

import uuid
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import numpy as np

from nsa.data.tasks.base import generator
from nsa.data.tasks.text import Draft, TextTask, listed
from nsa.data.tasks.words import NOISE, compounds, essay, names

EXAMPLES_FROM = 1024  # tokens; shorter samples have no room for an example
DEPTHS = 40  # places that needles may be at, evenly from the beginning to the end
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Form = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True, kw_only=True)
class RulerTask(TextTask):
    """strict_upstream: the order of places is the same in every sample of a size, as in the release."""

    strict_upstream: bool = False
    source: str = "RULER, arXiv 2404.06654"

    def shuffled(self, rng: np.random.Generator, count: int, key: tuple) -> np.ndarray:
        """A permutation: a new one for each sample, or (as upstream) one for each count and seed."""
        return (generator(key[0], "order") if self.strict_upstream else rng).permutation(count)


def _strings(rng: np.random.Generator, form: Form, count: int) -> list[str]:
    """Different strings of a form."""
    if form == "words":
        return names(rng, count)
    if form == "numbers":
        return [str(n) for n in (1_000_000 + rng.choice(9_000_000, count, replace=False)).tolist()]
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]


def _inserted(rng: np.random.Generator, lines: list[str], needles: list[str]) -> list[str]:
    """The needles among the lines, in their order, at depths out of 40."""
    grid = np.linspace(0, len(lines), DEPTHS).astype(int)
    places = np.sort(rng.choice(grid, len(needles), replace=len(needles) > DEPTHS)).tolist()
    result, at = [], 0
    for place, needle in zip(places, needles, strict=True):
        result += [*lines[at:place], needle]
        at = place
    return result + lines[at:]


@dataclass(frozen=True, kw_only=True)
class Needle(RulerTask):
    """Needles in a haystack: of noise, of an essay, or of needles that are not asked for.

    needles: keys that have a value (of a haystack of needles: those asked for). values: of each key. asked: keys.
    """

    haystack: Literal["noise", "essay", "needles"]
    keys: Literal["words", "uuids"] = "words"
    form: Literal["numbers", "uuids"] = "numbers"
    needles: int = 1
    values: int = 1
    asked: int = 1
    new_tokens: int = 128

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        rng = generator(*key)
        count = self.needles + (size if self.haystack == "needles" else 0)
        keys = _strings(rng, self.keys, count)
        values = _strings(rng, self.form, count * self.values)
        of = {k: values[i * self.values : (i + 1) * self.values] for i, k in enumerate(keys)}
        lines = [f"One of the special magic {self.form} for {k} is: {v}." for k in keys for v in of[k]]
        needles = [lines[i] for i in self.shuffled(rng, len(lines), key)]
        if self.haystack == "needles":
            text = "\n".join(needles)
        elif self.haystack == "noise":
            text = "\n".join(_inserted(rng, [NOISE[i % len(NOISE)] for i in range(size)], needles))
        else:
            text = " ".join(_inserted(rng, essay(rng, size), needles))
        asked = keys[: self.asked]  # keys were drawn at random
        answers = [v for k in asked for v in of[k]]
        one, who = len(answers) == 1, listed(asked)
        what = f"special magic {self.form[:-1]}" if one else f"special magic {self.form}"
        head = f"Some special magic {self.form} are hidden in the following text. Remember them.\n"
        question = (
            f"\nWhat {'is' if one else 'are all'} the {what} for {who} mentioned in the text above?\n"
            f"The {what} for {who} mentioned in the text above {'is' if one else 'are'}"
        )
        several = self.asked == 1 and count > 1
        chance = 1 / count if several else 10.0**-7 if self.form == "numbers" else 0.0
        return Draft(head, text, ((question, f" {listed(answers)}.", tuple(answers)),), chance)


@dataclass(frozen=True, kw_only=True)
class VariableTracking(RulerTask):
    """`VAR A = 12345`, `VAR B = VAR A`, ... in noise: all variables that have the value.

    An example comes first, from 1,024 tokens on.
    """

    hops: int = 4
    new_tokens: int = 30

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        rng = generator(*key)
        values = (10_000 + rng.choice(90_000, 2, replace=False)).tolist()
        ask, answer, _, example = self._chain(rng, 5, values[0])
        question, right, names, text = self._chain(rng, size, values[1])
        head = "Find the variables of a value in a text.\n\n"
        if length >= EXAMPLES_FROM:
            head += f"{example}{ask}{answer}\n\n"
        return Draft(head, text, ((question, right, names),), 0.0)

    def _chain(self, rng: np.random.Generator, size: int, value: int) -> tuple[str, str, tuple[str, ...], str]:
        """Question, answer, the variables, and the text."""
        n = self.hops + 1
        codes = rng.choice(26**5, n, replace=False).tolist()
        names = ["".join(LETTERS[code // 26**i % 26] for i in range(5)) for code in codes]
        links = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
        lines: list[str] = []
        noise = [NOISE[i % len(NOISE)] for i in range(size)]
        places = np.sort(rng.integers(size + 1, size=n)).tolist()
        at = 0
        for place, link in zip(places, links, strict=True):
            lines += [*noise[at:place], link]
            at = place
        text = "\n".join([*lines, *noise[at:]])
        question = (
            f"\nQuestion: Find all variables that are assigned the value {value} in the text above.\n"
            f"Answer: By the chain of assignments in the text above, {n} variables are assigned the value {value}, "
            "they are:"
        )
        return question, f" {', '.join(names)}.", tuple(names), text


@dataclass(frozen=True, kw_only=True)
class CommonWords(RulerTask):
    """A numbered list of words: the ten that come often (30 times, the others 3 times).

    Below 4,096 tokens often is 6 times, the others once, as in the release. Below 1,024, where that does not fit, often
    is 3 times, and there is no example.
    """

    common: int = 10
    new_tokens: int = 120

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        rng = generator(*key)
        often, seldom = (30, 3) if length >= 4096 else (6, 1) if length >= EXAMPLES_FROM else (3, 1)
        head = "Below is a numbered list of words. Some of them come more often than others. Remember those.\n"
        if length >= EXAMPLES_FROM:
            ask, answer, _, example = self._list(rng, 10, *((10, 3) if length >= 4096 else (3, 1)), key)
            head += f"{example}{ask}{answer}\n{head}"
        question, answer, accepted, text = self._list(rng, size, often, seldom, key)
        share = self.common / (self.common + size)
        return Draft(head, text, ((question, answer, accepted),), share)

    def _list(
        self, rng: np.random.Generator, others: int, often: int, seldom: int, key: tuple
    ) -> tuple[str, str, tuple[str, ...], str]:
        words = compounds(rng, self.common + others)
        common = words[: self.common]
        all_words = common * often + words[self.common :] * seldom
        order = self.shuffled(rng, len(all_words), key)
        text = " ".join(f"{i}. {all_words[j]}" for i, j in enumerate(order, 1))
        question = (
            f"\nQuestion: What are the {self.common} most common words in the list above?\n"
            f"Answer: The {self.common} words that come most often in the list are:"
        )
        answer = "".join(f" {i}. {word}" for i, word in enumerate(common, 1))
        return question, answer, tuple(common), text


@dataclass(frozen=True, kw_only=True)
class FrequentWords(RulerTask):
    """Coded words of six letters by a zeta distribution: the three most frequent ones but for `...`, the first.

    alpha: the distribution's exponent; word k comes n k^-alpha / zeta(alpha) times.
    """

    alpha: float = 2.0
    new_tokens: int = 50
    letters: int = 6

    def sizes(self, length: int) -> tuple[int, int]:
        return 48, 1 << 40  # from 48 words on the fourth word comes less often than the third

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        rng = generator(*key)
        count = max(8, length // 50)
        codes = rng.choice(26**self.letters, count, replace=False).tolist()
        words = ["...", *("".join(LETTERS[c // 26**i % 26] for i in range(self.letters)).lower() for c in codes)]
        counts = [round(size * k**-self.alpha / zeta(self.alpha)) for k in range(1, len(words) + 1)]
        text = [word for word, n in zip(words, counts, strict=True) for _ in range(n)]
        text += [words[0]] * (size - len(text))
        head = "Read the coded text below and track how often each coded word comes. Find the three most frequent.\n"
        body = " ".join(text[i] for i in self.shuffled(rng, len(text), key))
        question = (
            "\nQuestion: What are the three most frequent words in the coded text above? Leave out the dots '...'.\n"
            "Answer: By the coded text above, the three most frequent words are:"
        )
        seen = sum(n > 0 for n in counts[1:])
        return Draft(head, body, ((question, f" {listed(words[1:4])}.", tuple(words[1:4])),), min(1.0, 3 / seen))


@lru_cache(maxsize=8)
def zeta(alpha: float) -> float:
    """Riemann's zeta function: the first terms, and the integral of the others."""
    return sum(k**-alpha for k in range(1, 10_000)) + 9_999.5 ** (1 - alpha) / (alpha - 1)


def ruler() -> tuple[TextTask, ...]:
    """The eleven synthetic tasks."""

    def niah(name: str, title: str, **parameters: object) -> Needle:
        scope = "multi" if parameters.get("values", 1) != 1 or parameters.get("asked", 1) != 1 else "single"
        general = {"name": f"niah_{name}", "title": title, "group": "retrieval", "scope": scope, "over": "text"}
        return Needle(**general, shortest=512, **parameters)  # type: ignore[arg-type]

    return (
        niah("single_1", "Needle in noise", haystack="noise"),
        niah("single_2", "Needle in an essay", haystack="essay"),
        niah("single_3", "Needle in an essay, a uuid", haystack="essay", form="uuids"),
        niah("multikey_1", "Four needles in an essay, one asked for", haystack="essay", needles=4),
        niah("multikey_2", "One needle among needles", haystack="needles"),
        niah("multikey_3", "One needle among needles, all uuids", haystack="needles", keys="uuids", form="uuids"),
        niah("multivalue", "Four values of one key in an essay", haystack="essay", values=4),
        niah("multiquery", "Four keys asked for in an essay", haystack="essay", needles=4, asked=4),
        VariableTracking(
            name="vt", title="Variable tracking", group="multi-hop", scope="multi", over="text", shortest=512
        ),
        CommonWords(
            name="cwe", title="Common words extraction", group="aggregation", scope="high", over="text", shortest=512
        ),
        FrequentWords(
            name="fwe", title="Frequent words extraction", group="aggregation", scope="high", over="text", shortest=512
        ),
    )
