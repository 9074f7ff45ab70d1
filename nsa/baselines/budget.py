"""How many tokens a query may attend to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST = 1  # every query attends to itself


class BudgetError(ValueError):
    """A budget that a method cannot meet."""


@dataclass(frozen=True)
class Budget:
    """A number of tokens, or a share of the tokens so far. Exactly one is given.

    Attributes:
        share: of the tokens so far, in (0, 1].
        tokens: absolute, at least 1.
        counts: "attended": the tokens attended to. "reads": all that is read for them, in tokens: what a method reads
            to choose (pages' bounds, some dims of all keys) comes out of its budget.

    Raises:
        ValueError: both or neither are given, or out of range.
    """

    share: float | None = None
    tokens: int | None = None
    counts: str = "attended"

    def __post_init__(self) -> None:
        if (self.share is None) == (self.tokens is None):
            raise ValueError("a budget is a share of the tokens or a number of tokens: give exactly one")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"a budget's share must be in (0, 1], got {self.share:g}")
        if self.tokens is not None and self.tokens < LEAST:
            raise ValueError(f"a budget must have at least {LEAST} token, got {self.tokens}")
        if self.counts not in ("attended", "reads"):
            raise ValueError(f"a budget counts attended or reads, not {self.counts!r}")

    @property
    def full(self) -> bool:
        """Whether nothing is left out at any length."""
        return self.share == 1

    def of(self, seen: int, *, least: int = LEAST, overhead: float = 0.0) -> int:
        """Tokens that a query may attend to.

        Args:
            seen: tokens so far. least: fewer are no use to the method (its sinks and its window, say).
            overhead: what choosing reads, in tokens (of K and V); counted with ``counts="reads"``.

        Raises:
            BudgetError: it is less than ``least``, and than what there is.
        """
        if self.full:
            return seen
        total = self.tokens if self.tokens is not None else round(self.share * seen)  # type: ignore[operator]
        left = total - (round(overhead) if self.counts == "reads" else 0)
        if left < min(least, seen):
            said = f"{self.tokens} tokens" if self.tokens is not None else f"{self.share:g} of {seen} tokens"
            why = f"choosing reads {overhead:g} of them, " if self.counts == "reads" and overhead else ""
            raise BudgetError(f"a budget of {said} cannot be met: {why}{least} tokens are the least")
        return min(left, seen)

    def each(self, seen: Tensor, *, least: int = LEAST, overhead: float | Callable[[int], float] = 0.0) -> Tensor:
        """As `of` for each sequence: seen (B,) int64 -> (B, 1, 1) int64. ``overhead``: of each token so far, or by it
        of so many tokens."""
        spent = overhead if callable(overhead) else lambda n: overhead * n
        counts = [self.of(n, least=least, overhead=spent(n)) for n in seen.tolist()]  # one wait for a GPU
        return torch.tensor(counts, dtype=torch.int64, device=seen.device)[:, None, None]

    def __str__(self) -> str:
        return f"{self.share:g}" if self.share is not None else f"{self.tokens} tokens"
