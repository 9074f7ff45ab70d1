"""Metrics of the attention of each layer, for TensorBoard.

Forward pre-hooks on ``attend`` of the layers see its inputs, so the layers need no code for it. The kind of attention
says what is measured (`nsa.layers.kind.Kind.figures`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from nsa.layers.around import innermost


@contextmanager
def probe(layers: nn.ModuleList, metrics: dict[str, float]) -> Iterator[None]:
    """On exit, add to ``metrics`` the means over the forward passes of the decoder ``layers`` in the context.

    Tags are attention/<name>/layer_<number>.
    """
    handles: list[Any] = []
    seen: dict[str, list[float]] = {}
    earlier: dict[Any, Any] = {}
    layer: Any
    for number, layer in enumerate(layers):
        figures = layer.kind.figures if hasattr(layer, "kind") else None  # the layer may be on another stage
        if figures is not None:
            if not handles:  # a new forward pass
                handles.append(layer.register_forward_pre_hook(lambda *_: earlier.clear()))
            hook = _hook(partial(figures, earlier=earlier), f"layer_{number:02d}", seen)
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
