"""Sketch-and-Walk: blocks by a walk over the sketched block attention of all layers so far."""

from dataclasses import dataclass

import torch

from nsa.baselines.importance.blocks import num_blocks, of_tokens
from nsa.baselines.importance.sketch import grow, hadamard_sketch, looked_at, reached, step
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Plan, View
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class SketchWalk(Method):
    """W of a layer is attention between sketched means of blocks, to the ``power``; the walk R is the product of the W
    of all layers so far. A query attends to the blocks with most of its block's row of R.

    The first and the query's own block are inside the budget, which is rounded down to blocks. While decoding, the
    mean of the last block grows with it, and one row of W and R is made anew. The mean query of a group stands for it.

    Attributes:
        block: tokens. sketch: elements of a sketch. seed: of the sketch.
        normalise: rows of W sum to 1. False: the literal product; its rows are only scaled, which changes no order.
        direct: share of the layer's own W in R, in [0, 1); 0: R is the product alone.
        scope: "group": each KV head walks; "layer": all heads together, as in the paper.
    """

    block: int = 64
    sketch: int = 64
    power: float = 8.0
    normalise: bool = True
    direct: float = 0.0
    scope: str = "group"
    seed: int = 0

    name = "sketch_walk"
    title = "Sketch-and-Walk"
    paper = "arXiv 2602.07397, section 2"
    axes = Axes("block of 64", "walk over sketched attention of block means, mean over the group", "uniform", "all")
    phases = ("prefill", "decode")
    causal = False  # in the prompt: the mean of a block of queries has queries after its first
    chunkable = False  # a chunk's border may cut a block of queries
    alone = False  # R of a layer has only ways that go on from where the layers before went
    licence = "none: the release (Escanord/SketchWalk) has no licence file that we know of; written from the paper"
    differs = (
        "differs from the paper because rows of W are normalised, later blocks are masked before the softmax, the "
        "scale is the model's, and each KV head walks; from the release, which walks damped (sketch_walk_damped), lets "
        "later blocks in and keeps the last four blocks of queries dense. The paper's layers 0 and 1 are dense: say so "
        "to the session; the walk starts after them"
    )
    formula = "k keys and values, and per call one sketch for each block and the blocks' W"
    small = {"block": 4}  # noqa: RUF012 - never changed

    def __post_init__(self) -> None:
        if self.scope not in ("group", "layer"):
            raise ValueError(f"scope is group or layer, not {self.scope!r}")
        if not 0 <= self.direct < 1 or (self.direct and not self.normalise):
            raise ValueError("direct must be in [0, 1), and 0 for the literal product")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        blocks, last = num_blocks(view, self.block), view.query_positions[:, -1] // self.block
        first = view.query_positions[:, 0].clamp(min=0) // self.block
        rows = (first[:, None] + torch.arange(int((last - first).max()) + 1, device=last.device)).clamp(max=blocks - 1)
        heads = view.k.shape[2] if self.scope == "group" else 1
        matrix = hadamard_sketch(view.k.shape[3], self.sketch, self.seed).to(rows.device)
        grow(state.rest, view, rows, self.block, blocks, heads, matrix)
        walk = step(state.rest, rows, view.scale, self.power, self.normalise)
        reach, chained = reached(state.shared, walk, rows, view.layer, self.direct, self.normalise)

        number, width = torch.arange(blocks, device=rows.device), view.k.shape[3] + view.v.shape[3]
        forced, later = (number == rows[..., None]) | (number == 0), number > rows[..., None]
        size = state.rest["keys"].shape[-1]
        share = walk.shape[1] / view.k.shape[2]
        overhead = lambda n: looked_at(-(-n // self.block), size, chained) * share / width  # noqa: E731
        budget = self.budget.each(view.seen, least=2 * self.block, overhead=overhead)
        count = torch.where(budget >= view.seen[:, None, None], blocks, budget // self.block)
        score = reach.masked_fill(forced[:, None], torch.inf).masked_fill(later[:, None], -torch.inf)
        keep = top(score, count).expand(-1, view.k.shape[2], -1, -1)

        triangle = blocks * (blocks + 1) / 2
        products = float((~later).sum()) / len(rows) * size + chained * rows.shape[1] * triangle
        read = looked_at(blocks, size, chained) + view.prompt * view.q.shape[1] * view.k.shape[3]
        kept = 2 * blocks * size + triangle
        cost = Estimate(read * share, products / view.k.shape[3] * share, kept * share)
        return Plan.of(of_tokens(view, keep, self.block, first), cost)

    decode_select = prefill_select


@dataclass(frozen=True, kw_only=True)
class SketchWalkDamped(SketchWalk):
    """As `SketchWalk`, with three quarters of the layer's own attention in each step, as in the release."""

    direct: float = 0.75

    name = "sketch_walk_damped"
    title = "Sketch-and-Walk, damped"
    differs = "differs from the release in its faults, its sketch and its budget; in damping (0.25) it follows it"
