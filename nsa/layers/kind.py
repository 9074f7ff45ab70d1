"""The record of a kind of attention: everything that the rest of the program asks of one.

A kind lives in a folder of its own: its layer, its section of the configuration and its record. `nsa.layers.kinds`
lists the records. Models, parallelism, planning, training and export read a record, and know no kind by name.

A layer has ``forward(x, rotary, cu_seqlens, cache)`` and ``new_cache()``, and two modules without parameters. It hands
the inputs of ``attend`` to ``exchange``, as soon as they are projected, and goes on with what that returns (`Local`).
Then it calls ``attend(*inputs, cu_seqlens, offset)``, where offset is the position of the first query.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from nsa.schema import Section

Price = Literal["causal", "compressed", "near"]  # constants of `nsa.planning`, fitted to measurements


@dataclass(frozen=True)
class Shape:
    """Of an attention layer.

    Attributes:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys. v_head_dim: Dv of values.
        rope_theta: base of the rotary frequencies.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rope_theta: float

    def on_rank(self, ranks: int) -> "Shape":
        """Of the part that each of ``ranks`` tensor-parallel ranks holds."""
        heads, kv_heads = self.num_heads // ranks, max(1, self.num_kv_heads // ranks)
        return replace(self, num_heads=heads, num_kv_heads=kv_heads)


@dataclass(frozen=True)
class Backends:
    """Implementations of the operators: ``operators`` of all (auto, triton, torch, naive); ``dense``: of causal
    attention, where that is auto (`nsa.ops.dense_attention`)."""

    operators: str = "auto"
    dense: str = "auto"


class Build(Protocol):
    """Makes the layer of a kind."""

    def __call__(self, shape: Shape, config: Any, backends: Backends) -> nn.Module: ...


@dataclass(frozen=True)
class Product:
    """A linear map of the layer: ``rows`` per token, from ``inner`` to ``outer`` features."""

    rows: float
    inner: int
    outer: int


@dataclass(frozen=True)
class Parts:
    """How tensor-parallel ranks split a layer, by the paths of its submodules.

    Attributes:
        columns: linear maps whose outputs belong to query heads. kv_heads: to KV heads.
        rows: linear maps whose inputs belong to query heads; the ranks add up their outputs.
        whole: modules that every rank holds whole.
        gathered: modules that need all query heads of a KV head, with the axis of the heads in each of their inputs by
            position; None: the input is the same for all.
        gathered_bytes: (shape, bytes of an activation) -> what one query head of one token weighs in these inputs.
    """

    columns: tuple[str, ...]
    kv_heads: tuple[str, ...]
    rows: tuple[str, ...]
    whole: tuple[str, ...]
    gathered: Mapping[str, tuple[int | None, ...]]
    gathered_bytes: Callable[[Shape, int], int]


@dataclass(frozen=True)
class Own:
    """A context-parallel rank needs the input at its own tokens only: a tensor (B, T, ...)."""


@dataclass(frozen=True)
class Gather:
    """It needs keys and values of all tokens before its own: a pair of tensors (B, T, G, ...). ``name``: of the bytes
    in the metrics."""

    name: str


@dataclass(frozen=True)
class Halo:
    """It needs keys and values of the last ``tokens`` before its own: a pair of tensors (B, T, G, ...)."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Blocks:
    """It needs keys and values of all blocks, as ``module`` makes them: one of ``length`` tokens every ``stride``.

    ``module`` is called with the pair (B, T, G, ...), the rotary tables and the borders. It needs a halo of length - 1
    tokens (``halo``, the name of these bytes in the metrics); then blocks are gathered (``name``).
    """

    name: str
    halo: str
    module: str
    length: int
    stride: int


Exchange = Own | Gather | Halo | Blocks


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """A kind of attention. Nothing has a default: a new kind says everything.

    Attributes:
        name: in ``attention.kind``, and of its section ``attention.<name>``.
        title: what it is called, with its paper.
        config: its section of the configuration; None: it has no keys. The functions below are given the section.
        build: makes the layer. Its parameters get their first values by `nsa.models.initialisation`.
        keeps_scale: submodules whose weights keep the scale of their input from the start, since no norm follows.
        products: (shape, config) -> the layer's linear maps; the first is the joint projection of the hidden state.
        keys: (config, tokens) -> keys that a query sees, the mean over a document of so many tokens, by term.
        reach: config -> the length up to which a query sees every token in some branch; 0: at all lengths.
        prices: by term, at what speed the plan expects these keys.
        priced_as: the kind whose launches and starts of kernels the plan takes for this one's.
        lists: whether queries choose lists of blocks, whose making the plan counts.
        dense_library: whether its causal attention is ``engine.dense_attention``'s.
        parts: for tensor parallelism.
        exchanges: config -> for context parallelism, what each input of ``attend`` needs, in their order, by name.
        choices: submodules that choose, as integers without gradient, what is attended to; recomputation keeps these.
        expensive: operators of torch.ops.nsa whose results selective recomputation keeps.
        figures: (attend, *inputs, cu_seqlens, offset) -> figures of one layer for TensorBoard; None: there are none.
        export: config -> fields of config.json; None: an export cannot carry the kind yet.
        card: config -> rows of the model card.
    """

    name: str
    title: str
    config: type[Section] | None
    build: Build
    keeps_scale: tuple[str, ...]
    products: Callable[[Shape, Any], list[Product]]
    keys: Callable[[Any, int], dict[str, float]]
    reach: Callable[[Any], int]
    prices: Mapping[str, Price]
    priced_as: str
    lists: bool
    dense_library: bool
    parts: Parts
    exchanges: Callable[[Any], dict[str, Exchange]]
    choices: tuple[str, ...]
    expensive: tuple[str, ...]
    figures: Callable[..., dict[str, float]] | None
    export: Callable[[Any], dict[str, Any]] | None
    card: Callable[[Any], dict[str, str]]


Pair = tuple[Tensor, Tensor]


class Local(nn.Module):
    """The exchange of a layer that has all tokens: nothing is sent."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return inputs
