"""Runs a comparison: every method on every sibling, at every budget, on the same samples; cell by cell."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from nsa.baselines import Budget, BudgetError, Ledger, Method
from nsa.data.tasks import Sample, Task, UnavailableError, as_vocabulary, task_named
from nsa.evaluation.comparison.answers import Answer, ask
from nsa.evaluation.comparison.calibration import fit
from nsa.evaluation.comparison.config import ComparisonConfig, MethodConfig, budget_of, share_of
from nsa.evaluation.comparison.decoding import AttachError, Reader
from nsa.evaluation.comparison.folder import Manifest, ResultsFolder
from nsa.evaluation.comparison.leaks import changes
from nsa.evaluation.comparison.models import Opened
from nsa.evaluation.comparison.rows import DENSE, OWN, Row

CONTROLS = ("dense", "oracle_topk", "oracle_topp", "random", "sink_window")
CALIBRATION = "calibration"  # the seed of samples that no result is measured on


@dataclass(frozen=True)
class Arm:
    """A sibling with a method at a budget.

    choice: None: as it was trained. budget: as configured; None: there is none to set.
    """

    model: Opened
    choice: MethodConfig | None
    budget: float | int | None

    @property
    def label(self) -> str:
        return f"{self.model.name}+{OWN if self.choice is None else self.choice.label}"


@dataclass(frozen=True)
class Block:
    """The questions of one cell."""

    task: Task
    length: int
    aware: bool
    samples: list[Sample]


class Comparison:
    """See `run`."""

    def __init__(self, config: ComparisonConfig, models: Sequence[Opened], say: Callable[[str], None]) -> None:
        self.config, self.models, self.say = config, models, say
        self.fitted: dict[tuple[Any, ...], float] = {}
        self._samples: dict[tuple[Any, ...], list[Sample]] = {}
        self._looked_at: set[str] = set()

    def arms(self) -> Iterator[Arm]:
        """All, the controls first."""
        choices = [MethodConfig(name=name) for name in CONTROLS]
        named = {c.label for c in self.config.methods}
        choices = [c for c in choices if c.label not in named] + list(self.config.methods)
        for model in self.models:
            if model.trained != DENSE:
                yield Arm(model, None, None)
            for choice in choices:
                fixed = not choice.build(Budget(share=1.0)).phases or self._threshold(choice) in choice.settings
                for budget in [None] if fixed else self.config.budgets:
                    yield Arm(model, choice, budget)

    def blocks(self) -> list[tuple[str, int, bool]]:
        """Task, length and whether the question is in the prompt."""
        return [
            (task, length, question == "before")
            for length in self.config.lengths
            for task in self.config.tasks
            for question in self.config.question
        ]

    def run(self, folder: ResultsFolder, progress: Callable[[int], None]) -> None:
        """Every cell that is not finished. ``progress``: called with the number of cells done.

        Raises:
            ValueError: a length is too short for a task; this is found before anything runs.
        """
        for model in self.models:
            for name, length, _ in self.blocks():
                with suppress(UnavailableError):
                    task_named(name).sample(model.tokenizer, length, CALIBRATION, 0)
        for arm in self.arms():
            for name, length, aware in self.blocks():
                share = None if arm.budget is None else share_of(arm.budget, length)
                if not folder.has(arm.label, share, name, length, aware, arm.model.train_seed):
                    try:
                        self._cell(folder, arm, self._block(arm.model, name, length, aware))
                    except (BudgetError, AttachError, UnavailableError) as error:
                        self._leave_out(
                            folder,
                            f"{arm.label}@{arm.budget} {name} {length} {'aware' if aware else 'agnostic'}",
                            str(error),
                        )
                progress(1)

    def _block(self, model: Opened, name: str, length: int, aware: bool, *, calibrate: bool = False) -> Block:
        task, seed = task_named(name), CALIBRATION if calibrate else f"comparison {self.config.seed}"
        count = self.config.calibration_samples if calibrate else self.config.samples
        key = (id(model.tokenizer), name, length, seed)
        if key not in self._samples:
            self._samples[key] = [task.sample(model.tokenizer, length, seed, i) for i in range(count)]
        return Block(task, length, aware, self._samples[key])

    # --------------------------------------------------------------------------------------------------- one cell

    def _cell(self, folder: ResultsFolder, arm: Arm, block: Block) -> None:
        method = self._method(arm, block)
        watch = self.config.watch and method is not None
        ledger, rows = Ledger(), []
        found, reader = self._ask(arm, method, block, ledger, watch=watch)
        counted = ledger.shares()
        vocabulary = as_vocabulary(arm.model.tokenizer)
        shared: dict[str, Any] = {
            "arm": arm.label,
            "model": arm.model.name,
            "trained": arm.model.trained,
            "parameters": arm.model.parameters,
            "train_seed": arm.model.train_seed,
            "method": OWN if method is None else method.name,
            "settings": {} if method is None else method.settings(),
            "phases": ["prefill", "decode"] if method is None else list(method.phases),
            "budget": None if arm.budget is None else share_of(arm.budget, block.length),
            "budget_tokens": arm.budget if isinstance(arm.budget, int) and arm.budget > 1 else None,
            "counted": counted,
            "task": block.task.name,
            "group": block.task.group,
            "scope": block.task.scope,
            "length": block.length,
            "question_aware": block.aware,
            "dense_layers": self._dense_layers(method),
            "ran": method is None or self._ran(arm, method, ledger),
        }
        for answer in found:
            bos = int(np.count_nonzero(block.samples[answer.sample].context == vocabulary.bos_id))
            rows.append(
                Row(
                    **shared,
                    sample=answer.sample,
                    query=answer.query,
                    score=answer.score or 0.0,
                    parsed=answer.score is not None,
                    bos=bos,
                )
            )
        folder.write(rows, self._figures(arm, reader, ledger, block) | self._changes(arm, method, block))

    def _ask(
        self, arm: Arm, method: Method | None, block: Block, ledger: Ledger, *, watch: bool
    ) -> tuple[list[Answer], Reader]:
        """All answers, counted into the ledger."""
        model = arm.model
        reader = model.reader(method, dense_layers=self._dense_layers(method), watch=watch, ledger=ledger)
        options: dict[str, Any] = {"aware": block.aware, "batch_tokens": self.config.batch_tokens}
        batches = ask(reader, model.tokenizer, block.task, block.samples, **options)
        return [answer for batch in batches for answer in batch], reader

    def _ran(self, arm: Arm, method: Method, ledger: Ledger) -> bool:
        """Whether the method chose in each layer and phase that it claims."""
        sparse = set(range(arm.model.num_layers)) - set(self.config.dense_layers)
        return {(phase, layer) for phase in method.phases for layer in sparse} <= ledger.ran

    def _dense_layers(self, method: Method | None) -> list[int]:
        return [] if method is None or not method.phases else list(self.config.dense_layers)

    def _figures(self, arm: Arm, reader: Any, ledger: Ledger, block: Block) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "reads": [ledger.shares([layer])["reads"] for layer in range(arm.model.num_layers)],
            "kv_bytes": arm.model.kv_elements * block.length * 2,  # in bf16
        }
        seen = [f for f in getattr(getattr(reader, "session", None), "figures", []) if not f["prompt"]]
        if seen:
            by_layer = [[f for f in seen if f["layer"] == layer] for layer in range(arm.model.num_layers)]
            figures["sink_mass"] = [float(np.mean([f["sink_mass"] for f in layer])) for layer in by_layer]
            figures["kept_mass"] = [np.mean([f["kept_mass"] for f in layer], 0).tolist() for layer in by_layer]
        return figures

    def _changes(self, arm: Arm, method: Method | None, block: Block) -> dict[str, Any]:
        """Whether the arm reads what its plans leave out, on one sample of its first cell below a full budget."""
        full = arm.budget is not None and share_of(arm.budget, block.length) == 1
        if not self.config.watch or method is None or not method.phases or full or arm.label in self._looked_at:
            return {}
        self._looked_at.add(arm.label)
        dense = self._dense_layers(method)
        ids = torch.from_numpy(block.samples[0].context.astype(np.int64))[None]
        found = changes(
            lambda ledger: arm.model.reader(method, dense_layers=dense, watch=False, ledger=ledger), method, ids
        )
        return {"changes": found} if found else {}

    # ------------------------------------------------------------------------------------------------- its method

    def _threshold(self, choice: MethodConfig) -> str | None:
        knob = choice.build(Budget(share=1.0)).knob
        return None if knob is None else knob[0]

    def _method(self, arm: Arm, block: Block) -> Method | None:
        """The method of an arm; a threshold is fitted to its budget by what it spends on other samples."""
        if arm.choice is None:
            return None
        if arm.budget is None:
            return arm.choice.build(Budget(share=1.0))
        method = arm.choice.build(budget_of(arm.budget, self.config.counts))
        if method.knob is None:
            return method
        key = (arm.label, arm.budget, block.task.name, block.length, block.aware)
        if key not in self.fitted:
            self.fitted[key] = self._fit(arm, method, block)
        return arm.choice.build(method.budget, **{method.knob[0]: self.fitted[key]})

    def _fit(self, arm: Arm, method: Method, block: Block) -> float:
        choice = arm.choice
        assert method.knob is not None and choice is not None
        name, low, high = method.knob
        assert arm.budget is not None
        share = share_of(arm.budget, block.length)
        others = self._block(arm.model, block.task.name, block.length, block.aware, calibrate=True)
        axis = "prefill" if "decode" not in method.phases else self.config.counts

        def spent(threshold: float) -> float:
            ledger = Ledger()
            trial = choice.build(method.budget, **{name: threshold})
            self._ask(arm, trial, others, ledger, watch=False)
            return ledger.shares(beside=False)[axis] or 0.0

        return fit(spent, share, low, high)[0]

    def _leave_out(self, folder: ResultsFolder, what: str, why: str) -> None:
        self.say(f"left out: {what}: {why}")
        folder.leave_out(what, why)


def manifest_of(
    config: ComparisonConfig, planned: int, commit: str, versions: dict[str, str], hardware: str
) -> Manifest:
    """The manifest of a comparison that begins now."""
    return Manifest(
        config=config.model_dump(mode="json"),
        commit=commit,
        versions=versions,
        hardware=hardware,
        planned=planned,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
