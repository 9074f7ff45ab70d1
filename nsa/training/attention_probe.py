"""Figures of what the attention of each layer does, for TensorBoard.

Forward pre-hooks on the parameter-free ``attend`` of the layers see its inputs; the layer knows nothing of it. What is
measured is up to the kind of attention (`nsa.layers.kind.Kind.figures`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nsa.layers.around import innermost


@contextmanager
def probe(layers: nn.ModuleList, metrics: dict[str, float]) -> Iterator[None]:
    """When closed, ``metrics`` has the figures of the forward passes of the decoder ``layers`` (means, of several).

    Tags are attention/<figure>/layer_<number>.
    """
    handles = []
    seen: dict[str, list[float]] = {}
    layer: Any
    for number, layer in enumerate(layers):
        figures = layer.kind.figures if hasattr(layer, "kind") else None  # a layer may lie on another stage
        if figures is not None:
            hook = _hook(figures, f"layer_{number:02d}", seen)
            handles.append(innermost(layer.attention.attend).register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        metrics |= {name: sum(values) / len(values) for name, values in seen.items()}


def _hook(figures: Callable[..., dict[str, float]], layer: str, seen: dict[str, list[float]]) -> Any:
    @torch.no_grad()
    def record(attend: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in figures(attend, *args, **kwargs).items():
            seen.setdefault(f"attention/{name}/{layer}", []).append(value)

    return record
