"""Decoding token by token: each step is the same launches on the same memory, so a CUDA graph can replay it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsa.cache import Position
from nsa.layers.linear import kept_joined
from nsa.models.decoder import Decoder
from nsa.ops.dispatch import check_backend


class DecodingSteps:
    """A decoder that has read a prompt, and reads one token per sequence at a time.

    The caches have room for all tokens from the start, and the position is on the device. In a step the host waits for
    nothing, and decides nothing. The weights must not change: a joint projection keeps a joined copy of its own.

    Args:
        decoder: in evaluation mode, without parallelism.
        ids: (B, T) int64, the prompt of each sequence, at least one token.
        room: tokens of a sequence at most, the prompt included.
        capture: whether steps are replays of a CUDA graph; None: on a GPU, for a decoder without experts.
        products: implementation of the linear projections of a step: auto, triton (for at most 4 sequences) or torch
            (`nsa.ops.few_rows_linear`).

    Attributes:
        logits: (B, V), of what follows the last token that was read. The next step overwrites it.
        length: tokens of a sequence so far.

    Raises:
        ValueError: no prompt, too little room, an unknown name in ``products``, a layer that has no such cache, or a
            capture of a decoder with experts.
    """

    def __init__(
        self, decoder: Decoder, ids: Tensor, room: int, *, capture: bool | None = None, products: str = "auto"
    ) -> None:
        if ids.dim() != 2 or not ids.numel():
            raise ValueError(f"a prompt must be (batch, tokens) with at least one token, got {tuple(ids.shape)}")
        if room < ids.shape[1]:
            raise ValueError(f"room for {room} tokens does not hold the prompt of {ids.shape[1]}")
        check_backend(products)
        if capture and decoder.config.moe is not None:
            raise ValueError("capture=True: the host reads how many tokens each expert gets; use None or False")
        layers: list[Any] = list(decoder.layers)
        for number, layer in enumerate(layers):
            if not hasattr(layer.attention, "fix"):
                raise ValueError(
                    f"layer {number}: {layer.kind.title} has no cache of fixed memory yet; decode with new_caches()"
                )
        device = decoder.embedding.weight.device
        self.decoder, self.room, self.length = decoder, room, ids.shape[1]
        self.caches, self._products = decoder.new_caches(), products
        self._joined: dict[tuple[int, ...], Tensor] = {}
        with torch.no_grad(), last_only(decoder):
            self.logits = decoder(ids.to(device), caches=self.caches)[:, -1]
        self._ids = torch.zeros(len(ids), 1, dtype=torch.int64, device=device)
        self._position = Position(len(ids), self.length, device)
        for layer, cache in zip(layers, self.caches, strict=True):
            layer.attention.fix(cache, room, self._position)
        if capture is None:
            capture = device.type == "cuda" and decoder.config.moe is None
        self._replay = self._captured() if capture else self._step

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Read the next token of each sequence, (B,) int64, on the decoder's device: returns ``logits``.

        Raises:
            ValueError: there is no room for it, or ``products`` cannot run here. Where steps are captured, the
                constructor says the latter.
        """
        if self.length == self.room:
            raise ValueError(f"the caches are full: {self.room} tokens; ask for more room at the start")
        self._ids.copy_(ids[:, None])
        self._replay()
        self.length += 1
        return self.logits

    def _step(self) -> None:
        with kept_joined(self._joined, self._products):
            logits = self.decoder(self._ids, caches=self.caches, positions=self._position.index)
        self.logits.copy_(logits[:, -1])
        self._position.advance()

    @torch.no_grad()
    def _captured(self) -> Callable[[], None]:
        """A step as a CUDA graph. What the first, uncaptured step writes is overwritten by the first replay."""
        stream, logits = torch.cuda.Stream(), self.logits.clone()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels, joins weights
            self._step()
            self._position.advance(-1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.logits.copy_(logits)
        return graph.replay


@contextmanager
def last_only(decoder: Decoder) -> Iterator[None]:
    """Within: the decoder computes logits of the last token alone, (B, 1, V)."""
    hook = decoder.head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def generate(decoder: Decoder, ids: Tensor, tokens: int, *, temperature: float = 0.0) -> Tensor:
    """Continue each sequence.

    Args:
        decoder: in evaluation mode, without parallelism.
        ids: (B, T) int64, at least one token.
        tokens: how many to add. temperature: 0: the most likely token; above: drawn by torch's generator.

    Returns:
        (B, T + tokens) int64, on the decoder's device.

    Raises:
        ValueError: as `DecodingSteps`; a negative number or temperature.
    """
    if tokens < 0 or temperature < 0:
        raise ValueError(f"tokens ({tokens}) and temperature ({temperature:g}) must not be negative")
    ids = ids.to(decoder.embedding.weight.device)
    if tokens == 0:
        return ids
    steps, found = DecodingSteps(decoder, ids, ids.shape[1] + tokens - 1), [ids]
    while True:
        if temperature:
            new = torch.multinomial((steps.logits.float() / temperature).softmax(-1), 1)
        else:
            new = steps.logits.argmax(-1, keepdim=True)
        found.append(new)
        if len(found) > tokens:
            return torch.cat(found, 1)
        steps.step(new[:, 0])
