"""Native Sparse Attention as a layer (DeepSeek, arXiv 2502.11089)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.cache import NativeSparseCache, Position
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.layers.kind import Local, Pair
from nsa.layers.linear import Linear, joint_linear
from nsa.layers.nsa.compression import BlockCompression, PooledCompression
from nsa.layers.rotary import Rotary, RotaryTables
from nsa.ops.compression import extend_compressed
from nsa.ops.geometry import Documents, block_ends

BRANCHES = ("compressed", "selected", "window")
Phase = Literal["warm-up", "sparse"]


class KeyValue(nn.Module):
    """The key and value projections of one branch. The layer computes all of its projections in one product."""

    def __init__(self, hidden_size: int, num_kv_heads: int, head_dim: int, v_head_dim: int) -> None:
        super().__init__()
        self.key = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=False)


class KeyValueCompression(nn.Module):
    """Computes the compressed keys and values, each with its own weights. Keys are rotated afterwards.

    ``pooled``: keys are means with learned weights, and not the output of an MLP.
    """

    key: BlockCompression | PooledCompression

    def __init__(
        self,
        head_dim: int,
        v_head_dim: int,
        length: int,
        stride: int,
        hidden: int | None,
        *,
        pooled: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.length, self.stride, self.backend = length, stride, backend
        if pooled:
            self.key = PooledCompression(head_dim, length, stride)
        else:
            self.key = BlockCompression(head_dim, length, stride, hidden, backend=backend)
        self.value = BlockCompression(v_head_dim, length, stride, hidden, backend=backend)

    def forward(self, raw: Pair, tables: Pair, cu_seqlens: Tensor | None = None, ahead: int = 0) -> Pair:
        """(B, T, G, D), (B, T, G, Dv) -> the blocks of `BlockCompression` for each.

        Args:
            tables: cos and sin of the tokens from index ``ahead`` on; every block must end there.
        """
        documents = Documents.of(raw[0].shape[1], 0, cu_seqlens, raw[0].device)
        ends = block_ends(documents, self.length, self.stride)
        if ahead:
            ends = ends - ahead
        k_cmp, v_cmp = self.key(raw[0], cu_seqlens), self.value(raw[1], cu_seqlens)
        return ops.apply_rotary(k_cmp, *tables, ends, backend=self.backend), v_cmp

    def extend(
        self, memories: Sequence[Tensor], rows: Sequence[Tensor], compressed: Pair, tables: Pair, index: Tensor
    ) -> None:
        """As `nsa.ops.compression.extend_compressed`; ``tables``: cos and sin of the newest token."""
        weights = self.key.weights, self.value.weights
        options: dict[str, Any] = {"stride": self.stride, "backend": self.backend}
        extend_compressed(memories, rows, weights, compressed, *tables, index, **options)


class BlockChoice(nn.Module):
    """The operator that selects the blocks of each query, without parameters and gradient."""

    def __init__(
        self,
        *,
        length: int,
        stride: int,
        block_size: int,
        num_blocks: int,
        num_initial: int,
        num_local: int,
        scale: float,
        backend: str,
    ) -> None:
        super().__init__()
        self.sizes = {"length": length, "stride": stride, "block_size": block_size, "num_blocks": num_blocks}
        self.sizes |= {"num_initial": num_initial, "num_local": num_local}
        self.scale, self.backend = scale, backend

    def forward(
        self, q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor | None = None, offset: int = 0, **sizes: int
    ) -> Tensor:
        """As `nsa.ops.select_blocks`, of no more blocks than there are; ``sizes`` replace those of the layer."""
        options = {"scale": self.scale, "cu_seqlens": cu_seqlens, "offset": offset, "backend": self.backend}
        sizes = self.sizes_of(offset + q.shape[1]) | sizes
        return ops.select_blocks(q, k_cmp, lse, **sizes, **options)  # type: ignore[arg-type]

    def sizes_of(self, tokens: int) -> dict[str, int]:
        """The sizes, for so many tokens: places for blocks that these do not have would only cost time."""
        forced, blocks = self.sizes["num_initial"] + self.sizes["num_local"], -(-tokens // self.sizes["block_size"])
        return self.sizes | {"num_blocks": min(self.sizes["num_blocks"], max(1, forced, blocks))}


class Divergence(nn.Module):
    """The loss that teaches the selection, a module without parameters: its target is a mean over all query heads."""

    def __init__(self, choose: BlockChoice, window: int) -> None:
        super().__init__()
        self.sizes = {name: size for name, size in choose.sizes.items() if name != "num_blocks"} | {"window": window}
        self.scale, self.backend = choose.scale, choose.backend

    def forward(
        self,
        q: Tensor,
        k_cmp: Tensor,
        k: Tensor,
        lse: Tensor,
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
        positions: Tensor | None = None,
    ) -> Tensor:
        """As `nsa.ops.selection_kl`: a scalar, the sum over tokens."""
        options: dict[str, Any] = self.sizes | {"scale": self.scale, "backend": self.backend}
        options |= {"cu_seqlens": cu_seqlens, "offset": offset, "positions": positions}
        return ops.selection_kl(q, k_cmp, k, lse, **options)


class Draw(nn.Module):
    """Which queries the loss looks at. A module, so that a recomputed pass gets those of the first one."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"kl_stride must be at least 1, got {stride}")
        self.stride = stride

    def forward(self, tokens: int, device: torch.device) -> Tensor:
        """(ceil(tokens / stride),) int32: one of each ``stride`` neighbours, drawn anew. The last may be beyond
        ``tokens``: then it is none, so that each token is drawn with the same probability."""
        first = torch.arange(0, tokens, self.stride, dtype=torch.int32, device=device)
        return first + torch.randint(self.stride, first.shape, dtype=torch.int32, device=device)


class GatedBranches(nn.Module):
    """The operators of the layer, as a module without parameters, so that hooks can see its inputs.

    Attributes:
        choose: the selection. diverge: the loss that teaches it, loss: attaches that to the output; both None if it is
            not taught. draw: the queries that the loss looks at; None: all.
        dense: whether queries attend to all tokens, as in the warm-up.
        together: of a mean over the query heads of a KV head, that over all of them, also where ranks share these.
    """

    diverge: Divergence | None
    loss: AuxiliaryLoss | None
    draw: Draw | None

    def __init__(
        self, choose: BlockChoice, *, window: int, phase: Phase = "sparse", kl_weight: float = 0.0, kl_stride: int = 1
    ) -> None:
        super().__init__()
        self.choose, self.window, self.dense = choose, window, phase == "warm-up"
        self.sizes, self.scale, self.backend = choose.sizes, choose.scale, choose.backend
        self.together = nn.Identity()
        self.diverge = self.loss = self.draw = None
        if self.dense or kl_weight:
            self.diverge, self.loss = Divergence(choose, window), AuxiliaryLoss(1.0 if self.dense else kl_weight)
        if kl_weight and kl_stride != 1 and not self.dense:
            self.draw = Draw(kl_stride)

    def forward(
        self,
        q: Tensor,
        kv_cmp: Pair,
        kv_slc: Pair | Callable[[], Pair],
        kv_win: Pair,
        gates: Tensor,
        cu_seqlens: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """As `nsa.ops.native_sparse_attention`. In the warm-up: dense attention with the selected branch's keys."""
        if self.diverge is None:
            return self._sparse(q, kv_cmp, kv_slc, kv_win, gates, cu_seqlens, offset)
        kv_slc = kv_slc() if callable(kv_slc) else kv_slc
        if self.dense:
            out, lse = self._dense(q, kv_slc, cu_seqlens, offset)
        else:
            out, lse = self._sparse(q, kv_cmp, kv_slc, kv_win, gates, cu_seqlens, offset), None
        if not kv_cmp[0].requires_grad:
            return out
        return self._taught(out, q, kv_cmp[0], kv_slc, lse, cu_seqlens, offset)

    def _sparse(
        self,
        q: Tensor,
        kv_cmp: Pair,
        kv_slc: Pair | Callable[[], Pair],
        kv_win: Pair,
        gates: Tensor,
        cu_seqlens: Tensor | None,
        offset: int,
    ) -> Tensor:
        return ops.native_sparse_attention(
            q,
            kv_cmp,
            kv_slc,
            kv_win,
            gates,
            **self.choose.sizes_of(offset + q.shape[1]),
            window=self.window,
            scale=self.scale,
            cu_seqlens=cu_seqlens,
            offset=offset,
            choose=partial(self.choose, cu_seqlens=cu_seqlens, offset=offset),
            backend=self.backend,
        )

    def _dense(
        self, q: Tensor, kv: Pair, cu_seqlens: Tensor | None, offset: int, positions: Tensor | None = None
    ) -> Pair:
        """Dense attention and its LSE. The queries are at ``positions``, or if that is None the last ones."""
        if positions is None:
            assert offset + q.shape[1] == kv[0].shape[1], "the queries must be those of the last tokens"
        options: dict[str, Any] = {"scale": self.scale, "cu_seqlens": cu_seqlens, "backend": self.backend}
        return ops.dense_attention(q, *kv, **options, positions=positions, return_lse=True)

    def _taught(
        self,
        out: Tensor,
        q: Tensor,
        k_cmp: Tensor,
        kv: Pair,
        lse: Tensor | None,
        cu_seqlens: Tensor | None,
        offset: int,
    ) -> Tensor:
        """``out`` with the loss attached, by which k_cmp learns where dense attention of q to kv goes.

        lse: of this attention; None: it is computed.
        """
        assert self.diverge is not None and self.loss is not None
        tokens, positions, each = q.shape[1], None, 1
        with torch.no_grad():  # tensor-parallel ranks gather the target without gradient
            if self.draw is not None:
                drawn, each = self.draw(tokens, q.device), self.draw.stride
                rows = drawn.clamp(max=tokens - 1)
                q, positions = q.index_select(1, rows), offset + rows
            if lse is None:
                _, lse = self._dense(q, kv, cu_seqlens, offset, positions)
            if self.draw is not None:
                lse = lse.masked_fill(drawn > rows, -torch.inf)  # what is no query has no target
            target = q.detach(), kv[0].detach(), lse.detach()
        where = {"cu_seqlens": cu_seqlens, "offset": offset, "positions": positions}
        divergence = self.diverge(target[0], k_cmp, *target[1:], **where)
        return self.loss(out, each * divergence, len(out) * tokens)

    def decode(self, q: Tensor, kv_cmp: Pair, kv_slc: Pair, kv_win: Pair, gates: Tensor, lengths: Tensor) -> Tensor:
        """As `nsa.ops.native_sparse_decode`, with an axis of one token: q (B, 1, H, D) -> (B, 1, H, Dv)."""
        if self.dense:
            dense: dict[str, Any] = {"scale": self.scale, "backend": self.backend}
            return ops.decode_attention(q[:, 0], *kv_slc, lengths, **dense)[0][:, None]
        options: dict[str, Any] = self.sizes | {"scale": self.scale, "backend": self.backend}
        return ops.native_sparse_decode(q[:, 0], kv_cmp, kv_slc, kv_win, gates[:, 0], lengths, **options)[:, None]


class NativeSparseAttention(nn.Module):
    """Learned compression, block selection and a sliding window, combined by gates; usable in any decoder.

    Each branch has its own keys and values, so that the window does not dominate what the others learn (section
    3.3.3). The compression MLP reads keys before their rotation. The compressed key of a block is then rotated to the
    position of the block's last token, so that scores depend on distances alone.

    The selection has no gradient: in the paper it learns through the compressed branch alone. In the phase "warm-up" it
    is taught instead, for a model that was dense: queries attend to all tokens with the selected branch's keys and
    values, and the compression of keys learns which blocks this attention goes to (`nsa.ops.selection_kl`). This loss
    is attached to the output, as that of `nsa.layers.dsa.layer.DeepSeekSparseAttention`. With ``kl_weight`` it is
    attached in the sparse phase, too: the compressed keys, and all that they are computed from, learn where the queries
    would go if they saw all tokens.

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys, even. v_head_dim: Dv of values; None: D.
        compress_length, compress_stride: tokens in a compression block (l) and between two (d); d divides l.
        compress_hidden: hidden width of the compression MLP; None: the head dimension.
        key_compression: "mlp", or "pooled" for a weighted mean (`nsa.layers.nsa.compression.PooledCompression`).
        block_size, num_blocks: tokens in a selection block (l'), and blocks per query (n).
        num_initial, num_local: blocks that are always selected: the document's first, the query's most recent.
        window: tokens of the sliding window (w).
        phase: "warm-up" or "sparse", see above.
        kl_weight: weight of the selection's loss in the sparse phase; 0: it has none.
        kl_stride: of so many neighbouring queries this loss looks at one (`Draw`); 1: at all.
        rope_theta: base of the rotary frequencies if ``forward`` gets no tables.
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
        compress_length: int = 32,
        compress_stride: int = 16,
        compress_hidden: int | None = None,
        key_compression: Literal["mlp", "pooled"] = "mlp",
        block_size: int = 64,
        num_blocks: int = 16,
        num_initial: int = 1,
        num_local: int = 2,
        window: int = 512,
        phase: Phase = "sparse",
        kl_weight: float = 0.0,
        kl_stride: int = 1,
        rope_theta: float = 10000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        v_head_dim = v_head_dim or head_dim
        self.head_dim, self.v_head_dim, self.rope_theta, self.backend = head_dim, v_head_dim, rope_theta, backend
        self.window = window
        # Modules give names and initialisation to the weights; one joint product uses them.
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.key_value = nn.ModuleDict({b: KeyValue(hidden_size, num_kv_heads, head_dim, v_head_dim) for b in BRANCHES})
        self.compress = KeyValueCompression(
            head_dim,
            v_head_dim,
            compress_length,
            compress_stride,
            compress_hidden,
            pooled=key_compression == "pooled",
            backend=backend,
        )
        self.gate = nn.Linear(hidden_size, 3 * num_heads)
        self.output = Linear(num_heads * v_head_dim, hidden_size, bias=False)
        choose = BlockChoice(
            length=compress_length,
            stride=compress_stride,
            block_size=block_size,
            num_blocks=num_blocks,
            num_initial=num_initial,
            num_local=num_local,
            scale=head_dim**-0.5,
            backend=backend,
        )
        self.exchange = Local()
        self.attend = GatedBranches(choose, window=window, phase=phase, kl_weight=kl_weight, kl_stride=kl_stride)

    def forward(
        self,
        x: Tensor,
        rotary: RotaryTables | None = None,
        cu_seqlens: Tensor | None = None,
        cache: NativeSparseCache | None = None,
    ) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        Args:
            rotary: tables at the tokens' positions (`nsa.layers.rotary.Rotary.at`); None: computed from
                ``rope_theta``.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1; no branch attends across one.
            cache: of the tokens before, from `new_cache`; the T new tokens are appended.
        """
        offset, fixed = (0, None) if cache is None else (cache.length, cache.position)
        if rotary is None:
            rotary = Rotary(self.rope_theta).at(Documents.of(x.shape[1], offset, cu_seqlens, x.device).query_local)
        tables = rotary.of(self.head_dim)
        q, raw_cmp, slc, win, gates = self.exchange(*self.project(x, tables))
        if cache is None:
            cmp = self.compress(raw_cmp, tables, cu_seqlens)
        elif fixed is not None:
            cmp, slc, win = cache.append_fixed(
                raw_cmp,
                slc,
                win,
                lambda memories, rows, blocks: self.compress.extend(memories, rows, blocks, tables, fixed.index),
            )
        else:
            cmp, slc, win = cache.append(
                raw_cmp, slc, win, lambda raw, first: self.compress(raw, tables, ahead=offset - first)
            )
        if fixed is not None:
            out = self.attend.decode(q, cmp, slc, win, gates, fixed.lengths)
        else:
            out = self.attend(q, cmp, slc, win, gates, cu_seqlens=cu_seqlens, offset=offset)
        return self.output(out.flatten(2))

    def project(self, x: Tensor, tables: Pair) -> tuple[Tensor, Pair, Pair, Pair, Tensor]:
        """Rotated queries; keys and values of each branch, not rotated for the compressed branch; gates."""
        branches: list[Any] = [self.key_value[branch] for branch in BRANCHES]
        linears = [self.query, *(linear for kv in branches for linear in (kv.key, kv.value)), self.gate]
        joint = joint_linear(x, [linear.weight for linear in linears])
        heads, groups = self.gate.out_features // 3, branches[0].key.out_features // self.head_dim
        rotated, value = ops.Heads(groups, self.head_dim, "rotate"), ops.Heads(groups, self.v_head_dim)
        parts = [
            ops.Heads(heads, self.head_dim, "rotate"),
            ops.Heads(groups, self.head_dim),
            value,
            rotated,
            value,
            rotated,
            value,
            ops.Heads(heads, 3, "sigmoid"),
        ]
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = ops.split_heads(
            joint, parts, *tables, bias=self.gate.bias, backend=self.backend
        )
        return q, (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win), gates

    def new_cache(self) -> NativeSparseCache:
        return NativeSparseCache(self.compress.stride, self.window)

    def fix(self, cache: NativeSparseCache, tokens: int, position: Position) -> None:
        """Give the cache memory for ``tokens`` that stays where it is; ``forward`` then takes a token at a time.

        ``forward`` needs ``rotary`` then, since only the device knows the position.
        """
        cache.fix(tokens, self.compress.length, position)
