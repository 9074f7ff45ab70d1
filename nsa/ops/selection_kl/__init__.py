"""A loss that teaches NSA's selection which blocks dense attention goes to, as DSA's warm-up teaches its indexer."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nsa.ops.compressed import check_blocks
from nsa.ops.dispatch import (
    accumulation_dtype,
    autocasts,
    check_attention,
    check_places,
    differentiable_once,
    resolve_backend,
    softmax_scale,
)
from nsa.ops.geometry import (
    BlockSizes,
    Documents,
    Ranges,
    block_starts,
    cached,
    longest_document,
    visible_blocks,
    window_ranges,
)
from nsa.ops.selection import check_selection, naive_importance
from nsa.ops.tiles import MAX_ROWS, MAX_SCORES


@autocasts("q", "k_cmp", "k")
def selection_kl(
    q: Tensor,
    k_cmp: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    length: int,
    stride: int,
    block_size: int,
    window: int,
    num_initial: int = 1,
    num_local: int = 2,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """How far NSA's importance of blocks is from the dense attention that they get: a sum over queries of KL.

    The target a[t, j] is the probability, in dense attention, of the tokens of selection block j that the window does
    not reach, as a mean over the heads of a KV head. It is taken over the blocks that the query chooses among: neither
    the initial nor the local ones, which are always selected. Nor those of which the query sees no compressed block,
    whose importance is 0 whatever the keys are; with a local block there are none. With m[t] = sum_j a[t, j] and the
    importance i[t, j] of `select_blocks`, divided by its sum over the same blocks:

        sum_t sum_j a[t, j] (log(a[t, j] / m[t]) - log i[t, j]),   as a mean over the KV heads.

    So a query counts by the attention m[t] that its choice is about.

    Args:
        q: (B, T, H, D). k: (B, S, G, D). lse: (B, H, T), the second result of `dense_attention`. They are the target,
            and have no gradient. A query whose lse is -inf adds nothing.
        k_cmp: (B, M, G, D), the compressed keys, as for `select_blocks`; these have a gradient.
        length, stride, block_size, num_initial, num_local, scale, cu_seqlens, offset: as for `select_blocks`.
        window: tokens that the window branch sees, the query's own included.
        positions: (T,) int32, rising: the places of the queries among the S tokens of k, which ``cu_seqlens`` then
            describes; None: from ``offset`` on.
        backend: auto, triton, torch or naive.

    Returns:
        Scalar, fp32 (float64 for float64). Memory is linear in T and S.

    Raises:
        ValueError: inconsistent shapes, unknown backend.
    """
    end = offset + q.shape[1] if positions is None else k.shape[1]
    check_attention(q, k, k, cu_seqlens, end - q.shape[1])
    check_attention(q, k_cmp, k_cmp, cu_seqlens, end - q.shape[1])
    check_selection(length, stride, block_size, num_initial + num_local + 1, num_initial, num_local)
    if k_cmp.shape[2] != k.shape[2]:
        raise ValueError(f"k_cmp has {k_cmp.shape[2]} heads, k has {k.shape[2]}")
    if end > k.shape[1]:
        raise ValueError(f"k has {k.shape[1]} tokens, the queries end at {end}")
    if lse.shape != (q.shape[0], q.shape[2], q.shape[1]):
        raise ValueError(f"lse must be {(q.shape[0], q.shape[2], q.shape[1])}, got {tuple(lse.shape)}")
    sizes = BlockSizes(length, stride, block_size, num_initial, num_local, window)
    check_blocks(k_cmp, end, length, stride, cu_seqlens)
    if positions is None:
        documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    else:
        check_places(positions, q.shape[1], end)
        documents = Documents.at(positions, end, cu_seqlens)
    q, k, lse, factor = q.detach(), k.detach(), lse.detach(), softmax_scale(scale, q.shape[3])
    implementation = resolve_backend(backend, q, k_cmp, k)
    if implementation == "naive":
        return _naive(q, k_cmp, k, lse, documents, sizes, factor)
    longest = longest_document(cu_seqlens, k.shape[1])
    if implementation == "triton":
        return _FusedKL.apply(q, k_cmp, k, lse, cu_seqlens, offset, positions, longest, sizes, factor)
    visible = visible_blocks(documents, length, stride)
    return _SelectionKL.apply(q, k_cmp, k, lse, documents, visible, longest, sizes, factor)


@torch.no_grad()
def block_attention(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    window: int,
    num_initial: int,
    num_local: int,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    backend: str = "auto",
    **_: int,
) -> Tensor:
    """The target of `selection_kl`: (B, G, T, M), of block m of each query's own document. Memory grows with T x M.

    M is that of the longest document, or of all tokens where the host does not know its length. Blocks that the query
    does not choose among have 0. Arguments as for `selection_kl`; naive is as torch.

    Raises:
        ValueError: inconsistent shapes, documents that do not end with the queries, unknown backend.
    """
    check_attention(q, k, k, cu_seqlens, offset)
    if resolve_backend(backend, q, k) == "triton":
        from nsa.ops.kernels import operators

        longest, factor = longest_document(cu_seqlens, k.shape[1]), softmax_scale(scale, q.shape[3])
        choice = block_size, num_initial, num_local, window
        return operators.block_attention(q, k, lse, cu_seqlens, offset, *choice, longest, factor)
    sizes = BlockSizes(0, 0, block_size, num_initial, num_local, window)
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    longest = longest_document(cu_seqlens, k.shape[1])
    most = -(-longest // block_size)
    found = [
        torch.nn.functional.pad(target, (0, most - target.shape[3]))
        for *_, target in _targets(q, k, lse, documents, longest, sizes, softmax_scale(scale, q.shape[3]))
    ]
    return torch.cat(found, 2)


def _targets(
    q: Tensor, k: Tensor, lse: Tensor, documents: Documents, longest: int, sizes: BlockSizes, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yields, by tiles: queries, their heads (B, G, h, t, D) times ``scale``, which blocks they choose among (t, M),
    and the target (B, G, t, M), M large enough for the tile's last query."""
    groups, dtype = k.shape[2], accumulation_dtype(q)
    heads = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    keys = k.transpose(1, 2)
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf).unflatten(1, (groups, -1))
    seen = window_ranges(documents, longest)  # all
    first, last = _bounds(seen, k.shape[1])
    most = MAX_ROWS if q.device.type == "cpu" else q.shape[1]
    step = max(1, min(most, MAX_SCORES // (q.shape[0] * q.shape[2] * longest)))
    for start in range(0, q.shape[1], step):
        rows = slice(start, min(start + step, q.shape[1]))
        span = slice(first[start], last[rows.stop - 1])
        key = torch.arange(span.start, span.stop, device=q.device)
        queries = heads[:, :, :, rows].to(dtype) * scale
        p = (queries @ keys[:, :, None, span].to(dtype).mT).sub_(lse[:, :, :, rows, None]).exp_().mean(2)
        outside = (key >= seen.first[rows, None]) & (key <= documents.query_position[rows, None] - sizes.window)
        own = documents.query_local[rows] // sizes.block_size
        block = torch.arange(-(-longest // sizes.block_size) if own.is_meta else int(own.max()) + 1, device=q.device)
        choice = (block >= sizes.num_initial) & (block <= own[:, None] - sizes.num_local)
        # The tokens of a tile can be of several documents. Those of others have probability 0, so any number will do.
        begin = documents.bounds[torch.searchsorted(documents.bounds, key, right=True) - 1]
        of_block = ((key - begin) // sizes.block_size)[:, None] == block
        target = p.masked_fill_(~outside, 0) @ of_block.to(dtype)
        yield rows, queries, choice, target * choice


def _bounds(ranges: Ranges, keys: int) -> tuple[list[int], list[int]]:
    """Of each query, the first of ``keys`` that it sees, and the one behind the last."""
    if ranges.first.is_meta:  # has no values: every query sees all
        return [0] * len(ranges.first), [keys] * len(ranges.first)
    return _on_host(ranges)


@cached
def _on_host(ranges: Ranges) -> tuple[list[int], list[int]]:
    """First and last, for all layers: the host waits once."""
    return ranges.first.tolist(), ranges.last.tolist()


class _FusedKL(torch.autograd.Function):
    """The kernels. As below, the gradient is computed along with the loss."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, cu_seqlens: Tensor | None, offset: int,
        positions: Tensor | None, longest: int, sizes: BlockSizes, scale: float,
    ) -> Tensor:  # fmt: skip
        from nsa.ops.kernels import operators

        where = cu_seqlens, offset, positions
        loss, gradient = operators.selection_loss(q, k_cmp, k, lse, *where, sizes, longest, scale)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * d_total.to(gradient.dtype), *(None,) * 8


class _SelectionKL(torch.autograd.Function):
    """In tiles of queries. The gradient is computed along with the loss: a scalar's is the same up to a factor."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, documents: Documents, visible: Ranges, longest: int,
        sizes: BlockSizes, scale: float,
    ) -> Tensor:  # fmt: skip
        dtype = accumulation_dtype(q)
        total = torch.zeros((), dtype=dtype, device=q.device)
        gradient = torch.zeros_like(k_cmp.transpose(1, 2), dtype=dtype)  # (B, G, M, D)
        first, last = _bounds(visible, k_cmp.shape[1])
        units = _units(documents, k_cmp.shape[1], sizes)
        for rows, queries, choice, target in _targets(q, k, lse, documents, longest, sizes, scale):
            span = slice(first[rows.start], max(last[rows.stop - 1], first[rows.start]))
            if span.start == span.stop:
                continue
            row = torch.arange(span.start, span.stop, device=q.device)
            sees = (row >= visible.first[rows, None]) & (row < visible.last[rows, None])
            keys = k_cmp[:, span].transpose(1, 2)[:, :, None].to(dtype)
            s = (queries @ keys.mT).masked_fill_(~sees, -torch.inf)
            p = s.sub_(s.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)).exp_()
            p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(dtype).tiny)  # (B, G, h, t, U)
            block = torch.arange(choice.shape[1], device=q.device)
            shared = (units[span, :, None] == block).sum(1).to(dtype)  # (U, M)
            choice = choice & (sees.to(dtype) @ shared > 0)
            importance = (p.sum(2) @ shared) * choice
            loss, slope = _divergence(target * choice, importance)
            total += loss
            d_p = (slope * choice @ shared.T)[:, :, None]
            d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True))
            gradient[:, :, span] += d_s.flatten(2, 3).mT @ queries.flatten(2, 3)
        ctx.save_for_backward((gradient / k.shape[2]).transpose(1, 2).to(k_cmp.dtype))
        return total / k.shape[2]

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient * d_total.to(gradient.dtype), *(None,) * 7


def _units(documents: Documents, count: int, sizes: BlockSizes) -> Tensor:
    """(M, l / d) the selection block of each stride unit of each compressed block, within its document."""
    bounds = documents.compressed_bounds(sizes.length, sizes.stride)
    start, document = block_starts(documents.bounds, bounds, sizes.stride, count)
    unit = sizes.stride * torch.arange(sizes.length // sizes.stride, device=start.device)
    return ((start - documents.bounds[document])[:, None] + unit) // sizes.block_size


def _divergence(target: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over all rows of the last dimension, and its slope in ``importance``, which need not sum to 1."""
    tiny = torch.finfo(target.dtype).tiny
    mass, whole = target.sum(-1, keepdim=True), importance.sum(-1, keepdim=True).clamp(min=tiny)
    known = importance.clamp(min=tiny)
    loss = torch.xlogy(target, target).sum() - torch.xlogy(mass, mass).sum() - (target * (known / whole).log()).sum()
    return loss, mass / whole - (target / known).where(importance > tiny, 0)


def _naive(
    q: Tensor, k_cmp: Tensor, k: Tensor, lse: Tensor, documents: Documents, sizes: BlockSizes, scale: float
) -> Tensor:
    """The definition, with autograd."""
    from nsa.ops.compressed import naive_mask as complete
    from nsa.ops.dense import naive_mask as causal

    groups, dtype = k.shape[2], accumulation_dtype(q)

    def scores(keys: Tensor, mask: Tensor) -> Tensor:
        found = torch.einsum("bthd,bshd->bhts", q.to(dtype), keys.to(dtype).repeat_interleave(q.shape[2] // groups, 2))
        return (found * scale).masked_fill(~mask, -torch.inf)

    everything, near = (causal(documents, k.shape[1], reach) for reach in (k.shape[1], sizes.window))
    lse = lse.to(dtype).masked_fill(lse == -torch.inf, torch.inf)
    dense = (scores(k, everything & ~near) - lse[..., None]).exp().unflatten(1, (groups, -1)).mean(2)
    key = torch.arange(k.shape[1], device=k.device)
    begin = documents.bounds[(key[:, None] >= documents.bounds[1:]).sum(1).clamp(max=len(documents.bounds) - 2)]
    sees = complete(documents, k_cmp.shape[1], sizes.length, sizes.stride)
    compressed = scores(k_cmp, sees).masked_fill(~sees.any(-1, keepdim=True), 0).logsumexp(-1)
    importance = naive_importance(q, k_cmp, compressed, documents, *sizes[:3], scale)
    block = torch.arange(importance.shape[3], device=k.device)
    target = dense @ (((key - begin) // sizes.block_size)[:, None] == block).to(dtype)
    own = (documents.query_local // sizes.block_size)[:, None]
    shared = (_units(documents, k_cmp.shape[1], sizes)[..., None] == block).any(1)
    choice = (block >= sizes.num_initial) & (block <= own - sizes.num_local) & (sees.to(dtype) @ shared.to(dtype) > 0)
    target, importance = target * choice, importance.where(choice, 0)
    tiny = torch.finfo(dtype).tiny
    share = importance / importance.sum(-1, keepdim=True).clamp(min=tiny)
    mass = target.sum(-1, keepdim=True)
    log_ratio = (target / mass.clamp(min=tiny)).clamp(min=tiny).log() - share.clamp(min=tiny).log()
    return (target * log_ratio).sum() / groups
