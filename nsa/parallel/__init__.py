"""The device mesh (`Grid`) and the ways to shard a decoder over it: tensor, context, pipeline, expert parallelism.

There is no global state, and the model code does not know of it: the trainer passes a `Grid` to `parallelize`.
"""

from nsa.parallel.config import ParallelConfig
from nsa.parallel.grid import Axis, Grid

__all__ = ["Axis", "Grid", "ParallelConfig"]
