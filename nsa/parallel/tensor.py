"""Tensor parallelism (Megatron-LM, arXiv 1909.08053) with sequence-parallel norms (arXiv 2205.05198).

Attention is sharded by heads and the MLP by columns: every rank keeps its part of the weights and computes a part of
the result. Between them each token is independent, and a rank holds its part of the tokens. So the activations and the
norms there are sharded, too. Before an attention or MLP the tokens are all-gathered, and its results are
reduce-scattered. Both are hooks on the module, which itself computes as on one rank, with fewer heads.

Query heads and KV heads are sharded together. If there are fewer KV heads than ranks, neighbours hold the same KV head
and share its query heads. A module that needs all query heads of a KV head also gets those of the neighbours: NSA
selects blocks by their importance to all of them, and these ranks must select the same.

Replicated parameters (norms, NSA's compression) see a part of the tokens or heads on each rank, so their gradients are
summed over the ranks. The record of a kind (`nsa.layers.kind.Parts`) says how each module of a layer is sharded.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsa.layers.around import Around
from nsa.layers.kind import Parts
from nsa.models import Decoder
from nsa.models.moe import MixtureOfExperts
from nsa.parallel.collectives import all_gather, all_reduce, gather_parts, reduce_scatter
from nsa.parallel.grid import Axis
from nsa.parallel.partition import Partition, mark, part_of, sum_over
from nsa.parallel.vocabulary import VocabularyEmbedding, VocabularyHead


def split_over_tensor_ranks(model: Decoder, axis: Axis, sharers: Axis) -> None:
    """Keep this rank's part of a whole decoder, which is identical on all ranks. ``sharers``: as in `Grid`."""
    if axis.size == 1:
        return
    columns, rows = Partition(0, axis.rank, axis.size), Partition(1, axis.rank, axis.size)
    # The dimension of x (B, T, C) that is sharded. Experts balance their load within sequences: a part of each.
    tokens = 1 if model.config.moe else None
    copies = sharers.size
    kv_heads = Partition(0, axis.rank // copies, axis.size // copies, owner=sharers.rank == 0)

    layer: Any
    shape = model.config.attention_shape
    for layer in model.layers:
        attention, mlp = layer.attention, layer.mlp
        parts = layer.kind.parts(shape, model.attention.of(layer.kind))
        _split_attention(attention, parts, columns, kv_heads, rows, axis, sharers)
        if hasattr(attention, "first_head"):
            attention.first_head = shape.num_heads // axis.size * axis.rank
        if layer.kind.loss is not None:
            attention.get_submodule(layer.kind.loss[0]).share = 1 / axis.size
        split = [attention]
        if isinstance(mlp, MixtureOfExperts):
            _replicate(mlp.router, axis)  # each rank routes its tokens; `nsa.parallel.experts` shards the experts
            mlp = mlp.shared
        if mlp is not None:
            for linear in (mlp.gate, mlp.up):
                _shard_linear(linear, columns)
            _shard_linear(mlp.down, rows)
            split.append(mlp)
        for norm in (layer.attention_norm, layer.mlp_norm):
            _replicate(norm, axis)
        for module in split:
            module.register_forward_pre_hook(partial(_gather_tokens, axis, tokens))
            module.register_forward_hook(partial(_sum_and_split_tokens, axis, tokens))
    _replicate(model.norm, axis)
    _split_vocabulary(model, axis, tokens)


def _split_attention(
    attention: nn.Module,
    parts: Parts,
    columns: Partition,
    kv_heads: Partition,
    rows: Partition,
    axis: Axis,
    sharers: Axis,
) -> None:
    for names, part in ((parts.columns, columns), (parts.kv_heads, kv_heads), (parts.rows, rows)):
        for name in names:
            linear: Any = attention.get_submodule(name)
            _shard_linear(linear, part)
            if part is kv_heads:
                for parameter in linear.parameters():
                    sum_over(parameter, sharers)
    for name in parts.heads:
        parent, _, child = name.rpartition(".")
        setattr(attention.get_submodule(parent), child, part_of(attention.get_parameter(name), columns))
    for name in parts.whole:
        _replicate(attention.get_submodule(name), axis)
    for name, axes in parts.gathered.items():
        _wrap(attention, name, WithAllHeads, axis if parts.one_kv_head else sharers, axes)
    for name in parts.drawn:
        _wrap(attention, name, OfFirst, sharers)
    for name, of_all in parts.averaged.items():
        _wrap(attention, name, Averaged, axis if of_all else sharers)


def _wrap(attention: nn.Module, name: str, wrapper: Callable[..., nn.Module], ranks: Axis, *more: Any) -> None:
    """Put a wrapper around a submodule, if there are several ranks."""
    if ranks.size > 1:
        parent, _, child = name.rpartition(".")
        setattr(attention.get_submodule(parent), child, wrapper(attention.get_submodule(name), ranks, *more))


def _split_vocabulary(model: Decoder, axis: Axis, tokens: int | None) -> None:
    rows = Partition(0, axis.rank, axis.size)
    embedding, head = part_of(model.embedding.weight, rows), part_of(model.head.weight, rows)
    if model.head.weight is model.embedding.weight:
        head = embedding
    model.embedding = VocabularyEmbedding(embedding, axis, tokens)  # type: ignore[assignment]
    model.head = VocabularyHead(head, axis, tokens)  # type: ignore[assignment]


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


def _gather_tokens(axis: Axis, dim: int | None, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return all_gather(args[0], axis, dim, "activations"), *args[1:]


def _sum_and_split_tokens(axis: Axis, dim: int | None, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return reduce_scatter(out, axis, dim, "activations")


class WithAllHeads(Around):
    """A module that gets all query heads of a KV head, of which each of ``sharers`` holds a part. They get no gradient.

    Args:
        heads: for each positional input, the dimension of its heads; None: the input is the same on all ranks.
    """

    def __init__(self, inside: nn.Module, sharers: Axis, heads: tuple[int | None, ...]) -> None:
        super().__init__(inside)
        self.sharers, self.heads = sharers, heads

    def forward(self, *inputs: Tensor, **others: Any) -> Any:
        whole = [
            x if axis is None else gather_parts(x, self.sharers, axis, "queries")
            for x, axis in zip(inputs, self.heads, strict=True)
        ]
        return self.inside(*whole, **others)


class OfFirst(Around):
    """A module that draws random numbers, which the first of ``sharers`` gives to all of them."""

    def __init__(self, inside: nn.Module, sharers: Axis) -> None:
        super().__init__(inside)
        self.sharers = sharers

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Tensor:
        drawn: Tensor = self.inside(*inputs)
        if self.sharers.rank:
            drawn = torch.zeros_like(drawn)
        return all_reduce(drawn, self.sharers, "noise")


class Averaged(Around):
    """A module whose result is averaged over the ranks."""

    def __init__(self, inside: nn.Module, ranks: Axis) -> None:
        super().__init__(inside)
        self.ranks = ranks

    @torch.no_grad()
    def forward(self, mean: Tensor) -> Tensor:
        return all_reduce(self.inside(mean).contiguous().clone(), self.ranks, "figures") / self.ranks.size
