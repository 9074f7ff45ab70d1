"""Means of figures over queries, which can be put together from those of parts."""

from collections.abc import Sequence


class Mean(float):
    """A mean over ``number`` queries (or of what else is counted); of none: the value that stands for it then."""

    number: float

    def __new__(cls, value: float, number: float) -> "Mean":
        mean = super().__new__(cls, value)
        mean.number = number
        return mean


def mean_of(parts: Sequence[float]) -> Mean:
    """The mean over the queries of all ``parts``. Plain numbers count alike. Parts of none count if all are."""
    numbers = [part.number if isinstance(part, Mean) else 1.0 for part in parts]
    if not (total := sum(numbers)):
        return Mean(sum(parts) / len(parts), 0)
    return Mean(sum(part * number for part, number in zip(parts, numbers, strict=True)) / total, total)
