"""Runs in many layouts, and reference runs in one process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.training.tiny import on_ranks

SCRIPT = Path(__file__).with_name("parallel_checks.py")
STEPS = 10
RANKS = 4  # of most launches; with fewer GPUs all runs, references included, use the CPU
# Four query heads; two KV heads, so that two tensor-parallel ranks have one each, and four must share.
BASE = ["model.num_heads=4", "model.num_kv_heads=2", "optimizer.schedule=constant"]
# The updates of SGD show the scale of gradients, which AdamW hides; the first is not clipped, the second in each step.
SGD = ["optimizer.kind=sgd", "optimizer.learning_rate=0.3", "optimizer.gradient_clipping=0"]
CLIPPED = ["optimizer.kind=adamw", "optimizer.gradient_clipping=0.2"]
MOE = ["num_experts=8", "top_k=2", "num_shared=1", "expert_size=16", "first_dense=0", "bias_rate=0.01"]
MOE = [f"model.moe.{override}" for override in [*MOE, "loss_weight=0.1"]]
# Overrides that do not affect what is learned.
LAYOUT = ("parallel.", "engine.", "training.micro_batch_size")

Case = list[str]
Curve = list[list[float]]  # of each step: loss, norm of the gradient


def layout(zero: int = 0, **sizes: int) -> list[str]:
    return [*(f"parallel.{axis}={size}" for axis, size in sizes.items()), f"engine.zero_stage={zero}"]


def learned(case: Case) -> Case:
    """The case without its layout, for the reference run in one process."""
    return [override for override in case if not override.startswith(LAYOUT)]


def references(folder: Path, cases: Sequence[Case], gpus: int = RANKS, steps: int = STEPS) -> dict[str, Curve]:
    """Curves in one process, by the case without its layout. ``gpus``: as for `on_ranks`."""
    distinct = list({str(learned(case)): learned(case) for case in cases}.values())
    checks = {"reference": ("curves", {"cases": distinct, "steps": steps})}
    curves = on_ranks(1, folder, checks, SCRIPT, gpus=gpus)["reference"]
    return {str(case): curve for case, curve in zip(distinct, curves, strict=True)}


def difference(curve: Curve, reference: Curve) -> float:
    """The largest relative difference in loss or norm of the gradient, over all steps."""
    pairs: list[Any] = [pair for step in zip(curve, reference, strict=True) for pair in zip(*step, strict=True)]
    return max(abs(found / expected - 1) for found, expected in pairs)
