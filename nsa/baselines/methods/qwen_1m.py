"""Qwen2.5-1M's recipe: columns and diagonals chosen per chunk of the prompt, attended at dual chunk positions."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsa.baselines.attention import plan_scores
from nsa.baselines.importance.lines import estimate_of, last_rows
from nsa.baselines.method import State
from nsa.baselines.methods.dual_chunk import dual_chunk_parts
from nsa.baselines.methods.vertical_slash import VerticalSlash
from nsa.baselines.plan import Plan, View


@dataclass(frozen=True, kw_only=True)
class Qwen1M(VerticalSlash):
    """Vertical-slash for each chunk of the prompt, chosen by its last queries at positions that grow with the query,
    attended at those of dual chunk attention. Decoding attends to all keys, at these positions.

    The paper's chunks have 32,768 tokens; here they are the ones that the prompt comes in.

    Attributes:
        chunk, local: see `DualChunk`.
        factors: of each layer, of each KV head, by which its budget is larger (`nsa.baselines.search.refined`); ():
            all 1.
    """

    chunk: int = 8192
    local: int = 1024
    factors: tuple[tuple[float, ...], ...] = ()

    name = "qwen_1m"
    title = "Qwen2.5-1M's recipe"
    paper = "arXiv 2501.15383, sections 3.1 and 5.2"
    axes = VerticalSlash.axes._replace(allocation="by a factor for each KV head, found offline")
    licence = "Apache-2.0 (vllm-project/vllm)"
    differs = (
        "differs from the release because it chooses per KV head, at any length, within its budget; logits beyond the "
        "length of training get no temperature"
    )
    formula = "prefill: at most k x factor keys and values, all keys once for each chunk; decoding reads all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.local < self.chunk:
            raise ValueError(f"local must be in [0, chunk), got {self.local} and a chunk of {self.chunk}")
        object.__setattr__(self, "factors", tuple(tuple(float(f) for f in layer) for layer in self.factors))
        if any(factor < 1 for layer in self.factors for factor in layer):
            raise ValueError("factors of budgets are at least 1")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        rows = last_rows(view, self.num_queries)
        mask = self.tokens(view, *self.chosen(view, self.scores(view, rows)))
        parts = (replace(part, keep=part.keep & mask) for part in dual_chunk_parts(view, self.chunk, self.local))
        return Plan(tuple(parts), estimate=estimate_of(view, rows))

    def decode_select(self, view: View, state: State) -> Plan | None:
        return Plan(dual_chunk_parts(view, self.chunk, self.local))

    def scores(self, view: View, rows: Tensor) -> Tensor:
        return plan_scores(view, Plan(dual_chunk_parts(view, self.chunk, self.local, critical=True)), rows)

    def size(self, view: View) -> Tensor:
        size = super().size(view)
        if not self.factors:
            return size
        if len(self.factors) != view.num_layers or len(self.factors[view.layer]) != view.k.shape[2]:
            raise ValueError(
                f"factors are of {len(self.factors)} layers with {len(self.factors[0])} KV heads, the model has "
                f"{view.num_layers} with {view.k.shape[2]}: find them anew (nsa.baselines.search)"
            )
        factors = torch.tensor(self.factors[view.layer], dtype=torch.float64, device=size.device)
        return torch.minimum((size * factors).ceil().long(), view.seen[:, None])
