"""The prediction against what was measured (benchmarks/models.py and benchmarks/training.py), its error stated."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from nsa.config import load_config
from nsa.planning.memory import memory_of
from nsa.planning.speed import GPUS, predict_speed

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
ALONE = ("training.micro_batch_size=1", "training.global_batch_size=1")


@dataclass(frozen=True)
class Comparison:
    """One measurement beside its prediction.

    Attributes:
        device, attention, tokens (of a sample): of what. config: name of the configuration and what was changed in it.
        row: what was measured, as it is in the file: tokens_per_s, and perhaps step_ms, mfu..., peak_gib, refused.
        tokens_per_second, memory_gib: predicted. fitted: whether the constants were fitted to this measurement.
    """

    device: str
    config: str
    attention: str
    tokens: int
    row: dict[str, Any]
    tokens_per_second: float
    memory_gib: float
    fitted: bool

    @property
    def error(self) -> float | None:
        """Of the speed, relative; None where the run was refused."""
        measured = self.row.get("tokens_per_s")
        return self.tokens_per_second / measured - 1 if measured else None

    @property
    def memory_error(self) -> float | None:
        measured = self.row.get("peak_gib")
        return self.memory_gib / measured - 1 if measured else None


def result_files() -> list[Path]:
    """Those that are committed."""
    folder = ROOT / "benchmarks/results"
    return [*sorted(folder.glob("models-*.json")), *sorted(folder.glob("training-*.json"))]


def compare(path: Path) -> Iterator[Comparison]:
    """The rows of a file: ``models`` (one GPU, batch 1, no DeepSpeed, nothing recomputed) and ``training``."""
    result = json.loads(path.read_text())
    gpu = next((gpu for name, gpu in GPUS.items() if name in result["device"]), None)
    if gpu is None:
        raise ValueError(f"{path}: no data sheet of {result['device']!r}; known: {', '.join(GPUS)}")
    for kind in ("models", "training"):
        for row in result.get(kind, []):
            told = [f"attention.kind={row['attention']}", f"data.sequence_length={row['tokens']}"]
            told += [f"model.max_position={row['tokens']}", *ALONE]
            told += ["engine.zero_stage=0", "engine.activation_checkpointing=none"] if kind == "models" else []
            config = load_config(ROOT / f"configs/{row['config']}.yaml", [*told, *row.get("overrides", [])])
            others = [told for told in row.get("overrides", []) if "activation_checkpointing" not in told]
            changed = [config.engine.activation_checkpointing, *others]
            yield Comparison(
                device=gpu.name,
                config=row["config"] + (f" ({', '.join(changed)})" if kind == "training" else ""),
                attention=row["attention"],
                tokens=row["tokens"],
                row=row,
                tokens_per_second=predict_speed(config, 1, gpu).tokens_per_second,
                memory_gib=memory_of(config, 1).peak / GIB if kind == "training" else 0.0,
                fitted=bool(result.get("fitted")),
            )


def table(rows: Sequence[Comparison]) -> str:
    """Markdown."""
    lines = [
        "| device | config (recomputed) | attention | tokens | step ms | tokens/s | predicted | error | MFU | "
        "MFU dense-equivalent | peak GiB | predicted | error |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in rows:
        name = f"| {r.device} | {r.config} | {r.attention} | {r.tokens} |"
        if "refused" in r.row:
            lines.append(
                f"{name} {r.row['refused']} | - | {r.tokens_per_second:,.0f} | - | - | - | - | {_gib(r)} | - |"
            )
            continue
        step = f"{r.row['step_ms']:,.0f}" if "step_ms" in r.row else "-"
        mfu = [f"{r.row[k]:.3f}" if k in r.row else "-" for k in ("mfu_sparse", "mfu_dense_equivalent")]
        peak = f"{r.row['peak_gib']:.1f}" if "peak_gib" in r.row else "-"
        speed = f"{r.row['tokens_per_s']:,.0f} | {r.tokens_per_second:,.0f} | {_percent(r.error)}"
        lines.append(
            f"{name} {step} | {speed} | {mfu[0]} | {mfu[1]} | {peak} | {_gib(r)} | {_percent(r.memory_error)} |"
        )
    return "\n".join(lines)


def error_lines(rows: Sequence[Comparison]) -> list[str]:
    """The error in one line for the measurements that the model was fitted to, and one for the others."""
    lines = []
    for fitted, words in ((True, "the points of the fit"), (False, "measurements that it was not fitted to")):
        errors = [abs(r.error) for r in rows if r.fitted == fitted and r.error is not None]
        if errors:
            mean, most = 100 * fmean(errors), 100 * max(errors)
            lines.append(
                f"Error of the speed on {words}: {mean:.0f} % on average, {most:.0f} % at most ({len(errors)})."
            )
    memory = [abs(r.memory_error) for r in rows if r.memory_error is not None]
    if memory:
        lines.append(f"Error of the memory: {100 * fmean(memory):.0f} % on average, {100 * max(memory):.0f} % at most.")
    return lines


def _gib(row: Comparison) -> str:
    return f"{row.memory_gib:.1f}" if row.memory_gib else "-"


def _percent(error: float | None) -> str:
    return "-" if error is None else f"{100 * error:+.0f} %"
