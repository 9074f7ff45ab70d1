"""The projection that the shape of a layer asks for."""

from dataclasses import replace

from nsa.layers.kind import Parts, Shape
from nsa.layers.projections.gqa import GQA
from nsa.layers.projections.mla import MLA
from nsa.layers.projections.record import ProjectionRecord


def projection_of(shape: Shape) -> ProjectionRecord:
    """The record of the projection."""
    return GQA if shape.mla is None else MLA


def parts_of(shape: Shape, whole: tuple[str, ...] = ()) -> Parts:
    """The parts of a layer with this projection; ``whole``: modules of the layer that are replicated, too."""
    parts = projection_of(shape).parts(shape)
    return replace(parts, whole=(*parts.whole, *whole))
