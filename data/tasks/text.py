"""Tasks over text: a text is made as long as fits, by counting the tokens of what is really put together."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np

from nsa.data.tasks.base import Query, Sample, Task, UnavailableError, Vocabulary
from nsa.data.tasks.scoring import matched
from nsa.data.tasks.words import NOISE

FULL = 0.95  # share of the length that a sample fills at least
AIM = 0.985  # share that the search is content with
TRIES = 16


@dataclass(frozen=True)
class Draft:
    """A text of some size. Filler may go between head and body. questions: (question, answer, accepted strings)."""

    head: str
    body: str
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]
    chance: float


Make = Callable[
    [int], Draft
]  # the draft of a size; a size more is about as many tokens more, and a size names one text


@dataclass(frozen=True, kw_only=True)
class TextTask(Task):
    """A task over text. Its questions begin on a line of their own; answers are scored as its source does.

    new_tokens: that generation is asked for; an answer that needs more gets more.
    """

    new_tokens: int = 32
    filler = ""  # what a line of filler begins with

    def max_new_tokens(self, query: Query) -> int:
        return max(self.new_tokens, len(query.answer))

    def score(self, query: Query, output: Any) -> float | None:
        """As the base class says; output: the generated text."""
        return matched(query.accepted, output)

    def final(self, query: Query, output: Any) -> bool:
        """As the base class says: a string that was found stays found."""
        return self.score(query, output) == 1

    def draw(self, vocabulary: Vocabulary, length: int, key: tuple, crowded: bool) -> Sample:
        least, most = self.sizes(length)
        return fit(self, vocabulary, length, lambda size: self.draft(size, length, key), least, most)

    def trainable_from(self, vocabulary: Vocabulary, length: int) -> int:
        """As the base class says. Found by trying lengths that double, and a quarter more, since samples differ."""
        first, tried = self.shortest, self.shortest
        while tried <= length:
            try:
                for index in range(2):
                    self.sample(vocabulary, tried, "trial", index)
            except UnavailableError:
                raise
            except ValueError:
                first = 2 * tried
            tried *= 2
        return first * 5 // 4

    def sizes(self, length: int) -> tuple[int, int]:
        """The smallest and the largest size of a draft."""
        return 1, 1 << 40

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        """The text of a size. key: names its random generator."""
        raise NotImplementedError


def fit(task: TextTask, vocabulary: Vocabulary, length: int, make: Make, least: int, most: int) -> Sample:
    """The largest draft found whose sample has at most `length` tokens, filled up to 95 % of them at least.

    The search goes by proportion: one to three drafts at most lengths, and always the same ones.
    """

    def built(size: int, filler: str = "") -> tuple[int, Sample]:
        return _encoded(vocabulary, make(size), filler)

    base, best = built(least)
    if base > length:
        raise ValueError(f"task {task.name}: a sample needs {base} tokens or more with this tokenizer, not {length}")
    top, unit = base, max(1.0, (built(least + 8)[0] - base) / 8)
    size = best_size = least
    high = most + 1  # a size that is known to be too large
    aim = 0.5 * (AIM + 1) * length
    for _ in range(TRIES):
        size = max(best_size + 1, min(high - 1, least + int((aim - base) / unit)))
        if size >= high:
            break
        total, sample = built(size)
        unit = max(1.0, (total - base) / (size - least))
        if total <= length:
            top, best, best_size = total, sample, size
            if total >= AIM * length:
                break
        else:
            high = size
    if top < FULL * length:
        top, best = _filled(task, vocabulary, length, make(best_size), top, best)
    return best


def _filled(
    task: TextTask, vocabulary: Vocabulary, length: int, draft: Draft, top: int, best: Sample
) -> tuple[int, Sample]:
    """The draft with a line of filler that is as long as fits."""
    sentences: list[str] = []
    room = length - top
    for sentence in cycle(NOISE):
        line = f"{task.filler}{' '.join([*sentences, sentence])}\n"
        if len(vocabulary.encode(line)) > room:
            break
        sentences.append(sentence)
    while sentences:
        total, sample = _encoded(vocabulary, draft, f"{task.filler}{' '.join(sentences)}\n")
        if total <= length:
            return total, sample
        sentences.pop()
    return top, best


def _encoded(vocabulary: Vocabulary, draft: Draft, filler: str) -> tuple[int, Sample]:
    """Tokens of the sample (context, longest question and answer), and the sample."""
    text = draft.head + filler + draft.body
    context = np.array([vocabulary.bos_id, *vocabulary.encode(text)], np.int64)
    queries = []
    for question, answer, accepted in draft.questions:
        tokens = vocabulary.encode(question)
        queries.append(
            Query(np.array(tokens, np.int64), np.array(_after(vocabulary, question, tokens, answer)), accepted)
        )
    longest = max(len(q.tokens) + len(q.answer) for q in queries)
    return len(context) + longest, Sample(context, tuple(queries), draft.chance)


def _after(vocabulary: Vocabulary, question: str, tokens: list[int], answer: str) -> list[int]:
    """Tokens of an answer where it follows its question: a tokenizer may put a space before a text that stands alone.

    If the question's last token would be another one together with the answer, the answer is encoded alone.
    """
    whole = vocabulary.encode(question + answer)
    return whole[len(tokens) :] if whole[: len(tokens)] == tokens else vocabulary.encode(answer)


def listed(items: list[str]) -> str:
    """`a`, `a and b`, `a, b, and c`."""
    if len(items) < 3:
        return " and ".join(items)
    return f"{', '.join(items[:-1])}, and {items[-1]}"
