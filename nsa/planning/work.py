"""Counts what a rank computes in a step: FLOPs of matrix products and attention, bytes read and written.

It does not depend on the speed of a device: `nsa.planning.speed` turns the counts into seconds. Bytes are those of
fused operators, each of which reads its inputs once and writes its results once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from nsa.config import Config
from nsa.layers.kind import OF_LOSS, Kind, Price
from nsa.models.sizes import parameters_of_attention
from nsa.ops.cross_entropy import chunk_rows
from nsa.parallel.config import stage_layers
from nsa.parallel.grid import data_parallel_size
from nsa.planning.memory import straight_gradients
from nsa.planning.traffic import Passes, element_bytes, passes_of, replicated_parameters, trained_of_rank
from nsa.training.cuda_graphs import graphs_serve
from nsa.training.deepspeed_config import micro_batches_per_step
from nsa.training.freezing import has_loss


@dataclass(frozen=True)
class Work:
    """The work of one rank of a stage in a step. Recomputation is counted again.

    Attributes:
        flops: of matrix products. thin: the same, but each product divided by its width a b / (a + b).
        attention: FLOPs of attention, as the MFU counts them, by price (`nsa.layers.kind.Price`).
        head_width: mean of the head dimensions of keys and values.
        lists: layers that select blocks x KV heads x tokens.
        logits: tokens x vocabulary. elementwise, optimizer: bytes.
        gradients: parameter tensors x micro batches, if Python passes each gradient to DeepSpeed.
        layers: passes of a layer, by the kind that it is priced as; a forward pass alone counts a third.
        launched: whether Python launches the kernels of these passes.
        sums: number of gradients that tensor-parallel ranks sum.
    """

    flops: float
    thin: float
    attention: dict[str, float]
    head_width: float
    lists: float
    logits: float
    elementwise: float
    optimizer: float
    gradients: float
    layers: dict[str, float]
    launched: bool
    sums: float


def work_of(config: Config, gpus: int, stage: int = 0, document: float | None = None) -> Work:
    """The work of a rank of the pipeline's ``stage``.

    Args:
        document: tokens of the document that a token lies in, mean over tokens; None: one document fills a sample.

    Raises:
        ValueError: ``gpus`` do not fit the layout.
    """
    model, parallel, has = config.model, config.parallel, passes_of(config)
    mode = has.again
    tp, passes = parallel.tensor, micro_batches_per_step(config, gpus)
    numbers = stage_layers(model.num_layers, parallel.pipeline, stage)
    kinds = config.attention.kinds(model.num_layers)[numbers.start : numbers.stop]
    tokens = config.training.micro_batch_size * config.data.sequence_length / parallel.context
    last = stage == parallel.pipeline - 1

    flops = thin = elementwise = 0.0
    for number, kind in zip(numbers, kinds, strict=True):
        experts = model.has_experts(number)
        products = list(_products(config, kind, experts))
        # What no gradient needs is not recomputed: here the last product of an MLP.
        again = [] if mode == "none" else products[: None if experts else -1]
        times = [_times(product, has) for product in products] + [1] * len(again)
        for often, (rows, a, b, _) in zip(times, [*products, *again], strict=True):
            flops += often * tokens * rows * 2 * a * b
            thin += often * tokens * rows * 2 * (a + b)
        forward, backward = _elements(config, kind, experts)
        bytes_moved = forward * (1 + (mode != "none")) + backward * has.backward
        elementwise += tokens * element_bytes(config) * bytes_moved
    words = model.vocab_size // tp
    if last and has.trained:
        whole = chunk_rows(int(tokens), words) >= tokens  # else the backward pass recomputes the logits
        flops += (6 if whole else 8) * tokens * model.hidden_size * words
        thin += (6 if whole else 8) * tokens * (model.hidden_size + words)

    seen = round(min(document or config.data.sequence_length, config.data.sequence_length))
    widths = [sum(kind.widths(model.attention_shape, config.attention.of(kind))) for kind in kinds]
    # Forward and backward cost three times the forward pass; recomputation adds one more.
    attended: float = 4 if mode == "full" else 3 if has.backward else 1
    attention: dict[str, float] = dict.fromkeys(get_args(Price), 0.0)
    layers: dict[str, float] = {}
    tensors = float(last and has.trained)
    whole_pass = (1.0 if mode == "none" else 4 / 3) if has.backward else 1 / 3
    for kind, width in zip(kinds, widths, strict=True):
        teaches = has_loss(kind, config)
        # Where the attention itself learns nothing, its loss computes the scores once more.
        each = 2 * tokens * (model.num_heads / tp) * (attended + 0.5 * (teaches and not has.trained))
        for term, keys in kind.keys(config.attention.of(kind), seen).items():
            if term != OF_LOSS or teaches:
                attention[kind.prices[term]] += each * width * passes * keys
        other = kind.other_flops(config.attention.of(kind), seen)
        attention["causal"] += 3 * tokens * passes * other
        layers[kind.priced_as] = layers.get(kind.priced_as, 0.0) + passes * whole_pass
        names = parameters_of_attention(kind, model.attention_shape, config.attention.of(kind))
        apart = tuple(f"{path}." for path in kind.apart)
        tensors += len(names) + 5 if has.trained else sum(name.startswith(apart) for name in names)
    groups = max(1, model.num_kv_heads // tp)
    recorded = graphs_serve(config, torch.device("cuda"))
    straight = straight_gradients(config)
    summed = len(replicated_parameters(config, kinds, last)) * (1 if parallel.pipeline > 1 else passes)
    return Work(
        flops=flops * passes,
        thin=thin * passes,
        attention=attention,
        head_width=sum(widths) / len(widths) / 2,
        lists=passes * tokens * groups * sum(kind.lists for kind in kinds) * (4 / 3 if mode == "full" else 1),
        logits=passes * tokens * words if last and has.trained else 0.0,
        elementwise=elementwise * passes,
        optimizer=_optimizer_bytes(config, gpus, passes),
        gradients=0.0 if straight else tensors * passes,
        layers=layers,
        launched=not recorded,
        sums=0.0 if straight else summed,
    )


def _times(product: tuple[float, int, int, int], has: Passes) -> int:
    """How often a product of this size is computed, without recomputation."""
    if has.trained:
        return 3
    return max(2, product[3]) if has.backward else product[3]  # the gradient of its input, or more


def _products(config: Config, kind: Kind, experts: bool) -> Iterator[tuple[float, int, int, int]]:
    """(rows per token of the rank, input size, output size, `nsa.layers.kind.Product.alone`) of a layer's forward
    products; the MLP's last is last."""
    model, tp = config.model, config.parallel.tensor
    hidden = model.hidden_size
    for product in kind.products(model.attention_shape.on_rank(tp), config.attention.of(kind)):
        yield product.rows, product.inner, product.outer, product.alone
    if experts:
        assert model.moe is not None
        yield 1 / tp, hidden, model.moe.num_experts, 1
        for _ in range(3):
            yield model.moe.top_k / tp, hidden, model.moe.expert_size, 1
        width = model.moe.num_shared * model.moe.expert_size // tp
    else:
        width = model.intermediate_size // tp
    for _ in range(3 if width else 0):
        yield 1, hidden, width, 1


def _elements(config: Config, kind: Kind, experts: bool) -> tuple[float, float]:
    """Elements per token that a layer reads and writes outside of products and attention: (forward, backward)."""
    model, tp = config.model, config.parallel.tensor
    # Norms and residual sums. Forward: two for the first norm, four for a sum with the second norm, three for the last.
    forward, backward = 9 * model.hidden_size / tp, 8 * model.hidden_size / tp
    # Heads are copied out of the joint projection.
    joint = kind.products(model.attention_shape.on_rank(tp), config.attention.of(kind))[0].outer
    forward, backward = forward + 2 * joint, backward + 2 * joint
    width = model.intermediate_size
    if experts:
        assert model.moe is not None
        # Rows are permuted to their experts and back; silu and product are two operators there.
        rows = model.moe.top_k / tp
        forward += rows * (4 * model.hidden_size + 5 * model.moe.expert_size)
        backward += rows * (6 * model.hidden_size + 8 * model.moe.expert_size)
        width = model.moe.num_shared * model.moe.expert_size
    return forward + 3 * width / tp, backward + 5 * width / tp


def _optimizer_bytes(config: Config, gpus: int, passes: int) -> float:
    """Bytes that gradients and the update read and write.

    Gradients of every micro batch are copied and accumulated in fp32. Once per step they are reduced, and the norm,
    clipping and update work on the rank's ZeRO shard.
    """
    trained, width, engine = trained_of_rank(config), element_bytes(config), config.engine
    replicas = data_parallel_size(config.parallel, gpus) * config.parallel.context // config.parallel.expert
    mine = trained / (replicas if engine.zero_stage else 1)
    updated = 0 if engine.offload_optimizer else 7 * 4 + 4 + width  # AdamW in fp32, and the copy in the model's dtype
    return trained * (passes * (3 * width + 8) + (12 if replicas > 1 else 0)) + mine * (12 + updated)
