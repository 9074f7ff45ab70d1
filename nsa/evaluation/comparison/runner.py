"""Runs a comparison: every method on every sibling, at every budget, on the same samples; cell by cell."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import inf, log

import numpy as np

from nsa.baselines import Budget
from nsa.data.tasks import UnavailableError, task_named
from nsa.evaluation.comparison.arms import Arm, Place, Unit, key_of, places_of, units_of
from nsa.evaluation.comparison.cells import CALIBRATION, Cells
from nsa.evaluation.comparison.config import ComparisonConfig, MethodConfig
from nsa.evaluation.comparison.folder import ResultsFolder
from nsa.evaluation.comparison.identity import tokenizer_digest
from nsa.evaluation.comparison.models import Candidate
from nsa.evaluation.comparison.reading.partial import Plan
from nsa.evaluation.comparison.rows import DENSE, Cell, cell_id
from nsa.evaluation.comparison.workers import Workers

LONG = 256  # tokens: a task with longer answers is said to take long
CONTROLS = ("dense", "oracle_topk", "oracle_topp", "random", "sink_window")


class Comparison:
    """See `run`.

    Args:
        candidates: the siblings. say: called with what is left out, and with what takes long.
        device: that answers are computed on; "cuda": on all GPUs, if there are several workers.
        workers: processes that answer at once; 1: this one answers.
    """

    def __init__(
        self,
        config: ComparisonConfig,
        candidates: Sequence[Candidate],
        say: Callable[[str], None],
        device: str = "cpu",
        workers: int = 1,
    ) -> None:
        self.config, self.candidates, self.say = config, candidates, say
        self.device, self.workers = device, workers

    def arms(self, model: Candidate, *, methods: bool) -> Iterator[Arm]:
        """Of a sibling: with ``methods`` those that choose, controls first; without, dense and as it was trained."""
        choices = [MethodConfig(name=name) for name in CONTROLS]
        named = {c.label for c in self.config.methods}
        choices = [c for c in choices if c.label not in named] + list(self.config.methods)
        if not methods and model.trained != DENSE:
            yield Arm(model, None, None)
        for choice in choices:
            if (choice.name != DENSE) == methods:
                method = choice.build(Budget(share=1.0))
                fixed = not method.phases or (method.knob is not None and method.knob[0] in choice.settings)
                for budget in [None] if fixed else self.config.budgets:
                    yield Arm(model, choice, budget)

    @property
    def most(self) -> int:
        """Cells, if dense reaches the floor everywhere."""
        arms = sum(
            1 for model in self.candidates for methods in (False, True) for _ in self.arms(model, methods=methods)
        )
        return arms * len(places_of(self.config))

    def plan(self) -> Plan:
        """All of these cells, and what one note leaves out together."""
        cells, together = dict[str, str](), dict[str, list[str]]()
        for model in self.candidates:
            for place in places_of(self.config):
                own, methods = ([*self.arms(model, methods=those)] for those in (False, True))
                cells |= {arm.told(place): cell_id(*key_of(arm, place)) for arm in own + methods}
                together[methods_on(model, place)] = [arm.told(place) for arm in methods]
        return Plan(cells, together)

    def run(
        self, folder: ResultsFolder, progress: Callable[[float], None], time_left: Callable[[], float] = lambda: inf
    ) -> None:
        """Every cell that is not finished; cell by cell, so that an interruption changes no result. Nor do workers.

        Dense runs come first: they say where methods are asked at all (`ComparisonConfig.floor`). Several processes
        begin with the methods of a place when its dense runs have ended. Methods that choose only while decoding are
        asked in turns, batch by batch, and each batch is read once for all of them.

        Args:
            progress: called with how many cells more are done or left out, parts of cells included.
            time_left: seconds; no cell is begun without any, but for the first.

        Raises:
            TimeUpError: there was no time left.
            WorkerLostError: a worker was killed.
            ResultsError: the folder has answers of another training of a sibling.
            ValueError: siblings that are compared would be asked different questions, or all lengths are too short for
                a task; this is found before anything runs.
        """

        def note(what: str, why: str) -> None:
            self.say(f"left out: {what}: {why}")
            folder.leave_out(what, why)

        here = self.device if self.workers == 1 else "cpu"
        cells = Cells(self.config, folder, note, here, time_left)
        self._check_tokenizers()
        self._check_tasks(cells)
        places = places_of(self.config)
        dense = [
            unit
            for model in self.candidates
            for place in places
            for unit in units_of(list(self.arms(model, methods=False)), place)
        ]
        planned, units = sum(len(unit.arms) for unit in dense), list[Unit]()

        def methods() -> list[Unit]:
            """Those of places whose dense runs have ended since the last call."""
            nonlocal planned, places
            waiting = {unit.place for unit in dense if unit.place in places and cells.missing(unit)}
            ended, found = [place for place in places if place not in waiting], list[Unit]()
            places = [place for place in places if place in waiting]
            for model in self.candidates:
                for place in ended:
                    arms = list(self.arms(model, methods=True))
                    if why := self._below(folder, model, place):
                        planned += 1
                        cells.leave_out(methods_on(model, place), why)
                        progress(len(arms))
                        continue
                    planned += len(arms)
                    found += units_of(arms, place)
            units.extend(found)
            return found

        with Workers(self.workers, cells, self.device, self.say) as workers:
            workers.finish(dense, progress, methods)
        cells.keep_first_changes(units)
        folder.plan(planned)

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

    def _check_tasks(self, cells: Cells) -> None:
        """Raises ValueError if all lengths are too short for a task. Where only some are, cells are left out.

        Says which tasks have long answers.
        """
        length, slow = max(self.config.lengths), dict[str, int]()
        for model in {tokenizer_digest(model.folder): model for model in reversed(self.candidates)}.values():
            for name in self.config.tasks:
                with suppress(UnavailableError):
                    task = task_named(name)
                    sample = task.sample(cells.opened(model).tokenizer, length, CALIBRATION, 0)
                    slow[name] = max(slow.get(name, 0), *map(task.max_new_tokens, sample.queries))
        for name, tokens in slow.items():
            if tokens > LONG:
                self.say(
                    f"{name} takes long: at {length} tokens an answer has up to {tokens} tokens, decoded one at a time"
                )

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


def methods_on(model: Candidate, place: Place) -> str:
    """All methods on a sibling at a place, as they are left out together."""
    return f"methods on {model.label} {place}"
