"""Metrics of the attention of each layer, for TensorBoard.

Forward pre-hooks on ``attend`` of the layers see its inputs, so the layers need no code for it. The kind of attention
says what is measured (`nsa.layers.kind.Kind.figures`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from nsa.layers.around import innermost
from nsa.layers.figure import Figure


@contextmanager
def probe(layers: nn.ModuleList, found: dict[str, Figure]) -> Iterator[None]:
    """On exit, ``found`` has the figures of all queries in the forward passes of the decoder ``layers`` in the context.

    Tags are attention/<name>/layer_<number>.
    """
    handles: list[Any] = []
    seen: dict[str, list[Figure]] = {}
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
        found |= {name: Figure.added(parts) for name, parts in seen.items()}


def of_all_ranks(seen: Sequence[tuple[int, dict[str, Figure]]]) -> dict[str, float]:
    """The values of figures of which ranks have parts: of other tokens, or of other heads.

    Args:
        seen: of each rank, its place among the tensor-parallel ranks, which have other heads, and what `probe` found.
    """
    answer: dict[str, float] = {}
    for name in dict.fromkeys(name for _, found in seen for name in found):
        heads: dict[int, list[Figure]] = {}
        for place, found in seen:
            if name in found:
                heads.setdefault(place, []).append(found[name])
        answer[name] = Figure.joined([Figure.added(parts) for parts in heads.values()]).value
    return answer


def _hook(figures: Callable[..., dict[str, Figure]], layer: str, seen: dict[str, list[Figure]]) -> Any:
    @torch.no_grad()
    def record(attend: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, value in figures(attend, *args, **kwargs).items():
            seen.setdefault(f"attention/{name}/{layer}", []).append(value)

    return record
