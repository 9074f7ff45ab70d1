"""Compares the predicted step times and memory with measurements (benchmarks/models.py, training.py, steady.py)."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from nsa.config import Config, load_config
from nsa.planning import constants
from nsa.planning.constants import Constants
from nsa.planning.memory import memory_of
from nsa.planning.speed import GPUS, Gpu, Plan, known

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
ALONE = ("training.micro_batch_size=1", "training.global_batch_size=1", "parallel={}")
STEADY = ("training.micro_batch_size=4", "training.global_batch_size=4", "parallel={}")  # samples of 4096 tokens
# Until this date these configurations recomputed layers. The rows of the trainer's results do not say so.
RECOMPUTED, UNTIL = {"1b": "full", "3b": "full", "7b": "full", "27b-a5b": "full"}, "2026-11-29"
# The trainer's benchmarks read the Python standard library. For each number of tokens per sample, PIECES has the tokens
# of the document that a token lies in (mean over tokens; vocabulary of 4096, Python 3.11). No attention crosses it.
SAMPLES = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
PIECES = (1860, 3440, 6033, 9869, 14684, 19533, 22910)


@dataclass(frozen=True)
class Case:
    """A measured step and its `Plan`, whose prediction depends on the constants alone.

    Attributes:
        file: path below the repository's root. kind: models, training or steady. row: as it is in the file.
        seconds: of the step; None if the run was refused.
    """

    file: str
    kind: str
    row: dict[str, Any]
    gpu: Gpu
    config: Config
    plan: Plan
    seconds: float | None

    def describe(self) -> str:
        """What was measured, as one line."""
        batch = self.config.training
        changed = [entry for entry in self.row.get("overrides", []) if "activation_checkpointing" not in entry]
        words = [self.gpu.name, self.kind, self.row["config"], self.row["attention"]]
        words += [f"{batch.global_batch_size} x {self.row['tokens']} tokens"]
        words += [f"recomputed {self.config.engine.activation_checkpointing}", *changed]
        return f"{' '.join(words)}: {1e3 * (self.seconds or 0.0):.1f} ms"

    def error(self, known: Constants) -> float:
        """Relative error of the predicted step time."""
        assert self.seconds is not None
        return self.plan.speed(known).step_seconds / self.seconds - 1


@dataclass(frozen=True)
class Comparison:
    """One measurement and its prediction.

    Attributes:
        device, attention, tokens (per sample): what was measured. config: name of the configuration, and its changes.
        row: the measurement as it is in the file: step_ms or ms, and perhaps mfu..., peak_gib, refused.
        seconds: of the step, measured; None if the run was refused.
        step_seconds, tokens_per_second, memory_gib: predicted.
        fitted: whether the constants were fitted to this measurement.
    """

    device: str
    config: str
    attention: str
    tokens: int
    row: dict[str, Any]
    seconds: float | None
    step_seconds: float
    tokens_per_second: float
    memory_gib: float
    fitted: bool

    @property
    def error(self) -> float | None:
        """Relative error of the step time; None if the run was refused."""
        return self.step_seconds / self.seconds - 1 if self.seconds else None

    @property
    def memory_error(self) -> float | None:
        measured = self.row.get("peak_gib")
        return self.memory_gib / measured - 1 if measured and self.memory_gib else None


def result_files() -> list[Path]:
    """All committed result files, also those of older code."""
    folder = ROOT / "benchmarks/results"
    return [path for kind in ("models", "training", "steady") for path in sorted(folder.glob(f"{kind}-*.json"))]


def fitted_files() -> list[Path]:
    """The result files that the constants were fitted to."""
    return [ROOT / name for name in constants.read().files]


def cases(path: Path) -> Iterator[Case]:
    """The rows of a result file: ``models`` (without DeepSpeed), ``training`` and ``steady`` (the trainer).

    Raises:
        ValueError: no such file, or a device that `GPUS` does not have.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    result = json.loads(path.read_text())
    gpu = next((gpu for name, gpu in GPUS.items() if name in result["device"]), None)
    if gpu is None:
        raise ValueError(f"{path}: no data sheet of {result['device']!r}; known: {', '.join(GPUS)}")
    whole = path.resolve()
    file = whole.relative_to(ROOT).as_posix() if whole.is_relative_to(ROOT) else path.name
    for row in result.get("models", []):
        config = load_config(ROOT / f"configs/{row['config']}.yaml", [*_shape(row), *_bare(row)])
        document = _document(row["tokens"]) if row.get("packed") else None
        plan = Plan(config, 1, gpu, document, dense=row.get("dense_attention", "triton"))
        # AdamW on bf16 weights, gradients accumulated in bf16.
        moved = plan.trained * (10 * row.get("accumulate", 1) + 16)
        plan.works = [replace(work, optimizer=moved, gradients=0.0) for work in plan.works]
        plan.steps = 0  # the host does nothing else once per step
        yield Case(file, "models", row, gpu, config, plan, row["ms"] / 1e3 if "ms" in row else None)
    for row in result.get("training", []):
        seconds = row["step_ms"] / 1e3 if "step_ms" in row else None
        overrides = list(ALONE)
        if result.get("date", UNTIL) < UNTIL and row["config"] in RECOMPUTED:
            overrides.append(f"engine.activation_checkpointing={RECOMPUTED[row['config']]}")
        yield _trained(file, "training", row, gpu, overrides, seconds)
    if "last" in result.get("steady", {}):
        row = {"tokens": 4096, **result["steady"]}
        row["tokens_per_s"] = row["last"]
        yield _trained(file, "steady", row, gpu, STEADY, row["tokens_per_step"] / row["last"])


def _trained(
    file: str, kind: str, row: dict[str, Any], gpu: Gpu, overrides: Sequence[str], seconds: float | None
) -> Case:
    config = load_config(ROOT / f"configs/{row['config']}.yaml", [*overrides, *_shape(row), *row.get("overrides", [])])
    plan = Plan(config, row.get("gpus", 1), gpu, _document(row["tokens"]))
    return Case(file, kind, row, gpu, config, plan, seconds)


def _document(tokens: int) -> float:
    """Tokens of the document that a token lies in (mean over tokens), in samples of ``tokens``; interpolated."""
    return float(np.exp(np.interp(np.log(tokens), np.log(SAMPLES), np.log(PIECES))))


def _shape(row: dict[str, Any]) -> list[str]:
    """The overrides that every row implies."""
    overrides = {"attention.kind": row["attention"], "data.sequence_length": row["tokens"]}
    overrides["model.max_position"] = row["tokens"]
    return [f"{key}={value}" for key, value in overrides.items()]


def _bare(row: dict[str, Any]) -> list[str]:
    """The overrides that a row of benchmarks/models.py implies."""
    samples = row.get("samples", 1)
    overrides = {"training.micro_batch_size": samples, "training.global_batch_size": samples * row.get("accumulate", 1)}
    overrides["engine.activation_checkpointing"] = row.get("recomputed", "none")
    return [*(f"{key}={value}" for key, value in overrides.items()), "engine.zero_stage=1", "parallel={}"]


def compare(path: Path) -> Iterator[Comparison]:
    """Every row of a file with its prediction."""
    fitted_files = _fitted_files()
    for case in cases(path):
        row, speed = case.row, case.plan.speed(known())
        changed = [case.config.engine.activation_checkpointing]
        changed += [entry for entry in row.get("overrides", []) if "activation_checkpointing" not in entry]
        gpus = row.get("gpus", 1)
        trained = case.kind != "models"
        yield Comparison(
            device=case.gpu.name if gpus == 1 else f"{gpus} x {case.gpu.name}",
            config=row["config"] + (f" ({', '.join(changed)})" if trained else ""),
            attention=row["attention"],
            tokens=row["tokens"],
            row=row,
            seconds=case.seconds,
            step_seconds=speed.step_seconds,
            tokens_per_second=speed.tokens_per_second,
            memory_gib=memory_of(case.config, gpus).peak / GIB if trained else 0.0,
            fitted=case.file in fitted_files,
        )


@cache
def _fitted_files() -> frozenset[str]:
    return frozenset(constants.read().files)


def table(rows: Sequence[Comparison]) -> str:
    """A Markdown table."""
    lines = [
        "| device | config (recomputed) | attention | tokens | step ms | predicted | error | tokens/s | MFU | "
        "MFU dense-equivalent | peak GiB | predicted | error |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        name = f"| {r.device} | {r.config} | {r.attention} | {r.tokens} |"
        predicted = f"{1e3 * r.step_seconds:,.1f}"
        if r.seconds is None:
            lines.append(f"{name} {r.row.get('refused', '-')} | {predicted} | - | - | - | - | - | {_gib(r)} | - |")
            continue
        mfu = [f"{r.row[k]:.3f}" if k in r.row else "-" for k in ("mfu_sparse", "mfu_dense_equivalent")]
        peak = f"{r.row['peak_gib']:.1f}" if "peak_gib" in r.row else "-"
        speed = f"{1e3 * r.seconds:,.1f} | {predicted} | {_percent(r.error)} | {r.row['tokens_per_s']:,.0f}"
        lines.append(f"{name} {speed} | {mfu[0]} | {mfu[1]} | {peak} | {_gib(r)} | {_percent(r.memory_error)} |")
    return "\n".join(lines)


def error_lines(rows: Sequence[Comparison]) -> list[str]:
    """Mean and worst error: a line for the measurements of the fit, one for the others, and one for the memory."""
    lines = []
    for fitted, words in ((True, "the cases of the fit"), (False, "measurements that it was not fitted to")):
        errors = [abs(r.error) for r in rows if r.fitted == fitted and r.error is not None]
        if errors:
            mean, most = 100 * fmean(errors), 100 * max(errors)
            lines.append(
                f"Error of the step time on {words}: {mean:.1f} % on average, {most:.1f} % at most ({len(errors)})."
            )
    memory = [abs(r.memory_error) for r in rows if r.memory_error is not None]
    if memory:
        lines.append(f"Error of the memory: {100 * fmean(memory):.0f} % on average, {100 * max(memory):.0f} % at most.")
    return lines


def _gib(row: Comparison) -> str:
    return f"{row.memory_gib:.1f}" if row.memory_gib else "-"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.0f} %"
