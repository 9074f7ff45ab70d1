"""alpha-entmax attention as a layer, with the scaling and the positions of ASEntmax (arXiv 2506.16640)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from nsa import ops
from nsa.cache import FullCache
from nsa.layers.around import innermost
from nsa.layers.kind import Local, Pair
from nsa.layers.linear import Linear
from nsa.layers.projections.base import ProjectedLayer
from nsa.layers.projections.gqa import GroupedQuery
from nsa.layers.rotary import Rotary, RotaryTables
from nsa.ops.dispatch import accumulation_dtype, without_autocast
from nsa.ops.geometry import Documents

Scaling = Literal["none", "asentmax", "ssmax"]
Position = Literal["rotary", "alibi"]


class SparseWeights(nn.Module):
    """The operator of the layer, as a module without parameters, so that hooks can see queries, keys and values.

    Attributes:
        alibi_heads: the first heads of the whole layer, which have a slope.
        first_head: the number of the first query head; not 0 on a tensor-parallel rank.
    """

    def __init__(self, alpha: float, alibi_heads: int, backend: str) -> None:
        super().__init__()
        self.alpha, self.alibi_heads, self.first_head, self.backend = alpha, alibi_heads, 0, backend

    def slopes(self, q: Tensor) -> Tensor | None:
        """(H,) fp32 of ALiBi, for the heads of q (B, T, H, D); None: no head has one."""
        if not self.alibi_heads:
            return None
        number = torch.arange(self.first_head, self.first_head + q.shape[2], device=q.device)
        return torch.where(number < self.alibi_heads, 1 / (number + 1), 0)

    def forward(
        self,
        q: Tensor,
        kv: Pair | Callable[[], Pair],
        logit_scale: Tensor,
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """As `nsa.ops.entmax_attention`.

        Args:
            kv: keys and values, or a function that waits for them if they are being gathered from other devices.
            offset: number of keys before the first query.
        """
        k, v = kv() if callable(kv) else kv
        assert offset + q.shape[1] == k.shape[1], "the queries must be those of the last tokens"
        return ops.entmax_attention(
            q,
            k,
            v,
            alpha=self.alpha,
            cu_seqlens=cu_seqlens,
            logit_scale=logit_scale,
            slopes=self.slopes(q),
            backend=self.backend,
        )


class EntmaxAttention(ProjectedLayer):
    """Causal grouped-query attention whose weights are an alpha-entmax of the scores; usable in any decoder.

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys, even. v_head_dim: Dv of values; None: D.
        alpha: above 1 (towards softmax) and at most 2 (sparsemax).
        scaling: factor of the scores of the token at position p of its document, with n = p + 2. "none": 1.
            "asentmax": 1 + softplus(W_b x) (log n)^(2 tanh(W_g x)), for each head. "ssmax" (arXiv 2501.19399):
            (1 + w) log n, with w of each head. With ``nope_heads`` it is that of these heads, and others have 1.
        nope_heads: query heads, the last ones, without positions. With ``position`` rotary, a multiple of H / G: keys
            are rotated for all queries of a group.
        position: of the other heads. "alibi": head h of all (from 1) has slope 1 / h, and none is rotated.
        rope_theta: base of the rotary frequencies if ``forward`` gets no tables.
        projection: how queries, keys and values are made, in place of those of these sizes; it must not rotate if heads
            have other positions than rotary ones.
        backend: implementation of the operators: auto, torch or naive (triton: of all but the attention).

    Raises:
        ValueError: alpha or nope_heads out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        alpha: float = 1.5,
        scaling: Scaling = "asentmax",
        nope_heads: int = 0,
        position: Position = "rotary",
        rope_theta: float = 10000.0,
        projection: GroupedQuery | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            projection
            or GroupedQuery(
                hidden_size,
                num_heads,
                num_kv_heads,
                head_dim,
                v_head_dim,
                rotate=rotates_all(position, nope_heads),
                backend=backend,
            )
        )
        check_heads(num_heads, num_kv_heads, nope_heads, position)
        self.head_dim, self.per_group = head_dim, num_heads // num_kv_heads
        self.rope_theta, self.backend = rope_theta, backend
        self.scaling, self.position = scaling, position
        self.placed_heads, self.nope_heads = num_heads - nope_heads, nope_heads  # heads with and without positions
        if scaling == "asentmax":
            self.beta = nn.Linear(hidden_size, num_heads, bias=False)
            self.gamma = nn.Linear(hidden_size, num_heads, bias=False)
        elif scaling == "ssmax":
            self.log_scale = nn.Linear(1, num_heads, bias=False)
        self.output = Linear(num_heads * (v_head_dim or head_dim), hidden_size, bias=False)
        self.exchange = Local()
        alibi_heads = self.placed_heads if position == "alibi" else 0
        self.attend = SparseWeights(alpha, alibi_heads, backend if backend != "triton" else "auto")

    @property
    def first_head(self) -> int:
        """The number of the first query head; not 0 on a tensor-parallel rank."""
        return innermost(self.attend).first_head  # type: ignore[return-value]

    @first_head.setter
    def first_head(self, number: int) -> None:
        innermost(self.attend).first_head = number  # type: ignore[assignment]

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        cu_seqlens: Tensor | None = None,
        cache: FullCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            rotary: tables at the tokens' positions (`nsa.layers.rotary.Rotary.at`); None: computed from
                ``rope_theta``.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1.
            cache: of the tokens before, from `new_cache`; the T new tokens are appended.
        """
        offset = 0 if cache is None else cache.length
        if rotary is None:
            rotary = Rotary(self.rope_theta).at(Documents.of(x.shape[1], offset, cu_seqlens, x.device).query_local)
        q, (k, v), _ = self.projection(x, rotary)
        if self.position == "rotary" and self.nope_heads:
            tables = rotary.of(self.head_dim)
            q = self._turn(q, self.placed_heads - self.first_head, tables)
            k = self._turn(k, self.placed_heads // self.per_group - self.first_head // self.per_group, tables)
        q, kv, logit_scale = self.exchange(q, (k, v), self.logit_scale(x, rotary.positions, q.shape[2]))
        if cache is not None:
            kv = cache.append(*kv)
        out = self.attend(q, kv, logit_scale, cu_seqlens=cu_seqlens, offset=offset)
        return self.output(out.flatten(2))

    def logit_scale(self, x: Tensor, positions: Tensor, heads: int) -> Tensor:
        """(B, T, H) fp32, from x (B, T, C) of tokens at ``positions`` (T,) in their documents."""
        dtype = accumulation_dtype(x)
        one = torch.ones((), dtype=dtype, device=x.device).expand(*x.shape[:2], heads)
        if self.scaling == "none":
            return one
        log_n = (positions + 2).to(dtype).log()[:, None]  # (T, 1)
        if self.scaling == "ssmax":
            with without_autocast(x.device.type):
                scale = log_n + log_n @ self.log_scale.weight.to(dtype).T
            scale = scale.expand_as(one)
        else:
            beta, gamma = softplus(self.beta(x).to(dtype)), 2 * self.gamma(x).to(dtype).tanh()
            scale = 1 + beta * (gamma * log_n.log()).exp()
        if self.nope_heads:
            number = torch.arange(self.first_head, self.first_head + heads, device=x.device)
            scale = torch.where(number < self.placed_heads, one, scale)
        return scale

    def _turn(self, x: Tensor, heads: int, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Rotate the first ``heads`` of x (B, T, heads, D)."""
        heads = min(max(heads, 0), x.shape[2])
        first, others = x.tensor_split([heads], 2)
        turned = ops.apply_rotary(first.contiguous(), *tables, backend=self.backend) if heads else first
        return torch.cat((turned, others), 2)

    def new_cache(self) -> FullCache:
        return FullCache()


def rotates_all(position: Position, nope_heads: int) -> bool:
    """Whether all heads have rotary positions, so that the projection rotates them."""
    return position == "rotary" and nope_heads == 0


def check_heads(num_heads: int, num_kv_heads: int, nope_heads: int, position: Position) -> None:
    """Raise ValueError if there cannot be so many heads without positions."""
    if not 0 <= nope_heads <= num_heads:
        raise ValueError(f"attention.entmax.nope_heads ({nope_heads}) must be from 0 to the query heads ({num_heads})")
    if position == "rotary" and nope_heads % (num_heads // num_kv_heads):
        raise ValueError(
            f"attention.entmax.nope_heads ({nope_heads}) must be a multiple of the query heads of a KV head "
            f"({num_heads // num_kv_heads}), since a key is rotated for all of them or for none; or set "
            "attention.entmax.position to alibi"
        )
