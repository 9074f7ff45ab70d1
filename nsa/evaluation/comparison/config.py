"""The configuration of a comparison: siblings, methods, budgets, tasks."""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from nsa import strict_yaml
from nsa.baselines import Budget, Method, method_named
from nsa.config import load_config
from nsa.data.tasks import task_named
from nsa.schema import Section, shell_path


class SiblingConfig(Section):
    """A model. Siblings have the same data, steps and size, and differ in their attention."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name in the tables, such as nsa")
    export: str | None = Field(None, description="folder of an export, or of a Hugging Face Llama, Qwen or Mistral")
    config: str | None = Field(
        None, description="configuration that the comparison trains the sibling with; path relative to this file"
    )
    overrides: list[str] = Field(default=[], description="key=value overrides of config")
    seeds: list[int] = Field(
        default=[],
        description="the sibling is trained once per seed; {seed} in export and overrides is the current one. []: once",
    )
    compared: bool = Field(True, description="false: only train it, because others start from it")

    @model_validator(mode="after")
    def _one_origin(self) -> "SiblingConfig":
        if (self.export is None) == (self.config is None):
            raise ValueError(f"sibling {self.name} needs either export (a folder) or config (to train it)")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"sibling {self.name} has a seed twice")
        if self.export is not None and len({self.export.replace("{seed}", str(s)) for s in self.seeds}) < len(
            self.seeds
        ):
            raise ValueError(f"sibling {self.name} has seeds, so its export needs {{seed}} in the folder's name")
        return self


class StageConfig(Section):
    """A part of a comparison that has a report of its own. It adds to those before it."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="name in messages")
    siblings: list[str] = Field(default=[], description="names of siblings that take part from this stage on")
    methods: list[str] = Field(default=[], description="methods, as in the tables, that take part from this stage on")


class MethodConfig(Section):
    """A method, and settings other than its defaults.

    A setting that says the default is left out, so that the arm is the same. Its `Method.knob` stays: said, it is not
    fitted.
    """

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="as `python -m nsa.compare list` shows")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> "MethodConfig":
        kind = method_named(self.name)
        there = {f.name: f.default for f in fields(kind) if f.name != "budget"}
        for name, value in self.settings.items():
            if name not in there:
                near = difflib.get_close_matches(name, there, 1)
                hint = f": did you mean {near[0]}?" if near else f": it has {', '.join(there) or 'none'}"
                raise ValueError(f"method {self.name} has no setting {name}{hint}")
            if isinstance(there[name], Method):
                raise ValueError(f"method {self.name}: {name} is a method, which no file can give: leave it out")
            if isinstance(there[name], bool) != isinstance(value, bool):
                only = "must" if isinstance(there[name], bool) else "cannot"
                raise ValueError(f"method {self.name}: {name} {only} be true or false, got {value!r}")
        try:
            self.build(Budget(share=1.0))
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {self.name}: {error}") from error
        knob = kind.knob[0] if kind.knob else None
        for name, value in self.settings.items():
            if value == there[name] and name != knob and self.model_extra is not None:
                del self.model_extra[name]
        return self

    def build(self, budget: Budget, **knob: float) -> Method:
        """The method at this budget."""
        return method_named(self.name)(budget=budget, **self.settings | knob)

    @property
    def label(self) -> str:
        """The name, and the settings that are not the defaults."""
        return "".join([self.name, *(f",{name}={value}" for name, value in sorted(self.settings.items()))])


class ComparisonConfig(Section):
    """Which models, put through which methods at which budgets, on which tasks.

    The lists of siblings, methods and stages may grow when there are results already: no cell depends on them.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the results folder")
    output_dir: str = Field("checkpoints", description="where the results folder is made")
    siblings: list[SiblingConfig] = Field(min_length=1)
    methods: list[MethodConfig] = Field(
        min_length=1, description="names, or mappings with settings; the controls are always there"
    )
    budgets: list[float | int] = Field(
        min_length=1, description="a share in (0, 1] of the tokens so far, or a number of tokens"
    )
    counts: Literal["attended", "reads"] = Field(
        "attended",
        description="what budgets count. attended: tokens attended to; reads: also what is read to choose them",
    )
    tasks: list[str] = Field(min_length=1, description="as `python -m nsa.compare list` shows")
    lengths: list[int] = Field(min_length=1, description="tokens of a sample, its questions and answers included")
    samples: int = Field(32, ge=1, description="samples per task and length; all arms answer the same")
    queries: int | None = Field(None, ge=1, description="questions of a sample that are asked at most; null: all")
    question: list[Literal["after", "before"]] = Field(
        default=["after"],
        min_length=1,
        description="after: the question comes after the prompt was read (and thinned out); before: the question is "
        "part of the prompt",
    )
    batch_tokens: int = Field(16384, ge=1, description="most tokens of prompts that are read at once")
    decode_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of prompts that arms read at once if they leave prompts dense; such arms need less "
        "memory; null: as batch_tokens",
    )
    calibration_samples: int = Field(2, ge=1, description="samples by which a method's threshold is fitted to a budget")
    dense_layers: list[int] = Field(default=[], description="layers that stay dense in all methods, disclosed")
    watch: bool = Field(
        True, description="also measure kept attention, attention to the first tokens, and reads outside of the plans"
    )
    floor: float = Field(
        0.0, ge=0, le=1, description="methods are asked only where dense reaches this score; 0: everywhere"
    )
    stages: list[StageConfig] = Field(
        default=[], description="the order of the work, with a report after each; empty: all at once"
    )
    trainings_per_gpu: int = Field(
        1,
        ge=1,
        description="siblings that one GPU trains at once, with --workers; raise it for small siblings",
    )
    seed: int = Field(0, ge=0, description="seed of the samples")

    @field_validator("methods", mode="before")
    @classmethod
    def _as_mappings(cls, values: Any) -> Any:
        return [{"name": v} if isinstance(v, str) else v for v in values] if isinstance(values, list) else values

    @field_validator("methods")
    @classmethod
    def _different(cls, values: list[MethodConfig]) -> list[MethodConfig]:
        labels = [method.label for method in values]
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"method {min(twice)} is there twice")
        return values

    @field_validator("tasks")
    @classmethod
    def _known_tasks(cls, values: list[str]) -> list[str]:
        for value in values:
            task_named(value)
        return values

    @field_validator("budgets")
    @classmethod
    def _as_budgets(cls, values: list[float | int]) -> list[float | int]:
        for value in values:
            budget_of(value, "attended")
        return values

    @model_validator(mode="after")
    def _names_differ(self) -> "ComparisonConfig":
        names = [sibling.name for sibling in self.siblings]
        if len(set(names)) < len(names):
            raise ValueError("two siblings have the same name")
        for key in ("tasks", "lengths", "question"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} has a value twice")
        for length in self.lengths:
            shares = [share_of(budget, length) for budget in self.budgets]
            if len(set(shares)) < len(shares):
                raise ValueError(f"two budgets are the same at {length} tokens: leave one out")
        if not any(sibling.compared for sibling in self.siblings):
            raise ValueError("no sibling is compared")
        if self.stages:
            _all_once("sibling", names, [name for stage in self.stages for name in stage.siblings])
            labels = [method.label for method in self.methods]
            _all_once("method", labels, [label for stage in self.stages for label in stage.methods])
        return self

    def up_to(self, stage: int) -> "ComparisonConfig":
        """With the siblings and methods of the stages up to this one, from 0, in the order of the stages."""
        if not self.stages:
            return self
        siblings = {sibling.name: sibling for sibling in self.siblings}
        methods = {method.label: method for method in self.methods}
        parts = self.stages[: stage + 1]
        return self.model_copy(
            update={
                "siblings": [siblings[name] for part in parts for name in part.siblings],
                "methods": [methods[label] for part in parts for label in part.methods],
            }
        )

    @property
    def folder(self) -> Path:
        """Of the results."""
        return Path(shell_path(self.output_dir)) / self.name


def budget_of(value: float | int, counts: str) -> Budget:
    """A budget of a configuration: a whole number above 1 is tokens, else it is a share.

    Raises:
        ValueError: out of range.
    """
    if value > 1 and value == int(value):
        return Budget(tokens=int(value), counts=counts)
    return Budget(share=float(value), counts=counts)


def share_of(value: float | int, length: int) -> float:
    """A budget of a configuration as a share of ``length`` tokens; 1 if it has as many or more."""
    budget = budget_of(value, "attended")
    return min(1.0, budget.tokens / length) if budget.tokens is not None else float(value)


def load(path: str | Path, overrides: list[str] | None = None) -> ComparisonConfig:
    """Read a comparison's YAML file, with ``key=value`` overrides. Raises ConfigError that lists all problems."""
    return strict_yaml.load(ComparisonConfig, path, overrides or [])


def _all_once(what: str, there: list[str], named: list[str]) -> None:
    """Raises ValueError unless the stages name each of ``there`` once."""
    for name in named:
        if name not in there:
            near = difflib.get_close_matches(name, there, 1)
            raise ValueError(f"stages: there is no {what} {name}" + (f": did you mean {near[0]}?" if near else ""))
    wrong = [name for name in there if named.count(name) != 1]
    if wrong:
        raise ValueError(f"stages: {what} {wrong[0]} must be in one stage, not in {named.count(wrong[0])}")


@dataclass(frozen=True)
class Training:
    """One training of a sibling, or its only export.

    seed: None: the sibling has no list of them. export: its folder. arguments: of `nsa.train`; None: it is not trained
    here. run: the folder of its run.
    """

    sibling: SiblingConfig
    seed: int | None
    export: Path
    arguments: list[str] | None = None
    run: Path | None = None


def trainings_of(config: ComparisonConfig, path: str | Path) -> list[Training]:
    """All trainings of all siblings, in order. ``path``: of the comparison's file."""
    pairs = [(sibling, seed) for sibling in config.siblings for seed in (*sibling.seeds,) or (None,)]
    return [_training(config, sibling, seed, Path(path)) for sibling, seed in pairs]


def _training(config: ComparisonConfig, sibling: SiblingConfig, seed: int | None, path: Path) -> Training:
    def filled(text: str) -> str:
        return text if seed is None else text.replace("{seed}", str(seed))

    if sibling.config is None:
        return Training(sibling, seed, Path(shell_path(filled(sibling.export or ""))))
    training = Path(shell_path(sibling.config))
    if not training.is_absolute():
        training = path.parent / training
    name = f"{config.name}-{sibling.name}" + ("" if seed is None else f"-{seed}")
    overrides = [f"name={name}", *([] if seed is None else [f"seed={seed}"]), *map(filled, sibling.overrides)]
    run = load_config(training, overrides)
    folder = Path(run.output_dir) / run.name
    return Training(sibling, seed, folder / "export", [str(training), *overrides], folder)
