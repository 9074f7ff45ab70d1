"""Dual chunk attention: positions are folded so that no distance is longer than those of training."""

from dataclasses import dataclass

from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Part, Plan, View


def dual_chunk_parts(view: View, chunk: int, local: int, critical: bool = False) -> tuple[Part, ...]:
    """All keys, by parts: of the query's own chunk, of the one before, of earlier ones.

    With c = chunk - local, key j stands at j mod c. With r = i mod c query i stands at r for its own chunk, at
    min(r + c, chunk) for the one before, at min(2 c - 1, chunk) for earlier ones. Distances in a chunk, and up to
    ``local`` over its border, are true; none is above ``chunk``.

    ``critical``: r + c and r + chunk instead, which grow with the query, so that a diagonal stays one: for choosing.
    """
    size = chunk - local
    key_at = view.positions.clamp(min=0) % size
    rest = view.query_positions.clamp(min=0) % size
    back = (view.query_positions // size)[:, None, :, None] - (view.positions // size).transpose(1, 2)[:, :, None]
    parts = [Part(back == 0)]  # as it is: the distance is the same as at the folded positions
    if int(view.seen.max()) > size:
        before = rest + size if critical else (rest + size).clamp(max=chunk)
        parts.append(Part(back == 1, query_at=before, key_at=key_at))
    if int(view.seen.max()) > 2 * size:
        earlier = rest + chunk if critical else (rest * 0 + 2 * size - 1).clamp(max=chunk)
        parts.append(Part(back >= 2, query_at=earlier, key_at=key_at))
    return tuple(parts)


@dataclass(frozen=True, kw_only=True)
class DualChunk(Method):
    """Attends to all tokens, at folded positions: for texts longer than those of training. The budget has no meaning.

    Attributes:
        chunk: the longest distance, in tokens; at most the length of training. local: up to this distance the chunk
            before is at its true distance.
    """

    chunk: int = 8192
    local: int = 1024

    name = "dual_chunk"
    title = "dual chunk attention"
    paper = "arXiv 2402.17463; as in arXiv 2501.15383, section 3.1"
    axes = Axes("none", "none", "all", "all")
    phases = ()  # it leaves nothing out
    stepwise = True
    licence = "Apache-2.0 (vllm-project/vllm)"
    differs = "differs from the release because logits beyond the length of training get no temperature"
    formula = "reads all keys and values"

    def __post_init__(self) -> None:
        if not 0 <= self.local < self.chunk:
            raise ValueError(f"local must be in [0, chunk), got {self.local} and a chunk of {self.chunk}")

    def prefill_select(self, view: View, state: State) -> Plan | None:
        return Plan(dual_chunk_parts(view, self.chunk, self.local))

    decode_select = prefill_select
