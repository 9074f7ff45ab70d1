"""One way to read a prompt and to decode, for every arm: a decoder as it was trained, or with a method put onto it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from nsa.baselines import Ledger, Session, Turn
from nsa.baselines.ledger import Counts
from nsa.cache import Rows
from nsa.layers.around import Around
from nsa.layers.kind import Kind, Spent, seen_keys
from nsa.models import Decoder
from nsa.models.decoding import last_only


class AttachError(ValueError):
    """A method cannot be put onto a model."""


class Reader(Protocol):
    """A model that reads a prompt, then one token at a time, for a batch of sequences of equal length."""

    ledger: Ledger

    def begin(self) -> None:
        """Forget the batch before."""

    def read(self, ids: Tensor) -> Tensor:
        """Read the next tokens (B, T) int64: logits (B, V) of what follows the last of them."""

    def end_prompt(self) -> None:
        """What is read from now on is decoded, one token at a time."""

    def follow(self, other: Self) -> None:
        """Begin, and go on from a prompt that ``other`` has read (`Prompts`), as if it had been read here.

        Raises:
            ValueError: the method does not leave the prompt dense.
        """

    def take(self, sequences: Tensor) -> Self:
        """A copy that goes on with these sequences of the batch, (B',) int64; one may stand several times."""


class Prompts:
    """Prompts that are read once for all readers of a model whose methods leave them dense. The last one is kept.

    Args:
        open_reader: with the method `nsa.baselines.methods.dense.DenseForOthers`, and a ledger of its own.
    """

    def __init__(self, open_reader: Callable[[], Reader]) -> None:
        self._open = open_reader
        self._last: tuple[Tensor, Reader] | None = None

    def forget(self) -> None:
        """Give its memory back."""
        self._last = None

    def read(self, ids: Tensor) -> Reader:
        """The reader that has read this prompt, (B, T) int64: for `Reader.follow`."""
        if self._last is None or not torch.equal(self._last[0], ids):
            self.forget()  # before the next one is read: memory
            reader = self._open()
            reader.begin()
            reader.read(ids)
            self._last = ids, reader
        return self._last[1]


class DecoderReader:
    """Our decoder as a `Reader`. Within `reading` its layers attend by ``session``; outside of it nothing has changed.

    Args:
        decoder: in evaluation mode, without parallelism.
        session: the method; None: each layer attends as it was trained, and is counted.

    Raises:
        AttachError: a layer's kind of attention, or the projection, has no place for a method.
    """

    def __init__(self, decoder: Decoder, session: Session | None, ledger: Ledger | None = None) -> None:
        if session is not None:
            check(decoder, session)
        self.decoder, self.session = decoder, session
        self.ledger = session.ledger if session is not None else ledger or Ledger()
        self.begin()

    def begin(self) -> None:
        if self.session is not None:
            self.session.begin()
        self.prompt, self.length = True, 0
        layers: list[Any] = list(self.decoder.layers)
        self.caches: list[Any] = [x.attention.new_cache() if self._cached(x.kind) else None for x in layers]

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        device = self.decoder.embedding.weight.device
        positions = torch.arange(self.length, self.length + ids.shape[1], device=device)
        with self._in_place(), last_only(self.decoder):
            logits = self.decoder(ids.to(device), caches=self.caches, positions=positions)
        self.length += ids.shape[1]
        return logits[:, -1].float().cpu()

    def end_prompt(self) -> None:
        self.prompt = False
        if self.session is not None:
            self.session.end_prompt()

    def follow(self, other: "DecoderReader") -> None:
        self.begin()
        assert self.session is not None and other.session is not None
        self.session.follow(other.session)
        for (phase, layer), counts in other.ledger.beside.items():
            self.ledger.add(phase, layer, counts, beside=True)
        self.length, self.caches = other.length, other._caches_of(torch.arange(other.session.batch))

    def take(self, sequences: Tensor) -> "DecoderReader":
        other = object.__new__(DecoderReader)
        other.decoder, other.ledger, other.prompt, other.length = self.decoder, self.ledger, self.prompt, self.length
        other.session = None if self.session is None else self.session.take(sequences)
        other.caches = self._caches_of(sequences)
        return other

    def _caches_of(self, sequences: Tensor) -> list[Any]:
        return [None if cache is None else cache.take(sequences) for cache in self.caches]

    # ------------------------------------------------------------------------------------------------ the layers

    def _cached(self, kind: Kind) -> bool:
        return self.session is None or (kind.guest is not None and kind.guest.cached)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Within: each layer's ``attend`` is the method's, or is counted."""
        layers: list[Any] = list(self.decoder.layers)
        inside = [layer.attention.attend for layer in layers]
        try:
            for number, layer in enumerate(layers):
                layer.attention.attend = _Attend(self, number, layer.kind, inside[number])
            yield
        finally:
            for layer, attend in zip(layers, inside, strict=True):
                layer.attention.attend = attend

    def count(self, layer: int, spent: Spent, q: Tensor, offset: int, *, method: bool) -> None:
        """Enter what a layer's own attention has looked at; ``method``: beside a method, which the session counts."""
        config = self.decoder.config
        if len(spent.reads) == 1:  # each KV head of the model has its share
            spent = Spent(*(x.expand(config.num_kv_heads) / config.num_kv_heads for x in spent))
        groups, width = len(spent.reads), config.head_dim + config.attention_shape.v_head_dim
        one = torch.ones(groups, dtype=torch.float64)
        seen = 0.0 if method else float(seen_keys(q, offset).sum() * len(q))
        parts = [part for part in vars(self.caches[layer]).values() if isinstance(part, Rows) and part.length]
        stored = sum(x.numel() for part in parts for x in part.kept)
        whole = (offset + q.shape[1]) * len(q) * width  # elements of all tokens, per KV head
        self.ledger.add(
            "prefill" if self.prompt else "decode",
            layer,
            Counts(
                visible=one * seen * (q.shape[2] // groups),
                attended=spent.attended,
                scored=spent.scored,
                dense_reads=one * seen * width,
                reads=spent.reads,
                dense_resident=one * (0 if method else whole),
                # What the method chooses from is in the session's cache, and counted there.
                resident=one * (stored / groups - (whole if method else 0)),
            ),
            beside=method,
        )


class _Attend(Around):
    """Stands in the place of a layer's ``attend`` for one forward pass."""

    def __init__(self, reader: DecoderReader, layer: int, kind: Kind, inside: nn.Module) -> None:
        super().__init__(inside)
        self._reader, self._layer, self._kind = reader, layer, kind

    def forward(self, *inputs: Any, cu_seqlens: Tensor | None = None, offset: int = 0) -> Tensor:
        reader, guest = self._reader, self._kind.guest
        assert guest is not None
        if cu_seqlens is not None:
            raise AttachError("sequences are read in a batch here, not packed")
        if reader.session is not None:
            assert guest.attention is not None
            out = guest.attention(self.inside, partial(reader.session.attend, self._layer), *inputs, offset=offset)
            if guest.beside is not None:
                beside = guest.beside(self.inside, *inputs, offset=offset)
                reader.count(self._layer, beside, inputs[0], offset, method=True)
            return out
        out = self.inside(*inputs, offset=offset)
        reader.count(self._layer, guest.spent(self.inside, *inputs, offset=offset), inputs[0], offset, method=False)
        return out


def turn_of(decoder: Decoder) -> Turn:
    """Rotates as the decoder does."""
    return Turn(decoder.rotary.frequencies(decoder.config.head_dim))


def check(decoder: Decoder, session: Session) -> None:
    """Raises AttachError if the session's method cannot be put onto the decoder."""
    name = session.method.name
    if decoder.config.mla is not None:
        raise AttachError(f"{name} needs keys and values per KV head: this model keeps MLA's latents instead")
    layers: list[Any] = list(decoder.layers)
    for number, layer in enumerate(layers):
        if layer.kind.guest is None or layer.kind.guest.attention is None:
            raise AttachError(f"layer {number} is {layer.kind.title}, which has no place for {name}")
    assert session.num_layers == len(decoder.layers)
