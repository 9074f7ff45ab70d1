"""The record of a kind of attention: everything that the rest of the program needs to know about it.

Each kind has a folder with its layer, its section of the configuration and its record. `nsa.layers.kinds` lists the
records. Models, parallelism, planning, training and export read the records and know no kind by name.

A layer has ``forward(x, rotary, cu_seqlens, cache)`` and ``new_cache()``, and two modules without parameters. It passes
the projected inputs of ``attend`` to ``exchange`` (`Local`), and what that returns to
``attend(*inputs, cu_seqlens, offset)``, where offset is the position of the first query. A layer whose query heads
differ has ``first_head``, the number of its first one: tensor parallelism sets it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nsa.layers.figure import Figure
from nsa.layers.projections.config import MlaConfig
from nsa.schema import Section

OF_LOSS = "taught"
Price = Literal["causal", "compressed", "near"]  # speeds that `nsa.planning` fits to measurements


@dataclass(frozen=True)
class Shape:
    """The shape of an attention layer.

    Attributes:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys. v_head_dim: Dv of values.
        rope_theta: base of the rotary frequencies.
        qkv_bias, qk_norm: options of grouped queries (`nsa.layers.projections.gqa`). norm_eps: epsilon of the
            projection's norms.
        mla: the widths of a latent (`nsa.layers.projections.mla`); None: queries are grouped.
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    rope_theta: float
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    mla: MlaConfig | None = None

    @property
    def options(self) -> tuple[str, ...]:
        """The options that it asks for, which not every kind has. ``v_head_dim``: values have a width of their own."""
        found = [name for name in ("qkv_bias", "qk_norm", "mla") if getattr(self, name)]
        return tuple(found + ["v_head_dim"] * (self.v_head_dim != self.head_dim))

    def on_rank(self, ranks: int) -> "Shape":
        """The shape of the part that each of ``ranks`` tensor-parallel ranks holds."""
        heads, kv_heads = self.num_heads // ranks, max(1, self.num_kv_heads // ranks)
        return replace(self, num_heads=heads, num_kv_heads=kv_heads)


@dataclass(frozen=True)
class Backends:
    """Implementations of the operators.

    ``operators``: of all operators (auto, triton, torch, naive). ``dense``: of dense attention if the former is auto
    (`nsa.ops.dense_attention`).
    """

    operators: str = "auto"
    dense: str = "auto"


class Build(Protocol):
    """Builds the layer of a kind. ``before``: the model's earlier layers of this kind, in order."""

    def __call__(
        self, shape: Shape, config: Any, backends: Backends, before: Sequence[nn.Module] = ...
    ) -> nn.Module: ...


@dataclass(frozen=True)
class Product:
    """A linear map of the layer: ``rows`` per token, from ``inner`` to ``outer`` features.

    ``alone``: how many matrix products it takes where only what is trained apart is trained (`Kind.apart`). 1: the
    forward pass. 2: also the gradient of its weights. 3: and that of its input.
    """

    rows: float
    inner: int
    outer: int
    alone: int = 1


@dataclass(frozen=True)
class Parts:
    """How a layer is sharded over tensor-parallel ranks, by the paths of its submodules.

    Attributes:
        columns: linear maps whose outputs belong to query heads. kv_heads: those whose outputs belong to KV heads.
        rows: linear maps whose inputs belong to query heads; the ranks sum their outputs.
        heads: parameters with one row for each query head, such as a sink.
        whole: modules that are replicated.
        one_kv_head: whether all query heads share one KV head, whatever the shape says.
        gathered: modules that need all query heads of a KV head -> the dimension of the heads in each positional input;
            None: the input is the same on all ranks.
        gathered_bytes: (shape, bytes per activation) -> bytes of one query head of one token in the inputs of one of
            them.
        thinned: of these modules, those that get one of n neighbouring tokens -> n. The others get all tokens.
        drawn: modules that draw random numbers of four bytes, kept like `Kind.choices`: ranks with the same KV head
            must get the same ones -> (tokens, KV heads of the rank) -> how many numbers.
        averaged: modules whose tensor is a mean over query heads that choose together, for the probe alone -> whether
            all query heads do; else those of a KV head.
    """

    columns: tuple[str, ...]
    kv_heads: tuple[str, ...]
    rows: tuple[str, ...]
    heads: tuple[str, ...]
    whole: tuple[str, ...]
    one_kv_head: bool
    gathered: Mapping[str, tuple[int | None, ...]]
    gathered_bytes: Callable[[Shape, int], int]
    thinned: Mapping[str, int]
    drawn: Mapping[str, Callable[[int, int], int]]
    averaged: Mapping[str, bool]


@dataclass(frozen=True)
class Own:
    """A context-parallel rank needs the input at its own tokens only: a tensor (B, T, ...)."""


@dataclass(frozen=True)
class Same:
    """The input is the same for all tokens, such as a sink of each head."""


@dataclass(frozen=True)
class Gather:
    """It needs the rows of all earlier tokens: a tuple of tensors (B, T, ...), such as keys and values.

    ``name``: of the bytes sent, in the metrics. ``width``: elements per token, in all of the tensors. ``apart``:
    whether submodules that are trained apart compute it.
    """

    name: str
    width: int
    apart: bool = False


@dataclass(frozen=True)
class Halo:
    """It needs the rows of the last ``tokens`` tokens before its own: a tuple of tensors (B, T, G, ...).

    ``width``: as in `Gather`.
    """

    name: str
    tokens: int
    width: int


@dataclass(frozen=True)
class Blocks:
    """It needs all blocks that ``module`` computes, such as keys and values: one of ``length`` tokens every ``stride``.

    ``module`` is called with a tuple of tensors (B, T, G, ...), tables (T, ...) of which a block needs the row of its
    last token, and the document boundaries. It returns the blocks, a tuple of tensors (B, M, G, ...), which are then
    gathered. It needs a halo of length - 1 tokens. ``halo`` and ``name``: of the bytes of either, in the metrics.

    ``before``: how many tokens before a block it reads, too, if the document has them. Then it also gets ``earlier``,
    the tensors at the tokens so many before. ``raw``, ``width``: elements that it reads per token, and of a block.
    """

    name: str
    halo: str
    module: str
    length: int
    stride: int
    before: int
    raw: int
    width: int


@dataclass(frozen=True)
class Borrowed:
    """It is what the exchange of an earlier layer made of a `Gather`, and is not gathered again."""


Exchange = Own | Same | Gather | Halo | Blocks | Borrowed


@dataclass(frozen=True)
class Known:
    """A model of `transformers` with such layers.

    Attributes:
        model_type: its name in config.json.
        unlike: what of the layer it has not, in words; empty: nothing.
        fields: of its config.json, which this kind's section gives.
    """

    model_type: str
    unlike: tuple[str, ...]
    fields: Mapping[str, Any]


class Spent(NamedTuple):
    """What one call of ``attend`` has looked at: fp64 tensors (G,), per KV head, sums over the batch.

    A pair is a query head with a key. attended: pairs. scored: pairs scored only to choose, in units of a whole key.
    reads: elements read from memory; a key is read once for all query heads of its KV head.
    """

    attended: Tensor
    scored: Tensor
    reads: Tensor


@dataclass(frozen=True)
class Guest:
    """How a method that was not trained with the layer (`nsa.baselines`) chooses in it, instead of the layer.

    Attributes:
        attention: (attend, method, *inputs, offset=) -> the output (B, T, H, Dv). ``method(q, k, v, scale)`` is
            attention of the T new tokens, whose keys and values it gets, to what the method chooses. None: the layer
            has no place for a method, and is counted only.
        spent: (attend, *inputs, offset=) -> what the layer's own choice looks at. One KV head for all query heads may
            stand in for those of the model.
        beside: the same of what the layer attends to beside the method's choice; None: nothing.
        cached: whether the layer needs its own cache for it; else it gets none, and sees its new tokens only.
    """

    attention: Callable[..., Tensor] | None
    spent: Callable[..., Spent]
    beside: Callable[..., Spent] | None
    cached: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """A kind of attention. No attribute has a default, so a new kind must state everything.

    Attributes:
        name: in ``attention.kind``, and of its section ``attention.<name>``.
        title: its full name, with its paper.
        config: its section of the configuration, which the functions below get; None: it has no keys.
        build: builds the layer. `nsa.models.initialisation` initialises its parameters.
        keeps_scale: submodules whose initial weights keep the scale of their input, since no norm follows.
        products: (shape, config) -> the layer's linear maps; the first is the joint projection of the hidden state.
        keys: (config, tokens) -> term -> number of keys that a query attends to, mean over a document of ``tokens``.
            The term `OF_LOSS` stands for what only the layer's loss computes.
        widths: (shape, config) -> D and Dv of these keys and values.
        other_flops: (config, tokens) -> FLOPs per token of other scores than the attention's own (an indexer's), in the
            forward pass, mean over a document of ``tokens``; each tensor-parallel rank computes them all.
        reach: config -> the length up to which a query sees every token in some branch; 0: at all lengths.
        prices: term -> the speed that the plan assumes for these keys.
        priced_as: the kind whose launch and start times of kernels the plan assumes.
        lists: whether queries select blocks; the plan then counts the time to build their lists.
        recordable: whether CUDA graphs can record its passes: no operator waits for the device.
        dense_library: whether ``engine.dense_attention`` applies.
        options: those of `Shape.options` that it has.
        parts: (shape, config) -> for tensor parallelism.
        exchanges: (shape, config) -> for context parallelism, what each input of ``attend`` needs: name -> exchange, in
            order.
        choices: submodules that select (as integers without gradient) what is attended to, draw random numbers, or pass
            something from layer to layer; recomputation keeps their results.
        placed: (config, place) -> the record of the layer with this number among the layers of the kind, from 0. Layers
            of one kind can differ in what they have; they share a section. None: all are alike.
        borrows: whether it takes from an earlier layer of its kind. Both must be on one pipeline stage.
        twin: config -> the section with which the second of two layers has this record.
        expensive: operators of torch.ops.nsa whose results selective recomputation keeps.
        loss: the path of its auxiliary loss (`nsa.layers.auxiliary_loss`), and the loss's name in the metrics; None: it
            has none. Each tensor-parallel rank computes it for its heads (or for all, see `Parts.gathered`); it is the
            mean over the ranks.
        apart: submodules that this loss alone trains, such as an indexer. Their gradient is clipped by its own norm.
            ``train: indexer`` trains nothing else.
        taught: whether the layer is for ``train: indexer`` only: with ``train: all`` much of it would not be trained.
        from_dense: (name, shape, config, read) -> the first value of parameter ``name`` of a layer that begins with the
            weights of a dense layer, which ``read(name)`` returns; None: the value of a new run.
        holds_dense: whether its layer has all weights of a dense layer, under the same names, so that a dense layer can
            begin with them.
        free: keys of its section that do not say what its weights mean: they may differ in a run that starts from one.
        problem: (config, tokens) -> what is wrong with these values for samples of ``tokens``, in words; None: nothing.
        figures: (attend, *inputs, cu_seqlens, offset, earlier) -> metrics of one layer for TensorBoard, for the queries
            of this call (`nsa.layers.figure.Figure` adds them up); None: there are none. ``earlier``: a dictionary in
            which a layer may leave something for the later ones of a forward pass.
        guest: how other methods choose in its place, for comparisons; None: they cannot.
        export: keys of its section -> their names in config.json, for all that change what a layer computes; None: the
            kind cannot be exported yet.
        known: (shape, config) -> the model of `transformers` itself that has such layers, among those that
            `nsa.exporting` can write; None: there is none.
        card: config -> rows of the model card.
    """

    name: str
    title: str
    config: type[Section] | None
    build: Build
    keeps_scale: tuple[str, ...]
    products: Callable[[Shape, Any], list[Product]]
    keys: Callable[[Any, int], dict[str, float]]
    widths: Callable[[Shape, Any], tuple[int, int]]
    other_flops: Callable[[Any, int], float]
    reach: Callable[[Any], int]
    prices: Mapping[str, Price]
    priced_as: str
    lists: bool
    recordable: bool
    dense_library: bool
    options: tuple[str, ...]
    parts: Callable[[Shape, Any], Parts]
    exchanges: Callable[[Shape, Any], dict[str, Exchange]]
    choices: tuple[str, ...]
    placed: Callable[[Any, int], "Kind"] | None
    borrows: bool
    twin: Callable[[Any], Any]
    expensive: tuple[str, ...]
    loss: tuple[str, str] | None
    apart: tuple[str, ...]
    taught: bool
    from_dense: Callable[[str, torch.Size, Any, Callable[[str], Tensor]], Tensor | None]
    holds_dense: bool
    free: tuple[str, ...]
    problem: Callable[[Any, int], str | None]
    figures: Callable[..., dict[str, Figure]] | None
    guest: Guest | None
    export: Mapping[str, str] | None
    known: Callable[[Shape, Any], Known | None]
    card: Callable[[Any], dict[str, str]]


Pair = tuple[Tensor, Tensor]


def newest(kv: Pair, tokens: int) -> Pair:
    """Keys and values (B, S, ...) of the last ``tokens``."""
    return kv[0][:, -tokens:], kv[1][:, -tokens:]


def seen_keys(q: Tensor, offset: int) -> Tensor:
    """(T,) fp64: how many tokens each query (B, T, ...) sees, itself included, after ``offset`` others."""
    return torch.arange(offset + 1, offset + q.shape[1] + 1, dtype=torch.float64)


class Local(nn.Module):
    """The exchange of a layer that has all tokens: returns its inputs."""

    def forward(self, *inputs: Any) -> tuple[Any, ...]:
        return inputs
