"""DeepSeek Sparse Attention as a layer (DeepSeek-V3.2, arXiv 2512.02556)."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.cache import FullCache, IndexedCache, Position
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.dsa.share import DECODED, HandOver, IndexShare, SharedChoice, TakeOver
from nsa.layers.index_sets import IndexChoice
from nsa.layers.kind import Local, Pair
from nsa.layers.linear import Linear
from nsa.layers.projections.base import ProjectedLayer, Projection
from nsa.layers.projections.gqa import GroupedQuery
from nsa.layers.rotary import Rotary, RotaryTables
from nsa.ops.dispatch import accumulation_dtype
from nsa.ops.geometry import Documents, RotaryLayout
from nsa.ops.index_topk.fp8 import rounded_to_fp8

Phase = Literal["warm-up", "sparse"]


class LightningIndexer(nn.Module):
    """Queries, keys and head weights of the index scores (arXiv 2512.02556, Eq. 1).

    Its input is detached: only its own loss trains it, and it adds nothing to the gradient of the decoder.

    Args:
        hidden_size: C. num_heads: Hi. head_dim: Di. rotary: which dims of a head are rotated.
        query_size: width of what the queries are made of, the latent of the attention's queries; None: C.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        rotary: RotaryLayout,
        *,
        query_size: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rotary, self.backend = num_heads, head_dim, rotary, backend
        self.query = nn.Linear(query_size or hidden_size, num_heads * head_dim, bias=False)
        self.key = nn.Linear(hidden_size, head_dim, bias=False)
        self.key_norm = nn.LayerNorm(head_dim, eps=1e-6)
        self.head_weight = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(
        self, x: Tensor, rotary: RotaryTables, query_latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C) -> q_idx (B, T, Hi, Di), k_idx (B, T, Di), weights (B, T, Hi) fp32: see `nsa.ops.index_topk`.

        ``query_latent``: (B, T, query_size); None: x.
        """
        x = x.detach()
        asking = x if query_latent is None else query_latent.detach()
        tables = rotary.of(self.rotary.turning(self.head_dim)[0])
        turned = ops.Heads(self.num_heads, self.head_dim, "rotate", self.rotary)
        (q_idx,) = ops.split_heads(self.query(asking), [turned], *tables, backend=self.backend)
        (k_idx,) = ops.split_heads(
            self.key_norm(self.key(x)), [turned._replace(number=1)], *tables, backend=self.backend
        )
        weights = self.head_weight(x).to(accumulation_dtype(x)) * (self.num_heads * self.head_dim) ** -0.5
        return q_idx, k_idx.squeeze(2), weights


class TokenChoice(IndexChoice):
    """The operator that selects the tokens of each query, without parameters and gradient."""

    def __init__(self, share: IndexShare, sizes: dict[str, Any], *, backend: str) -> None:
        super().__init__()
        self.share, self.sizes, self.topk, self.backend = share, sizes, sizes["topk"], backend

    def forward(self, *inputs: Tensor, cu_seqlens: Tensor | None = None, offset: int = 0) -> Tensor:
        sets = super().forward(*inputs, cu_seqlens=cu_seqlens, offset=offset)
        if self.share.index is not None:
            self.share.sets[offset] = sets
        return sets

    def select(self, *inputs: Tensor, cu_seqlens: Tensor | None, offset: int) -> Tensor:
        """inputs: q_idx, k_idx, weights, as `nsa.ops.index_topk` takes them; the indices only."""
        return ops.index_topk(*inputs, **self.sizes, cu_seqlens=cu_seqlens, backend=self.backend)[0]

    def decode(self, *inputs: Tensor) -> Tensor:
        """inputs: as `nsa.ops.index_topk_decode` takes them -> (B, topk)."""
        sets = ops.index_topk_decode(*inputs, **self.sizes, backend=self.backend)
        if self.share.index is not None:
            self.share.sets[DECODED] = sets
        return sets


class IndexedAttention(nn.Module):
    """The operators of the layer, as a module without parameters, so that hooks can see its inputs.

    Attributes:
        choose: the selection. loss: the indexer's, which is attached to the output. In the sparse phase it is computed
            in the attention's backward pass, if there is one.
        scale: factor of the attention's scores; None: D ** -0.5.
        together: of a mean over query heads, that over all of them, also where ranks share these.
    """

    def __init__(
        self, choose: IndexChoice, loss: AuxiliaryLoss, *, phase: Phase, scale: float | None = None, backend: str
    ) -> None:
        super().__init__()
        self.scale = scale
        self.choose, self.loss = choose, loss
        self.phase, self.backend = phase, backend
        self.together = nn.Identity()

    def forward(
        self,
        q: Tensor,
        kv: Pair | Callable[[], Pair],
        q_idx: Tensor,
        k_idx: tuple[Tensor] | Callable[[], tuple[Tensor]],
        weights: Tensor,
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """(B, T, H, Dv) for the queries at positions ``offset`` on.

        Args:
            kv: keys and values, k_idx: index keys; or functions that wait for them.
        """
        k, v = kv() if callable(kv) else kv
        (index_keys,) = k_idx() if callable(k_idx) else k_idx
        assert offset + q.shape[1] == k.shape[1], "the queries must be those of the last tokens"
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "backend": self.backend}
        tokens = None
        if self.phase == "warm-up":
            out, lse = ops.dense_attention(q, k, v, scale=self.scale, **options, return_lse=True)
        else:
            tokens = self.choose(q_idx, index_keys, weights, cu_seqlens=cu_seqlens, offset=offset)
            sparse: dict[str, Any] = {"scale": self.scale, **options}
            if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
                # The attention has a backward pass, in which the indexer learns from the same probabilities.
                factor = self.loss.factor(q, q.shape[0] * q.shape[1])
                return ops.token_sparse_attention_kl(q, k, v, tokens, q_idx, index_keys, weights, factor, **sparse)
            out, lse = ops.token_sparse_attention(q, k, v, tokens, **sparse, return_lse=True)
        if not (out.requires_grad or q_idx.requires_grad):
            return out
        divergence = ops.indexer_kl(
            q_idx, index_keys, weights, q, k, lse, token_indices=tokens, scale=self.scale, **options
        )
        return self.loss(out, divergence, q.shape[0] * q.shape[1])

    def decode(
        self, q: Tensor, kv: Pair, q_idx: Tensor, k_idx: tuple[Tensor], weights: Tensor, lengths: Tensor
    ) -> Tensor:
        """For one token (B, 1, ...) per sequence, on the memory of a cache with so many tokens: (B, 1, H, Dv)."""
        if self.choose.recorded is not None or self.choose.given is not None:
            raise ValueError("index sets are recorded and replayed with new_caches() only, not by DecodingSteps")
        pages = None
        if self.phase == "sparse":
            sets = self.choose.decode(q_idx[:, 0], *k_idx, weights[:, 0], lengths)  # type: ignore[operator]
            pages = sets[:, None].expand(-1, kv[0].shape[2], -1)
        options: dict[str, Any] = {"pages": pages, "scale": self.scale, "backend": self.backend}
        return ops.decode_attention(q[:, 0], *kv, lengths, **options)[0][:, None]


class DeepSeekSparseAttention(ProjectedLayer):
    """Grouped-query attention of each query to the tokens that a lightning indexer selects; usable in any decoder.

    The indexer learns to predict the attention, by `nsa.ops.indexer_kl`. This loss is attached to the output: the
    backward pass of any loss includes it, with the weight ``kl_weight``, as a mean over the tokens of the pass
    (`nsa.layers.auxiliary_loss.AuxiliaryLoss.scale` replaces the mean).

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys, even. v_head_dim: Dv of values; None: D.
        topk, num_initial, num_local: tokens per query (k); among them the document's first, the query's most recent.
        index_heads, index_head_dim: Hi and Di of the indexer. index_rotary: which dims of an index head are rotated.
        index_fp8: whether the selection takes index queries and keys in fp8. The loss does not.
        phase: "warm-up": queries attend to all tokens, and the indexer learns this attention. "sparse": they attend to
            the selected tokens, and the indexer learns the attention among these.
        kl_weight: weight of the indexer's loss.
        share: the attribute ``share`` of an earlier layer, whose index sets this one attends to. Then it has no
            indexer, the sizes of an index head do not matter, and the weight of the loss is divided among these layers.
        rope_theta: base of the rotary frequencies if ``forward`` gets no tables.
        projection: how queries, keys and values are made, in place of grouped ones of these sizes.
        backend: implementation of the operators: auto, triton, torch or naive.

    Raises:
        ValueError: (in ``forward``) sizes that do not belong together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        topk: int = 2048,
        num_initial: int = 0,
        num_local: int = 0,
        index_heads: int = 64,
        index_head_dim: int = 128,
        index_rotary: RotaryLayout = RotaryLayout(64),  # noqa: B008 - a constant
        index_fp8: bool = False,
        phase: Phase = "sparse",
        kl_weight: float = 1.0,
        share: IndexShare | None = None,
        rope_theta: float = 10000.0,
        projection: Projection | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            projection or GroupedQuery(hidden_size, num_heads, num_kv_heads, head_dim, v_head_dim, backend=backend)
        )
        self.rope_theta, self.index_fp8 = rope_theta, index_fp8
        self.indexer: LightningIndexer | None = None
        self.share = IndexShare(kl_weight) if share is None else share
        sizes = {"topk": topk, "num_initial": num_initial, "num_local": num_local, "fp8": index_fp8}
        loss = AuxiliaryLoss(kl_weight)
        number = self.share.join(loss)
        choose: IndexChoice
        if share is None:
            self.indexer = LightningIndexer(
                hidden_size,
                index_heads,
                index_head_dim,
                index_rotary,
                query_size=self.projection.latent_size,
                backend=backend,
            )
            self.shared: nn.Module = HandOver(self.share)
            choose = TokenChoice(self.share, sizes, backend=backend)
        else:
            self.shared = TakeOver(share, number)
            choose = SharedChoice(share, number, sizes)
        self.output = Linear(num_heads * (v_head_dim or head_dim), hidden_size, bias=False)
        self.exchange = Local()
        self.attend = IndexedAttention(choose, loss, phase=phase, scale=self.projection.scale, backend=backend)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        cu_seqlens: Tensor | None = None,
        cache: IndexedCache | FullCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            rotary: tables at the tokens' positions (`nsa.layers.rotary.Rotary.at`); None: computed from
                ``rope_theta``.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1.
            cache: of the tokens before, from `new_cache`; the T new tokens are appended.
        """
        offset, fixed = (0, None) if cache is None else (cache.length, cache.position)
        if rotary is None:
            rotary = Rotary(self.rope_theta).at(Documents.of(x.shape[1], offset, cu_seqlens, x.device).query_local)
        q, rows, query_latent = self.projection(x, rotary)
        if self.indexer is None:
            q_idx, k_idx, weights = self.shared()
        else:
            q_idx, index_keys, weights = self.indexer(x, rotary, query_latent)
            k_idx = (index_keys,)
        q, rows, q_idx, k_idx, weights = self.exchange(q, rows, q_idx, k_idx, weights)
        if isinstance(cache, IndexedCache):
            if self.index_fp8:  # here, so that no step rounds all of them again
                k_idx = tuple(rounded_to_fp8(x) for x in k_idx)
            rows, k_idx = cache.append(rows, k_idx)
        elif cache is not None:
            rows = cache.append(*rows)
        if self.indexer is not None:
            self.shared(q_idx, k_idx, weights)
        absorbed = self.attend.phase == "sparse" or offset > 0  # a token's row is read by many heads, from few places
        q, kv = self.projection.form(q, rows, absorbed)
        if fixed is not None:
            assert not callable(kv) and not callable(k_idx)
            out = self.attend.decode(q, kv, q_idx, k_idx, weights, fixed.lengths)
        else:
            out = self.attend(q, kv, q_idx, k_idx, weights, cu_seqlens=cu_seqlens, offset=offset)
        return self.output(self.projection.values(out, absorbed).flatten(2))

    def new_cache(self) -> IndexedCache | FullCache:
        """Without an indexer there are no index keys to keep."""
        return FullCache() if self.indexer is None else IndexedCache()

    def fix(self, cache: IndexedCache | FullCache, tokens: int, position: Position) -> None:
        """Give the cache memory for ``tokens`` that stays where it is; ``forward`` then takes a token at a time.

        ``forward`` needs ``rotary`` then, since only the device knows the position.
        """
        cache.fix(tokens, position)
