"""Fits the threshold of a method to a budget, by counting."""

from collections.abc import Callable

STEPS = 12
CLOSE = 0.01  # relative


def fit(spent: Callable[[float], float], target: float, low: float, high: float) -> tuple[float, float]:
    """The threshold between ``low`` (spends least) and ``high`` (spends most) that spends about ``target``.

    Args:
        spent: of a threshold, the share that is counted; it rises from low to high, if low < high or not.

    Returns:
        The threshold, and what it spends: the nearest that bisection finds. It may be far off where the method jumps.
    """
    best = min((abs(value - target), at, value) for at in (low, high) for value in [spent(at)])
    for _ in range(STEPS):
        if best[0] <= CLOSE * target:
            break
        middle = (low + high) / 2
        value = spent(middle)
        best = min(best, (abs(value - target), middle, value))
        low, high = (middle, high) if value < target else (low, middle)
    return best[1], best[2]
