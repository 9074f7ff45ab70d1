"""The projection that the shape of a layer asks for."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from nsa.layers.kind import Parts, Shape
from nsa.layers.projections.gqa import GQA
from nsa.layers.projections.mla import MLA
from nsa.layers.projections.record import ProjectionRecord


def projection_of(shape: Shape) -> ProjectionRecord:
    """The record of the projection."""
    return GQA if shape.mla is None else MLA


def parts_of(
    shape: Shape,
    whole: tuple[str, ...] = (),
    columns: tuple[str, ...] = (),
    kv_heads: tuple[str, ...] = (),
    drawn: Mapping[str, Callable[[int, int], int]] = MappingProxyType({}),
    averaged: Mapping[str, bool] = MappingProxyType({}),
) -> Parts:
    """The parts of a layer with this projection, and its own."""
    parts = projection_of(shape).parts(shape)
    return replace(
        parts,
        whole=(*parts.whole, *whole),
        columns=(*parts.columns, *columns),
        kv_heads=(*parts.kv_heads, *kv_heads),
        drawn=drawn,
        averaged=averaged,
    )
