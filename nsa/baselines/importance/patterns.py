"""The patterns that MInference gives to KV heads (arXiv 2407.02490, section 3.2)."""

from typing import Any

# Kind, columns, diagonals. With "block_sparse" the numbers have no meaning.
Pattern = tuple[str, int, int]
# The candidates of the release. Only the proportion of columns to diagonals counts: all spend the same budget.
CANDIDATES: tuple[Pattern, ...] = (
    *(("vertical_slash", v, s) for v, s in ((30, 800), (100, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096))),
    ("a_shape", 100, 800),
    ("block_sparse", 0, 0),
)


def checked(given: Any) -> tuple[tuple[Pattern, ...], ...]:
    """The patterns of each layer, of each KV head; from a file of settings they come as lists.

    Raises:
        ValueError: there is no such kind, or lines of one sort are missing.
    """
    patterns = tuple(tuple((str(k), int(v), int(s)) for k, v, s in layer) for layer in given)
    for kind, columns, diagonals in {pattern for layer in patterns for pattern in layer}:
        if kind not in ("vertical_slash", "a_shape", "block_sparse"):
            raise ValueError(f"a pattern is vertical_slash, a_shape or block_sparse, not {kind!r}")
        if kind != "block_sparse" and min(columns, diagonals) < 1:
            raise ValueError(f"{kind} needs at least one column and one diagonal, got {columns} and {diagonals}")
    return patterns
