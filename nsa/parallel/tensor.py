"""Tensor parallelism (Megatron-LM, arXiv 1909.08053) with sequence-parallel norms (arXiv 2205.05198).

Attention is split by heads and the MLP by columns: every rank keeps its part of the weights and computes a part of the
result. Between them, where each token is on its own, a rank holds its part of the tokens: so activations there, and
the work of the norms, are split, too. The residual stream is gathered before an attention or MLP and their results are
summed and split after it: both are hooks around the module, which computes as it does alone, with fewer heads.

Query heads and KV heads are split together. Where there are fewer KV heads than ranks, neighbours hold the same KV
head and split its query heads; NSA selects blocks by the importance to all query heads of a KV head, so these ranks
gather each other's queries to choose alike.

Parameters that every rank holds whole (norms, NSA's compression) see a part of the tokens or heads on each rank: their
gradients are summed over the ranks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.layers import DenseAttention, NativeSparseAttention
from nsa.layers.native_sparse import GatedBranches, Pair
from nsa.models import Decoder
from nsa.models.moe import MixtureOfExperts
from nsa.ops.native_sparse import arrived, key_borders
from nsa.parallel.collectives import all_gather, gather_parts, reduce_scatter
from nsa.parallel.grid import Axis
from nsa.parallel.partition import Partition, mark, part_of, sum_over
from nsa.parallel.vocabulary import VocabularyEmbedding, VocabularyHead

TOKENS = 1  # the axis of x (B, T, C) that is split between attention and MLP


def split_over_tensor_ranks(model: Decoder, axis: Axis, sharers: Axis) -> None:
    """Keep this rank's part of a whole decoder, initialised alike on every rank. ``sharers``: of its KV head."""
    if axis.size == 1:
        return
    columns, rows = Partition(0, axis.rank, axis.size), Partition(1, axis.rank, axis.size)
    copies = sharers.size
    kv_heads = Partition(0, axis.rank // copies, axis.size // copies, owner=sharers.rank == 0)

    layer: Any
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        _shard_linear(attention.query, columns)
        for key_value in _key_values(attention):
            for linear in (key_value.key, key_value.value):
                _shard_linear(linear, kv_heads)
                sum_over(linear.weight, sharers)
        if isinstance(attention, NativeSparseAttention):
            _shard_linear(attention.gate, columns)
            _replicate(attention.compress, axis)
            if copies > 1:
                attend: Any = attention.attend
                attend.forward = partial(_attend_together, attend, sharers)
        _shard_linear(attention.output, rows)
        split = [attention]
        if isinstance(mlp, MixtureOfExperts):
            _replicate(mlp.router, axis)  # each rank routes its tokens; `nsa.parallel.experts` deals out the experts
            mlp = mlp.shared
        if mlp is not None:
            for linear in (mlp.gate, mlp.up):
                _shard_linear(linear, columns)
            _shard_linear(mlp.down, rows)
            split.append(mlp)
        for norm in (layer.attention_norm, layer.mlp_norm):
            _replicate(norm, axis)
        for module in split:
            module.register_forward_pre_hook(partial(_gather_tokens, axis))
            module.register_forward_hook(partial(_sum_and_split_tokens, axis))
    _replicate(model.norm, axis)
    _split_vocabulary(model, axis)


def _split_vocabulary(model: Decoder, axis: Axis) -> None:
    rows = Partition(0, axis.rank, axis.size)
    embedding, head = part_of(model.embedding.weight, rows), part_of(model.head.weight, rows)
    if model.head.weight is model.embedding.weight:
        head = embedding
    model.embedding = VocabularyEmbedding(embedding, axis)  # type: ignore[assignment]
    model.head = VocabularyHead(head, axis)  # type: ignore[assignment]


def _key_values(attention: nn.Module) -> list[Any]:
    """The modules with a key and a value projection."""
    if isinstance(attention, NativeSparseAttention):
        return list(attention.key_value.values())
    assert isinstance(attention, DenseAttention), f"{type(attention).__name__} cannot be split by heads"
    return [attention]


def _shard_linear(linear: nn.Linear, part: Partition) -> None:
    linear.weight = part_of(linear.weight, part)
    if linear.bias is not None:
        assert part.dim == 0, "the bias of a part of a sum would be added by every rank"
        linear.bias = part_of(linear.bias, part)
    linear.out_features, linear.in_features = linear.weight.shape


def _replicate(module: nn.Module, axis: Axis) -> None:
    for parameter in module.parameters():
        mark(parameter, Partition(owner=axis.rank == 0))
        sum_over(parameter, axis)


def _gather_tokens(axis: Axis, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return all_gather(args[0], axis, TOKENS, "activations"), *args[1:]


def _sum_and_split_tokens(axis: Axis, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return reduce_scatter(out, axis, TOKENS, "activations")


def _attend_together(
    attend: GatedBranches,
    sharers: Axis,
    q: Tensor,
    kv_cmp: Pair,
    kv_slc: Pair | Callable[[], Pair],
    kv_win: Pair,
    gates: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """`GatedBranches.forward` on a part of the query heads of one KV head: ``sharers`` hold the others."""
    common: dict[str, Any] = {"scale": attend.scale, "cu_seqlens": cu_seqlens, "backend": attend.backend}
    blocks: dict[str, Any] = {"length": attend.length, "stride": attend.stride, "offset": offset}
    out_cmp, lse = ops.compressed_attention(q, kv_cmp[0], kv_cmp[1], **blocks, **common)
    with torch.no_grad():
        chosen = ops.select_blocks(
            gather_parts(q, sharers, 2, "queries"),
            kv_cmp[0],
            gather_parts(lse, sharers, 1, "queries"),
            block_size=attend.block_size,
            num_blocks=attend.num_blocks,
            num_initial=attend.num_initial,
            num_local=attend.num_local,
            **blocks,
            **common,
        )
    out_slc = ops.selected_attention(q, *arrived(kv_slc), chosen, block_size=attend.block_size, **common)
    common["cu_seqlens"] = key_borders(cu_seqlens, offset + q.shape[1], kv_win[0])
    out_win = ops.dense_attention(q, *kv_win, window=attend.window, **common)
    g = gates.to(q.dtype).unsqueeze(-1)
    return g[..., 0, :] * out_cmp + g[..., 1, :] * out_slc + g[..., 2, :] * out_win
