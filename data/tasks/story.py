"""Story tasks in the manner of the Sparse Frontier (Nawrot et al. 2025, arXiv 2504.17768), in words of our own.

A traveller's journal in numbered chapters. In each the traveller comes to a place, meets somebody, hears of an event
and, in most, buys something.
"""

from dataclasses import dataclass
from math import comb
from typing import Any, NamedTuple

import numpy as np

from nsa.data.tasks.base import Query, generator
from nsa.data.tasks.scoring import has_first_line, overlap, starts_with
from nsa.data.tasks.text import Draft, TextTask
from nsa.data.tasks.words import NOUNS, pick

TOWN_ENDS = "bury dale fell ford gate haven holm mere mouth port stead ton wick worth".split()
FIRST = (
    "Ada Bero Calla Dorin Edda Falk Greta Hanno Ilse Joris Katla Lorn Mira Nils Orla Pavo Runa Sven Tilda Ulf".split()
)
TRADES = (
    "baker cooper dyer farrier glazier hunter joiner mason miller potter roper saddler scribe tailor weaver".split()
)
MATERIALS = (
    "ash brass clay copper flint glass horn iron ivory jade leather linen oak pearl silver tin walnut wool".split()
)
GOODS = (
    "bowl box brush chest comb cup dish flute frame hook jug knife lamp ladle mask ring spoon tray vase whistle".split()
)
MANNERS = (
    "carved chipped dented faded folded heavy old painted patched plain polished ribbed rusty small striped".split()
)
EVENTS = (
    "a bridge had fallen into the river|the harvest had been brought in early|a wedding had lasted for nine days|"
    "the mill wheel had been stolen|a bell had cracked in the frost|the ferry had sunk without a wave|"
    "two brothers had made peace|the well had run dry|a bear had come to the market|the mayor had lost a wager|"
    "a fire had spared only the bakery|the school had been given a globe|a ship of salt had come in|"
    "the dam had held through the storm|a thief had returned the silver|the orchard had flowered twice"
).split("|")
ARRIVALS = ("The road led", "Rain drove me", "A cart took me", "I walked all night", "A rumour drew me")
TALK = (
    '"Few people stop here," said {who}.|"Rest a while," said {who}, "the road is long."|'
    "{who} talked about the weather for an hour.|We shared bread and cheese with {who}.|"
    '"The evenings are the best of it," said {who}.|{who} would not hear of a payment for the tea.'
).split("|")
FAREWELLS = (
    "I left before the sun was up.",
    "We parted as friends.",
    "The gate closed behind me.",
    "I slept well and went on.",
)
PLACES = [f"{noun.capitalize()}{end}" for noun in NOUNS for end in TOWN_ENDS]
PEOPLE = [f"{first} the {trade}" for first in FIRST for trade in TRADES]
ITEMS = [f"the {a} {b} {c}" for a in MANNERS for b in MATERIALS for c in GOODS]


class Chapter(NamedTuple):
    number: int
    place: str
    person: str
    event: str
    item: str | None  # that was bought

    def text(self, rng: np.random.Generator) -> str:
        who = self.person
        lines = [f"{pick(rng, ARRIVALS)} to {self.place}.", f"There I met {who}."]
        lines += [f"I heard that {self.event}.", pick(rng, TALK).format(who=who)]
        if self.item:
            lines.append(f"From {who} I bought {self.item}.")
        return f"Chapter {self.number}. {' '.join([*lines, pick(rng, FAREWELLS)])}"


def journal(rng: np.random.Generator, size: int, idle: int) -> list[Chapter]:
    """Chapters; in `idle` of them nothing is bought. Pairs of place and person, and items, do not come twice."""
    where = rng.choice(len(PLACES), size, replace=size > len(PLACES)).tolist()
    who = rng.integers(len(PEOPLE), size=size).tolist()
    bought = rng.choice(len(ITEMS), size, replace=False).tolist()
    without = set(rng.choice(size, idle, replace=False).tolist())
    return [
        Chapter(i + 1, PLACES[where[i]], PEOPLE[who[i]], pick(rng, EVENTS), None if i in without else ITEMS[bought[i]])
        for i in range(size)
    ]


@dataclass(frozen=True, kw_only=True)
class Story(TextTask):
    """What the three tasks share. questions: the most that are asked."""

    source: str = "Sparse Frontier, arXiv 2504.17768"
    questions: int = 16
    idle = 0  # chapters without a purchase

    def sizes(self, length: int) -> tuple[int, int]:
        return 4, len(ITEMS)

    def draft(self, size: int, length: int, key: tuple) -> Draft:
        rng = generator(*key)
        chapters = journal(rng, size, self.idle)
        text = "\n".join(chapter.text(rng) for chapter in chapters)
        asked, chance = self.ask(rng, chapters)
        return Draft("A traveller's journal.\n", text, tuple(asked), chance)

    def ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[list, float]:
        """Questions, and the accuracy of a guess."""
        raise NotImplementedError

    def score(self, query: Query, output: Any) -> float | None:
        """1 if the answer begins with what is accepted."""
        return starts_with(query.accepted, output)

    def final(self, query: Query, output: Any) -> bool:
        return has_first_line(output)


class StoryRetrieval(Story):
    """Where the traveller was in a chapter, who was met, what was bought, what was heard."""

    def ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[list, float]:
        asked = []
        for at in rng.permutation(len(chapters))[: self.questions]:
            chapter, n = chapters[at], chapters[at].number
            kinds = [
                (f"In chapter {n} the traveller came to", chapter.place),
                (f"In chapter {n} the traveller met", chapter.person),
                (f"In chapter {n} the traveller heard that", chapter.event),
                (f"In chapter {n} the traveller bought", chapter.item or ""),
            ]
            question, answer = kinds[int(rng.integers(len(kinds)))]
            asked.append((f"\n{question}", f" {answer}.", (answer,)))
        return asked, 1 / len(chapters)


class StoryMultihop(Story):
    """What was bought last before an item."""

    def ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[list, float]:
        bought = [chapter.item for chapter in chapters if chapter.item]
        asked = []
        for at in (rng.permutation(len(bought) - 1) + 1)[: self.questions]:
            before, item = bought[at - 1], bought[at]
            asked.append((f"\nThe last thing that the traveller bought before {item} was", f" {before}.", (before,)))
        return asked, 1 / len(bought)


class StoryFiltering(Story):
    """The three chapters in which nothing was bought: intersection over union of their numbers."""

    idle = 3

    def ask(self, rng: np.random.Generator, chapters: list[Chapter]) -> tuple[list, float]:
        numbers = [str(chapter.number) for chapter in chapters if not chapter.item]
        k, n = len(numbers), len(chapters)
        hits = [comb(k, i) * comb(n - k, k - i) / comb(n, k) * i / (2 * k - i) for i in range(k + 1)]
        question = "\nThe three chapters in which the traveller bought nothing have the numbers"
        return [(question, f" {', '.join(numbers)}.", tuple(numbers))], sum(hits)

    def score(self, query: Query, output: Any) -> float | None:
        """Intersection over union of the numbers."""
        return overlap(query.accepted, output)


def stories() -> tuple[TextTask, ...]:
    return (
        StoryRetrieval(
            name="story_retrieval", title="Story retrieval", group="retrieval", scope="multi", over="text", shortest=512
        ),
        StoryMultihop(
            name="story_multihop", title="Story multi-hop", group="multi-hop", scope="multi", over="text", shortest=512
        ),
        StoryFiltering(
            name="story_filtering",
            title="Story filtering",
            group="aggregation",
            scope="high",
            over="text",
            shortest=512,
        ),
    )
