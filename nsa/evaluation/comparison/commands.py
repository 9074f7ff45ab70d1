"""What `python -m nsa.compare` does."""

import platform
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from nsa.baselines import METHODS, method_named
from nsa.data.tasks import TASKS
from nsa.evaluation.comparison.config import ComparisonConfig, load, training_of
from nsa.evaluation.comparison.folder import ResultsFolder
from nsa.evaluation.comparison.models import Opened, open_model
from nsa.evaluation.comparison.report import write_report
from nsa.evaluation.comparison.rows import ResultsError
from nsa.evaluation.comparison.runner import Comparison, manifest_of
from nsa.exporting.folder import CONFIG
from nsa.schema import shell_path


def listing() -> str:
    """The methods and the tasks, one a line."""
    methods = [f"  {m.name:<22} {'+'.join(m.phases) or '-':<15} {m.title}" for m in METHODS]
    tasks = [f"  {t.name:<22} {t.group:<15} {t.title}" for t in TASKS]
    return "\n".join(["methods, and the phases in which they choose", *methods, "", "tasks, and their groups", *tasks])


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


def untrained(path: str, overrides: list[str]) -> Iterator[list[str]]:
    """For each sibling that has no export yet: its run folder, and the arguments of `nsa.train`."""
    config = load(path, overrides)
    for sibling in config.siblings:
        if sibling.config is not None:
            arguments, run = training_of(config, sibling, path)
            if not (run / "export" / CONFIG).is_file():
                yield [str(run), *arguments]


def compare(path: str, overrides: list[str]) -> None:
    """Run a comparison and write its report; goes on where it was interrupted.

    Raises:
        ValueError: a mistake in the configuration, or a model that is not there.
    """
    config = load(path, overrides)
    models = [open_model(s.name, _folder(config, s, path)) for s in config.siblings if s.compared]
    for model in models:
        if (longest := max(config.lengths)) > model.reaches:
            raise ValueError(f"{model.name} reaches {model.reaches} tokens, lengths ask for {longest}")
    comparison = Comparison(config, models, lambda text: tqdm.write(text, file=sys.stderr))
    planned = len(list(comparison.arms())) * len(comparison.blocks())
    folder = ResultsFolder(config.folder, manifest_of(config, planned, _commit(), _versions(), _hardware()))
    with tqdm(total=planned, unit="cell", desc=config.name, mininterval=1 if sys.stderr.isatty() else 30) as bar:
        comparison.run(folder, lambda cells: bar.update(cells))
    folder.finish(datetime.now(UTC).isoformat(timespec="seconds"))
    report(config.folder)


def report(folder: str | Path) -> None:
    """Write the report of finished results beside them, and say where.

    Raises:
        ResultsError: the folder is no finished comparison; the message says what to do.
    """
    if not str(folder):
        raise ResultsError("name a results folder: python -m nsa.compare report FOLDER")
    write_report(folder)


def _folder(config: ComparisonConfig, sibling, path: str) -> Path:  # type: ignore[no-untyped-def]
    if sibling.export is not None:
        return Path(shell_path(sibling.export))
    arguments, run = training_of(config, sibling, path)
    if not (run / "export" / CONFIG).is_file():
        raise ValueError(
            f"sibling {sibling.name} is not trained yet: bash launch.sh compare {path}; or python -m nsa.train "
            f"{' '.join(arguments)}, then python -m nsa.export {run}"
        )
    return run / "export"


def _commit() -> str:
    """Of this project's code; with a plus where files differ from it."""

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""

    commit = git("rev-parse", "HEAD")
    return (commit or "unknown") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


__all__ = ["Opened", "compare", "explain", "listing", "report", "untrained"]
