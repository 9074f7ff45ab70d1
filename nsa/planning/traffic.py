"""Bytes that a rank sends in a step, by formulas: those that nsa/parallel counts, and DeepSpeed's.

Tests compare `bytes_sent` with a dry run, number by number, and the dry run with real ranks.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from nsa.config import Config
from nsa.layers.kind import Blocks, Gather, Halo, Kind
from nsa.models import count_parameters
from nsa.models.moe import even
from nsa.models.sizes import parameters_of_attention
from nsa.ops.cross_entropy import chunk_rows
from nsa.ops.geometry import num_compressed
from nsa.parallel.chunks import Chunks, halo_plan
from nsa.parallel.config import stage_layers
from nsa.parallel.grid import Axis, data_parallel_size
from nsa.training.deepspeed_config import micro_batches_per_step
from nsa.training.freezing import attached


@dataclass(frozen=True)
class Passes:
    """Which passes a micro batch has.

    Attributes:
        trained: whether all weights are; else only what is trained apart is (`nsa.training.freezing`).
        backward: whether gradients go back through the whole model. Else they stay within what is trained apart.
        again: what the backward pass recomputes, as in engine.activation_checkpointing.
    """

    trained: bool
    backward: bool
    again: str


def passes_of(config: Config) -> Passes:
    """Of the configuration. Where only a part is trained, nothing is recomputed."""
    trained = config.train == "all"
    again = config.engine.activation_checkpointing if trained else "none"
    return Passes(trained, trained or attached(config), again)


def element_bytes(config: Config) -> int:
    """Bytes per element of activations, and of the weights that the passes use."""
    return 2 if config.engine.precision == "bf16" else 4


@dataclass(frozen=True)
class Rank:
    """A rank, and what it has of a micro batch.

    Attributes:
        batches: micro batches in a step.
        has: which passes each of them has.
        number: of the rank within its replica.
        first, last: whether its pipeline stage is the first, the last. All are both without a pipeline.
        kinds: of attention, of the layers of its stage. routed: how many of these layers have experts.
        tokens: of a micro batch, on this context rank.
        shard: bytes of its part of the residual stream: of these tokens / tensor ranks.
    """

    batches: int
    has: Passes
    number: int
    first: bool
    last: bool
    kinds: Sequence[Kind]
    routed: int
    tokens: int
    shard: int


def _rank(config: Config, gpus: int, number: int) -> Rank:
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline
    stage = number // (parallel.tensor * parallel.expert * parallel.context) % stages
    layers = stage_layers(model.num_layers, stages, stage)
    tokens = config.training.micro_batch_size * config.data.sequence_length // parallel.context
    return Rank(
        batches=micro_batches_per_step(config, gpus),
        has=passes_of(config),
        number=number,
        first=stage == 0,
        last=stage == stages - 1,
        kinds=[config.attention.kinds(model.num_layers)[i] for i in layers],
        routed=sum(model.has_experts(i) for i in layers),
        tokens=tokens,
        shard=tokens // parallel.tensor * model.hidden_size * element_bytes(config),
    )


def bytes_sent(config: Config, gpus: int, rank: int = 0) -> dict[str, int]:
    """Bytes that ``rank`` sends within its replica in a step, by the names of `comm/...` in the metrics.

    Raises:
        ValueError: ``gpus`` do not fit the layout.
    """
    at, parallel = _rank(config, gpus, rank), config.parallel
    sent: Counter[str] = Counter()
    if parallel.tensor > 1:
        sent.update(_tensor(config, at))
    if config.model.moe is not None and parallel.tensor * parallel.expert > 1:
        sent.update(_experts(config, at))
    if parallel.context > 1:
        chunks = Chunks.of_local(
            at.tokens, _axis(rank // (parallel.tensor * parallel.expert) % parallel.context, parallel.context)
        )
        sent.update(
            {f"context/{name}": at.batches * size for name, size in _context(config, at.kinds, chunks, at.has).items()}
        )
    if parallel.pipeline > 1:
        sent.update(_pipeline(config, at))
    return {name: num_bytes for name, num_bytes in sorted(sent.items()) if num_bytes}


def _sums(config: Config, at: Rank) -> int:
    """How often gradients are summed in a step: a pipeline sums them once, else each micro batch does."""
    return at.batches if config.parallel.pipeline == 1 else 1


def _tensor(config: Config, at: Rank) -> Counter[str]:
    """Between tensor-parallel ranks."""
    p = config.parallel.tensor
    sent: Counter[str] = Counter()
    # Forward, a layer has an all-gather before and a reduce-scatter after each of attention and MLP: 4. The backward
    # pass has them the other way round: 4. Recomputation has all but the last, whose result no gradient needs: 3.
    of_a_layer = 4 + 4 * at.has.backward + 3 * (at.has.again != "none")
    # Forward and backward, the first stage scatters after the embedding and the last gathers before the head. If only
    # a part is trained, there is no loss, and no gradient of the embedding.
    of_the_ends = 2 * at.first + 2 * at.last if at.has.trained else at.first
    collectives = len(at.kinds) * of_a_layer + of_the_ends
    sent["tensor/activations"] = at.batches * (p - 1) * at.shard * collectives
    for kind in at.kinds:
        sent.update(_of_heads(config, at, kind))
    replicated = replicated_parameters(config, at.kinds, at.last)
    sent["tensor/gradients"] = _sums(config, at) * sum(
        _all_reduce(4 * elements, ranks) for elements, ranks in replicated
    )
    if at.last and at.has.trained:
        sent["tensor/loss"] = at.batches * _losses(config, at.tokens, p)
    return sent


def _of_heads(config: Config, at: Rank, kind: Kind) -> Counter[str]:
    """Of a layer's attention: ranks that share a KV head gather its queries, and draw its noise together."""
    model, p = config.model, config.parallel.tensor
    sent: Counter[str] = Counter()
    calls = (
        2 if config.parallel.context > 1 else 1
    )  # a context-parallel rank attends in two chunks, one after the other
    parts = kind.parts(model.attention_shape, config.attention.of(kind))
    copies = p if parts.one_kv_head else max(1, p // model.num_kv_heads)
    head = parts.gathered_bytes(model.attention_shape, element_bytes(config))
    for path in parts.gathered:
        times = 1 + (at.has.again != "none" and path not in kind.choices)  # a choice is kept
        here = calls * -(-at.tokens // calls // parts.thinned.get(path, 1))
        sent["tensor/queries"] += at.batches * here * (model.num_heads // p) * head * (copies - 1) * times
    sharers, heads = max(1, p // model.num_kv_heads), max(1, model.num_kv_heads // p)
    for path, numbers in parts.drawn.items() if sharers > 1 else ():
        often = calls if path.startswith("attend.") else 1
        sent["tensor/noise"] += at.batches * often * _all_reduce(4 * numbers(at.tokens // often, heads), sharers)
    return sent


def _experts(config: Config, at: Rank) -> Counter[str]:
    """Tokens to the ranks that hold their experts and back, and the gradients of what is no routed expert."""
    model, parallel = config.model, config.parallel
    assert model.moe is not None
    holders = parallel.tensor * parallel.expert  # of different experts
    rows = at.tokens // parallel.tensor * model.moe.top_k
    away = rows - even(rows, holders)[at.number % holders]
    ways = 2 + 2 * at.has.backward + 2 * (at.has.again != "none")  # there and back, in each pass
    sent = Counter({"experts/tokens": at.batches * at.routed * ways * away * model.hidden_size * element_bytes(config)})
    if parallel.expert > 1:  # in fp32; the average over the stages
        counts, stages = count_parameters(model, config.attention), parallel.pipeline
        alike = (counts["total"] - counts["routed"]) // (parallel.tensor * stages)
        alike = alike if at.has.trained else counts["apart"] // stages
        sent["expert/gradients"] = _sums(config, at) * _all_reduce(4 * alike, parallel.expert)
    return sent


def _pipeline(config: Config, at: Rank) -> Counter[str]:
    """Activations to the next stage and their gradients to the one before."""
    model = config.model
    sent = Counter({"pipeline/activations": at.batches * at.shard * (not at.last)})
    sent["pipeline/gradients"] = at.batches * at.shard * (not at.first) * at.has.backward
    if at.has.trained and model.tie_embeddings and (at.first or at.last):  # an all-reduce of two, in fp32
        sent["pipeline/gradients"] += model.vocab_size // config.parallel.tensor * model.hidden_size * 4
    return sent


def parameters_of_rank(config: Config) -> float:
    """Number of parameters that a rank holds, on average over the pipeline stages."""
    counts, parallel = count_parameters(config.model, config.attention), config.parallel
    return (counts["total"] - counts["routed"] * (1 - 1 / parallel.expert)) / (parallel.tensor * parallel.pipeline)


def trained_of_rank(config: Config) -> float:
    """Those of them that are trained. What is trained apart is replicated on tensor-parallel ranks."""
    if config.train == "all":
        return parameters_of_rank(config)
    return count_parameters(config.model, config.attention)["apart"] / config.parallel.pipeline


def data_bytes(config: Config, gpus: int) -> float:
    """Bytes that DeepSpeed sends in a step between ranks with the same weights: fp32 gradients, and ZeRO's weights.

    Collectives are counted as rings.
    """
    replicas = data_parallel_size(config.parallel, gpus) * config.parallel.context // config.parallel.expert
    stage, again = config.engine.zero_stage, passes_of(config).again != "none"
    passes = micro_batches_per_step(config, gpus) if config.parallel.pipeline == 1 else 1
    # Stages 2 and 3 reduce after every micro batch; stage 3 gathers weights in every pass over a layer.
    reduced = {0: 2, 1: 2, 2: passes, 3: passes}[stage] * 4
    gathered = {0: 0, 1: 1, 2: 1, 3: passes * (2 + again)}[stage] * element_bytes(config)
    trained, whole = trained_of_rank(config), parameters_of_rank(config)
    return (replicas - 1) / replicas * (trained * reduced + (whole if stage == 3 else trained) * gathered)


@cache  # axes compare by identity: the caches of `nsa.parallel.chunks` need the same object
def _axis(rank: int, size: int) -> Axis:
    return Axis("context", rank, size, tuple(range(size)), None)


def _all_reduce(num_bytes: int, ranks: int) -> int:
    return 2 * num_bytes * (ranks - 1) // ranks


def replicated_parameters(config: Config, kinds: Sequence[Kind], last: bool) -> list[tuple[int, int]]:
    """(elements, ranks) of each parameter of the layers ``kinds`` that is replicated on tensor-parallel ranks.

    They sum its gradient, if it is trained. These are norms, whole modules (NSA's compression) and shared KV
    projections.
    """
    model, p = config.model, config.parallel.tensor
    copies = max(1, p // model.num_kv_heads)
    if p == 1:
        return []
    trained = config.train == "all"
    replicated = [(model.hidden_size, p)] * (2 * len(kinds) + last) * trained
    for kind in kinds:
        parts = kind.parts(model.attention_shape, config.attention.of(kind))
        parameters = parameters_of_attention(kind, model.attention_shape, config.attention.of(kind))
        for name, elements in parameters.items():
            module = name.rpartition(".")[0]
            if not trained and not name.startswith(tuple(f"{path}." for path in kind.apart)):
                continue
            if module in parts.kv_heads and copies > 1:
                replicated.append((elements // model.num_kv_heads, copies))
            if f"{module}.".startswith(tuple(f"{whole}." for whole in parts.whole)):
                replicated.append((elements, p))
    return replicated


def _losses(config: Config, tokens: int, p: int) -> int:
    """Bytes of the loss: three fp32 numbers per token (see `nsa.parallel.vocabulary.VocabularyHead`), by chunks."""
    size = chunk_rows(tokens, config.model.vocab_size // p)
    chunks = [min(size, tokens - start) for start in range(0, tokens, size)]
    return sum(_all_reduce(4 * rows, p) + _all_reduce(8 * rows, p) for rows in chunks)


def _context(config: Config, kinds: Sequence[Kind], chunks: Chunks, has: Passes) -> dict[str, int]:
    """Bytes of one micro batch, forward and backward. Gradients are sent back the way that the keys came.

    Without a backward pass those of what is trained apart are: index keys, or blocks and perhaps their tokens.
    """
    shape = config.model.attention_shape.on_rank(config.parallel.tensor)
    n, width = chunks.axis.size, element_bytes(config)
    again = has.again != "none"

    def rounds(back: bool) -> int:
        """Gathered, scattered, and gathered again."""
        return (n - 1) * (1 + (has.backward or back) + again)

    sent: Counter[str] = Counter()
    for kind in kinds:
        for exchange in kind.exchanges(shape, config.attention.of(kind)).values():
            if isinstance(exchange, Gather):
                sent[exchange.name] += 2 * chunks.size * exchange.width * width * rounds(exchange.apart)
            elif isinstance(exchange, Halo):
                rows = _halo(chunks, min(exchange.tokens, chunks.tokens - 1), has.backward, again)
                sent[exchange.name] += rows * exchange.width * width
            elif isinstance(exchange, Blocks):
                behind, module = exchange.length - 1, f"{exchange.module}."
                inside = any(module.startswith(f"{path}.") for path in kind.apart)
                learns = inside or any(path.startswith(module) for path in kind.apart)
                rows = _halo(chunks, behind + exchange.before, has.backward or inside, again)
                sent[exchange.halo] += rows * exchange.raw * width
                blocks = num_compressed(2 * (behind + chunks.size), exchange.length, exchange.stride)
                sent[exchange.name] += blocks * exchange.width * width * rounds(learns)
    return sent


def _halo(chunks: Chunks, width: int, back: bool, again: bool) -> int:
    """Rows that leave the rank: tokens of others' halos, and if ``back`` gradients of the tokens of its own halos."""
    if not width:
        return 0
    plan, here = halo_plan(chunks, width, torch.device("cpu")), chunks.axis.rank
    sent, received = (sum(counts) - counts[here] for counts in (plan.send, plan.receive))
    return sent * (1 + again) + received * back
