"""A whole decoder, sharded over the grid."""

from collections.abc import Callable

from nsa.models import Decoder
from nsa.parallel.context import ComputeOwn, split_over_context_ranks
from nsa.parallel.experts import split_over_expert_ranks
from nsa.parallel.grid import Grid
from nsa.parallel.partition import add_up_in_backward
from nsa.parallel.pipeline import split_over_stages
from nsa.parallel.tensor import split_over_tensor_ranks


def parallelize(model: Decoder, grid: Grid, fill: Callable[[Decoder], None] | None = None) -> Decoder:
    """Reduce ``model``, which is whole and identical on all ranks, to this rank's part.

    Parameters keep their names; `nsa.parallel.partition` says which part of the logical parameter each is.

    Args:
        fill: gives a model on the meta device its values once it is sharded (`nsa.parallel.partition.materialise`).

    Returns:
        ``model`` or a wrapper of it. Called like the whole decoder, it returns the losses of this rank's tokens, or
        activations on a stage that is not the last.
    """
    split_over_tensor_ranks(model, grid.tensor, grid.sharers)
    split_over_context_ranks(model, grid.context)
    split_over_expert_ranks(model, grid)
    split_over_stages(model, grid.pipeline, grid.ends)
    if fill:
        fill(model)
    if grid.pipeline.size == 1:
        add_up_in_backward(model.parameters())  # a pipeline does it once per step
    if grid.context.size > 1:
        return ComputeOwn(model, grid.context)  # type: ignore[return-value]
    return model
