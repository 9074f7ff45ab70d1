"""One answer, and one cell: all answers of an arm to one task at one length and budget."""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

DENSE = "dense"  # the method that attends to all, and the kind of a sibling that was trained so
OWN = "own"  # the method of a sibling that runs as it was trained
RANDOM = "random"  # the control that chooses without looking
COUNTED = ("reads", "attended", "scored", "resident", "prefill")
FIGURES = ("sink_mass", "kept_mass", "reads", "kv_bytes", "changes")


class ResultsError(ValueError):
    """Results of a comparison are not what they must be; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What all answers of a cell have in common.

    Attributes:
        arm: the sibling and the method, "dense+quest". model: the sibling. trained: the kind that it was trained as.
        parameters: of the sibling. train_seed: of its training.
        method: in `nsa.baselines`, "dense" or "own" (as it was trained). settings: the method's fields.
        phases: where the method ran: "prefill", "decode".
        budget: nominal share of dense reads; None: dense, or none is set. budget_tokens: in tokens, if so given.
        counted: shares of what dense attention spends (`COUNTED`), as `nsa.baselines.ledger.Ledger.shares` gives them;
            None: there was no such phase.
        task, group, scope: of the task. length: tokens of the prompt and its answers. question_aware: whether the
            question was there when the prompt was thinned out.
        dense_layers: layers that stayed dense, as said in the report. ran: whether the sparse path ran in each layer
            and phase that it claims.
    """

    arm: str
    model: str
    trained: str
    parameters: int
    train_seed: int
    method: str
    settings: dict[str, Any]
    phases: list[str]
    budget: float | None
    budget_tokens: int | None
    counted: dict[str, float | None]
    task: str
    group: str
    scope: str
    length: int
    question_aware: bool
    dense_layers: list[int]
    ran: bool


@dataclass(frozen=True, kw_only=True)
class Row(Shared):
    """One answer.

    Attributes:
        sample, query: the same numbers are the same question in all arms. score: in [0, 1], 0 where the answer was not
            parsed. parsed: whether there was an answer. bos: tokens that begin a sequence in the prompt; None: the
            tokenizer has none.
    """

    sample: int
    query: int
    score: float
    parsed: bool
    bos: int | None = None


OF_CELL = tuple(f.name for f in fields(Shared))
OF_ANSWER = ("sample", "query", "score", "parsed", "bos")


@dataclass(frozen=True, kw_only=True)
class Cell(Shared):
    """All answers of one arm and training seed to one task, at one length and budget.

    sample, query: (A,) int64. score: (A,) float64. parsed: (A,) bool. bos: (A,) int64, -1 where there is none to count.
    figures: what was seen inside the model, all optional (`FIGURES`): "sink_mass", a list over layers, attention on the
    first 4 tokens; "kept_mass", lists over layers of lists over KV heads, dense attention on what was kept; "reads",
    a list over layers, shares of dense reads; "kv_bytes", bytes that a dense step of decoding reads at this length;
    "changes", see `nsa.evaluation.comparison.leaks.changes`, in one cell of each arm.
    """

    sample: NDArray[np.int64]
    query: NDArray[np.int64]
    score: NDArray[np.float64]
    parsed: NDArray[np.bool_]
    bos: NDArray[np.int64]
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """A name for files, different for different cells."""
        return cell_id(self.arm, self.budget, self.task, self.length, self.question_aware, self.train_seed)

    @property
    def dense(self) -> bool:
        """Whether attention was dense."""
        return self.method == DENSE

    @property
    def reference(self) -> bool:
        """Whether it is the dense run of a sibling that was trained dense: what all arms are compared with."""
        return self.dense and self.trained == DENSE

    @property
    def mean(self) -> float:
        return float(self.score.mean())

    @property
    def unparsed(self) -> float:
        """Share of answers that could not be parsed."""
        return float((~self.parsed).mean())

    @property
    def axis(self) -> str:
        """Which count its budget is measured by: what decoding reads, or pairs of the prompt if it runs there only."""
        return "reads" if "decode" in self.phases or not self.phases else "prefill"

    @property
    def cost(self) -> float:
        """The counted budget, a share of dense; 1 for dense runs."""
        value = self.counted.get(self.axis)
        return 1.0 if self.dense or value is None else value

    def head(self) -> dict[str, Any]:
        """What all of its answers share, for JSON."""
        return {**{name: getattr(self, name) for name in OF_CELL}, "figures": self.figures}

    def answers(self) -> list[dict[str, Any]]:
        """What its answers do not share, for JSON."""
        return [
            {"sample": int(s), "query": int(q), "score": float(r), "parsed": bool(p), "bos": int(b) if b >= 0 else None}
            for s, q, r, p, b in zip(self.sample, self.query, self.score, self.parsed, self.bos, strict=True)
        ]


def cell_id(arm: str, budget: float | None, task: str, length: int, question_aware: bool, train_seed: int) -> str:
    """A readable name for files; a digest tells apart what other signs would make equal."""
    key = [arm, budget, task, length, question_aware, train_seed]
    asks = "aware" if question_aware else "agnostic"
    words = f"{arm}@{'none' if budget is None else f'{budget:g}'}-{task}-{length}-{asks}-{train_seed}"
    return f"{re.sub(r'[^A-Za-z0-9+@._-]', '_', words)[:120]}-{digest(key)[:6]}"


def digest(value: Any) -> str:
    """A fingerprint of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def cell_of(rows: Sequence[Row], figures: Mapping[str, Any] | None = None) -> Cell:
    """The cell that the rows form, sorted by sample and query.

    Raises:
        ResultsError: there are no rows, they belong to several cells, or a value is out of its range.
    """
    if not rows:
        raise ResultsError("a cell needs at least one answer: ask for more samples")
    first = {name: getattr(rows[0], name) for name in OF_CELL}
    for row in rows:
        for name in OF_CELL:
            if getattr(row, name) != first[name]:
                raise ResultsError(
                    f"answers of two cells: {name} is {first[name]!r} and {getattr(row, name)!r}; write each by itself"
                )
    return build_cell(
        {**first, "figures": dict(figures or {})}, [{name: getattr(row, name) for name in OF_ANSWER} for row in rows]
    )


def build_cell(head: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], where: str = "a cell") -> Cell:
    """A cell of its fields and answers as JSON holds them. ``where`` begins the message of an error.

    Raises:
        ResultsError: a field is missing or unknown, or a value is out of its range.
    """
    _same_names(head, (*OF_CELL, "figures"), where)
    if not answers:
        raise ResultsError(f"{where} has no answers: delete it and run the comparison again")
    for answer in answers:
        _same_names(answer, OF_ANSWER, f"an answer of {where}")
        score, bos = answer["score"], answer["bos"]
        if not isinstance(score, int | float) or not 0 <= score <= 1:  # NaN is refused, too
            raise ResultsError(f"{where}: a score of {score!r}, but scores lie in [0, 1]")
        if score > 0 and not answer["parsed"]:
            raise ResultsError(f"{where}: an answer that was not parsed counts as wrong, but its score is {score}")
        if bos is not None and (not isinstance(bos, int) or bos < 0):
            raise ResultsError(f"{where}: {bos!r} BOS tokens; give their number, or null if there is no such token")
    _check_head(head, where)
    answers = sorted(answers, key=lambda answer: (answer["sample"], answer["query"]))
    keys = [(answer["sample"], answer["query"]) for answer in answers]
    for one, following in itertools.pairwise(keys):
        if one == following:
            raise ResultsError(f"{where}: sample {one[0]} has two answers to query {one[1]}; number them apart")
    return Cell(
        **head,
        sample=np.array([key[0] for key in keys], np.int64),
        query=np.array([key[1] for key in keys], np.int64),
        score=np.array([answer["score"] for answer in answers], np.float64),
        parsed=np.array([answer["parsed"] for answer in answers], bool),
        bos=np.array([-1 if answer["bos"] is None else answer["bos"] for answer in answers], np.int64),
    )


def tidy(cell: Cell) -> dict[str, Any]:
    """The cell as one line of a table: plain values, its mean, and counts beside each other."""
    flat = {
        name: getattr(cell, name) for name in OF_CELL if name not in ("settings", "phases", "counted", "dense_layers")
    }
    return {
        "cell": cell.id,
        **flat,
        "settings": json.dumps(cell.settings, sort_keys=True),
        "phases": "+".join(cell.phases),
        "dense_layers": ",".join(map(str, cell.dense_layers)),
        "samples": len(np.unique(cell.sample)),
        "answers": len(cell.score),
        "score": cell.mean,
        "unparsed": cell.unparsed,
        **{f"counted_{name}": cell.counted[name] for name in COUNTED},
    }


def _same_names(given: Mapping[str, Any], wanted: Sequence[str], where: str) -> None:
    missing, unknown = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has unknown fields {', '.join(unknown)}"] if unknown else []
        raise ResultsError(f"{where} {' and '.join(parts)}")


def _check_head(head: Mapping[str, Any], where: str) -> None:
    counted, budget, figures = head["counted"], head["budget"], head["figures"]
    _same_names(counted, COUNTED, f"what is counted of {where}")
    for name, value in counted.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ResultsError(f"{where}: {name} was counted as {value}; a share is a number from 0")
    if budget is not None and not 0 < budget <= 1:
        raise ResultsError(f"{where}: a budget of {budget}; it is a share of dense reads, above 0 and at most 1")
    if head["method"] == DENSE and budget is not None:
        raise ResultsError(f"{where}: dense attention has no budget, but {budget} is given: write null")
    unknown = set(figures) - set(FIGURES)
    if unknown:
        raise ResultsError(f"{where}: unknown figures {', '.join(sorted(unknown))}; known are {', '.join(FIGURES)}")
    if head["length"] < 1 or head["parameters"] < 1:
        raise ResultsError(f"{where}: length and parameters must be at least 1")
