"""What a comparison asks: arms, places, and units of work."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nsa.baselines import Budget
from nsa.evaluation.comparison.config import ComparisonConfig, MethodConfig, share_of
from nsa.evaluation.comparison.models import Candidate
from nsa.evaluation.comparison.rows import DENSE, OWN


class Place(NamedTuple):
    """What a cell is asked. aware: the question is in the prompt."""

    task: str
    length: int
    aware: bool

    def __str__(self) -> str:
        return f"{self.task} {self.length} {'aware' if self.aware else 'agnostic'}"


@dataclass(frozen=True)
class Arm:
    """A sibling with a method at a budget.

    choice: None: as it was trained. budget: as configured; None: there is none to set.
    """

    model: Candidate
    choice: MethodConfig | None
    budget: float | int | None

    @property
    def label(self) -> str:
        return f"{self.model.name}+{self._method}"

    def is_full(self, length: int) -> bool:
        return self.budget is not None and share_of(self.budget, length) == 1

    def told(self, place: Place) -> str:
        """A cell of it, for messages."""
        return f"{self.model.label}+{self._method}@{self.budget} {place}"

    @property
    def key(self) -> tuple[Candidate, str]:
        """The same at all of its budgets."""
        return self.model, self.label

    @property
    def leaves_prompts_dense(self) -> bool:
        """Whether its method chooses only while decoding, so that all such arms read a prompt with the same result."""
        return self.choice is not None and self.choice.build(Budget(share=1.0)).phases == ("decode",)

    @property
    def chooses(self) -> bool:
        """Whether a method chooses what is attended to."""
        return self.choice is not None and self.choice.name != DENSE

    @property
    def _method(self) -> str:
        return OWN if self.choice is None else self.choice.label


def places_of(config: ComparisonConfig) -> list[Place]:
    return [
        Place(task, length, question == "before")
        for length in config.lengths
        for task in config.tasks
        for question in config.question
    ]


def key_of(arm: Arm, place: Place) -> tuple[str, float | None, str, int, bool, int]:
    """By which a folder knows a cell."""
    share = None if arm.budget is None else share_of(arm.budget, place.length)
    return arm.label, share, *place, arm.model.train_seed


class Unit(NamedTuple):
    """Cells of one sibling and place: those that are answered together, or one that is answered alone."""

    arms: tuple[Arm, ...]
    place: Place

    @property
    def model(self) -> Candidate:
        return self.arms[0].model


def units_of(arms: Sequence[Arm], place: Place) -> list[Unit]:
    """Those of a sibling's arms that leave prompts dense together, each other one alone."""
    together = tuple(arm for arm in arms if arm.leaves_prompts_dense)
    groups = [together, *((arm,) for arm in arms if arm not in together)]
    return [Unit(group, place) for group in groups if group]
