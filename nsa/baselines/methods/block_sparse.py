"""MInference's block-sparse pattern: blocks of keys by attention between mean queries and mean keys."""

from dataclasses import dataclass

import torch

from nsa import ops
from nsa.baselines.importance.blocks import by_blocks, pooled_attention
from nsa.baselines.importance.lines import keys_once
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.plan import Estimate, Plan, View
from nsa.baselines.prompt import by_kernels, mask_of
from nsa.ops.choose import top


@dataclass(frozen=True, kw_only=True)
class BlockSparse(Method):
    """Each block of queries attends to the blocks of keys whose mean it attends to most.

    The query's own block is always in, and ``first`` blocks of the sequence and ``near`` blocks before its own: they
    are inside the budget, which is rounded down to blocks.

    Probabilities of the heads of a KV head are summed: logits of one head have another scale than those of the next.

    Attributes:
        block: tokens.
    """

    block: int = 64
    first: int = 0
    near: int = 0

    name = "block_sparse"
    title = "MInference, block-sparse"
    paper = "arXiv 2407.02490, section 3.2 and algorithm 3"
    axes = Axes("block of 64", "attention between means of queries and of keys, sum over the group", "uniform", "all")
    phases = ("prefill",)
    causal = False  # the mean of a block of queries has queries after its first
    chunkable = False  # a chunk's border may cut a block of queries
    licence = "MIT (microsoft/MInference)"
    differs = (
        "differs from the release because it chooses per KV head, not per query head, and keeps the query's own block, "
        "without which a query may attend to nothing; a length that is a multiple of the block gets no empty block more"
    )
    formula = "prefill: k keys and values, one product for each pair of blocks; decoding is dense"
    small = {"block": 8}  # noqa: RUF012 - never changed

    def prefill_select(self, view: View, state: State) -> Plan | None:
        if by_kernels(view) and not self.budget.full:
            return self.by_kernels(view)
        attention, there = pooled_attention(view, self.block)
        blocks = attention.shape[-1]
        number = torch.arange(blocks, device=view.q.device)
        back = number[:, None] - number
        forced = (back >= 0) & ((back <= self.near) | (number < self.first))
        budget = self.budget.each(view.seen, least=self.block * (1 + self.first + self.near))
        count = torch.where(budget >= view.seen[:, None, None], blocks, budget // self.block)
        mass = view.per_group(attention).sum(2).masked_fill(forced, torch.inf).masked_fill(back < 0, -torch.inf)
        pairs = float(((back >= 0) & there).double().sum() / len(view.q)) * view.group
        cost = Estimate(read=keys_once(view), pairs=pairs)
        return Plan((by_blocks(view, top(mass, count), self.block),), estimate=cost)

    def by_kernels(self, view: View) -> Plan:
        """The same of a whole prompt: all sequences have the same budget."""
        tokens, blocks, forced = view.q.shape[1], -(-view.q.shape[1] // self.block), 1 + self.first + self.near
        budget = self.budget.of(tokens, least=self.block * forced)
        found, _ = ops.pooled_blocks(
            view.q, view.k, block_size=self.block,
            num_blocks=max(blocks, forced) if budget >= tokens else budget // self.block,
            num_initial=self.first, num_local=1 + self.near, scale=view.scale,
        )  # fmt: skip
        cost = Estimate(read=keys_once(view), pairs=blocks * (blocks + 1) / 2 * view.group)
        return Plan.of(mask_of(found, blocks), cost, unit=self.block, tile=self.block)


@dataclass(frozen=True, kw_only=True)
class BlockSparseFrontier(BlockSparse):
    """As `BlockSparse`, with the blocks of The Sparse Frontier: of 16; the first and the previous one are forced."""

    block: int = 16
    first: int = 1
    near: int = 1

    name = "block_sparse_frontier"
    title = "block-sparse of The Sparse Frontier"
    paper = "arXiv 2504.17768, appendix; after arXiv 2407.02490"
    axes = BlockSparse.axes._replace(unit="block of 16")
    licence = "Apache-2.0 (PiotrNawrot/sparse-frontier)"
    differs = "differs from the release because a length that is a multiple of the block gets no empty block more"
    small = {"block": 4}  # noqa: RUF012 - never changed
