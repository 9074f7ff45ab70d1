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


def bytes_sent(config: Config, gpus: int, rank: int = 0) -> dict[str, int]:
    """Bytes that ``rank`` sends within its replica in a step, by the names of `comm/...` in the metrics.

    Raises:
        ValueError: ``gpus`` do not fit the layout.
    """
    model, parallel = config.model, config.parallel
    passes = micro_batches_per_step(config, gpus)
    p, n, stages = parallel.tensor, parallel.context, parallel.pipeline
    holders = p * parallel.expert  # of different experts
    place, stage = rank // holders % n, rank // (holders * n) % stages
    first, last = stage == 0, stage == stages - 1
    kinds = [config.attention.kinds(model.num_layers)[i] for i in stage_layers(model.num_layers, stages, stage)]
    has = passes_of(config)
    width, again = element_bytes(config), has.again != "none"
    tokens = config.training.micro_batch_size * config.data.sequence_length // n  # per rank
    # A context-parallel rank attends in two chunks, one after the other.
    calls = 2 if n > 1 else 1
    shard = tokens // p * model.hidden_size * width  # bytes of its part of the residual stream

    sent: Counter[str] = Counter()
    # An all-gather before and a reduce-scatter after each attention and MLP; in the backward pass the other way round.
    # Recomputation stops before the last reduce-scatter, whose result no gradient needs.
    each = (p - 1) * shard
    ends = 2 * first + 2 * last if has.trained else first  # the head has no loss, the embedding no gradient
    sent["tensor/activations"] += passes * each * (len(kinds) * (4 + 4 * has.backward + 3 * again) + ends)
    if p > 1:
        for kind in kinds:
            parts = kind.parts(model.attention_shape, config.attention.of(kind))
            copies = p if parts.one_kv_head else max(1, p // model.num_kv_heads)
            head = parts.gathered_bytes(model.attention_shape, width)
            for path in parts.gathered:
                times = 1 + (again and path not in kind.choices)  # a choice is kept
                here = calls * -(-tokens // calls // parts.thinned.get(path, 1))
                sent["tensor/queries"] += passes * here * (model.num_heads // p) * head * (copies - 1) * times
            sharers, heads = max(1, p // model.num_kv_heads), max(1, model.num_kv_heads // p)
            for path, numbers in parts.drawn.items() if sharers > 1 else ():
                often = calls if path.startswith("attend.") else 1
                num_bytes = 4 * numbers(tokens // often, heads)
                sent["tensor/noise"] += passes * often * _all_reduce(num_bytes, sharers)
    if p > 1:
        # A pipeline sums gradients once per step; without one they are summed after each micro batch.
        sent["tensor/gradients"] += (passes if stages == 1 else 1) * sum(
            _all_reduce(4 * elements, ranks) for elements, ranks in replicated_parameters(config, kinds, last)
        )
        if last and has.trained:
            sent["tensor/loss"] += passes * _losses(config, tokens, p)
    routed = [model.has_experts(i) for i in stage_layers(model.num_layers, stages, stage)].count(True)
    if model.moe is not None and holders > 1:
        rows = tokens // p * model.moe.top_k
        away = rows - even(rows, holders)[rank % holders]
        # To the experts and back, forward and backward; recomputation sends both ways once more.
        ways = 2 + 2 * has.backward + 2 * again
        sent["experts/tokens"] += passes * routed * ways * away * model.hidden_size * width
    if parallel.expert > 1:  # all but the routed experts, in fp32; average over the stages
        counts = count_parameters(model, config.attention)
        alike = (counts["total"] - counts["routed"]) // (p * stages) if has.trained else counts["apart"] // stages
        sent["expert/gradients"] += (passes if stages == 1 else 1) * _all_reduce(4 * alike, parallel.expert)
    if n > 1:
        for name, num_bytes in _context(config, kinds, Chunks.of_local(tokens, _axis(place, n)), has).items():
            sent[f"context/{name}"] += passes * num_bytes
    if stages > 1:
        sent["pipeline/activations"] += passes * shard * (not last)
        sent["pipeline/gradients"] += passes * shard * (not first) * has.backward
        if (
            has.trained and model.tie_embeddings and (first or last)
        ):  # gradients summed over both stages: an all-reduce of two, fp32
            sent["pipeline/gradients"] += model.vocab_size // p * model.hidden_size * 4
    return {name: num_bytes for name, num_bytes in sorted(sent.items()) if num_bytes}


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
