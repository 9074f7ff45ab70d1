"""The sets of tokens that layers select, recorded or given from outside.

Reinforcement learning needs both: training must attend to what the rollout attended to, else the ratio of their
probabilities is not that of their policies.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa.layers.around import innermost
from nsa.ops.geometry import Documents

IndexSets = dict[int, Tensor]


class IndexChoice(nn.Module):
    """A module that selects a set of ``topk`` indices for each query; subclasses say how (``select``).

    Attributes:
        scores: whether it scores to select; else it takes sets that were selected elsewhere.
        recorded: position of the first query of a pass -> its sets, while they are recorded.
        given: sets to return in place of selecting some (`replay_index_sets`).
    """

    topk: int
    scores = True

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[int, Tensor] | None = None
        self.given: GivenSets | None = None

    def select(self, *inputs: Tensor, cu_seqlens: Tensor | None, offset: int) -> Tensor:
        """The indices (B, T, topk) int32 for queries from position ``offset`` on; -1 fills the rest."""
        raise NotImplementedError

    def visible(self, documents: Documents) -> tuple[Tensor, Tensor]:
        """The first and the last index that each query may have, (T,) each."""
        return documents.bounds[documents.query_document], documents.query_position

    def forward(self, *inputs: Tensor, cu_seqlens: Tensor | None = None, offset: int = 0) -> Tensor:
        """inputs: (B, T, ...) first. Returns as `select`."""
        if self.given is not None:
            sets = self.given.of(inputs[0], cu_seqlens, offset)
        else:
            sets = self.select(*inputs, cu_seqlens=cu_seqlens, offset=offset)
        if self.recorded is not None:
            if offset == 0:  # another sequence
                self.recorded.clear()
            self.recorded[offset] = sets
        return sets


class GivenSets:
    """Sets (B, T, K) that a layer is to attend to. ``layer``: its number, for messages.

    Raises:
        ValueError: another shape, no integers, an index that its query does not see, or one that is listed twice.
    """

    def __init__(self, sets: Tensor, choice: IndexChoice, layer: int) -> None:
        self.layer, self.choice = layer, choice
        if sets.dim() != 3 or sets.shape[2] != choice.topk or sets.is_floating_point():
            raise ValueError(
                f"index sets of layer {layer} must be (batch, tokens, {choice.topk}) integers, padded with -1, got "
                f"{tuple(sets.shape)} {sets.dtype}"
            )
        self._check(sets, Documents.of(sets.shape[1], 0, None, sets.device))
        ordered = sets.sort(-1).values
        if ((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any():
            raise ValueError(f"index sets of layer {layer} have an index twice")
        self.sets = sets.to(torch.int32)

    def of(self, x: Tensor, cu_seqlens: Tensor | None, offset: int) -> Tensor:
        """Those of the queries of x (B, T, ...), at positions ``offset`` on."""
        stop = offset + x.shape[1]
        if self.sets.shape[0] != x.shape[0] or self.sets.shape[1] < stop:
            raise ValueError(
                f"index sets of layer {self.layer} are for {self.sets.shape[0]} sequences of {self.sets.shape[1]} "
                f"tokens; the pass has {x.shape[0]}, and queries up to token {stop}"
            )
        if self.sets.device != x.device:
            self.sets = self.sets.to(x.device)
        rows = self.sets[:, offset:stop]
        if cu_seqlens is not None:
            self._check(rows, Documents.of(x.shape[1], offset, cu_seqlens, x.device))
        return rows.contiguous()

    def _check(self, sets: Tensor, documents: Documents) -> None:
        first, last = (bound[:, None] for bound in self.choice.visible(documents))
        if ((sets != -1) & ((sets < first) | (sets > last))).any():
            raise ValueError(
                f"index sets of layer {self.layer} have an index that its query does not see: give sets of the same "
                "documents, packed in the same way"
            )


def index_choices(model: nn.Module) -> dict[int, IndexChoice]:
    """Number of the layer -> the module that selects its index sets, of the layers of ``model`` that have one.

    Raises ValueError if there is none.
    """
    found: dict[int, IndexChoice] = {}
    layer: Any
    for number, layer in enumerate(getattr(model, "layers", ())):
        if not hasattr(layer, "kind"):  # the layer is on another pipeline stage
            continue
        for path in layer.kind.choices:
            choice = innermost(layer.attention.get_submodule(path))
            if isinstance(choice, IndexChoice):
                found[number] = choice
    if not found:
        raise ValueError("no layer of this model selects index sets: give a decoder with layers of kind dsa or csa")
    return found


@contextmanager
def record_index_sets(model: nn.Module) -> Iterator[IndexSets]:
    """On exit, the dictionary has the sets that each layer selected in the context: layer -> (B, T, K) int32.

    They are those of one batch of sequences, from its first token on: of a whole forward pass, or of cached decoding
    in any pieces. A pass that begins at token 0 begins another batch, and the last one counts. A recomputed pass is not
    recorded again.

    Args:
        model: a `nsa.models.Decoder`, wrapped or not. Of a pipeline, the layers of this stage are recorded. Tensor-
            parallel ranks record the same.

    Raises:
        ValueError: no layer selects index sets; none did in the context (a warm-up attends to all tokens); the first
            tokens are not those of a sequence, or some between are missing (a rank of context parallelism has a part).
    """
    choices, sets = index_choices(model), IndexSets()
    for choice in choices.values():
        choice.recorded = {}
    try:
        yield sets
        for number, choice in choices.items():
            if choice.recorded:
                sets[number] = _joined(choice.recorded, number)
    finally:
        for choice in choices.values():
            choice.recorded = None
    if not sets:
        raise ValueError("no layer selected index sets: there was no forward pass, or the phase is warm-up")


def _joined(pieces: Mapping[int, Tensor], layer: int) -> Tensor:
    """The rows of passes, by the position of their first query."""
    rows, length = [], 0
    for first, sets in sorted(pieces.items()):
        if first != length:
            raise ValueError(
                f"layer {layer} did not select for tokens {length} to {first - 1} while it was recorded: begin to "
                "record before the first token, and without context parallelism, where each rank has a part only"
            )
        rows.append(sets)
        length = first + sets.shape[1]
    return torch.cat(rows, 1)


@contextmanager
def replay_index_sets(model: nn.Module, sets: Mapping[int, Tensor]) -> Iterator[None]:
    """Passes in the context attend to the given ``sets``, whatever the indexers score.

    The indexers still learn, from the attention among these tokens. A layer that is recomputed attends to the sets of
    its first pass, also after the context.

    Args:
        model: as for `record_index_sets`.
        sets: layer -> (B, T, K) integers: what `record_index_sets` gave. A pass may have fewer tokens than T. All
            layers of ``model`` that select must be there; in a pipeline, other stages' layers may be.

    Raises:
        ValueError: a layer is missing, selects nothing or has sets of another shape; an index is not visible to its
            query (also in the forward pass, where documents and the batch are known).
    """
    choices = index_choices(model)
    missing = sorted(choices.keys() - sets.keys())
    if missing:
        raise ValueError(f"index sets of layers {_names(missing)} are missing: every layer that selects needs them")
    layers: Any = model.layers
    surplus = sorted(n for n in sets if n >= len(layers) or (n not in choices and hasattr(layers[n], "kind")))
    if surplus:
        raise ValueError(f"there are index sets of layers {_names(surplus)}, which select nothing: take them out")
    given = {number: GivenSets(sets[number], choice, number) for number, choice in choices.items()}
    for number, choice in choices.items():
        choice.given = given[number]
    try:
        yield
    finally:
        for choice in choices.values():
            choice.given = None


def _names(layers: list[int]) -> str:
    return ", ".join(map(str, layers))
