"""What a run reads: the `data` section of a configuration."""

from typing import Literal

from pydantic import Field, field_validator, model_validator

from nsa.data.tasks import TASKS, task_named
from nsa.schema import Section, shell_path


class SourceConfig(Section):
    """One source of the blend."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="unique; names the source's folder of shards")
    kind: Literal["builtin", "files", "hub", "synthetic"] = Field(
        description="builtin: the Python standard library's sources and docs, and those of packages; files: local "
        "text, JSONL or Parquet; hub: a data set by name; synthetic: generated recall tasks"
    )
    weight: float = Field(1.0, gt=0, description="share of the samples, relative to the other sources")
    packages: list[str] = Field(
        [],
        description="builtin: installed packages whose .py files are read, too, by the names that are imported, for "
        "instance [sympy, torch]",
    )
    path: str | None = Field(None, description="files: a file, folder or glob; hub: the data set's name")
    subset: str | None = Field(None, description="hub: the data set's configuration name")
    split: str = Field("train", description="hub: the split to read")
    text_field: str = Field("text", description="files (JSONL, Parquet) and hub: the column that holds the text")
    include: list[str] = Field([], description="files of a folder or glob: patterns of names to read; []: all")
    exclude: list[str] = Field(
        ["_*", "package.json", "package-lock.json"],
        description="files of a folder or glob: patterns of files and folders to leave out; hidden ones always are",
    )
    bad_rows: float = Field(
        0.001,
        ge=0,
        lt=1,
        description="files and hub: rows without text are left out; a larger share of such rows is an error",
    )
    task: str | None = Field(
        None,
        description="synthetic: the task to generate (docs/tasks.md)",
        json_schema_extra={"anyOf": [{"enum": [task.name for task in TASKS]}, {"type": "null"}]},
    )
    lengths: Literal["short", "log_uniform"] = Field(
        "short",
        description="synthetic: lengths of the episodes in a sample. short: each doubling of the length gets half as "
        "many tokens; log_uniform: it gets the same number of episodes",
    )
    curriculum: int = Field(
        0,
        ge=0,
        description="synthetic: over so many samples of this source, the longest episode grows from the task's "
        "shortest to a whole sample; 0: whole samples from the start",
    )

    @field_validator("path")
    @classmethod
    def _as_a_shell_reads_it(cls, value: str | None) -> str | None:
        return value and shell_path(value)

    @field_validator("packages")
    @classmethod
    def _names_of_packages(cls, value: list[str]) -> list[str]:
        """In alphabetical order, so that the order in the file makes no other data."""
        for name in value:
            if not name.isidentifier():
                raise ValueError(
                    f"{name!r} is no name of a package: write the one that is imported, without dots (sklearn, not "
                    "scikit-learn)"
                )
        if len(set(value)) != len(value):
            raise ValueError(f"the packages must differ, got {value}")
        return sorted(value)

    @field_validator("task")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return value and task_named(value).name

    @model_validator(mode="after")
    def _consistent(self) -> "SourceConfig":
        if self.kind in ("files", "hub") and not self.path:
            raise ValueError(f"data source {self.name!r}: kind {self.kind} needs a path")
        if self.kind == "synthetic" and self.task is None:
            raise ValueError(
                f"data source {self.name!r}: kind synthetic needs a task: set task, such as task: {TASKS[0].name}"
            )
        if self.kind != "synthetic" and self.task is not None:
            raise ValueError(
                f"data source {self.name!r}: a task goes with kind synthetic only: set kind: synthetic, or "
                "take task out"
            )
        if self.packages and self.kind != "builtin":
            raise ValueError(f"data source {self.name!r}: packages go with kind builtin only")
        if self.kind != "synthetic" and (self.lengths != "short" or self.curriculum):
            raise ValueError(f"data source {self.name!r}: lengths and curriculum go with kind synthetic only")
        return self


class TokenizerConfig(Section):
    """The tokenizer: one that is trained here (sentencepiece), or one that is there."""

    path: str | None = Field(
        None,
        description="an existing tokenizer: a sentencepiece .model, or a Hugging Face folder with tokenizer.model or "
        "with a tokenizer.json of byte-level BPE or of an export; null: train one on the corpus",
    )
    vocab_size: int = Field(
        4096, ge=300, le=2**24, description="vocabulary of a trained tokenizer, its 256 bytes included"
    )
    train_bytes: int = Field(20_000_000, ge=10_000, description="bytes of text that a trained tokenizer sees at most")

    @field_validator("path")
    @classmethod
    def _as_a_shell_reads_it(cls, value: str | None) -> str | None:
        return value and shell_path(value)


class DataConfig(Section):
    """Where tokens come from and how they are cut into samples."""

    sources: list[SourceConfig] = Field(min_length=1, description="the data mixture")
    tokenizer: TokenizerConfig = Field(TokenizerConfig(), description="the tokenizer")
    cache_dir: str = Field("data/cache", description="folder of the prepared tokenizer and token shards")
    sequence_length: int = Field(ge=8, description="tokens in one sample (sequence)")
    validation_fraction: float = Field(0.02, gt=0, lt=0.5, description="share of documents held out")
    seed: int | None = Field(
        None,
        ge=0,
        description="seed of the choice of held-out documents, and of the text that a tokenizer is trained on; null: "
        "the run's seed. Set it if runs with different seeds are compared, or start from one another: else one run is "
        "tested on documents that another was trained on",
    )
    workers: int = Field(2, ge=1, description="processes that prepare shards")

    @field_validator("cache_dir")
    @classmethod
    def _as_a_shell_reads_it(cls, value: str) -> str:
        return shell_path(value)

    def seed_of(self, run: int) -> int:
        """The seed of what is held out, for a run with this seed."""
        return run if self.seed is None else self.seed

    @model_validator(mode="after")
    def _consistent(self) -> "DataConfig":
        names = [s.name for s in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources: the names must differ, got {names}")
        return self
