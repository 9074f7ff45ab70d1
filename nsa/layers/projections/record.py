"""The record of a projection: what the rest of the program needs to know about it."""

from collections.abc import Callable
from dataclasses import dataclass

from nsa.layers.kind import Parts, Product, Shape
from nsa.layers.projections.base import Projection


@dataclass(frozen=True, kw_only=True, eq=False)
class ProjectionRecord:
    """The record of a projection, with the layer's ``output``. No attribute has a default.

    Attributes:
        build: (shape, backend of the operators) -> the projection.
        parts: shape -> how it is sharded over tensor-parallel ranks.
        products: shape -> its linear maps; the first is the joint projection of the hidden state.
        row_width: shape -> elements of `nsa.layers.projections.base.Projected.rows` per token.
        widths: (shape, absorbed) -> D and Dv of the keys and values that queries attend to in this form.
    """

    build: Callable[[Shape, str], Projection]
    parts: Callable[[Shape], Parts]
    products: Callable[[Shape], list[Product]]
    row_width: Callable[[Shape], int]
    widths: Callable[[Shape, bool], tuple[int, int]]
