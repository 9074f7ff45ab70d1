"""What `python -m nsa.compare` does."""

import fcntl
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from nsa.baselines import METHODS, method_named
from nsa.data.tasks import TASKS
from nsa.evaluation.comparison.cells import TimeUpError
from nsa.evaluation.comparison.config import ComparisonConfig, Training, load, trainings_of
from nsa.evaluation.comparison.folder import MANIFEST, Manifest, ResultsFolder, read_manifest, read_results
from nsa.evaluation.comparison.identity import code_digest
from nsa.evaluation.comparison.models import candidate_of
from nsa.evaluation.comparison.reading import packed
from nsa.evaluation.comparison.reading.partial import PLAN
from nsa.evaluation.comparison.reading.report import write_report
from nsa.evaluation.comparison.rows import ResultsError
from nsa.evaluation.comparison.runner import Comparison
from nsa.exporting.folder import CONFIG

# As tqdm has it, but for parts of cells, which are counted and not shown.
BAR = "{l_bar}{bar}| {n:.0f}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def listing() -> str:
    """The methods and the tasks, one a line."""
    methods = [f"  {m.name:<22} {'+'.join(m.phases) or '-':<15} {m.title}" for m in METHODS]
    tasks = [f"  {t.name:<22} {t.group:<15} {t.title}" for t in TASKS]
    return "\n".join(["methods, and the phases in which they choose", *methods, "", "tasks, and their groups", *tasks])


def explanations(names: Sequence[str]) -> str:
    """Each of these methods. Raises ValueError: there are no names, or not such a method."""
    if not names:
        raise ValueError(f"explain: name one or more of {', '.join(method.name for method in METHODS)}")
    return "\n\n".join(map(explain, names))


def explain(name: str) -> str:
    """One method: its axes, source, variant, labels, settings and what its ledger counts.

    Raises:
        ValueError: there is no such method; the message has the nearest name.
    """
    kind = method_named(name)
    lines = [
        ("paper", kind.paper),
        ("unit", kind.axes.unit),
        ("importance", kind.axes.importance),
        ("allocation", kind.axes.allocation),
        ("cache", kind.axes.cache),
        ("phases", ", ".join(kind.phases) or "none"),
        ("prompt", _prompt(kind)),
        ("budget", "its own" if kind.knob is None else "follows from {}, {:g} to {:g}".format(*kind.knob)),
        ("counted", kind.formula),
        ("release", kind.differs or "no difference that is known"),
        ("licence", kind.licence),
        ("settings", ", ".join(f"{name}={value}" for name, value in kind().settings().items()) or "none"),
        ("file", f"nsa/baselines/methods ({kind.__module__.rpartition('.')[2]}.py)"),
    ]
    about = (kind.__doc__ or "").split("\n\n")[0].strip()
    return "\n".join([f"{kind.name}: {kind.title}", f"  {about}", *(f"  {key:<11} {value}" for key, value in lines)])


def _prompt(kind: type) -> str:
    if "prefill" not in kind.phases:  # type: ignore[attr-defined]
        return "dense"
    causal = "no query's choice depends on later tokens" if kind.causal else "choices may depend on later tokens"  # type: ignore[attr-defined]
    return f"{causal}; {'may' if kind.chunkable else 'must not'} come in chunks"  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Work:
    """What a configuration asks for next: its stage, from 0, the configuration up to there, and the trainings."""

    stage: int
    config: ComparisonConfig
    trainings: list[Training]
    whole: ComparisonConfig

    @property
    def left(self) -> list[str]:
        """Names of the stages from this one on."""
        return [stage.name for stage in self.whole.stages[self.stage :]]

    def folder(self, comparison: Comparison) -> ResultsFolder:
        """Begun, or gone on with. Raises ResultsError if it holds something else."""
        manifest = Manifest(
            config=self.whole.model_dump(mode="json"),
            code=code_digest(),
            commit=_commit(),
            versions=_versions(),
            hardware=_hardware(),
            planned=comparison.most,
            stage=self.stage,
            started=_now(),
        )
        folder = ResultsFolder(self.whole.folder, manifest)
        folder.keep_plan(comparison.plan())
        return folder

    def comparison(self, device: str = "cpu", workers: int = 1) -> Comparison:
        candidates = [candidate_of(training) for training in self.trainings if training.sibling.compared]
        return Comparison(self.config, candidates, lambda text: tqdm.write(text, file=sys.stderr), device, workers)


def work_of(path: str, overrides: list[str]) -> Work:
    """What is to be done next: the first stage that is not finished, or the last one."""
    whole = load(path, overrides)
    stage = 0
    if (whole.folder / MANIFEST).is_file():
        there = read_manifest(whole.folder)
        stage = there.stage + (there.finished is not None)
    stage = max(0, min(stage, len(whole.stages) - 1))
    config = whole.up_to(stage)
    return Work(stage, config, trainings_of(config, path), whole)


def stages_left(path: str, overrides: list[str]) -> list[str]:
    """Names of the stages that are not finished; the last one if all are."""
    return work_of(path, overrides).left


def untrained(path: str, overrides: list[str]) -> list[Training]:
    """The trainings that have no export yet.

    Raises:
        ResultsError: the results folder is of other code or another configuration. It is begun here, so that trainings
            and answers are of one code.
    """
    work = work_of(path, overrides)
    todo = [t for t in work.trainings if t.arguments is not None and not (t.export / CONFIG).is_file()]
    if todo:
        work.folder(work.comparison())
    return todo


def compare(path: str, overrides: list[str], minutes: float | None = None, workers: int = 1) -> bool:
    """Run the next stage of a comparison and write its report; goes on where it was interrupted.

    Args:
        minutes: stop before the cell that would begin after so long, but for the first; None: when all is done.
        workers: processes that answer at once, spread over the GPUs; they change no answer.

    Returns:
        Whether the stage is done.

    Raises:
        WorkerLostError: a worker was killed.
        ValueError: a mistake in the configuration, or a model that is not there.
    """
    end = None if minutes is None else time.monotonic() + 60 * minutes
    work = work_of(path, overrides)
    for training in work.trainings:
        if training.arguments is not None and training.sibling.compared and not (training.export / CONFIG).is_file():
            raise ValueError(
                f"sibling {training.sibling.name} is not trained yet: bash launch.sh compare {path}; or python -m "
                f"nsa.train {' '.join(training.arguments)}, then python -m nsa.export {training.run}"
            )
    comparison = work.comparison("cuda" if torch.cuda.is_available() else "cpu", workers)
    with alone_in(work.whole.folder):
        folder = work.folder(comparison)
        seldom = 1 if sys.stderr.isatty() else 30
        options: dict[str, Any] = {"unit": "cell", "mininterval": seldom, "bar_format": BAR}
        with tqdm(total=comparison.most, desc=work.whole.name, **options) as bar:
            try:
                comparison.run(folder, bar.update, lambda: inf if end is None else end - time.monotonic())
            except TimeUpError:
                return False
            except torch.OutOfMemoryError as error:
                if workers > 1:  # each has tried with smaller batches
                    alone = "out of memory, one sample at a time and with no other worker left"
                    what = "end what else uses the GPU and run the same command again, or compare at shorter lengths"
                    raise ValueError(f"{alone}: {what} ({error})") from None
                lower = f"batch_tokens={work.whole.batch_tokens // 2}"
                if work.whole.decode_batch_tokens is not None:
                    lower += f" and decode_batch_tokens={work.whole.decode_batch_tokens // 2}"
                raise ValueError(f"out of memory: read less at once, {lower} ({error})") from None
        folder.finish(_now())
        report(work.whole.folder)
    if len(work.left) > 1:
        print(f"stage {work.left[0]} is done; run the same command again for {work.left[1]}")
    return True


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Within: no other process answers into this folder. A process that is killed gives it free.

    Raises:
        ResultsError: another one does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResultsError(f"another process writes into {folder}: wait for its end, or stop it") from None
        yield


def report(folder: str | Path, pack_into: str | None = None, partial: bool = False) -> None:
    """Write the report of results beside them, and say where.

    Args:
        folder: of results. pack_into: another folder, which gets the results in few files, and the report.
        partial: the comparison may have been stopped.

    Raises:
        ResultsError: the folder is no finished comparison; the message says what to do.
    """
    if not str(folder):
        raise ResultsError("name a results folder: python -m nsa.compare report FOLDER")
    if pack_into is not None:
        pack(Path(folder), Path(pack_into), partial)
        write_report(pack_into)
    elif partial:
        write_report(folder, partial=True)
    else:
        write_report(folder)


def pack(folder: Path, out: Path, partial: bool = False) -> None:
    """Write results in few files into another folder. ``partial``: the comparison may have been stopped.

    Raises:
        ResultsError: the results are not finished, or the other folder is not there to be written.
    """
    results = read_results(folder, partial)
    if out.resolve() == folder.resolve():
        raise ResultsError(f"{out} holds the results themselves: name another folder to pack them into")
    heads = {name: {"origin": results.manifest.origin, "made": made} for name, made in results.made.items()}
    packed.write({cell.id: cell for cell in results.cells}, heads, folder, out)
    if results.planned is not None:
        shutil.copyfile(folder / PLAN, out / PLAN)
    else:
        (out / PLAN).unlink(missing_ok=True)  # of a pack that was made before the end


def _commit() -> str:
    """Of this project's code; with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return (commit or "unknown") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


__all__ = ["compare", "explain", "listing", "pack", "report", "stages_left", "untrained", "work_of"]
