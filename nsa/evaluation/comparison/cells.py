"""Answers cells: all answers of one arm to one task. Cells whose methods leave prompts dense are answered together."""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from time import perf_counter
from typing import Any, TypeVar

import numpy as np
import torch

from nsa.baselines import Budget, BudgetError, Ledger, Method
from nsa.baselines.methods.dense import DenseForOthers
from nsa.data.tasks import Sample, Task, as_vocabulary, task_named
from nsa.evaluation.comparison.answers import Answer, ask
from nsa.evaluation.comparison.arms import Arm, Place, Unit, key_of, places_of
from nsa.evaluation.comparison.begun import Begun
from nsa.evaluation.comparison.config import ComparisonConfig, budget_of, share_of
from nsa.evaluation.comparison.decoding import AttachError, Prompts, Reader
from nsa.evaluation.comparison.folder import ResultsFolder
from nsa.evaluation.comparison.identity import export_digest, tokenizer_digest
from nsa.evaluation.comparison.leaks import changes
from nsa.evaluation.comparison.models import Candidate, Opened, open_model
from nsa.evaluation.comparison.rows import OWN, Row
from nsa.exporting.folder import CONFIG
from nsa.training.memory import is_memory

CALIBRATION = "calibration"  # the seed of samples that no result is measured on
KEPT = 8  # lists of samples: those of one place of a sibling, and some
DECIMALS = 5  # of figures: a folder of many cells stays small
TOGETHER = 600.0  # seconds that cells are answered together, at most, if one alone takes less: then they are written
STEPS = 12  # of bisection
CLOSE = 0.01  # relative: of what is spent to the budget


class TimeUpError(Exception):
    """The time that was given is over; everything that was answered is written."""


class NoSampleError(ValueError):
    """A task has no samples of this length."""


@dataclass(frozen=True)
class Block:
    """The questions of one cell."""

    task: Task
    length: int
    aware: bool
    samples: list[Sample]


@dataclass
class Asked:
    """A cell while it is answered. ``begun``: what is known of it so far."""

    arm: Arm
    block: Block
    method: Method | None
    reader: Reader
    batches: Iterator[list[Answer]]
    begun: Begun

    def go_on(self) -> bool:
        """Answer the next batch. True."""
        start = perf_counter()
        found = next(self.batches)
        self.begun.add(found, self.begun.seconds + perf_counter() - start, figures_of(self.reader))
        return True


def figures_of(reader: Reader) -> list[dict[str, Any]]:
    """What was seen of a reader's attention; empty: it is not watched."""
    return getattr(getattr(reader, "session", None), "figures", [])


Made = TypeVar("Made")


class Cells:
    """Answers cells into a folder, and says which cannot be.

    Args:
        note: called with what is left out, and why. device: that answers are computed on. time_left: in seconds.
    """

    def __init__(
        self,
        config: ComparisonConfig,
        folder: ResultsFolder,
        note: Callable[[str, str], None],
        device: torch.device | str,
        time_left: Callable[[], float],
    ) -> None:
        self.config, self.folder, self.note, self.device, self.time_left = config, folder, note, device, time_left
        self.left = folder.left_out()
        self._parts = 1  # a batch is read in so many
        self._begun = False  # the first cell of a run is answered whatever the time, so that every run gets further
        self._open: tuple[Candidate, Opened, str, str] | None = None  # one at a time: memory; with its fingerprints
        self._prompts: Prompts | None = None  # of this model
        self._samples: dict[tuple[Any, ...], list[Sample]] = {}

    def finish(self, unit: Unit, progress: Callable[[float], None]) -> None:
        """Answer what is missing of these cells.

        Args:
            progress: called with how many cells more are done or left out, parts of cells included.

        Raises:
            TimeUpError: no time is left; not before the first cell of a run is done.
            torch.OutOfMemoryError: the memory is too small; what was answered is kept.
            ValueError: a file cannot be written or read.
        """
        told = dict.fromkeys(unit.arms, 0.0)  # of each cell

        def tell(arm: Arm, part: float) -> None:
            progress(part - told[arm])
            told[arm] = part

        some = unit.arms
        while some:
            missing = self.missing(Unit(some, unit.place))
            for arm in some:
                if arm not in missing:
                    tell(arm, 1.0)
            if missing and self._begun and self.time_left() <= 0:
                raise TimeUpError
            if missing:
                self._begun = True
                try:
                    self._answer(missing, unit.place, tell)
                except RuntimeError as error:
                    if not is_memory(error):
                        raise
                    progress(-sum(told.values()))  # told again, if these cells are tried again
                    raise torch.OutOfMemoryError(str(error)) from error
                except OSError as error:  # such as a full disk
                    kept = f"The answers so far are in {self.folder.path}"
                    raise ValueError(f"{error}. {kept}: mend this, and run the same command again") from error
            some = missing

    def free(self) -> None:
        """Give back what a call has read that failed since the memory was full."""
        self._begun = False  # nothing is answered
        if self._prompts is not None:
            self._prompts.forget()
        gc.collect()  # what the failed call held in cycles
        torch.cuda.empty_cache()

    def read_less(self, unit: Unit) -> int | None:
        """Of these cells, read half as much at once as before, until `read_all`.

        Returns:
            Tokens of prompts; None: it is one sample already, or the model has no place.
        """
        if self._open is None or self._open[0] != unit.model:
            return None
        methods = [None if arm.choice is None else arm.choice.build(Budget(share=1.0)) for arm in unit.arms]
        shortest = min(len(sample.context) for sample in self._block(unit.model, unit.place).samples)
        if (tokens := max(map(self._at_once, methods))) < 2 * shortest:
            return None
        self._parts *= 2
        return tokens // 2

    def read_all(self) -> None:
        """Read as much at once as is configured."""
        self._parts = 1

    def _at_once(self, method: Method | None) -> int:
        """Tokens of prompts."""
        tokens = self.config.batch_tokens
        if method is not None and "prefill" not in method.phases:
            tokens = self.config.decode_batch_tokens or tokens
        return tokens // self._parts

    def missing(self, unit: Unit) -> tuple[Arm, ...]:
        """Arms whose cells are neither finished nor left out."""
        place = unit.place
        return tuple(arm for arm in unit.arms if arm.told(place) not in self.left and not self._has(arm, place))

    def leave_out(self, what: str, why: str) -> None:
        if what not in self.left:
            self.note(what, why)
            self.left[what] = why

    def _has(self, arm: Arm, place: Place) -> bool:
        return self.folder.has(*key_of(arm, place))

    def opened(self, model: Candidate) -> Opened:
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
        tokenizer = self.opened(model).tokenizer
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

    # ------------------------------------------------------------------------------------------ cells, in turns

    def _answer(self, arms: Sequence[Arm], place: Place, tell: Callable[[Arm, float], None]) -> None:
        """Answer and write cells, batch by batch in turns: as many as there is time for, the first in any case.

        What is begun and not written here is gone on with when it is asked for again.

        Args:
            tell: called with a cell and the part of it that is answered.
        """
        end = perf_counter() + TOGETHER
        cells: list[Asked] = []
        for arm in arms:
            if not cells or self._rest(end) > 0:
                begun = self._tried(arm, place, partial(self._begin, arm, place))
                cells += [begun] if begun is not None else []
        questions = sum(len(sample.queries) for sample in cells[0].block.samples) if cells else 0
        while cells and (fewest := min(len(cell.begun.answers) for cell in cells)) < questions:
            answered: list[Asked] = []
            for cell in cells:
                if answered and seconds_for([*answered, cell], questions) > self._rest(end):
                    break
                # Who is ahead waits, so that prompts are read for all.
                if len(cell.begun.answers) > fewest or self._tried(cell.arm, place, cell.go_on):
                    answered.append(cell)
                    tell(cell.arm, len(cell.begun.answers) / questions)
            cells = answered
        if self._prompts is not None:
            self._prompts.forget()
        for cell in cells:
            self._tried(cell.arm, place, partial(self._write, cell, place))

    def _rest(self, end: float) -> float:
        """Seconds until the time that was given is over, or the time for cells that are answered together."""
        return min(self.time_left(), end - perf_counter())

    def _tried(self, arm: Arm, place: Place, do: Callable[[], Made]) -> Made | None:
        """What this returns; None: it cannot be done, and the folder says why."""
        try:
            return do()
        except (BudgetError, AttachError, NoSampleError) as error:
            self.leave_out(arm.told(place), str(error))
            self.folder.forget(*key_of(arm, place))
            return None

    def _begin(self, arm: Arm, place: Place) -> Asked:
        block = self._block(arm.model, place)
        assert self._open is not None
        self.folder.check_weights(arm.model.name, arm.model.train_seed, self._open[2])
        self.folder.keep_training(arm.model.label, arm.model.folder / CONFIG)
        begun = self.folder.begun(self._open[2], *key_of(arm, place))
        method = self._method(arm, block, begun)
        batches, reader = self._ask(
            arm,
            method,
            block,
            begun.ledger,
            watch=self.config.watch and method is not None,
            answered={(answer.sample, answer.query) for answer in begun.answers},
        )
        figures_of(reader).extend(begun.figures)
        begun.begin(None if method is None or method.knob is None else getattr(method, method.knob[0]))
        return Asked(arm, block, method, reader, batches, begun)

    def _write(self, cell: Asked, place: Place) -> None:
        arm, block, method, ledger, rows = cell.arm, cell.block, cell.method, cell.begun.ledger, []
        model = self.opened(arm.model)
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
        for answer in cell.begun.answers:
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
        figures = self._figures(model, cell.reader, ledger, block) | self._changes(arm, method, block)
        self.folder.write(rows, figures, self._open[2])

    def _ask(
        self,
        arm: Arm,
        method: Method | None,
        block: Block,
        ledger: Ledger,
        *,
        watch: bool,
        answered: Collection[tuple[int, int]] = (),
    ) -> tuple[Iterator[list[Answer]], Reader]:
        """All answers but those that are there, batch by batch, counted into the ledger."""
        model = self.opened(arm.model)
        reader = model.reader(method, dense_layers=self._dense_layers(method), watch=watch, ledger=ledger)
        options: dict[str, Any] = {"aware": block.aware, "batch_tokens": self._at_once(method), "answered": answered}
        if arm.leaves_prompts_dense:
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
        seen = [f for f in figures_of(reader) if not f["prompt"]]
        if seen:
            by_layer = [[f for f in seen if f["layer"] == layer] for layer in layers]
            for name in ("sink_mass", "kept_mass"):
                figures[name] = [np.mean([f[name] for f in layer], 0).round(DECIMALS).tolist() for layer in by_layer]
        return figures

    def _changes(self, arm: Arm, method: Method | None, block: Block) -> dict[str, Any]:
        """Whether the arm reads what its plans leave out, on one sample of its first cell below a full budget.

        It is looked at unless a cell before this one is there. With several processes a cell before this one may come
        later: `keep_first_changes` takes out what is too much.
        """
        if not self.config.watch or method is None or not method.phases or arm.is_full(block.length):
            return {}
        here = arm, Place(block.task.name, block.length, block.aware)
        if any(self._has(*cell) for cell in takewhile(lambda cell: cell != here, self._below_full(arm))):
            return {}
        model, dense = self.opened(arm.model), self._dense_layers(method)
        ids = torch.from_numpy(block.samples[0].context.astype(np.int64))[None]
        found = changes(
            lambda ledger: model.reader(method, dense_layers=dense, watch=False, ledger=ledger), method, ids
        )
        return {"changes": found} if found else {}

    def _below_full(self, arm: Arm) -> list[tuple[Arm, Place]]:
        """The cells of an arm at all budgets, without full ones, in the order in which one process answers them."""
        budgets = [None] if arm.budget is None else self.config.budgets
        cells = [(replace(arm, budget=budget), place) for place in places_of(self.config) for budget in budgets]
        return [(one, place) for one, place in cells if not one.is_full(place.length)]

    def keep_first_changes(self, units: Sequence[Unit]) -> None:
        """Of all cells of an arm only the first has ``changes``, in whichever order they were answered."""
        for arm in {arm.key: arm for unit in units for arm in unit.arms}.values():
            for cell in [cell for cell in self._below_full(arm) if self._has(*cell)][1:]:
                self.folder.drop_figure("changes", *key_of(*cell))

    def _method(self, arm: Arm, block: Block, begun: Begun) -> Method | None:
        """The method of an arm; a threshold is fitted to its budget by what it spends on other samples.

        ``begun``: has the threshold, if it was fitted before, or those that were tried.
        """
        if arm.choice is None:
            return None
        if arm.budget is None:
            return arm.choice.build(Budget(share=1.0))
        method = arm.choice.build(budget_of(arm.budget, self.config.counts))
        if method.knob is None:
            return method
        # Of this cell alone: the threshold does not depend on what ran before it.
        fitted = self._fit(arm, method, block, begun) if begun.threshold is None else begun.threshold
        return arm.choice.build(method.budget, **{method.knob[0]: fitted})

    def _fit(self, arm: Arm, method: Method, block: Block, begun: Begun) -> float:
        choice = arm.choice
        assert method.knob is not None and choice is not None and arm.budget is not None
        name, low, high = method.knob
        others = self._block(arm.model, Place(block.task.name, block.length, block.aware), calibrate=True)
        begun.begin(None)

        def spent(threshold: float) -> float:
            if threshold not in begun.tried:
                trial = choice.build(method.budget, **{name: threshold})
                begun.keep_trial(threshold, self._spent(arm, trial, others))
            return begun.tried[threshold]

        return fit(spent, share_of(arm.budget, block.length), low, high)[0]

    def _spent(self, arm: Arm, method: Method, block: Block) -> float:
        ledger = Ledger()
        for _ in self._ask(arm, method, block, ledger, watch=False)[0]:
            pass
        axis = "prefill" if "decode" not in method.phases else self.config.counts
        return ledger.shares(beside=False)[axis] or 0.0


def seconds_for(cells: Sequence[Asked], questions: int) -> float:
    """What is left to do will take so long, by what it took so far; one that has not begun takes what another takes."""
    left = whole = 0.0
    for begun in (cell.begun for cell in cells):
        if begun.answers:
            whole = begun.seconds * questions / len(begun.answers)
        left += whole - begun.seconds
    return left


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
