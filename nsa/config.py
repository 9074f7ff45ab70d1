"""The configuration tree of a run, from YAML with `key=value` overrides.

Commands:
    python -m nsa.config configs/demo.yaml optimizer.learning_rate=1e-3     # check, print with every default
    python -m nsa.config --schema                                           # JSON schema, for editors
    python -m nsa.config --reference                                        # every key as a Markdown table
"""

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from nsa import strict_yaml
from nsa.config_history import upgraded
from nsa.data.config import DataConfig
from nsa.layers.kinds import KINDS
from nsa.models.config import AttentionConfig, ModelConfig, check_projection
from nsa.parallel.config import ParallelConfig, check_layout, check_stages
from nsa.schema import Section, shell_path
from nsa.stages import STAGE, Stages, stages_of
from nsa.strict_yaml import ConfigError

__all__ = ["Config", "ConfigError", "dump_config", "json_schema", "load_config", "load_saved"]


class OptimizerConfig(Section):
    """Optimizer and learning-rate schedule."""

    kind: Literal["adamw", "sgd"] = Field("adamw", description="adamw; sgd is for tests of gradients")
    learning_rate: float = Field(gt=0, description="peak learning rate")
    min_learning_rate: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="how the rate decays; wsd: warm-up, stable, decay"
    )
    decay_steps: int | None = Field(
        None, ge=1, description="wsd only: steps of the final linear decay; null: a fifth of training.steps"
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw: decay of the running mean of the gradient")
    beta2: float = Field(0.95, ge=0, lt=1, description="adamw: decay of the running mean of the squared gradient")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the root of the mean square")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay, times the learning rate; not for norms, biases and embeddings"
    )
    gradient_clipping: float = Field(1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    @model_validator(mode="after")
    def _consistent(self) -> "OptimizerConfig":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optimizer.min_learning_rate ({self.min_learning_rate}) exceeds "
                f"optimizer.learning_rate ({self.learning_rate}), the peak"
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"optimizer.decay_steps ({self.decay_steps}) goes with optimizer.schedule wsd only, "
                f"not {self.schedule}: set it to null or change the schedule"
            )
        return self


class TrainingConfig(Section):
    """How long and in what pieces."""

    steps: int = Field(ge=1, description="optimizer steps of the whole run")
    global_batch_size: int = Field(ge=1, description="samples (sequences) per optimizer step over all ranks")
    micro_batch_size: int = Field(ge=1, description="samples per forward pass of one rank")
    validation_every: int = Field(
        100, ge=1, description="steps between two validations; the last step always validates"
    )
    validation_samples: int = Field(32, ge=1, description="held-out samples read by one validation")
    log_every: int = Field(1, ge=1, description="steps between two lines of metrics")
    probe_every: int = Field(
        50, ge=1, description="steps between two sets of attention metrics (gates, selected blocks)"
    )
    max_skipped_steps: int = Field(
        10, ge=0, description="consecutive non-finite steps that are skipped before the run stops"
    )
    max_hours: float | None = Field(
        None,
        gt=0,
        description="hours after which this job saves and exits with code 75, to be run again; null: no limit",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.global_batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.global_batch_size ({self.global_batch_size}) must be a multiple of "
                f"training.micro_batch_size ({self.micro_batch_size})"
            )
        return self


class CheckpointConfig(Section):
    """When checkpoints are written and how many are kept."""

    every: int = Field(200, ge=1, description="steps between two checkpoints; the last step always saves")
    keep_last: int = Field(
        2,
        ge=1,
        description="newest checkpoints that are kept; a new one is written first, so the disk needs room for one more",
    )


class ResumeConfig(Section):
    """What a resumed run may do differently on purpose."""

    allow: list[
        Literal[
            "optimizer.learning_rate",
            "optimizer.min_learning_rate",
            "optimizer.warmup_steps",
            "optimizer.schedule",
            "optimizer.decay_steps",
            "optimizer.beta1",
            "optimizer.beta2",
            "optimizer.eps",
            "optimizer.weight_decay",
            "optimizer.gradient_clipping",
        ]
    ] = Field(
        [],
        description="keys of the optimizer that may differ from the checkpoint's; changes of other keys are refused",
    )


class RecoveryConfig(Section):
    """What the trainer does about loss spikes, hangs and lost ranks (docs/reliability.md)."""

    loss_sigma: float = Field(
        6.0,
        ge=0,
        description="a step whose loss is this many standard deviations above the window's mean is skipped; 0: never",
    )
    grad_norm_sigma: float = Field(
        0.0, ge=0, description="like loss_sigma, for the gradient norm before clipping; 0: never"
    )
    window: int = Field(128, ge=8, description="accepted steps that spikes are measured against")
    max_spikes: int = Field(
        4,
        ge=0,
        description="spikes per window that are only skipped; at one more the run rolls back, without their batches",
    )
    max_rollbacks: int = Field(3, ge=0, description="rollbacks to an earlier checkpoint before the run stops")
    hang_seconds: float = Field(
        1800.0,
        ge=0,
        description="if a rank makes no progress for this long, stacks are written and the job ends; 0: never",
    )
    lost_seconds: float = Field(
        60.0, ge=2, description="if a process gives no sign of life for this long, the job ends"
    )


class EngineConfig(Section):
    """DeepSpeed and memory."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what ZeRO shards over the ranks: 0 nothing, 1 optimizer, 2 + gradients, 3 + weights"
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="type of weights and activations; the optimizer is always in fp32"
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="what the backward pass recomputes. full: each layer; selective: each layer without its "
        "attention, whose outputs are kept (2 bytes x heads x head dimension per token and branch); none: nothing. "
        "true and false mean full and none"
    )  # fmt: skip
    offload_optimizer: bool = Field(
        False, description="keep the optimizer's fp32 weights and moments in the host's memory, and update there. "
        "Saves 12 bytes per parameter (sharded), costs time in every step; needs zero_stage 1 to 3"
    )  # fmt: skip
    cuda_graphs: bool = Field(
        True, description="on a GPU, capture the passes of a micro batch in CUDA graphs, so that a small model does "
        "not wait for Python. The graphs keep their memory. No effect with zero_stage 3, a pipeline or expert ranks"
    )  # fmt: skip
    backend: Literal["auto", "triton", "torch", "naive"] = Field(
        "auto",
        description="implementation of the attention operators; auto: triton on a GPU, else torch; naive: the "
        "quadratic reference implementation",
    )

    dense_attention: Literal["auto", "triton", "cudnn", "flash", "flash-attn-3", "flash-attn-4"] = Field(
        "auto", description="implementation of causal attention in dense layers, if backend is auto. auto: on "
        "Hopper the first of flash-attn-4, cudnn and triton that is installed and supports the inputs; on other GPUs "
        "triton. Only triton has deterministic gradients; it takes 4 to 14 % more time than cuDNN and 15 to 40 % more "
        "than FlashAttention-4. cudnn needs documents of equal length; triton computes batches without"
    )  # fmt: skip

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _in_one_word(cls, value: Any) -> Any:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _consistent(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError(
                "engine.offload_optimizer needs engine.zero_stage 1, 2 or 3: only ZeRO's optimizer can be offloaded"
            )
        return self


class EvaluationConfig(Section):
    """What `nsa.evaluate` measures on an export."""

    length_factors: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4], min_length=1, description="lengths of the recall tasks, times the training length"
    )
    recall_samples: int = Field(64, ge=1, description="samples per recall task and length")
    bpb_samples: int = Field(64, ge=1, description="held-out samples for bits per byte by position")


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="names the run's folder")
    seed: int = Field(1234, ge=0, lt=2**31, description="random seed for initialisation and data order")
    output_dir: str = Field("checkpoints", min_length=1, description="folder that holds the run folders")
    start_from: str | None = Field(
        None,
        min_length=1,
        description="folder whose weights a new run begins with: a run, one of its checkpoints (of any layout), a "
        "Hugging Face folder, or an export of this project (docs/importing.md). Dense attention can become any kind; "
        "null: random weights",
    )
    train: Literal["all", "indexer"] = Field(
        "all",
        description="all: the whole model. indexer: only what selects, that is the indexers or, in NSA's warm-up, the "
        "compression of keys; the language-model loss is not computed, and the logged loss is the sum over indexers",
    )
    model: ModelConfig = Field(description="shape of the decoder")
    attention: AttentionConfig = Field(AttentionConfig(), description="attention of every layer")
    data: DataConfig = Field(description="where tokens come from and how they are cut into samples")
    optimizer: OptimizerConfig = Field(description="optimizer and learning-rate schedule")
    training: TrainingConfig = Field(description="steps, batch sizes, validation and logging")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when checkpoints are written, how many stay")
    resume: ResumeConfig = Field(ResumeConfig(), description="what may differ from the checkpoint on purpose")
    recovery: RecoveryConfig = Field(RecoveryConfig(), description="loss spikes, hangs, lost ranks")
    engine: EngineConfig = Field(EngineConfig(), description="DeepSpeed and memory")
    parallel: ParallelConfig = Field(ParallelConfig(), description="ranks that share one replica of the model")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="what nsa.evaluate measures on an export")

    @field_validator("output_dir", "start_from")
    @classmethod
    def _as_a_shell_reads_it(cls, value: str | None) -> str | None:
        return None if value is None else shell_path(value)

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.name in (".", ".."):
            raise ValueError(f"name: {self.name!r} is no name for a folder")
        if self.data.sequence_length > self.model.max_position:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) exceeds the rotary range model.max_position "
                f"({self.model.max_position}): shorten the samples or raise max_position"
            )
        if self.data.tokenizer.path is None and self.data.tokenizer.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"data.tokenizer.vocab_size ({self.data.tokenizer.vocab_size}) exceeds model.vocab_size "
                f"({self.model.vocab_size}): every piece of the tokenizer needs a row of the embedding"
            )
        check_projection(self.model, self.attention)
        self._check_kinds()
        check_layout(self.parallel, self.model, self.data.sequence_length, self.engine.zero_stage)
        check_stages(self.parallel, self.model, self.attention)
        decay = self.optimizer.decay_steps or 0
        if self.optimizer.warmup_steps + decay > self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}){f' + decay_steps ({decay})' if decay else ''} "
                f"exceed training.steps ({self.training.steps}): shorten the warm-up too (optimizer.warmup_steps=...)"
            )
        return self

    def _check_kinds(self) -> None:
        once = len(self.attention.pattern(self.model.num_layers))  # later layers are like these; a file may say 10^9
        kinds = set(self.attention.kinds(once))
        for kind in sorted(kinds, key=lambda kind: kind.title):
            if kind.taught and self.train == "all":
                raise ValueError(
                    f"attention.{kind.name}.phase: warm-up goes with train: indexer; set it to sparse to train all"
                )
            if problem := kind.problem(self.attention.of(kind), self.data.sequence_length):
                raise ValueError(problem)
        if self.train == "all":
            return
        if not any(kind.apart for kind in kinds):
            having = ", ".join(kind.name for kind in KINDS if kind.apart)
            raise ValueError(
                f"train: {self.train} needs layers with an indexer: set attention.kind to {having}, or to nsa with "
                "attention.nsa.phase warm-up"
            )
        if self.start_from is None:
            raise ValueError(f"train: {self.train} needs start_from: there is nothing to learn from random weights")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and write ``key=value`` overrides (dotted keys, YAML values) over it, in order.

    Of a file with stages (`nsa.stages`), the override ``stage=NAME`` says which one is wanted.

    Raises ``ConfigError`` that names the file, the line and the full key of every problem: unknown keys (with the
    nearest valid one), duplicate keys, wrong types, values out of range, contradictions.
    """
    stage = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith(STAGE)), None)
    others = [o for o in overrides if not o.startswith(STAGE)]
    stages = Stages(path, stage)
    return strict_yaml.load(Config, path, others, stages.choose, stages.finish)


def load_saved(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, for a file that a run saved: one of an earlier version is brought up to date.

    Raises ``ConfigError`` also if it is no regular file.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise ConfigError(f"{path} is no regular file")
    return strict_yaml.load(Config, path, overrides, upgraded)


def dump_config(config: Config) -> str:
    """YAML of a configuration, every default written out; ``load_config`` reads it back to an equal one."""
    return strict_yaml.dump(config)


def json_schema() -> str:
    """JSON schema of the YAML files, as committed in ``configs/schema.json``."""
    schema = Config.model_json_schema()
    schema["properties"]["stages"] = {
        "description": "runs that follow one another, each with its name and the keys that it replaces (nsa/stages.py)",
        "type": "array",
        "items": {"type": "object", "required": ["name"]},
    }
    return json.dumps(schema, indent=2) + "\n"


MINIMAL = """
name: my-run
model: {vocab_size: 4096, hidden_size: 256, num_layers: 4, num_heads: 4, num_kv_heads: 1, head_dim: 64,
        intermediate_size: 768, max_position: 1024}
data: {sequence_length: 1024, sources: [{name: python, kind: builtin}]}
optimizer: {learning_rate: 1.0e-3}
training: {steps: 200, global_batch_size: 8, micro_batch_size: 4}
"""


STAGES_IN_WORDS = """
## Stages

The top-level list `stages` holds runs that follow one another, in one file. An item has a `name` (required: letters,
digits, `_` and `-`) and the keys that it replaces; what it does not name is as in the file:

```yaml
stages:
  - {name: dense, attention: {kind: dense}}
  - {name: indexer, train: indexer, training: {steps: 100}, attention: {dsa: {phase: warm-up}}}
  - {name: sparse}
```

Each stage is a run of its own, in the folder `<output_dir>/<name>-<stage>`. It starts from the stage before it, unless
it has `start_from`; the first one starts from that of the file. On the command line `stage=NAME` says which stage is
wanted, and other overrides apply to it. `stage=` is no key of the file, and overrides cannot change `stages`. `bash
launch.sh train CONFIG` trains all stages in turn.
"""


def reference() -> str:
    """Markdown tables of every key, type, default and meaning, as committed in ``docs/configuration.md``."""
    lines = [
        "# Configuration reference",
        "",
        "Generated by `python -m nsa.config --reference`; a test keeps it current.",
        "In a key, `*` stands for an index of a list, from 0. Any key can be set in the YAML file or on the command",
        "line (`model.num_layers=4`). `configs/schema.json` lets editors complete and check the files. A file with the",
        "required keys alone:",
        "",
        "```yaml",
        MINIMAL.strip(),
        "```",
    ]
    lines += STAGES_IN_WORDS.rstrip().split("\n")
    section = None
    for key, field in strict_yaml.walk(Config):
        head = key.rpartition(".")[0]
        if head != section:
            section = head
            lines += ["", f"## {head or 'Top level'}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        bounds = [_bound(item) for item in field.metadata]
        default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
        kind = ", ".join([strict_yaml.type_words(field.annotation), *filter(None, bounds)])
        lines.append(f"| `{key.rpartition('.')[2]}` | {kind} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def _bound(constraint: Any) -> str:
    for name, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if hasattr(constraint, name):
            return f"{sign} {getattr(constraint, name)}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nsa.config", description="Check and print a configuration.")
    parser.add_argument("config", nargs="?", help="a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. attention.kind=dense")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema instead")
    parser.add_argument("--reference", action="store_true", help="print every key as Markdown instead")
    parser.add_argument("--stages", action="store_true", help="print the names of its stages instead, one per line")
    options = parser.parse_intermixed_args(arguments)
    if options.schema or options.reference:
        print(json_schema() if options.schema else reference(), end="")
        return 0
    if options.config is None:
        parser.error("name a YAML file, or --schema, or --reference")
    try:
        if options.stages:
            print("".join(f"{name}\n" for name in stages_of(options.config)), end="")
            return 0
        print(dump_config(load_config(options.config, options.overrides)), end="")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the printing
    sys.exit(main())
