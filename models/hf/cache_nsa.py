"""The cache of an exported decoder. Sizes in the comments are those of attention_nsa.py."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class ChosenTokens:
    """What indexers choose in one forward pass, for later layers that attend to the same tokens: by the number of the
    indexer's layer, (B, c, K) int64 of each chunk of queries, in order; -1 fills the rest.

    It is no dictionary, of which accelerate would give every layer a copy. A layer that is recomputed in a backward
    pass finds the choice of the first pass.
    """

    def __init__(self):
        self.of_layer: dict[int, list[Tensor]] = {}


class Step(NamedTuple):
    """Where the T tokens of one forward pass go; a tuple, so that accelerate moves it to the device of a layer.

    slots: (B, T) int64, the slot of each token in its row. stop: slots of the longest row, these tokens included.
    shortest_before, shortest: real tokens of the shortest row without and with these. chosen: by the indexers so far.
    """

    slots: Tensor
    stop: int
    shortest_before: int
    shortest: int
    chosen: ChosenTokens


@dataclass
class Span:
    """Keys (B, n, G, D) and values (B, n, G, V) of the slots ``start`` .. ``start + n - 1`` of every row."""

    start: int
    keys: Tensor
    values: Tensor

    def write(self, keys: Tensor, values: Tensor, step: Step) -> "Span":
        """With those of a step's tokens at their slots."""

        def put(old: Tensor, new: Tensor) -> Tensor:
            room = pad(old, (0, 0, 0, 0, 0, max(0, step.stop - self.start - old.shape[1])))
            new = new.to(old.dtype)  # autocast may have begun or ended since
            return room.scatter(1, (step.slots - self.start)[..., None, None].expand_as(new), new)

        return Span(self.start, put(self.keys, keys), put(self.values, values))

    def between(self, first: int, stop: int) -> "Span":
        """The part in the slots ``first`` .. ``stop - 1``."""
        first = max(first, self.start)
        part = slice(first - self.start, max(stop, first) - self.start)
        return Span(first, self.keys[:, part], self.values[:, part])


class NSACache:
    """What decoding keeps: of a dense layer all keys and values; of an indexer its index keys, too; of an NSA layer
    its compressed blocks, the tail of tokens whose blocks are not complete, all tokens for selection, and the last
    window (section 3.3.3: each branch has keys and values of its own); of a CSA layer its entries, the tail, and the
    last window. Rows may hold different numbers of tokens.

    Layers get the whole cache and their number: accelerate copies dictionaries and lists that a layer is called with.

    seen: (B, columns) bool, False where an input column was padded; None before the first call.
    """

    is_croppable = True  # this and the next two are asked for by `generate`
    is_compileable = False
    is_linear = (False,)  # that is: no layer's state has a fixed size

    def __init__(self, num_layers: int):
        self.seen: Tensor | None = None
        self.record_past = False
        self.layers: list[dict[str, Span]] = [{} for _ in range(num_layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Input columns seen, padding included."""
        return 0 if self.seen is None else self.seen.shape[1]

    def first_kept(self, first: int) -> int:
        """The first slot to keep, if later queries need ``first`` .. only."""
        return 0 if self.record_past else first

    def activate_past_recording(self) -> None:
        """Drop nothing from now on, so that tokens can be taken back: assisted generation."""
        self.record_past = True

    def crop(self, tokens: int) -> None:
        """Take back the last ``-tokens`` columns; a positive number is how many stay (transformers before 5.24)."""
        columns = self.get_seq_length()
        stay = columns + tokens if tokens <= 0 else min(tokens, columns)
        if stay == columns:
            return
        if not self.record_past:
            raise ValueError(
                "the cache may have dropped tokens that it needs after a crop: call activate_past_recording() first"
            )
        self.seen = self.seen[:, :stay]  # the tokens after it are written over

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, a row as often as it is named."""
        if self.seen is not None:
            self.seen = self.seen[indices.to(self.seen.device)]
        for spans in self.layers:
            for name, span in spans.items():
                rows = indices.to(span.keys.device)
                spans[name] = Span(span.start, span.keys[rows], span.values[rows])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies side by side."""
        if self.seen is not None:
            rows = torch.arange(self.seen.shape[0], device=self.seen.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))


def extend(spans: dict[str, Span] | None, name: str, keys: Tensor, values: Tensor, step: Step) -> Span:
    """The span ``name`` of a layer's cache with the new tokens; the new tokens alone if there is none."""
    if spans is None or name not in spans:
        return Span(0, keys, values)  # without a past, token t of a row is in slot t
    return spans[name].write(keys, values, step)
