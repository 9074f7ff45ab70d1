"""One rank grid, and the ways to spread a decoder over it: tensor, context, pipeline and expert parallelism.

Nothing here is a global and no model file knows of it: the trainer builds a `Grid` and hands it to `parallelize`.
"""

from nsa.parallel.config import ParallelConfig
from nsa.parallel.grid import Axis, Grid

__all__ = ["Axis", "Grid", "ParallelConfig"]
