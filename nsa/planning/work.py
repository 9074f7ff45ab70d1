"""What a rank computes in a step, counted: FLOPs of products by their width, bytes of what goes through memory.

Nothing here knows how fast a device is: `nsa.planning.speed` puts a price on it. Bytes are those of fused operators:
each reads its inputs once and writes its results once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch

from nsa.config import Config
from nsa.layers.kind import Kind, Price
from nsa.models.sizes import parameters_of_attention
from nsa.ops.cross_entropy import chunk_rows
from nsa.parallel.grid import data_parallel_size
from nsa.parallel.pipeline import stage_layers
from nsa.planning.memory import straight_gradients
from nsa.planning.traffic import element_bytes, held_alike, parameters_of_rank
from nsa.training.cuda_graphs import graphs_serve
from nsa.training.deepspeed_config import micro_batches_per_step


@dataclass(frozen=True)
class Work:
    """Of one rank of a stage in a step. What runs again in the backward pass is counted again.

    Attributes:
        flops: of matrix products. thin: the same, each divided by its width a b / (a + b).
        attention: FLOPs of attention, as the MFU counts them, by price (`nsa.layers.kind.Price`).
        head_width: mean of the widths of keys and values. lists: layers that choose blocks x KV heads x tokens.
        logits: tokens x words. elementwise, optimizer: bytes. gradients: parameter tensors x micro batches, where
            Python hands each over.
        layers: passes of a layer, by the kind that it is priced as; a forward pass alone counts a third.
        launched: whether Python launches them.
        sums: gradients that tensor-parallel ranks sum.
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
    """Of a rank of the pipeline's ``stage``.

    Args:
        document: tokens of the documents that samples are packed of, a mean over tokens; None: a sample is one.

    Raises:
        ValueError: the ranks cannot be dealt out.
    """
    model, parallel, mode = config.model, config.parallel, config.engine.activation_checkpointing
    tp, passes = parallel.tensor, micro_batches_per_step(config, gpus)
    numbers = stage_layers(model.num_layers, parallel.pipeline, stage)
    kinds = config.attention.kinds(model.num_layers)[numbers.start : numbers.stop]
    tokens = config.training.micro_batch_size * config.data.sequence_length / parallel.context
    last = stage == parallel.pipeline - 1

    flops = thin = elementwise = 0.0
    for number, kind in zip(numbers, kinds, strict=True):
        experts = model.has_experts(number)
        products = list(_products(config, kind, experts))
        # What no gradient needs does not run again: here the product that ends an MLP.
        again = [] if mode == "none" else products[: None if experts else -1]
        for rows, a, b in [*products * 3, *again]:
            flops += tokens * rows * 2 * a * b
            thin += tokens * rows * 2 * (a + b)
        forward, backward = _elements(config, kind, experts)
        elementwise += tokens * element_bytes(config) * (forward * (1 + (mode != "none")) + backward)
    words = model.vocab_size // tp
    if last:
        whole = chunk_rows(int(tokens), words) >= tokens  # else the backward pass computes the logits again
        flops += (6 if whole else 8) * tokens * model.hidden_size * words
        thin += (6 if whole else 8) * tokens * (model.hidden_size + words)

    seen = round(min(document or config.data.sequence_length, config.data.sequence_length))
    key, value = model.head_dim, model.v_head_dim or model.head_dim
    # Forward and backward is three times the forward pass, what runs again once more.
    each = 2 * tokens * (model.num_heads / tp) * (key + value) * (4 if mode == "full" else 3)
    attention: dict[str, float] = dict.fromkeys(get_args(Price), 0.0)
    layers: dict[str, float] = {}
    tensors = float(last)
    for kind in kinds:
        for term, keys in kind.keys(config.attention.of(kind), seen).items():
            attention[kind.prices[term]] += each * passes * keys
        layers[kind.priced_as] = layers.get(kind.priced_as, 0.0) + passes * (1.0 if mode == "none" else 4 / 3)
        tensors += len(parameters_of_attention(kind, model.attention_shape, config.attention.of(kind))) + 5
    groups = max(1, model.num_kv_heads // tp)
    recorded = graphs_serve(config, torch.device("cuda"))
    straight = straight_gradients(config)
    summed = len(held_alike(config, kinds, last)) * (1 if parallel.pipeline > 1 else passes)
    return Work(
        flops=flops * passes,
        thin=thin * passes,
        attention=attention,
        head_width=(key + value) / 2,
        lists=passes * tokens * groups * sum(kind.lists for kind in kinds) * (4 / 3 if mode == "full" else 1),
        logits=passes * tokens * words if last else 0.0,
        elementwise=elementwise * passes,
        optimizer=_optimizer_bytes(config, gpus, passes),
        gradients=0.0 if straight else tensors * passes,
        layers=layers,
        launched=not recorded,
        sums=0.0 if straight else summed,
    )


def _products(config: Config, kind: Kind, experts: bool) -> Iterator[tuple[float, int, int]]:
    """(rows per token of the rank, width in, width out) of a layer's products, forward; the MLP's last comes last."""
    model, tp = config.model, config.parallel.tensor
    hidden = model.hidden_size
    for product in kind.products(model.attention_shape.on_rank(tp), config.attention.of(kind)):
        yield product.rows, product.inner, product.outer
    if experts:
        assert model.moe is not None
        yield 1 / tp, hidden, model.moe.num_experts
        for _ in range(3):
            yield model.moe.top_k / tp, hidden, model.moe.expert_size
        width = model.moe.num_shared * model.moe.expert_size // tp
    else:
        width = model.intermediate_size // tp
    for _ in range(3 if width else 0):
        yield 1, hidden, width


def _elements(config: Config, kind: Kind, experts: bool) -> tuple[float, float]:
    """Elements that a layer reads and writes per token between its products, forward and backward."""
    model, tp = config.model, config.parallel.tensor
    # Norms and sums: of the first norm x and its result; of the sum and the second norm four; of the last sum three.
    forward, backward = 9 * model.hidden_size / tp, 8 * model.hidden_size / tp
    # Heads are cut out of what was projected.
    joint = kind.products(model.attention_shape.on_rank(tp), config.attention.of(kind))[0].outer
    forward, backward = forward + 2 * joint, backward + 2 * joint
    width = model.intermediate_size
    if experts:
        assert model.moe is not None
        # Rows go to their experts and come back; silu and product are two operators there.
        rows = model.moe.top_k / tp
        forward += rows * (4 * model.hidden_size + 5 * model.moe.expert_size)
        backward += rows * (6 * model.hidden_size + 8 * model.moe.expert_size)
        width = model.moe.num_shared * model.moe.expert_size
    return forward + 3 * width / tp, backward + 5 * width / tp


def _optimizer_bytes(config: Config, gpus: int, passes: int) -> float:
    """Gradients of every micro batch are copied and added up in fp32; once a step they are reduced, and what ZeRO
    leaves to the rank is measured, clipped and updated."""
    parameters, width, engine = parameters_of_rank(config), element_bytes(config), config.engine
    replicas = data_parallel_size(config.parallel, gpus) * config.parallel.context // config.parallel.expert
    mine = parameters / (replicas if engine.zero_stage else 1)
    updated = 0 if engine.offload_optimizer else 7 * 4 + 4 + width  # AdamW on fp32, and the copy to compute with
    return parameters * (passes * (3 * width + 8) + (12 if replicas > 1 else 0)) + mine * (12 + updated)
