"""What the sparse attention does: gates, selected blocks and the share of each branch, by layer.

Forward pre-hooks on the parameter-free `GatedBranches` of NSA layers see its inputs; the layer knows nothing of it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.layers.native_sparse import GatedBranches
from nsa.ops.native_sparse import arrived, key_borders
from nsa.ops.packing import Documents

BRANCHES = ("compressed", "selected", "window")


@contextmanager
def probe(layers: nn.ModuleList, metrics: dict[str, float]) -> Iterator[None]:
    """When closed, ``metrics`` has the figures of the forward passes of the decoder ``layers`` (means, of several).

    Tags end in the layer's number:
        attention/gate_<branch>: mean gate over tokens and heads.
        attention/mass_<branch>: norm of the branch's gated output, as a share of the sum over branches.
        attention/block_entropy: how evenly the selections are spread over the blocks, 0 (one block) to 1.
        attention/block_overlap: share of a query's selected blocks that the query before it selected as well.
        attention/first_block_share: share of queries that would select the first block if it were not forced, among
            those that have a choice (more blocks than they may select).
    """
    handles = []
    seen: dict[str, list[float]] = {}
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(module, GatedBranches):
                hook = _hook(f"layer_{number:02d}", seen)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        metrics |= {name: sum(values) / len(values) for name, values in seen.items()}


def _hook(layer: str, seen: dict[str, list[float]]) -> Any:
    @torch.no_grad()
    def record(attend: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in measure(attend, *args, **kwargs).items():
            seen.setdefault(f"attention/{name}/{layer}", []).append(value)

    return record


def measure(
    attend: Any,
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
) -> dict[str, float]:
    """The figures of one layer, from the inputs of its ``attend`` (shapes as in `nsa.ops.native_sparse_attention`)."""
    common: dict[str, Any] = {"scale": attend.scale, "cu_seqlens": cu_seqlens, "backend": attend.backend}
    sizes: dict[str, Any] = {"length": attend.length, "stride": attend.stride, "offset": offset}
    selection = sizes | {"block_size": attend.block_size, "num_blocks": attend.num_blocks}
    compressed, lse = ops.compressed_attention(q, kv_cmp[0], kv_cmp[1], **sizes, **common)

    def select(num_initial: int) -> Tensor:
        forced = {"num_initial": num_initial, "num_local": attend.num_local}
        return ops.select_blocks(q, kv_cmp[0], lse, **selection, **forced, **common)

    blocks = select(attend.num_initial)
    first_block = select(0)
    selected = ops.selected_attention(q, *arrived(kv_slc), blocks, block_size=attend.block_size, **common)
    common["cu_seqlens"] = key_borders(cu_seqlens, offset + q.shape[1], kv_win[0])
    window = ops.dense_attention(q, *kv_win, window=attend.window, **common)

    figures = {}
    norms = [
        (out.float().norm(dim=-1) * gates[..., i].float()).mean().item()
        for i, out in enumerate((compressed, selected, window))
    ]
    for i, branch in enumerate(BRANCHES):
        figures[f"gate_{branch}"] = gates[..., i].float().mean().item()
        figures[f"mass_{branch}"] = norms[i] / max(sum(norms), 1e-30)
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    figures["block_entropy"] = block_entropy(blocks, documents.query_document)
    figures["block_overlap"] = block_overlap(blocks, documents.query_document)
    choice = documents.query_local // attend.block_size >= max(attend.num_blocks, attend.num_local)
    figures["first_block_share"] = first_block_share(first_block, choice)
    return figures


def block_entropy(blocks: Tensor, document: Tensor) -> float:
    """Entropy of how often each block is selected, over its largest value; mean over batch and KV heads.

    Args:
        blocks: (B, T, G, n) int, -1 where nothing is selected. document: (T,) int64, of each query.
    """
    entropies = []
    number = document[:, None] * (int(blocks.max()) + 1) + blocks.permute(0, 2, 1, 3)  # unlike in unlike documents
    for chosen, valid in zip(number.flatten(0, 1), blocks.permute(0, 2, 1, 3).flatten(0, 1) >= 0, strict=True):
        counts = torch.unique(chosen[valid], return_counts=True)[1].double()
        share = counts / counts.sum()
        entropies.append(float(-(share * share.log()).sum()) / math.log(len(counts)) if len(counts) > 1 else 0.0)
    return sum(entropies) / len(entropies)


def block_overlap(blocks: Tensor, document: Tensor) -> float:
    """Share of the blocks of each query that the query before it, in the same document, selected too."""
    now, before = blocks[:, 1:], blocks[:, :-1]
    valid = (now >= 0) & (document[1:] == document[:-1])[:, None, None]
    shared = torch.zeros_like(valid)
    for i in range(blocks.shape[-1]):  # no (T, n, n) in memory
        shared |= now == before[..., i, None]
    return (shared & valid).sum().item() / max(1, int(valid.sum()))


def first_block_share(blocks: Tensor, choice: Tensor) -> float:
    """Share of the queries in ``choice`` (T,) bool that select block 0; 1 if none has a choice: then all see it."""
    if not choice.any():
        return 1.0
    return (blocks[:, choice] == 0).any(-1).float().mean().item()
