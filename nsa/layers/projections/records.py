"""The projection that the shape of a layer asks for."""

from dataclasses import replace

from nsa.layers.kind import Parts, Shape
from nsa.layers.projections.gqa import GQA
from nsa.layers.projections.mla import MLA
from nsa.layers.projections.record import ProjectionRecord


def projection_of(shape: Shape) -> ProjectionRecord:
    """The record of the projection."""
    return GQA if shape.mla is None else MLA


def parts_of(shape: Shape, whole: tuple[str, ...] = (), columns: tuple[str, ...] = ()) -> Parts:
    """The parts of a layer with this projection, and its own: replicated ones, and those by query heads."""
    parts = projection_of(shape).parts(shape)
    return replace(parts, whole=(*parts.whole, *whole), columns=(*parts.columns, *columns))
