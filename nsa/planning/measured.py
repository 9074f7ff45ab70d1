"""The prediction against what was measured (benchmarks/models.py, training.py and steady.py), its error stated."""

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
# What configurations recomputed that no longer do, and until when: rows of the trainer did not say it.
RECOMPUTED, UNTIL = {"1b": "full", "3b": "full", "7b": "full", "27b-a5b": "full"}, "2026-11-29"
# The trainer's benchmarks read the Python standard library. Tokens of a sample, and of the piece of a file that a token
# of it lies in (mean over tokens; 4096 words, Python 3.11): no attention looks beyond a piece.
SAMPLES = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
PIECES = (1860, 3440, 6033, 9869, 14684, 19533, 22910)


@dataclass(frozen=True)
class Case:
    """A measured step, counted: what the plan says of it hangs on constants alone.

    Attributes:
        file: its name below the repository's root. kind: models, training or steady. row: as it is in the file.
        seconds: of the step; None where the run was refused.
    """

    file: str
    kind: str
    row: dict[str, Any]
    gpu: Gpu
    config: Config
    plan: Plan
    seconds: float | None

    def describe(self) -> str:
        """What was measured, in a line."""
        batch = self.config.training
        changed = [told for told in self.row.get("overrides", []) if "activation_checkpointing" not in told]
        words = [self.gpu.name, self.kind, self.row["config"], self.row["attention"]]
        words += [f"{batch.global_batch_size} x {self.row['tokens']} tokens"]
        words += [f"recomputed {self.config.engine.activation_checkpointing}", *changed]
        return f"{' '.join(words)}: {1e3 * (self.seconds or 0.0):.1f} ms"

    def error(self, known: Constants) -> float:
        """Of the predicted step time, relative."""
        assert self.seconds is not None
        return self.plan.speed(known).step_seconds / self.seconds - 1


@dataclass(frozen=True)
class Comparison:
    """One measurement beside its prediction.

    Attributes:
        device, attention, tokens (of a sample): of what. config: name of the configuration and what was changed in it.
        row: what was measured, as it is in the file: step_ms or ms, and perhaps mfu..., peak_gib, refused.
        seconds: of the step, measured; None where the run was refused. step_seconds, tokens_per_second, memory_gib:
        predicted. fitted: whether the constants were fitted to this measurement.
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
        """Of the step time, relative; None where the run was refused."""
        return self.step_seconds / self.seconds - 1 if self.seconds else None

    @property
    def memory_error(self) -> float | None:
        measured = self.row.get("peak_gib")
        return self.memory_gib / measured - 1 if measured and self.memory_gib else None


def result_files() -> list[Path]:
    """All that are committed, of older code, too."""
    folder = ROOT / "benchmarks/results"
    return [path for kind in ("models", "training", "steady") for path in sorted(folder.glob(f"{kind}-*.json"))]


def fitted_files() -> list[Path]:
    """Those that the constants were fitted to."""
    return [ROOT / name for name in constants.read().files]


def cases(path: Path) -> Iterator[Case]:
    """The rows of a file: ``models`` (no DeepSpeed, every sample one document), ``training`` and ``steady`` (trainer).

    Raises:
        ValueError: no such file, a device without a data sheet.
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
        # AdamW on 16 bits, gradients added up in 16 bits.
        moved = plan.parameters * (10 * row.get("accumulate", 1) + 16)
        plan.works = [replace(work, optimizer=moved, gradients=0.0) for work in plan.works]
        plan.steps = 0  # nothing that the host does once a step
        yield Case(file, "models", row, gpu, config, plan, row["ms"] / 1e3 if "ms" in row else None)
    for row in result.get("training", []):
        seconds = row["step_ms"] / 1e3 if "step_ms" in row else None
        told = list(ALONE)
        if result.get("date", UNTIL) < UNTIL and row["config"] in RECOMPUTED:
            told.append(f"engine.activation_checkpointing={RECOMPUTED[row['config']]}")
        yield _trained(file, "training", row, gpu, told, seconds)
    if "last" in result.get("steady", {}):
        row = {"tokens": 4096, **result["steady"]}
        row["tokens_per_s"] = row["last"]
        yield _trained(file, "steady", row, gpu, STEADY, row["tokens_per_step"] / row["last"])


def _trained(file: str, kind: str, row: dict[str, Any], gpu: Gpu, told: Sequence[str], seconds: float | None) -> Case:
    config = load_config(ROOT / f"configs/{row['config']}.yaml", [*told, *_shape(row), *row.get("overrides", [])])
    plan = Plan(config, row.get("gpus", 1), gpu, _document(row["tokens"]))
    return Case(file, kind, row, gpu, config, plan, seconds)


def _document(tokens: int) -> float:
    """Tokens of a document as a token sees it, packed into samples of ``tokens``."""
    return float(np.exp(np.interp(np.log(tokens), np.log(SAMPLES), np.log(PIECES))))


def _shape(row: dict[str, Any]) -> list[str]:
    told = {"attention.kind": row["attention"], "data.sequence_length": row["tokens"]}
    told["model.max_position"] = row["tokens"]
    return [f"{key}={value}" for key, value in told.items()]


def _bare(row: dict[str, Any]) -> list[str]:
    """What benchmarks/models.py says of a row in words of its own."""
    samples = row.get("samples", 1)
    told = {"training.micro_batch_size": samples, "training.global_batch_size": samples * row.get("accumulate", 1)}
    told["engine.activation_checkpointing"] = row.get("recomputed", "none")
    return [*(f"{key}={value}" for key, value in told.items()), "engine.zero_stage=1", "parallel={}"]


def compare(path: Path) -> Iterator[Comparison]:
    """Every row of a file beside its prediction."""
    fitted_files = _fitted_files()
    for case in cases(path):
        row, speed = case.row, case.plan.speed(known())
        changed = [case.config.engine.activation_checkpointing]
        changed += [told for told in row.get("overrides", []) if "activation_checkpointing" not in told]
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
    """Markdown."""
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
    """The error in one line for the measurements that the model was fitted to, and one for the others."""
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
