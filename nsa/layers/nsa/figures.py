"""Metrics of Native Sparse Attention for TensorBoard: gates, selected blocks and the share of each branch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa import ops
from nsa.layers.figure import Figure
from nsa.layers.nsa.layer import BRANCHES
from nsa.ops.geometry import Documents, clip_borders
from nsa.ops.native_sparse import branches
from nsa.ops.selection_kl import block_attention

ROWS = 1024  # queries whose attention to all blocks is in memory at once


@torch.no_grad()
def measure(
    attend: Any,
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    earlier: dict[Any, Any] | None = None,
) -> dict[str, Figure]:
    """The metrics of one layer, from the inputs of its ``attend`` (shapes as in `nsa.ops.native_sparse_attention`).

    gate_<branch>: mean gate over tokens and heads.
    mass_<branch>: norm of the branch's gated output, as a share of the sum over branches.
    block_entropy: how evenly the selections are distributed over the blocks, from 0 (one block) to 1.
    block_overlap: share of a query's selected blocks that the previous query selected as well.
    first_block_share: share of queries that would select the first block if it were not forced, among those with more
        blocks than they may select.
    """
    sizes = attend.sizes
    choose = partial(attend.choose, cu_seqlens=cu_seqlens, offset=offset)
    compressed, selected, window, blocks, lse = branches(
        q, kv_cmp, kv_slc, kv_win, choose, length=sizes["length"], stride=sizes["stride"],
        block_size=sizes["block_size"], window=attend.window, scale=attend.scale, cu_seqlens=cu_seqlens,
        offset=offset, backend=attend.backend,
    )  # fmt: skip
    first_block = choose(q, kv_cmp[0], lse, num_initial=0)

    figures = {}
    norms = [
        float((out.float().norm(dim=-1) * gates[..., i].float()).sum(dtype=torch.float64))
        for i, out in enumerate((compressed, selected, window))
    ]
    for i, branch in enumerate(BRANCHES):
        figures[f"gate_{branch}"] = Figure.mean_of(gates[..., i])
        figures[f"mass_{branch}"] = Figure.mean(norms[i], sum(norms), otherwise=0.0)
    documents = Documents.of(q.shape[1], offset, cu_seqlens, q.device)
    figures["block_entropy"] = block_entropy(blocks, documents, sizes["block_size"])
    figures["block_overlap"] = block_overlap(blocks, documents.query_document)
    choice = documents.query_local // sizes["block_size"] >= max(sizes["num_blocks"], sizes["num_local"])
    figures["first_block_share"] = first_block_share(first_block, choice)
    return figures


@torch.no_grad()
def measure_warm_up(
    attend: Any,
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    kv_win: tuple[Tensor, Tensor],
    gates: Tensor,
    cu_seqlens: Tensor | None = None,
    offset: int = 0,
    earlier: dict[Any, Any] | None = None,
) -> dict[str, Figure]:
    """The metrics of one layer whose selection is taught. Shares of the attention that the choice is about: that to
    blocks which are neither always selected nor reached by the window.

    recall: the share that the selected blocks hold. recall_bound: the most that as many blocks can hold.
    choice_mass: the probability of all of it, mean over tokens.
    """
    k, v = kv_slc() if callable(kv_slc) else kv_slc
    sizes, documents = attend.sizes, {"scale": attend.scale, "cu_seqlens": cu_seqlens}
    dense: dict[str, Any] = documents | {"backend": attend.backend}
    _, lse = ops.dense_attention(q, k, v, **dense, return_lse=True)
    blocks: dict[str, Any] = dense | {name: sizes[name] for name in ("length", "stride")}
    _, compressed = ops.compressed_attention(q, kv_cmp[0], kv_cmp[1], **blocks, offset=offset)
    chosen = attend.choose(q, kv_cmp[0], compressed, cu_seqlens=cu_seqlens, offset=offset).transpose(1, 2).long()
    free = sizes["num_blocks"] - sizes["num_initial"] - sizes["num_local"]
    held, most, whole = (torch.zeros((), dtype=torch.float64, device=q.device) for _ in range(3))
    for start in range(0, q.shape[1], ROWS):
        stop = min(start + ROWS, q.shape[1])
        rows, end = slice(start, stop), offset + stop
        borders = None if cu_seqlens is None else clip_borders(cu_seqlens, 0, end)
        here = sizes | dense | {"window": attend.window, "offset": offset + start, "cu_seqlens": borders}
        target, blocks_here = block_attention(q[:, rows], k[:, :end], lse[:, :, rows], **here), chosen[:, :, rows]
        held += (target.gather(3, blocks_here.clamp(min=0)) * (blocks_here >= 0)).sum()  # forced blocks have none of it
        most += attend.together(target).topk(min(free, target.shape[3]), -1).values.sum()
        whole += target.sum()
    return {
        "recall": Figure.mean(held, whole),
        "recall_bound": Figure.mean(most, whole),
        "choice_mass": Figure.mean(whole, chosen[..., 0].numel()),
    }


@torch.no_grad()
def measure_taught(
    attend: Any,
    q: Tensor,
    kv_cmp: tuple[Tensor, Tensor],
    kv_slc: tuple[Tensor, Tensor] | Callable[[], tuple[Tensor, Tensor]],
    *inputs: Any,
    **options: Any,
) -> dict[str, Figure]:
    """The metrics of a layer that attends as NSA while its selection is taught: those of both."""
    kv_slc = kv_slc() if callable(kv_slc) else kv_slc
    found = measure(attend, q, kv_cmp, kv_slc, *inputs, **options)
    return found | measure_warm_up(attend, q, kv_cmp, kv_slc, *inputs, **options)


def block_entropy(blocks: Tensor, documents: Documents, block_size: int) -> Figure:
    """Entropy of how often each block is selected, divided by its maximum; mean over batch and KV heads.

    Args:
        blocks: (B, T, G, n) int, -1 where nothing is selected. documents: of the T queries.
    """
    lengths = documents.bounds.diff()
    before = ((lengths + block_size - 1) // block_size).cumsum(0).roll(1)  # blocks of the documents before
    before[0] = 0  # every part of the queries numbers the blocks alike
    number = before[documents.query_document][:, None] + blocks.permute(0, 2, 1, 3)
    valid, number = (x.flatten(0, 1) for x in (blocks.permute(0, 2, 1, 3) >= 0, number))
    bins = int(number.max()) + 1
    counts = [torch.bincount(row[there], minlength=bins) for row, there in zip(number, valid, strict=True)]
    return Figure(torch.stack(counts), entropy=True)


def block_overlap(blocks: Tensor, document: Tensor) -> Figure:
    """Share of the blocks of each query that the previous query of the same document selected, too; 0 without any."""
    now, before = blocks[:, 1:], blocks[:, :-1]
    valid = (now >= 0) & (document[1:] == document[:-1])[:, None, None]
    shared = torch.zeros_like(valid)
    for i in range(blocks.shape[-1]):  # no (T, n, n) in memory
        shared |= now == before[..., i, None]
    return Figure.mean((shared & valid).sum(), valid.sum(), otherwise=0.0)


def first_block_share(blocks: Tensor, choice: Tensor) -> Figure:
    """Share of the queries in ``choice`` (T,) bool that select block 0; 1 if ``choice`` is empty."""
    return Figure.mean_of((blocks[:, choice] == 0).any(-1))
