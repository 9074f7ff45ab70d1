"""Grouped-query attention."""

from collections.abc import Callable

from torch import Tensor, nn

from nsa import ops
from nsa.cache import FullCache
from nsa.layers.kind import Local, Pair
from nsa.layers.projection import joint_linear
from nsa.layers.rotary import RotaryTables
from nsa.ops.dense.libraries import NAMES


class CausalAttention(nn.Module):
    """The operator of the layer, as a module without parameters, so that hooks can see queries, keys and values.

    ``asks_for_lengths``: whether it is faster if the host knows the lengths of the documents
    (`nsa.ops.geometry.tell_lengths`).
    """

    def __init__(self, backend: str, implementation: str = "auto") -> None:
        super().__init__()
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
        return ops.dense_attention(q, k, v, cu_seqlens=cu_seqlens, backend=self.backend)


class DenseAttention(nn.Module):
    """Causal grouped-query attention (arXiv 2305.13245) with rotary embedding.

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys. v_head_dim: Dv of values; None: D.
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
        backend: str = "auto",
        implementation: str = "auto",
    ) -> None:
        super().__init__()
        v_head_dim = v_head_dim or head_dim
        self.head_dim, self.v_head_dim, self.backend = head_dim, v_head_dim, backend
        # Modules give names and initialisation to the weights; one joint product uses them.
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=False)
        self.output = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)
        self.exchange = Local()
        self.attend = CausalAttention(backend, implementation)

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
            cache: keys and values of the tokens before, to which T new ones are appended.
        """
        joint = joint_linear(x, [linear.weight for linear in (self.query, self.key, self.value)])
        parts = [
            ops.Heads(self.query.out_features // self.head_dim, self.head_dim, "rotate"),
            ops.Heads(self.key.out_features // self.head_dim, self.head_dim, "rotate"),
            ops.Heads(self.value.out_features // self.v_head_dim, self.v_head_dim),
        ]
        q, k, v = ops.split_heads(joint, parts, *rotary.of(self.head_dim), backend=self.backend)
        offset = 0 if cache is None else cache.length
        q, kv = self.exchange(q, (k, v))
        if cache is not None:
            kv = cache.append(*kv)
        out = self.attend(q, kv, cu_seqlens=cu_seqlens, offset=offset)
        return self.output(out.flatten(2))

    def new_cache(self) -> FullCache:
        return FullCache()
