"""Dynamic Memory Sparsification (arXiv 2506.05345)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nsa.cache.delayed import DelayedCache
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.dms.attention import ROWS, delayed_attention, shifted
from nsa.layers.kind import Local, Pair
from nsa.layers.linear import Linear
from nsa.layers.projections.base import ProjectedLayer, Projection
from nsa.layers.projections.gqa import GroupedQuery
from nsa.layers.rotary import Rotary, RotaryTables
from nsa.ops.dispatch import accumulation_dtype, softmax_scale
from nsa.ops.geometry import Documents


class DelayedEviction(nn.Module):
    """The operator of the layer, as a module without parameters, so that hooks can see its inputs."""

    def __init__(self, window: int, scale: float | None, backend: str) -> None:
        super().__init__()
        self.window, self.scale, self.backend = window, scale, backend

    def forward(
        self,
        q: Tensor,
        kv: Pair | Callable[[], Pair],
        log_keep: tuple[Tensor] | Callable[[], tuple[Tensor]],
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """(B, T, H, Dv) for the queries at positions ``offset`` on.

        Args:
            kv: keys and values, log_keep: (B, S, G) of each token's decision about the one before it; or functions
                that wait for them.
        """
        k, v = kv() if callable(kv) else kv
        (decided,) = log_keep() if callable(log_keep) else log_keep
        assert offset + q.shape[1] == k.shape[1], "the queries must be those of the last tokens"
        documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
        return delayed_attention(
            q,
            k,
            v,
            shifted(decided),
            window=self.window,
            scale=softmax_scale(self.scale, q.shape[3]),
            query_positions=documents.query_position,
            key_positions=torch.arange(k.shape[1], device=q.device)[None, :, None],
            first=documents.bounds[documents.query_document],
            rows=q.shape[1] if self.backend == "naive" else ROWS,
        )


class LogisticNoise(nn.Module):
    """What is added to the logits in training. A module, so that a recomputed pass gets the noise of the first one."""

    def forward(self, logits: Tensor) -> Tensor:
        """Drawn anew, in the shape of the logits."""
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        return uniform.log() - (-uniform).log1p()


class MemorySparseAttention(ProjectedLayer):
    """Grouped-query attention whose KV heads learn to forget tokens, each its own; usable in any decoder.

    Each KV head has an eviction logit per token, from a linear map of the layer's input (a head of its own; the release
    borrows a neuron of a query). The logit of token t + 1 decides about token t, for queries more than ``window`` after
    it. In training the decision is soft: log(1 - alpha) is added to the scores, with alpha = sigmoid((logit + noise) /
    temperature) and logistic noise. In evaluation it is hard: a logit above 0 forgets. With a cache, forgotten tokens
    leave the memory.

    A loss is attached to the output: the backward pass of any loss includes max(0, ``evicted`` - mean of alpha) with
    the factor ``weight``, for this layer alone (the paper has one mean over all layers).

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys, even. v_head_dim: Dv of values; None: D.
        window, evicted, weight, temperature, offset: see `nsa.layers.dms.config.DmsConfig`.
        rope_theta: base of the rotary frequencies if ``forward`` gets no tables.
        projection: how queries, keys and values are made, in place of grouped ones of these sizes.
        backend: naive: all scores at once; any other: by blocks of queries. There is no kernel yet.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        window: int = 256,
        evicted: float = 0.75,
        weight: float = 1.0,
        temperature: float = 0.1,
        offset: float = 5.0,
        rope_theta: float = 10000.0,
        projection: Projection | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            projection or GroupedQuery(hidden_size, num_heads, num_kv_heads, head_dim, v_head_dim, backend=backend)
        )
        self.rope_theta, self.evicted, self.temperature, self.offset = rope_theta, evicted, temperature, offset
        self.evict = nn.Linear(hidden_size, num_kv_heads)
        self.noise = LogisticNoise()
        self.output = Linear(num_heads * (v_head_dim or head_dim), hidden_size, bias=False)
        self.exchange = Local()
        self.attend = DelayedEviction(window, self.projection.scale, backend)
        self.share = AuxiliaryLoss(weight)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        cu_seqlens: Tensor | None = None,
        cache: DelayedCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            rotary: tables at the tokens' positions (`nsa.layers.rotary.Rotary.at`); None: computed from
                ``rope_theta``.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1.
            cache: of the tokens before, from `new_cache`; the T new tokens are appended. The decisions are hard.
        """
        past = 0 if cache is None else cache.length
        if rotary is None:
            rotary = Rotary(self.rope_theta).at(Documents.of(x.shape[1], past, cu_seqlens, x.device).query_local)
        q, rows, _ = self.projection(x, rotary)
        logits = self.evict(x).to(accumulation_dtype(x)) - self.offset
        if cache is not None:
            return self.output(self._cached(q, rows, logits > 0, cache).flatten(2))
        log_keep, loss = self.decide(logits)
        q, rows, decided = self.exchange(q, rows, (log_keep,))
        q, kv = self.projection.form(q, rows, False)
        out: Any = self.attend(q, kv, decided, cu_seqlens=cu_seqlens)
        if loss is not None:
            out = self.share(out, loss, x.shape[0] * x.shape[1])
        return self.output(out.flatten(2))

    def decide(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Eviction logits (B, T, G) -> log of what stays, of that shape, and the loss, a sum over tokens (training)."""
        if not self.training:
            return torch.zeros_like(logits).masked_fill(logits > 0, -torch.inf), None
        logits = (logits + self.noise(logits)) / self.temperature
        missing = (self.evicted - logits.sigmoid().mean()).clamp(min=0)
        return functional.logsigmoid(-logits), missing * (logits.shape[0] * logits.shape[1])

    def _cached(self, q: Tensor, rows: tuple[Tensor, ...], evicts: Tensor, cache: DelayedCache) -> Tensor:
        start, (k, v) = cache.length, rows
        positions = torch.arange(start, start + q.shape[1], device=q.device)
        cache.append_decided(k, v, positions.expand(len(q), -1), evicts)
        out = delayed_attention(
            q,
            cache.keys,
            cache.values,
            torch.zeros(cache.gone.shape, device=q.device).masked_fill(cache.gone, -torch.inf),
            window=cache.window,
            scale=softmax_scale(self.attend.scale, q.shape[3]),
            query_positions=positions,
            key_positions=cache.positions,
        )
        cache.forget()
        return out

    def new_cache(self) -> DelayedCache:
        return DelayedCache(self.attend.window)
