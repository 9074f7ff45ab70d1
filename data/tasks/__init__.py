"""Synthetic long-context tasks: docs/tasks.md. Every sample is a function of (seed, task, length, index)."""

from nsa.data.tasks.base import (
    IGNORED,
    SET_SIZE,
    Bytes,
    Episode,
    HuggingFace,
    IdSets,
    Query,
    Sample,
    Task,
    UnavailableError,
    Vocabulary,
    as_vocabulary,
    episode,
    generator,
    id_sets,
)
from nsa.data.tasks.registry import TASKS, task_named

__all__ = [
    "IGNORED",
    "SET_SIZE",
    "TASKS",
    "Bytes",
    "Episode",
    "HuggingFace",
    "IdSets",
    "Query",
    "Sample",
    "Task",
    "UnavailableError",
    "Vocabulary",
    "as_vocabulary",
    "episode",
    "generator",
    "id_sets",
    "task_named",
]
