"""The configuration of a comparison: siblings, methods, budgets, tasks."""

import difflib
from dataclasses import fields
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

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="in the tables, such as nsa")
    export: str | None = Field(None, description="its folder: an export, or a Hugging Face Llama, Qwen or Mistral")
    config: str | None = Field(
        None, description="a training configuration, if it is trained for this comparison; relative to this file"
    )
    overrides: list[str] = Field(default=[], description="key=value, of that configuration")
    compared: bool = Field(True, description="false: it is trained only, since others start from it")

    @model_validator(mode="after")
    def _one_origin(self) -> "SiblingConfig":
        if (self.export is None) == (self.config is None):
            raise ValueError(f"sibling {self.name} needs either export (a folder) or config (to train it)")
        return self


class MethodConfig(Section):
    """A method, and settings other than its defaults."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(description="as `python -m nsa.compare list` shows")

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def _known(self) -> "MethodConfig":
        kind = method_named(self.name)
        there = [f.name for f in fields(kind) if f.name != "budget"]
        for name in self.settings:
            if name not in there:
                near = difflib.get_close_matches(name, there, 1)
                hint = f": did you mean {near[0]}?" if near else f": it has {', '.join(there) or 'none'}"
                raise ValueError(f"method {self.name} has no setting {name}{hint}")
        try:
            self.build(Budget(share=1.0))
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {self.name}: {error}") from error
        return self

    def build(self, budget: Budget, **knob: float) -> Method:
        """The method at this budget."""
        return method_named(self.name)(budget=budget, **self.settings | knob)

    @property
    def label(self) -> str:
        """The name, and the settings that are not the defaults."""
        return "".join([self.name, *(f",{name}={value}" for name, value in sorted(self.settings.items()))])


class ComparisonConfig(Section):
    """Which models, put through which methods at which budgets, on which tasks."""

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
        "attended", description="attended: a budget is tokens attended to; reads: with what is read to choose them"
    )
    tasks: list[str] = Field(min_length=1, description="as `python -m nsa.compare list` shows")
    lengths: list[int] = Field(min_length=1, description="tokens of a sample, its questions and answers included")
    samples: int = Field(32, ge=1, description="samples per task and length; all arms answer the same")
    question: list[Literal["after", "before"]] = Field(
        default=["after"],
        min_length=1,
        description="after: the question comes when the prompt has been read (and thinned out); before: it is part of "
        "the prompt",
    )
    batch_tokens: int = Field(16384, ge=1, description="tokens of prompts that are read at once")
    calibration_samples: int = Field(2, ge=1, description="samples by which a method's threshold is fitted to a budget")
    dense_layers: list[int] = Field(default=[], description="layers that stay dense in all methods, disclosed")
    watch: bool = Field(
        True, description="look inside: the mass that is kept, that of the first tokens, reads that no plan has"
    )
    margin: float = Field(0.02, gt=0, lt=1, description="a method may lose this much and is still not inferior")
    seed: int = Field(0, ge=0, description="of the samples")

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
        return self

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


def training_of(config: ComparisonConfig, sibling: SiblingConfig, path: str | Path) -> tuple[list[str], Path]:
    """The arguments of `nsa.train` for a sibling, and its run folder. ``path``: of the comparison's file."""
    assert sibling.config is not None
    training = Path(shell_path(sibling.config))
    if not training.is_absolute():
        training = Path(path).parent / training
    overrides = [f"name={config.name}-{sibling.name}", *sibling.overrides]
    run = load_config(training, overrides)
    return [str(training), *overrides], Path(run.output_dir) / run.name
