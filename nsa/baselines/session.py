"""One method at work in all layers of one model, for one batch: from a prompt to the last decoded token."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nsa.baselines import prompt
from nsa.baselines.attention import attend, is_dense, kept
from nsa.baselines.ledger import Ledger
from nsa.baselines.listed import attend_listed, can_list
from nsa.baselines.masked import attend_masked, can_mask
from nsa.baselines.method import Method, State
from nsa.baselines.methods.dense import GIVEN
from nsa.baselines.plan import Plan, Turn, View
from nsa.cache.evicting import EvictingCache


class Session:
    """Attention of all layers by ``method``. The caches are its own: a layer hands over its new tokens.

    A prompt comes first, in one piece or in chunks; `end_prompt` ends it (or `last_chunk` is set before the last
    forward pass). Then tokens come one at a time.

    Args:
        method: what to attend to. num_layers: of the model.
        turn: rotates as the model does; None: it cannot be turned.
        dense_layers: layers whose attention stays dense, disclosed in every result.
        ledger: counts into this one; None: a new one.
        watch: phases ("prefill", "decode") whose attention is also measured, at the cost of a dense one: `_watch`.
    """

    def __init__(
        self,
        method: Method,
        num_layers: int,
        *,
        turn: Turn | None = None,
        dense_layers: Iterable[int] = (),
        ledger: Ledger | None = None,
        watch: Iterable[str] = (),
    ) -> None:
        self.method, self.num_layers, self.turn = method, num_layers, turn
        self.dense_layers = frozenset(dense_layers)
        self.ledger = Ledger() if ledger is None else ledger
        self.watch = frozenset(watch)
        self.figures: list[dict[str, Any]] = []
        self.begin()

    def begin(self, padding: Tensor | None = None) -> None:
        """Forget the batch before. ``padding``: (B,) int64, tokens of padding on the left of each new prompt."""
        self.padding, self.prompt, self.last_chunk = padding, True, True
        self.caches = [EvictingCache() for _ in range(self.num_layers)]
        self.all = [EvictingCache() for _ in range(self.num_layers)] if self.watch else []  # nothing is evicted here
        shared: dict[str, Any] = {}
        self.states = [State(shared=shared) for _ in range(self.num_layers)]
        self.lengths = [0] * self.num_layers  # tokens that each layer has seen, padding included

    @property
    def length(self) -> int:
        """Tokens so far, padding and evicted ones included."""
        return self.lengths[-1]

    @property
    def batch(self) -> int:
        """Sequences, once there is a token."""
        return len(self.caches[0].positions)

    @contextmanager
    def more_to_come(self) -> Iterator[None]:
        """Within: chunks of a prompt that are not its last."""
        self.last_chunk = False
        try:
            yield
        finally:
            self.last_chunk = True

    def end_prompt(self) -> None:
        """The next tokens are decoded."""
        self.prompt = False

    @torch.no_grad()
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of T new tokens in a layer: q (B, T, H, D), k (B, T, G, D), v (B, T, G, Dv) -> (B, T, H, Dv).

        Keys are rotated already, at positions that may differ from the true ones by a constant for each sequence.
        """
        view, plan = self._planned(layer, q, k, v, scale)
        watched = ("prefill" if self.prompt else "decode") in self.watch
        # A prompt that is left dense has the same bits whether a plan says so or none, so that others can `follow` it.
        wanted = None if self.prompt and is_dense(view, plan) else plan
        fast = self.prompt and not watched and prompt.on_gpu(view)  # watching needs the LSE of portable attention
        lse: Tensor | None = None
        if not self.prompt and q.is_cuda and can_list(view, plan):
            out, lse = attend_listed(view, plan)
        elif fast and wanted is not None and prompt.can_list(view, wanted):
            out, _ = prompt.attend_blocks(view, wanted)
        elif fast and can_mask(view, wanted):
            out = attend_masked(view, wanted)
        else:
            out, lse = attend(view, wanted)
        if watched:
            assert lse is not None
            self._watch(view, plan, lse)
        self._settle(view, plan)
        return out

    @torch.no_grad()
    def follow(self, other: "Session") -> None:
        """Go on from a prompt that ``other`` has read by `DenseForOthers`, in one piece, as if it had been read here.

        Attention is not computed again. The caches are copies.

        Raises:
            ValueError: the method does not leave the prompt dense.
        """
        self.begin(other.padding)
        for state in other.states:
            given: View = state.rest[GIVEN]
            view, plan = self._planned(given.layer, given.q, given.k, given.v, given.scale)
            if not is_dense(view, plan):
                raise ValueError(f"{self.method.name} does not leave the prompt dense: it must read the prompt itself")
            self._settle(view, plan)

    def _planned(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[View, Plan | None]:
        """What a layer sees once its new tokens are in the cache, and what the method says to it."""
        positions = self._positions(layer, q)
        cache, state = self.caches[layer], self.states[layer]
        cache.append(k, v, positions)
        if self.watch:
            self.all[layer].append(k, v, positions)
        self.lengths[layer] += q.shape[1]
        if state.slots:
            state.slots = cache.extra
        view = View(
            q=q,
            k=cache.keys,
            v=cache.values,
            query_positions=positions,
            positions=cache.positions,
            seen=positions[:, -1] + 1,
            scale=scale,
            layer=layer,
            num_layers=self.num_layers,
            prompt=self.prompt,
            last=self.last_chunk,
            turn=self.turn,
        )
        if layer in self.dense_layers:
            return view, None
        select = self.method.prefill_select if self.prompt else self.method.decode_select
        return view, select(view, state)

    def _settle(self, view: View, plan: Plan | None) -> None:
        """Count what was attended to, let the method look at it, and forget what it evicts."""
        cache, state = self.caches[view.layer], self.states[view.layer]
        self.ledger.record(view, plan)
        if view.layer not in self.dense_layers:
            self.method.observe(view, plan, state)
            if state.slots:
                cache.set_extra(state.slots)
            stays = self.method.evict(view, state)
            if stays is not None:
                cache.keep(stays)
                self.ledger.ran.add(("prefill" if self.prompt else "decode", view.layer))
            if state.slots:
                state.slots = cache.extra
        self.ledger.keep(view, cache.stored)

    def take(self, sequences: Tensor) -> "Session":
        """A copy with these sequences of the batch, (B',) int64; one may stand several times. The ledger is shared."""
        other = copy.copy(self)
        other.caches = [cache.take(sequences) for cache in self.caches]
        other.all = [cache.take(sequences) for cache in self.all]
        shared = _taken(self.states[0].shared, sequences)
        other.states = [State(_taken(s.rest, sequences), _taken(s.slots, sequences), shared) for s in self.states]
        other.lengths = list(self.lengths)
        other.padding = None if self.padding is None else self.padding[sequences]
        return other

    def _positions(self, layer: int, q: Tensor) -> Tensor:
        """(B, T) int64 of the new tokens in their sequences; -1: padding."""
        slot = torch.arange(self.lengths[layer], self.lengths[layer] + q.shape[1], device=q.device)
        padding = torch.zeros(len(q), dtype=torch.int64) if self.padding is None else self.padding
        return (slot - padding.to(q.device)[:, None]).clamp(min=-1)

    def _watch(self, view: View, plan: Plan | None, lse: Tensor) -> None:
        """Figures per layer: ``kept_mass`` of each KV head, and ``sink_mass``, the mass of the first four tokens.

        Shares of the attention to all tokens, evicted ones included, at the model's own positions.
        """
        real = (view.query_positions >= 0)[:, None]
        parts = () if plan is None else plan.parts
        if any(p.query_at is not None or p.key_at is not None or p.log_weight is not None for p in parts):
            mask = view.per_head(kept(view, plan, torch.arange(view.q.shape[1], device=view.q.device)))
            lse = view.scores().masked_fill(~mask, -torch.inf).logsumexp(-1)  # theirs is an estimate, or of elsewhere
        cache = self.all[view.layer]
        whole_view = replace(view, k=cache.keys, v=cache.values, positions=cache.positions)
        scores = whole_view.scores()
        whole = scores.logsumexp(-1)
        mass = torch.where(real, (lse - whole).exp(), 0).nan_to_num(0).sum((0, 2)) / real.sum()
        first = view.per_head((whole_view.positions < 4).transpose(1, 2)[:, :, None])
        sink = torch.where(first, (scores - whole[..., None]).exp(), 0).nan_to_num(0).sum(-1)
        sink_mass = float(torch.where(real, sink, 0).sum() / (real.sum() * view.q.shape[2]))
        kept_mass = mass.view(view.k.shape[2], -1).mean(1).tolist()
        self.figures.append(
            {"layer": view.layer, "prompt": view.prompt, "kept_mass": kept_mass, "sink_mass": sink_mass}
        )


def _taken(value: Any, sequences: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[sequences]
    if isinstance(value, dict):
        return {name: _taken(part, sequences) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_taken(part, sequences) for part in value)
    return value
