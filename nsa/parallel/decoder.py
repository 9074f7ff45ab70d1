"""A whole decoder, spread over the grid."""

from nsa.models import Decoder
from nsa.parallel.context import split_over_context_ranks
from nsa.parallel.grid import Grid
from nsa.parallel.tensor import split_over_tensor_ranks


def parallelize(model: Decoder, grid: Grid) -> None:
    """Leave of ``model``, whole and initialised alike on all ranks, what this rank holds, in place. Collective.

    Parameters keep their names; `nsa.parallel.partition` says which part of the logical one each is. Called like the
    whole decoder, the model then returns the losses of this rank's tokens.
    """
    split_over_tensor_ranks(model, grid.tensor)
    split_over_context_ranks(model, grid.context)
