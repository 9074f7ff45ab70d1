"""Results of a comparison that nobody ran: scores follow a law that the tests know."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nsa.evaluation.comparison.folder import Manifest, ResultsFolder
from nsa.evaluation.comparison.rows import Cell, Row, cell_of

SIBLINGS = {"dense": "dense", "nsa": "nsa", "dsa": "dsa"}
# Tokens that a method needs at 1,024, in its phases; the smaller, the better.
METHODS = {
    "oracle_top_k": (30, ["prefill", "decode"]),
    "quest": (90, ["decode"]),
    "sparq": (110, ["decode"]),
    "twilight": (70, ["decode"]),
    "h2o": (220, ["decode"]),
    "snapkv": (160, ["decode"]),
    "streaming_llm": (500, ["decode"]),
    "vertical_slash": (120, ["prefill"]),
    "block_sparse": (200, ["prefill"]),
    "random": (2000, ["prefill", "decode"]),
}
TASKS = {
    "passkey": ("retrieval", "single", 1.0),
    "mqar": ("retrieval", "multi", 1.3),
    "niah_multikey": ("retrieval", "multi", 1.6),
    "variable_tracking": ("multi-hop", "multi", 2.2),
    "story_filtering": ("aggregation", "high", 3.0),
    "common_words": ("aggregation", "high", 4.0),
}
BUDGETS, LENGTHS = (0.25, 0.1, 0.05), (1024, 4096)
LAYERS, KV_HEADS = 6, 4
MANIFEST = Manifest(
    config={"comparison": {"budgets": list(BUDGETS)}},
    code="abcdef012345",
    commit="0123456789ab",
    versions={"torch": "2.13.0"},
    hardware="2 CPU cores",
    planned=0,
    started="2026-11-29T12:00:00",
)


def row(**changes: Any) -> Row:
    """An answer of dense+quest, right, with what is named changed."""
    usual: dict[str, Any] = {
        "arm": "dense+quest", "model": "dense", "trained": "dense", "parameters": 25_000_000, "train_seed": 0,
        "method": "quest", "settings": {"page": 16}, "phases": ["decode"], "budget": 0.25, "budget_tokens": None,
        "counted": {"reads": 0.25, "attended": 0.2, "scored": 0.05, "resident": 1.0, "prefill": 1.0},
        "task": "mqar", "group": "retrieval", "scope": "multi", "length": 1024, "question_aware": True,
        "dense_layers": [], "ran": True, "sample": 0, "query": 0, "score": 1.0, "parsed": True, "bos": 1,
    }  # fmt: skip
    return Row(**{**usual, **changes})


def right_share(need: float, budget: float, length: int, exponent: float) -> float:
    """Share of dense's right answers that are kept: half where the tokens are what is needed."""
    tokens = budget * length
    wanted = need * (length / 1024) ** exponent
    return 1 / (1 + (wanted / tokens) ** 3)


def cell(
    method: str,
    model: str = "dense",
    budget: float | None = None,
    task: str = "mqar",
    length: int = 1024,
    samples: int = 50,
    queries: int = 4,
    train_seed: int = 0,
    dense_score: float = 0.95,
    exponent: float = 0.5,
    **changes: Any,
) -> Cell:
    """A simulated cell. An answer is right where a number of its own is below what the law says: arms are paired."""
    group, scope, hard = TASKS[task]
    kind = SIBLINGS.get(model, "dense")
    need, phases = METHODS.get(method, (20, ["prefill", "decode"]))
    if kind != "dense" and method != "own":  # a sibling that was trained sparse spreads its attention
        need *= 1.5 if kind == "nsa" else 1.2
    share = 1.0 if method == "dense" or budget == 1 else right_share(need * hard, budget or 1.0, length, exponent)
    if kind != "dense" and method == "dense":
        share = 0.97
    rng = np.random.default_rng([len(task), length, train_seed])
    own = rng.random((samples, queries)) * 0.7 + rng.random((samples, 1)) * 0.3
    right = np.argsort(np.argsort(own, axis=None)).reshape(own.shape) < dense_score * share * own.size
    decode = "decode" in phases
    reads = budget if budget and decode else 1.0
    head = row(
        arm=f"{model}+{method}" if method != "dense" or kind != "dense" else model,
        model=model,
        trained=kind,
        train_seed=train_seed,
        method=method,
        settings={},
        phases=[] if method == "dense" else phases,
        budget=budget,
        counted={
            "reads": reads,
            "attended": reads,
            "scored": 0.0 if method == "dense" else 0.06,
            "resident": reads if method in ("h2o", "snapkv", "streaming_llm") else 1.0,
            "prefill": budget if budget and "prefill" in phases else 1.0,
        },
        task=task,
        group=group,
        scope=scope,
        length=length,
    )
    rows = [
        replace(head, sample=s, query=q, score=float(right[s, q]), **changes)
        for s in range(samples)
        for q in range(queries)
    ]
    return cell_of(rows, _figures(method, kind, budget, length, phases))


def _figures(method: str, kind: str, budget: float | None, length: int, phases: Sequence[str]) -> dict[str, Any]:
    layers = np.arange(LAYERS)
    figures: dict[str, Any] = {
        "reads": [budget or 1.0] * LAYERS,
        "kv_bytes": 2 * 2 * LAYERS * KV_HEADS * 64 * length,
        "sink_mass": [
            round(float(x), 4)
            for x in {"dense": 0.5, "nsa": 0.12, "dsa": 0.2}[kind]
            * (0.8 if method == "own" else 1.0)
            * layers
            / (layers + 1)
        ],
    }
    if budget is not None:
        need = METHODS.get(method, (60, []))[0]
        mass = 1 - np.exp(-budget * length / need) * (0.4 + 0.6 * np.linspace(0.3, 1, LAYERS * KV_HEADS))
        figures["changes"] = {phase: [0.0, 3.0] for phase in phases if method != "own"}
        figures["kept_mass"] = mass.reshape(LAYERS, KV_HEADS).round(4).tolist()
    return figures


def cells(
    methods: Sequence[str] = tuple(METHODS), models: Sequence[str] = tuple(SIBLINGS), samples: int = 50
) -> Iterator[Cell]:
    """Siblings x methods x budgets x tasks x lengths, the dense run and the own run of each sibling."""
    for model in models:
        for task in TASKS:
            for length in LENGTHS:
                score = 0.6 if (task, length) == ("common_words", 4096) else 0.95
                yield cell("dense", model, None, task, length, samples, dense_score=score)
                if SIBLINGS[model] != "dense":
                    yield cell("own", model, 0.1, task, length, samples, dense_score=score)
                for method in methods:
                    for budget in BUDGETS:
                        yield cell(method, model, budget, task, length, samples, dense_score=score)


def rows_of(made: Cell) -> list[Row]:
    head = {name: value for name, value in made.head().items() if name != "figures"}
    return [Row(**head, **answer) for answer in made.answers()]


def write(folder: Path, made: Sequence[Cell], finished: bool = True) -> ResultsFolder:
    results = ResultsFolder(folder, replace(MANIFEST, planned=len(made)))
    for one in made:
        results.write(rows_of(one), one.figures)
    if finished:
        results.finish("2026-11-29T13:00:00")
    return results
