"""Runs a comparison: every method on every sibling, at every budget, on the same samples; cell by cell."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf, log
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from nsa.baselines import Budget, BudgetError, Ledger, Method
from nsa.baselines.methods.dense import DenseForOthers
from nsa.data.tasks import Sample, Task, UnavailableError, as_vocabulary, task_named
from nsa.evaluation.comparison.answers import Answer, ask
from nsa.evaluation.comparison.calibration import fit
from nsa.evaluation.comparison.config import ComparisonConfig, MethodConfig, budget_of, share_of
from nsa.evaluation.comparison.decoding import AttachError, Prompts, Reader
from nsa.evaluation.comparison.folder import ResultsFolder
from nsa.evaluation.comparison.identity import export_digest, tokenizer_digest
from nsa.evaluation.comparison.leaks import changes
from nsa.evaluation.comparison.models import Candidate, Opened, open_model
from nsa.evaluation.comparison.rows import DENSE, OWN, Cell, Row
from nsa.exporting.folder import CONFIG

CONTROLS = ("dense", "oracle_topk", "oracle_topp", "random", "sink_window")
CALIBRATION = "calibration"  # the seed of samples that no result is measured on
KEPT = 8  # lists of samples: those of one place of a sibling, and some
DECIMALS = 5  # of figures: a folder of many cells stays small
TOGETHER = 600.0  # seconds that cells are answered together, at most, if one alone takes less: a kill costs that much


class TimeUpError(Exception):
    """The time that was given is over; everything that was answered is written."""


class NoSampleError(ValueError):
    """A task has no samples of this length."""


@dataclass(frozen=True)
class Arm:
    """A sibling with a method at a budget.

    choice: None: as it was trained. budget: as configured; None: there is none to set.
    """

    model: Candidate
    choice: MethodConfig | None
    budget: float | int | None

    @property
    def label(self) -> str:
        return f"{self.model.name}+{self._method}"

    def is_full(self, length: int) -> bool:
        return self.budget is not None and share_of(self.budget, length) == 1

    @property
    def told(self) -> str:
        """The label for messages, with the seed."""
        return f"{self.model.label}+{self._method}"

    @property
    def _method(self) -> str:
        return OWN if self.choice is None else self.choice.label


class Place(NamedTuple):
    """What a cell is asked. aware: the question is in the prompt."""

    task: str
    length: int
    aware: bool

    def __str__(self) -> str:
        return f"{self.task} {self.length} {'aware' if self.aware else 'agnostic'}"


@dataclass(frozen=True)
class Block:
    """The questions of one cell."""

    task: Task
    length: int
    aware: bool
    samples: list[Sample]


@dataclass
class Asked:
    """A cell while it is answered. seconds: that it took so far."""

    arm: Arm
    method: Method | None
    ledger: Ledger
    reader: Reader
    batches: Iterator[list[Answer]]
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0

    def go_on(self) -> bool:
        """Answer the next batch; True."""
        begun = perf_counter()
        self.answers += next(self.batches)
        self.seconds += perf_counter() - begun
        return True


Made = TypeVar("Made")


class Comparison:
    """See `run`.

    Args:
        candidates: the siblings. device: that answers are computed on. say: called with what is left out.
    """

    def __init__(
        self,
        config: ComparisonConfig,
        candidates: Sequence[Candidate],
        say: Callable[[str], None],
        device: torch.device | str = "cpu",
    ) -> None:
        self.config, self.candidates, self.say, self.device = config, candidates, say, device
        self._open: tuple[Candidate, Opened, str, str] | None = None  # one at a time: memory; with its fingerprints
        self._prompts: Prompts | None = None  # of this model
        self._samples: dict[tuple[Any, ...], list[Sample]] = {}
        self._begun = False  # the first cell of a run is answered whatever the time, so that every run gets further

    def arms(self, model: Candidate, *, methods: bool) -> Iterator[Arm]:
        """Of a sibling: with ``methods`` those that choose, controls first; without, dense and as it was trained."""
        choices = [MethodConfig(name=name) for name in CONTROLS]
        named = {c.label for c in self.config.methods}
        choices = [c for c in choices if c.label not in named] + list(self.config.methods)
        if not methods and model.trained != DENSE:
            yield Arm(model, None, None)
        for choice in choices:
            if (choice.name != DENSE) == methods:
                fixed = not choice.build(Budget(share=1.0)).phases or self._threshold(choice) in choice.settings
                for budget in [None] if fixed else self.config.budgets:
                    yield Arm(model, choice, budget)

    def places(self) -> list[Place]:
        return [
            Place(task, length, question == "before")
            for length in self.config.lengths
            for task in self.config.tasks
            for question in self.config.question
        ]

    @property
    def most(self) -> int:
        """Cells, if dense reaches the floor everywhere."""
        arms = sum(
            1 for model in self.candidates for methods in (False, True) for _ in self.arms(model, methods=methods)
        )
        return arms * len(self.places())

    def run(
        self, folder: ResultsFolder, progress: Callable[[int], None], time_left: Callable[[], float] = lambda: inf
    ) -> None:
        """Every cell that is not finished; cell by cell, so that an interruption changes no result.

        Dense runs come first: they say where methods are asked at all (`ComparisonConfig.floor`). Methods that choose
        only while decoding are asked in turns, batch by batch, and each batch is read once for all of them.

        Args:
            progress: called with a number of cells that are done or left out.
            time_left: seconds; no cell is begun without any, but for the first.

        Raises:
            TimeUpError: there was no time left.
            ResultsError: the folder has answers of another training of a sibling.
            ValueError: siblings that are compared would be asked different questions, or all lengths are too short for
                a task; this is found before anything runs.
        """
        self._check_tokenizers()
        self._check_lengths()
        left, cells = folder.left_out(), 0
        for methods in (False, True):
            for model in self.candidates:
                for place in self.places():
                    arms = list(self.arms(model, methods=methods))
                    if methods and (why := self._below(folder, model, place)):
                        cells += 1
                        self._leave_out(folder, left, f"methods on {model.label} {place}", why)
                        progress(len(arms))
                        continue
                    cells += len(arms)
                    for some in self._groups(arms):
                        self._missing(folder, left, some, place, progress, time_left)
        folder.plan(cells)

    def _check_tokenizers(self) -> None:
        """Questions are made of tokens: seeds of a sibling must have one tokenizer, and so must it and what it is
        compared with. Raises ValueError."""
        tokenizers = {model: tokenizer_digest(model.folder) for model in self.candidates}
        dense = {tokenizers[model]: model for model in reversed(self.candidates) if model.trained == DENSE}
        first: dict[str, Candidate] = {}
        for model, mine in tokenizers.items():
            other = first.setdefault(model.name, model)
            if tokenizers[other] == mine and (model.trained == DENSE or not dense or mine in dense):
                continue
            other = other if tokenizers[other] != mine else next(iter(dense.values()))
            raise ValueError(
                f"siblings {other.label} and {model.label} have different tokenizers, so they would be asked different "
                "questions: train both with one (data.tokenizer.path)"
            )

    def _check_lengths(self) -> None:
        """Raises ValueError if all lengths are too short for a task. Where only some are, cells are left out."""
        for model in {tokenizer_digest(model.folder): model for model in reversed(self.candidates)}.values():
            for task in self.config.tasks:
                with suppress(UnavailableError):
                    task_named(task).sample(self._opened(model).tokenizer, max(self.config.lengths), CALIBRATION, 0)

    def _groups(self, arms: Sequence[Arm]) -> Iterator[list[Arm]]:
        """Those that are asked together, and each other one alone."""
        together = [arm for arm in arms if self._reads_densely(arm)]
        yield from ([arm] for arm in arms if arm not in together)
        yield together

    def _reads_densely(self, arm: Arm) -> bool:
        return arm.choice is not None and arm.choice.build(Budget(share=1.0)).phases == ("decode",)

    def _missing(
        self,
        folder: ResultsFolder,
        left: dict[str, str],
        arms: list[Arm],
        place: Place,
        progress: Callable[[int], None],
        time_left: Callable[[], float],
    ) -> None:
        """The cells of these arms that are not finished."""
        while arms:
            todo = [arm for arm in arms if _told(arm, place) not in left and not self._has(folder, arm, place)]
            progress(len(arms) - len(todo))
            if todo and self._begun and time_left() <= 0:
                raise TimeUpError
            if todo:
                self._begun = True
                self._cells(folder, left, todo, place, partial(_sooner, time_left, perf_counter() + TOGETHER))
            arms = todo

    def _tried(self, folder: ResultsFolder, left: dict[str, str], what: str, do: Callable[[], Made]) -> Made | None:
        """What this returns; None: it cannot be done, and the folder says why."""
        try:
            return do()
        except (BudgetError, AttachError, NoSampleError) as error:
            self._leave_out(folder, left, what, str(error))
            return None

    def _has(self, folder: ResultsFolder, arm: Arm, place: Place) -> bool:
        share = None if arm.budget is None else share_of(arm.budget, place.length)
        return folder.has(arm.label, share, *place, arm.model.train_seed)

    def _below(self, folder: ResultsFolder, model: Candidate, place: Place) -> str | None:
        """Why methods on a sibling need not be asked: its dense run is below the floor, by the mean over seeds.

        Its dense run is its own, if it was trained dense, else that of the dense-trained sibling nearest in size.
        """
        if not self.config.floor:
            return None

        def dense(of: Candidate) -> Cell | None:
            return folder.cell(f"{of.name}+{DENSE}", None, *place, of.train_seed)

        mine = dense(model)
        others = {of: cell for of in self.candidates if of.trained == DENSE and (cell := dense(of)) is not None}
        if mine is None or not others:
            return "dense was not measured"
        size = mine.parameters
        nearest = min(others, key=lambda of: (of.name != model.name, round(abs(log(others[of].parameters / size)), 6)))
        mean = float(np.mean([cell.mean for of, cell in others.items() if of.name == nearest.name]))
        return None if mean >= self.config.floor else f"dense reaches {mean:.3f}, below {self.config.floor:g}"

    def _opened(self, model: Candidate) -> Opened:
        if self._open is None or self._open[0] != model:
            self._open = self._prompts = None  # before the next one is loaded
            opened = open_model(model.name, model.folder, self.device)
            if (longest := max(self.config.lengths)) > opened.reaches:
                raise ValueError(f"{model.name} reaches {opened.reaches} tokens, lengths ask for {longest}")
            self._prompts = Prompts(
                lambda: opened.reader(DenseForOthers(), dense_layers=[], watch=False, ledger=Ledger())
            )
            self._open = model, opened, export_digest(model.folder), tokenizer_digest(model.folder)
        return self._open[1]

    def _block(self, model: Candidate, place: Place, *, calibrate: bool = False) -> Block:
        tokenizer = self._opened(model).tokenizer
        assert self._open is not None
        task, seed = task_named(place.task), CALIBRATION if calibrate else f"comparison {self.config.seed}"
        count = self.config.calibration_samples if calibrate else self.config.samples
        key = (self._open[3], place.task, place.length, seed)
        if key not in self._samples:
            try:
                samples = [self._limited(task.sample(tokenizer, place.length, seed, i)) for i in range(count)]
            except ValueError as error:
                raise NoSampleError(str(error)) from None
            while len(self._samples) >= KEPT:
                del self._samples[next(iter(self._samples))]
            self._samples[key] = samples
        return Block(task, place.length, place.aware, self._samples[key])

    def _limited(self, sample: Sample) -> Sample:
        """With as many questions as are asked, spread over all of the sample's."""
        there, asked = len(sample.queries), self.config.queries
        if asked is None or there <= asked:
            return sample
        return replace(sample, queries=tuple(sample.queries[i * there // asked] for i in range(asked)))

    # --------------------------------------------------------------------------------------------------- one cell

    def _cells(
        self,
        folder: ResultsFolder,
        left: dict[str, str],
        arms: Sequence[Arm],
        place: Place,
        time_left: Callable[[], float],
    ) -> None:
        """Answer and write cells, batch by batch in turns: as many as there is time for, the first in any case.

        Whatever is begun and not written begins again when it is asked for again.
        """
        cells: list[Asked] = []
        for arm in arms:
            if not cells or time_left() > 0:
                begun = self._tried(folder, left, _told(arm, place), partial(self._begin, folder, arm, place))
                cells += [begun] if begun is not None else []
        done, questions = 0, sum(len(s.queries) for s in self._block(arms[0].model, place).samples) if cells else 0
        while cells and done < questions:
            going: list[Asked] = []
            for cell in cells:
                if (not going or time_left() > 0) and self._tried(folder, left, _told(cell.arm, place), cell.go_on):
                    going.append(cell)
            cells, done = going, len(going[0].answers) if going else 0
            cells = _in_time(cells, (questions - done) / done if done else 0.0, time_left())
        for cell in cells:
            self._tried(folder, left, _told(cell.arm, place), partial(self._write, folder, cell, place))

    def _begin(self, folder: ResultsFolder, arm: Arm, place: Place) -> Asked:
        block = self._block(arm.model, place)
        method = self._method(arm, block)
        assert self._open is not None
        folder.check_weights(arm.model.name, arm.model.train_seed, self._open[2])
        folder.keep_training(arm.model.label, arm.model.folder / CONFIG)
        ledger = Ledger()
        batches, reader = self._ask(arm, method, block, ledger, watch=self.config.watch and method is not None)
        return Asked(arm, method, ledger, reader, batches)

    def _write(self, folder: ResultsFolder, cell: Asked, place: Place) -> None:
        arm, method, ledger, rows = cell.arm, cell.method, cell.ledger, []
        model, block = self._opened(arm.model), self._block(arm.model, place)
        assert self._open is not None
        vocabulary = as_vocabulary(model.tokenizer)
        shared: dict[str, Any] = {
            "arm": arm.label,
            "model": model.name,
            "trained": model.trained,
            "parameters": model.parameters,
            "train_seed": arm.model.train_seed,
            "method": OWN if method is None else method.name,
            "settings": {} if method is None else method.settings(),
            "phases": ["prefill", "decode"] if method is None else list(method.phases),
            "budget": None if arm.budget is None else share_of(arm.budget, block.length),
            "budget_tokens": arm.budget if isinstance(arm.budget, int) and arm.budget > 1 else None,
            "counted": ledger.shares(),
            "task": block.task.name,
            "group": block.task.group,
            "scope": block.task.scope,
            "length": block.length,
            "question_aware": block.aware,
            "dense_layers": self._dense_layers(method),
            "ran": method is None or self._ran(model, method, ledger),
        }
        for answer in cell.answers:
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
        figures = self._figures(model, cell.reader, ledger, block) | self._changes(folder, arm, method, block)
        folder.write(rows, figures, self._open[2])

    def _ask(
        self, arm: Arm, method: Method | None, block: Block, ledger: Ledger, *, watch: bool
    ) -> tuple[Iterator[list[Answer]], Reader]:
        """All answers, batch by batch, counted into the ledger."""
        model = self._opened(arm.model)
        reader = model.reader(method, dense_layers=self._dense_layers(method), watch=watch, ledger=ledger)
        options: dict[str, Any] = {"aware": block.aware, "batch_tokens": self.config.batch_tokens}
        if self._reads_densely(arm):
            options["prompts"] = self._prompts
        return ask(reader, model.tokenizer, block.task, block.samples, **options), reader

    def _ran(self, model: Opened, method: Method, ledger: Ledger) -> bool:
        """Whether the method chose in each layer and phase that it claims."""
        sparse = set(range(model.num_layers)) - set(self.config.dense_layers)
        return {(phase, layer) for phase in method.phases for layer in sparse} <= ledger.ran

    def _dense_layers(self, method: Method | None) -> list[int]:
        return [] if method is None or not method.phases else list(self.config.dense_layers)

    def _figures(self, model: Opened, reader: Any, ledger: Ledger, block: Block) -> dict[str, Any]:
        layers = range(model.num_layers)
        figures: dict[str, Any] = {
            "reads": [None if (r := ledger.shares([n])["reads"]) is None else round(r, DECIMALS) for n in layers],
            "kv_bytes": model.kv_elements * block.length * 2,  # in bf16
        }
        seen = [f for f in getattr(getattr(reader, "session", None), "figures", []) if not f["prompt"]]
        if seen:
            by_layer = [[f for f in seen if f["layer"] == layer] for layer in layers]
            for name in ("sink_mass", "kept_mass"):
                figures[name] = [np.mean([f[name] for f in layer], 0).round(DECIMALS).tolist() for layer in by_layer]
        return figures

    def _changes(self, folder: ResultsFolder, arm: Arm, method: Method | None, block: Block) -> dict[str, Any]:
        """Whether the arm reads what its plans leave out, on one sample of its first cell below a full budget."""
        if not self.config.watch or method is None or not method.phases or arm.is_full(block.length):
            return {}
        budgets = [None] if arm.budget is None else self.config.budgets
        same = [(replace(arm, budget=budget), place) for budget in budgets for place in self.places()]
        if any(self._has(folder, one, place) for one, place in same if not one.is_full(place.length)):
            return {}
        model, dense = self._opened(arm.model), self._dense_layers(method)
        ids = torch.from_numpy(block.samples[0].context.astype(np.int64))[None]
        found = changes(
            lambda ledger: model.reader(method, dense_layers=dense, watch=False, ledger=ledger), method, ids
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
        # Of this training alone, and never kept: the threshold does not depend on what ran before it.
        return arm.choice.build(method.budget, **{method.knob[0]: self._fit(arm, method, block)})

    def _fit(self, arm: Arm, method: Method, block: Block) -> float:
        choice = arm.choice
        assert method.knob is not None and choice is not None
        name, low, high = method.knob
        assert arm.budget is not None
        share = share_of(arm.budget, block.length)
        others = self._block(arm.model, Place(block.task.name, block.length, block.aware), calibrate=True)
        axis = "prefill" if "decode" not in method.phases else self.config.counts

        def spent(threshold: float) -> float:
            ledger = Ledger()
            trial = choice.build(method.budget, **{name: threshold})
            for _ in self._ask(arm, trial, others, ledger, watch=False)[0]:
                pass
            return ledger.shares(beside=False)[axis] or 0.0

        return fit(spent, share, low, high)[0]

    def _leave_out(self, folder: ResultsFolder, left: dict[str, str], what: str, why: str) -> None:
        if what not in left:
            self.say(f"left out: {what}: {why}")
            folder.leave_out(what, why)
            left[what] = why


def _told(arm: Arm, place: Place) -> str:
    """A cell, for people."""
    return f"{arm.told}@{arm.budget} {place}"


def _sooner(time_left: Callable[[], float], end: float) -> float:
    return min(time_left(), end - perf_counter())


def _in_time(cells: list[Asked], rest: float, seconds: float) -> list[Asked]:
    """The first of them, as many as will be done in so many seconds; ``rest``: what is left to do of what was done."""
    total = 0.0
    for number, cell in enumerate(cells):
        total += cell.seconds * rest
        if number and total > seconds:
            return cells[:number]
    return cells
