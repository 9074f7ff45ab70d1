"""Grouped-query attention."""

from collections.abc import Callable

from torch import Tensor, nn

from nsa import ops
from nsa.cache import FullCache, Position
from nsa.layers.kind import Local, Pair
from nsa.layers.linear import Linear
from nsa.layers.projections.base import ProjectedLayer, Projection
from nsa.layers.projections.gqa import GroupedQuery
from nsa.layers.rotary import RotaryTables
from nsa.ops.dense.libraries import NAMES


class CausalAttention(nn.Module):
    """The operator of the layer, as a module without parameters, so that hooks can see queries, keys and values.

    ``asks_for_lengths``: whether it is faster if the host knows the lengths of the documents
    (`nsa.ops.geometry.tell_lengths`).
    """

    def __init__(self, backend: str, implementation: str = "auto", scale: float | None = None) -> None:
        super().__init__()
        self.scale, self.decoding = scale, backend
        self.backend = implementation if backend == "auto" else backend
        self.asks_for_lengths = self.backend in ("auto", *NAMES)

    def forward(
        self, q: Tensor, kv: Pair | Callable[[], Pair], cu_seqlens: Tensor | None = None, offset: int = 0
    ) -> Tensor:
        """As `nsa.ops.dense_attention`.

        Args:
            kv: keys and values, or a function that waits for them if they are being gathered from other devices.
            offset: number of keys before the first query.
        """
        k, v = kv() if callable(kv) else kv
        assert offset + q.shape[1] == k.shape[1], "the queries must be those of the last tokens"
        return ops.dense_attention(q, k, v, scale=self.scale, cu_seqlens=cu_seqlens, backend=self.backend)

    def decode(self, q: Tensor, kv: Pair, lengths: Tensor) -> Tensor:
        """As `nsa.ops.decode_attention` to all tokens, with an axis of one token: q (B, 1, H, D) -> (B, 1, H, Dv)."""
        return ops.decode_attention(q[:, 0], *kv, lengths, scale=self.scale, backend=self.decoding)[0][:, None]


class DenseAttention(ProjectedLayer):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary embedding.

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys. v_head_dim: Dv of values; None: D.
        projection: how queries, keys and values are made, in place of grouped ones of these sizes.
        backend: implementation of the operators: auto, triton, torch or naive.
        implementation: of the attention if ``backend`` is auto: auto, triton, or the name of a library
            (`nsa.ops.dense_attention`).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        projection: Projection | None = None,
        backend: str = "auto",
        implementation: str = "auto",
    ) -> None:
        super().__init__(
            projection or GroupedQuery(hidden_size, num_heads, num_kv_heads, head_dim, v_head_dim, backend=backend)
        )
        self.output = Linear(num_heads * (v_head_dim or head_dim), hidden_size, bias=False)
        self.exchange = Local()
        self.attend = CausalAttention(backend, implementation, self.projection.scale)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables,
        cu_seqlens: Tensor | None = None,
        cache: FullCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            rotary: tables at the tokens' positions (`nsa.layers.rotary.Rotary.at`).
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1.
            cache: of the tokens before, from `new_cache`; the T new tokens are appended.
        """
        offset, fixed = (0, None) if cache is None else (cache.length, cache.position)
        q, rows, _ = self.projection(x, rotary)
        q, rows = self.exchange(q, rows)
        if cache is not None:
            rows = cache.append(*rows)
        absorbed = offset > 0  # a few queries, many keys: these are not expanded again for each token
        q, kv = self.projection.form(q, rows, absorbed)
        if fixed is not None:
            assert not callable(kv)
            out = self.attend.decode(q, kv, fixed.lengths)
        else:
            out = self.attend(q, kv, cu_seqlens=cu_seqlens, offset=offset)
        return self.output(self.projection.values(out, absorbed).flatten(2))

    def new_cache(self) -> FullCache:
        return FullCache()

    def fix(self, cache: FullCache, tokens: int, position: Position) -> None:
        """Give the cache memory for ``tokens`` that stays where it is; ``forward`` then takes a token at a time."""
        cache.fix(tokens, position)
