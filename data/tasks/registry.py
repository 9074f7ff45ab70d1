"""All tasks, by name."""

from dataclasses import replace
from typing import Any

from nsa.data.tasks.base import Task, nearest
from nsa.data.tasks.ids import Hops, JointRecall, MqarWide, Mqmtar, Sort
from nsa.data.tasks.narrow import Copy, Mqar, Passkey
from nsa.data.tasks.questions import question_answering
from nsa.data.tasks.ruler import ruler
from nsa.data.tasks.story import stories
from nsa.data.tasks.symbols import symbols

TASKS: tuple[Task, ...] = (
    Mqar(
        name="mqar",
        title="Multi-query associative recall, 16 keys and 16 values",
        source="Arora et al. 2023, arXiv 2312.04927",
        group="retrieval",
        scope="single",
        over="ids",
        shortest=32,
    ),
    MqarWide(
        name="mqar_wide",
        title="Multi-query associative recall over the whole vocabulary",
        source="Arora et al. 2023, arXiv 2312.04927",
        group="retrieval",
        scope="single",
        over="ids",
        shortest=32,
    ),
    MqarWide(
        name="mqar_front",
        title="Multi-query associative recall over the whole vocabulary, pairs first",
        source="Arora et al. 2023, arXiv 2312.04927",
        group="retrieval",
        scope="single",
        over="ids",
        shortest=32,
        front=True,
    ),
    Mqmtar(
        name="mqmtar",
        title="Multi-query multi-token associative recall",
        source="ASEntmax, arXiv 2506.16640",
        group="retrieval",
        scope="single",
        over="ids",
        shortest=64,
    ),
    JointRecall(
        name="joint_recall",
        title="Recall by a context and a key",
        source="Zhan et al. 2025, arXiv 2507.00449",
        group="multi-hop",
        scope="single",
        over="ids",
        shortest=32,
    ),
    *(
        Hops(
            name=f"vt_{hops}",
            title=f"Variable tracking over ids, {hops} {'hop' if hops == 1 else 'hops'}",
            source="RULER, arXiv 2404.06654",
            group="multi-hop",
            scope="single" if hops == 1 else "multi",
            over="ids",
            shortest=64,
            hops=hops,
        )
        for hops in (1, 2, 3, 4)
    ),
    Copy(
        name="copy",
        title="Copy",
        source="ASEntmax, arXiv 2506.16640",
        group="copying",
        scope="high",
        over="ids",
        shortest=32,
    ),
    Copy(
        name="copy_wide",
        title="Copy over the whole vocabulary",
        source="ASEntmax, arXiv 2506.16640",
        group="copying",
        scope="high",
        over="ids",
        shortest=32,
        wide=True,
    ),
    Sort(
        name="sort",
        title="Sort",
        source="ASEntmax, arXiv 2506.16640",
        group="aggregation",
        scope="high",
        over="ids",
        shortest=32,
    ),
    Passkey(
        name="passkey",
        title="Passkey",
        source="Mohtashami and Jaggi 2023, arXiv 2305.16300",
        group="sanity",
        scope="single",
        over="ids",
        shortest=32,
    ),
    *ruler(),
    *question_answering(),
    *stories(),
    symbols(),
)


def task_named(name: str, **parameters: Any) -> Task:
    """The task of that name, with parameters of its own: `task_named("niah_single_1", strict_upstream=True)`.

    Raises:
        ValueError: there is no such task, or it has no such parameter.
    """
    for task in TASKS:
        if task.name == name:
            try:
                return replace(task, **parameters)
            except TypeError as error:
                raise ValueError(f"task {name}: {error}") from error
    names = [task.name for task in TASKS]
    raise ValueError(f"unknown task {name!r}{nearest(name, names)}; there are: {', '.join(names)}")
