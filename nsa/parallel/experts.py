"""Expert parallelism: every rank holds some whole experts of a layer, and ranks send each other tokens.

A rank routes its own tokens and sends each to the ranks that hold its experts. They compute and send the results back
(two all-to-alls). The ranks of `Grid.experts` take part: those along ``parallel.expert``, which read different
samples, and the tensor-parallel ranks. The latter hold different tokens at this point, so no expert has to be split.

An expert's gradient comes from the tokens of all these ranks. DeepSpeed averages it over the ranks that hold the same
expert. All other parameters are replicated along ``parallel.expert``, and their gradients are summed there.
"""

from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from nsa.layers.around import Around
from nsa.models import Decoder
from nsa.models.moe import Experts, MixtureOfExperts, sizes, take
from nsa.parallel.collectives import all_reduce, exchange
from nsa.parallel.grid import Axis, Grid
from nsa.parallel.partition import Partition, mark, part_of, partition_of, sum_over


def split_over_expert_ranks(model: Decoder, grid: Grid) -> None:
    """Keep this rank's experts of a decoder that is already sharded over tensor-parallel ranks."""
    routed = set()
    for moe in model.modules():
        if not isinstance(moe, MixtureOfExperts):
            continue
        if grid.row.size > 1:
            moe.row_counts = partial(all_reduce, axis=grid.row, what="counts")
        if grid.experts.size > 1:
            part = Partition(0, grid.experts.rank, grid.experts.size)
            for name, weight in list(moe.experts.named_parameters()):
                setattr(moe.experts, name, part_of(weight, part))
            moe.experts = ComputeTogether(moe.experts, grid.experts)  # type: ignore[assignment]
        routed |= {id(weight) for weight in moe.experts.parameters()}
    if grid.expert.size > 1:
        for parameter in model.parameters():
            if id(parameter) not in routed:
                part = partition_of(parameter)
                mark(parameter, replace(part, owner=part.owner and grid.expert.rank == 0))
                sum_over(parameter, grid.expert)


class ComputeTogether(Around):
    """Computes the experts of all ranks, in order; ``inside`` holds this rank's."""

    def __init__(self, inside: Experts, axis: Axis) -> None:
        super().__init__(inside)
        self.axis = axis

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """As `Experts.forward`."""
        axis = self.axis
        send = counts.view(axis.size, -1)  # (ranks, experts of each)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=axis.group)
        sent, got = (sizes(x.sum(1), len(rows)) for x in (send, receive))
        received = exchange(rows, axis, sent, got, "tokens")
        # The rows arrive sorted by rank and then by expert; `Experts` takes them sorted by expert.
        number = torch.arange(send.shape[1], device=counts.device).repeat(axis.size)
        order = number.repeat_interleave(receive.flatten(), output_size=len(received)).argsort(stable=True)
        inverse = order.argsort()
        out = self.inside(take(received, order, inverse), receive.sum(0))
        return exchange(take(out, inverse, order), axis, got, sent, "tokens")
