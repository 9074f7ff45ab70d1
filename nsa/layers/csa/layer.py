"""Compressed Sparse Attention as a layer (DeepSeek-V4, arXiv 2606.19348, section 2.3)."""

from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from nsa import ops
from nsa.cache import EntryCache
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.csa.compression import Compressor, Rows
from nsa.layers.index_sets import IndexChoice
from nsa.layers.kind import Local
from nsa.layers.linear import Linear, joint_linear
from nsa.layers.norm import RMSNorm
from nsa.layers.rotary import Rotary, RotaryTables
from nsa.ops.dispatch import accumulation_dtype
from nsa.ops.geometry import Documents, RotaryLayout, visible_blocks
from nsa.ops.native_sparse import key_borders
from nsa.ops.token_sparse import joined, with_sink

Phase = Literal["warm-up", "sparse"]


class EntryIndexer(nn.Module):
    """The lightning indexer (arXiv 2512.02556, Eq. 1) over compressed keys, which it makes with its own compressor.

    Its input is detached: only its own loss trains it, and it adds nothing to the gradient of the decoder.

    Args:
        hidden_size: C. num_heads: Hi. head_dim: Di. compress: makes entries of width Di.
        query_size: width of what the queries are made of, the latent of the attention's queries; None: C.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        compress: Compressor,
        query_size: int | None,
        backend: str,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rotary, self.backend = num_heads, head_dim, compress.rotary, backend
        self.query = nn.Linear(query_size or hidden_size, num_heads * head_dim, bias=False)
        self.compress = compress
        self.head_weight = nn.Linear(hidden_size, num_heads, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, query_latent: Tensor | None) -> tuple[Tensor, Rows, Tensor]:
        """x (B, T, C) -> q_idx (B, T, Hi, Di), what keys are made of (`Compressor.project`), weights (B, T, Hi) fp32.

        ``query_latent``: (B, T, query_size); None: x.
        """
        x = x.detach()
        asking = x if query_latent is None else query_latent.detach()
        heads = ops.Heads(self.num_heads, self.head_dim, "rotate", self.rotary)
        tables = rotary.untempered(self.rotary.turning(self.head_dim)[0])
        (q_idx,) = ops.split_heads(self.query(asking), [heads], *tables, backend=self.backend)
        weights = self.head_weight(x).to(accumulation_dtype(x)) * (self.num_heads * self.head_dim) ** -0.5
        return q_idx, self.compress.project(x), weights


class EntryChoice(IndexChoice):
    """The operator that selects the entries of each query, without parameters and gradient."""

    def __init__(self, topk: int, ratio: int, *, backend: str) -> None:
        super().__init__()
        self.topk, self.ratio, self.backend = topk, ratio, backend

    def visible(self, documents: Documents) -> tuple[Tensor, Tensor]:
        entries = visible_blocks(documents, self.ratio, self.ratio)
        return entries.first, entries.last - 1

    def select(self, *inputs: Tensor, cu_seqlens: Tensor | None, offset: int) -> Tensor:
        """inputs: q_idx, k_idx, weights, as `nsa.ops.index_topk` takes them; the indices only."""
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "offset": offset, "backend": self.backend}
        return ops.index_topk(*inputs, topk=self.topk, ratio=self.ratio, **options)[0]


class Divergence(nn.Module):
    """The loss of the indexer as a module without parameters: its target is a sum over all query heads."""

    def __init__(self, ratio: int, *, backend: str) -> None:
        super().__init__()
        self.ratio, self.backend = ratio, backend

    def forward(
        self,
        q: Tensor,
        lse: Tensor,
        entries: Tensor,
        q_idx: Tensor,
        k_idx: Tensor,
        weights: Tensor,
        sets: Tensor | None,
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """As `nsa.ops.indexer_kl`: a scalar, the sum over tokens."""
        return ops.indexer_kl(
            q_idx,
            k_idx,
            weights,
            q,
            entries,
            lse,
            token_indices=sets,
            ratio=self.ratio,
            cu_seqlens=cu_seqlens,
            offset=offset,
            backend=self.backend,
        )


class EntryAttention(nn.Module):
    """The operators of the layer, as a module without parameters, so that hooks can see its inputs.

    Attributes:
        choose: the selection, diverge: the indexer's loss, loss: attaches it to the output; None without an indexer.
    """

    choose: IndexChoice | None
    diverge: Divergence | None
    loss: AuxiliaryLoss | None

    def __init__(
        self, topk: int | None, kl_weight: float, *, ratio: int, window: int, phase: Phase, backend: str
    ) -> None:
        super().__init__()
        self.ratio, self.window, self.phase, self.backend = ratio, window, phase, backend
        self.choose = self.diverge = self.loss = None
        if topk is not None:
            self.choose = EntryChoice(topk, ratio, backend=backend)
            self.diverge = Divergence(ratio, backend=backend)
            self.loss = AuxiliaryLoss(kl_weight)

    def forward(
        self,
        q: Tensor,
        near: tuple[Tensor],
        sink: Tensor,
        entries: tuple[Tensor],
        q_idx: Tensor | None = None,
        k_idx: tuple[Tensor] | None = None,
        weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """(B, T, H, D) for the queries q (B, T, H, D) at positions ``offset`` on.

        Args:
            near: rows (B, S', 1, D) of the last tokens, the queries' own included. sink: (H,). entries: (B, S, 1, D).
                A row is both key and value.
            q_idx, k_idx, weights: as for `nsa.ops.index_topk`, k_idx with a dimension of heads, (B, S, 1, Di).
        """
        where: dict[str, Any] = {"cu_seqlens": cu_seqlens, "offset": offset}
        if self.choose is None or self.diverge is None or self.loss is None:
            return self.to_all(q, near, sink, entries, **where)[0]
        assert q_idx is not None and k_idx is not None and weights is not None
        index_keys, sets = k_idx[0].squeeze(2), None
        if self.phase == "warm-up":
            out, lse = self.to_all(q, near, sink, entries, **where)
        else:
            sets = self.choose(q_idx, index_keys, weights, **where)
            out, lse = self.to_sets(q, near, sink, entries, sets, **where)
        if not (out.requires_grad or q_idx.requires_grad):
            return out
        seen = q.detach(), lse.detach(), entries[0].detach()
        divergence = self.diverge(*seen, q_idx, index_keys, weights, sets, **where)
        return self.loss(out, divergence, q.shape[0] * q.shape[1])

    def to_sets(
        self,
        q: Tensor,
        near: tuple[Tensor],
        sink: Tensor,
        entries: tuple[Tensor],
        sets: Tensor,
        cu_seqlens: Tensor | None,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        """Attention to the window and to the entries of ``sets`` (B, T, K): output (B, T, H, D) and LSE (B, H, T)."""
        return ops.token_sparse_attention(
            q,
            entries[0],
            entries[0],
            sets,
            sink=sink,
            window=(near[0], near[0], self.window),
            cu_seqlens=key_borders(cu_seqlens, offset + q.shape[1], near[0]),
            return_lse=True,
            backend=self.backend,
        )

    def to_all(
        self,
        q: Tensor,
        near: tuple[Tensor],
        sink: Tensor,
        entries: tuple[Tensor],
        cu_seqlens: Tensor | None,
        offset: int,
    ) -> tuple[Tensor, Tensor]:
        """The same of the window and all entries that a query sees."""
        far = self.to_entries(q, entries, cu_seqlens, offset)
        return with_sink(*joined(far, self.to_window(q, near, cu_seqlens, offset)), sink)

    def to_entries(
        self, q: Tensor, entries: tuple[Tensor], cu_seqlens: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor]:
        """The same of all entries that a query sees; -inf is the LSE of a query that sees none."""
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "offset": offset, "backend": self.backend}
        return ops.compressed_attention(q, entries[0], entries[0], length=self.ratio, stride=self.ratio, **options)

    def to_window(
        self, q: Tensor, near: tuple[Tensor], cu_seqlens: Tensor | None, offset: int
    ) -> tuple[Tensor, Tensor]:
        """The same of the window."""
        borders = key_borders(cu_seqlens, offset + q.shape[1], near[0])
        options: dict[str, Any] = {"window": self.window, "cu_seqlens": borders, "backend": self.backend}
        return ops.dense_attention(q, near[0], near[0], **options, return_lse=True)


class CompressedSparseAttention(nn.Module):
    """Attention to the last tokens, and to entries that each stand for ``ratio`` tokens; usable in any decoder.

    All query heads share one KV head, and what they read of a token or an entry is both key and value. So the value is
    rotated, too, to the token's position; the rotated dims of the output are turned back by the query's position, and
    then they depend on distances alone. Query heads are normed without a weight. Window, entries and a learned sink
    of each head, which takes part in the denominator only, are in one softmax.

    With ``topk`` an indexer selects the entries of each query. It learns to predict the attention to entries, by
    `nsa.ops.indexer_kl`. This loss is attached to the output: the backward pass of any loss includes it, with the
    weight ``kl_weight``, as a mean over the tokens of the pass (`nsa.layers.auxiliary_loss.AuxiliaryLoss.scale`
    replaces the mean).

    Args:
        hidden_size: C. num_heads: H query heads. head_dim: D, even.
        ratio, overlap, topk, window, rotary_dims, q_lora_rank, index_heads, index_head_dim, index_rotary_dims, phase,
            kl_weight: see `nsa.layers.csa.config.CsaConfig`.
        norm_eps: epsilon of all norms.
        rope_theta: base of the rotary frequencies if ``forward`` gets no tables.
        backend: implementation of the operators: auto, triton, torch or naive.

    Raises:
        ValueError: rotary_dims exceed the head. (In ``forward``:) sizes that do not belong together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int,
        *,
        ratio: int = 4,
        overlap: bool = True,
        topk: int | None = 512,
        window: int = 128,
        rotary_dims: int | None = None,
        q_lora_rank: int | None = None,
        index_heads: int = 64,
        index_head_dim: int = 128,
        index_rotary_dims: int = 64,
        phase: Phase = "sparse",
        kl_weight: float = 1.0,
        norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if rotary_dims is not None and rotary_dims > head_dim:
            raise ValueError(f"attention.csa.rotary_dims ({rotary_dims}) exceeds model.head_dim ({head_dim}): lower it")
        self.head_dim, self.norm_eps, self.rope_theta, self.backend = head_dim, norm_eps, rope_theta, backend
        self.rotary = RotaryLayout(rotary_dims, "last", "interleaved")
        self.query_down: nn.Linear | None = None
        if q_lora_rank is not None:
            self.query_down = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.query_norm = RMSNorm(q_lora_rank, norm_eps)
        self.query = nn.Linear(q_lora_rank or hidden_size, num_heads * head_dim, bias=False)
        self.key_value = nn.Linear(hidden_size, head_dim, bias=False)
        self.key_value_norm = RMSNorm(head_dim, norm_eps)
        self.sink = nn.Parameter(nn.init.zeros_(self.query.weight.new_empty(num_heads)))
        options: dict[str, Any] = {"overlap": overlap, "eps": norm_eps, "backend": backend}
        self.compress = Compressor(hidden_size, head_dim, ratio, self.rotary, **options)
        self.indexer: EntryIndexer | None = None
        if topk is not None:
            layout = RotaryLayout(index_rotary_dims, "last", "interleaved")
            compress = Compressor(hidden_size, index_head_dim, ratio, layout, **options)
            self.indexer = EntryIndexer(hidden_size, index_heads, index_head_dim, compress, q_lora_rank, backend)
        self.output = Linear(num_heads * head_dim, hidden_size, bias=False)
        self.exchange = Local()
        self.attend = EntryAttention(topk, kl_weight, ratio=ratio, window=window, phase=phase, backend=backend)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        cu_seqlens: Tensor | None = None,
        cache: EntryCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            rotary: tables at the tokens' positions (`nsa.layers.rotary.Rotary.at`); None: computed from
                ``rope_theta``. Temperatures are left out: they would scale values, too.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1.
            cache: of the tokens before, from `new_cache`; the T new tokens are appended.
        """
        offset = 0 if cache is None else cache.length
        if rotary is None:
            rotary = Rotary(self.rope_theta).at(Documents.of(x.shape[1], offset, cu_seqlens, x.device).query_local)
        q, row, query_latent = self.project(x, rotary)
        inputs: list[Any] = [q, (row,), self.sink, self.compress.project(x)]
        if self.indexer is not None:
            inputs += self.indexer(x, rotary, query_latent)
        q, near, sink, raw, *index = self.exchange(*inputs)
        if cache is None:
            entries = self.compress(raw, self.compress.tables(rotary), cu_seqlens)
        else:
            near = cache.append_window(near)
            entries = cache.append(raw, self._later(self.compress, rotary, offset))
        if self.indexer is not None:
            compress: Any = self.indexer.compress
            if cache is None:
                index[1] = compress(index[1], compress.tables(rotary), cu_seqlens)
            else:
                index[1] = cache.append_index(index[1], self._later(compress, rotary, offset))
        out = self.attend(q, near, sink, entries, *index, cu_seqlens=cu_seqlens, offset=offset)
        cos, sin = rotary.untempered(self.rotary.turning(self.head_dim)[0])
        return self.output(ops.apply_rotary(out, cos, -sin, layout=self.rotary, backend=self.backend).flatten(2))

    def project(self, x: Tensor, rotary: RotaryTables) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rotated queries (B, T, H, D), rows of the window (B, T, 1, D), and the latent of the queries or None."""
        first = self.query if self.query_down is None else self.query_down
        joint = joint_linear(x, [first.weight, self.key_value.weight])
        columns, row = joint.split([first.out_features, self.head_dim], -1)
        query_latent = None
        if self.query_down is not None:
            query_latent = self.query_norm(columns)[1]
            columns = self.query(query_latent)
        q = rms_norm(columns.unflatten(-1, (-1, self.head_dim)), (self.head_dim,), None, self.norm_eps)
        row = self.key_value_norm(row)[1].unsqueeze(2)
        tables = rotary.untempered(self.rotary.turning(self.head_dim)[0])
        q, row = (ops.apply_rotary(heads, *tables, layout=self.rotary, backend=self.backend) for heads in (q, row))
        return q, row, query_latent

    def _later(self, compress: Compressor, rotary: RotaryTables, offset: int) -> Any:
        """Makes entries of cached tokens, of which those from position ``offset`` on are new."""
        return lambda raw, first: compress(raw, compress.tables(rotary), ahead=offset - first)

    def new_cache(self) -> EntryCache:
        return EntryCache(self.attend.ratio, self.compress.overlap, self.attend.window)
