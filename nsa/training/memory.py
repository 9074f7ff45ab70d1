"""Errors that say that memory is too small, by whichever library they come from."""

import torch

SAYINGS = ("out of memory", "status_alloc_failed", "can't allocate memory")  # the driver, cuBLAS, torch's CPU allocator


def is_memory(error: BaseException) -> bool:
    """Whether the memory of the device or of the host is too small."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in SAYINGS)
    )


def out_of_memory_behind(error: BaseException) -> torch.OutOfMemoryError | None:
    """The out-of-memory error that ended a capture, if any. Ending the capture then fails, too, and hides it."""
    behind: BaseException | None = error
    while behind is not None and not isinstance(behind, torch.OutOfMemoryError):
        behind = behind.__context__
    return behind
