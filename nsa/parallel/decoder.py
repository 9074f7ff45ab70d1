"""A whole decoder, spread over the grid."""

from collections.abc import Callable

from nsa.models import Decoder
from nsa.parallel.context import ComputeOwn, split_over_context_ranks
from nsa.parallel.experts import split_over_expert_ranks
from nsa.parallel.grid import Grid
from nsa.parallel.partition import add_up_in_backward
from nsa.parallel.pipeline import split_over_stages
from nsa.parallel.tensor import split_over_tensor_ranks


def parallelize(model: Decoder, grid: Grid, fill: Callable[[Decoder], None] | None = None) -> Decoder:
    """Leave of ``model``, whole and alike on all ranks, what this rank holds.

    ``fill``: gives a model on the meta device its values (`nsa.parallel.partition.materialise`), once it is split.

    Parameters keep their names; `nsa.parallel.partition` says which part of the logical one each is. What is returned
    is ``model``, or a module around it; called like the whole decoder, it returns the losses of this rank's tokens (a
    stage that is not the last: activations).
    """
    split_over_tensor_ranks(model, grid.tensor, grid.sharers)
    split_over_context_ranks(model, grid.context)
    split_over_expert_ranks(model, grid)
    split_over_stages(model, grid.pipeline, grid.ends)
    if fill:
        fill(model)
    if grid.pipeline.size == 1:
        add_up_in_backward(model.parameters())  # a pipeline does it once a step
    if grid.context.size > 1:
        return ComputeOwn(model, grid.context)  # type: ignore[return-value]
    return model
