"""Configurations as earlier versions wrote them, brought to what this one reads.

Only what a run saved itself is brought up to date (`nsa.config.load_saved`). In a file of a user an old key is an
error, which names the new one.
"""

from typing import Any

# Before 2026-11-29 NSA's sizes stood beside attention.kind. Keys that are newer were never there.
OF_NSA = (
    "compress_length",
    "compress_stride",
    "compress_hidden",
    "block_size",
    "num_blocks",
    "num_initial",
    "num_local",
    "window",
)


def upgraded(tree: Any) -> Any:
    """The values of a saved configuration under the keys of today; ``tree`` stays as it is."""
    attention = tree.get("attention") if isinstance(tree, dict) else None
    if not isinstance(attention, dict) or not attention.keys() & set(OF_NSA):
        return tree
    kept = {key: value for key, value in attention.items() if key not in OF_NSA}
    moved = {key: value for key, value in attention.items() if key in OF_NSA}
    return tree | {"attention": kept | {"nsa": attention.get("nsa", {}) | moved}}
