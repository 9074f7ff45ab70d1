"""One view of the fp32 weights and moments that DeepSpeed keeps, for all ZeRO stages.

A checkpoint holds logical tensors: whole, fp32, under the parameter's name. A rank holds a range of consecutive
elements of the flattened tensor: all of them (ZeRO 0), a part or none (ZeRO 1 and 2), a part (ZeRO 3). `local_shards`
returns these ranges as views of DeepSpeed's buffers, `gather` assembles whole tensors, `scatter` writes them back.
Both copy bits only, without arithmetic. This relies on internals of DeepSpeed 0.19.8, which
tests/training/test_resume.py tests. The model's buffers are saved like weights, without optimizer state. So is a frozen
parameter, of which DeepSpeed has no fp32 value: that lies on the CPU, as the parameter's attribute ``whole``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state
from torch import Tensor

from nsa.parallel.partition import WHOLE, Partition, named_buffers, partition_of

WEIGHT = "weight"


@dataclass
class Shard:
    """This rank's part of one parameter's state.

    Attributes:
        shape: of the parameter in this rank's model. start: index of the shard's first element in it, flattened.
        tensors: flat fp32 views of equal length, ``weight`` and the optimizer's (``exp_avg``, ...); empty if this rank
            holds nothing of the parameter.
        partition: which part of the logical parameter this rank's model has.
        replicated: whether all data-parallel ranks hold the same. everywhere: whether every rank holds all of it.
        speaks: whether this rank writes its elements to a checkpoint. Of the ranks that hold an element, one does.
        trained: whether the optimizer has state for it; otherwise there is ``weight`` alone.
    """

    shape: torch.Size
    start: int
    tensors: dict[str, Tensor]
    partition: Partition = WHOLE
    replicated: bool = False
    everywhere: bool = False
    speaks: bool = True
    trained: bool = True

    @property
    def logical_shape(self) -> torch.Size:
        return self.partition.whole(self.shape)


def create_optimizer_state(engine: DeepSpeedEngine, keys: tuple[str, ...], updates: int = 0) -> None:
    """Create the optimizer's state of every parameter before the first step: zeros, with ``updates`` updates so far."""
    optimizer = engine.optimizer
    base = getattr(optimizer, "optimizer", optimizer)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        parameters = optimizer.fp32_partitioned_groups_flat
    else:
        parameters = [p for group in base.param_groups for p in group["params"]]
    for p in parameters if keys else []:
        # A fused optimizer needs the count on the device of the weights, the others on the CPU.
        where = p.device if base.defaults.get("fused") else torch.device("cpu")
        state = {"step": torch.tensor(float(updates), device=where)}
        base.state[p] = state | {key: torch.zeros_like(p, requires_grad=False) for key in keys}
    if keys and isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def local_shards(engine: DeepSpeedEngine, keys: tuple[str, ...]) -> dict[str, Shard]:
    """name -> shard of every parameter, then of every buffer, of the whole model. ``keys``: of the optimizer state."""
    named = dict(engine.module.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    shards = _local_shards(engine, trained, keys)
    shards = {name: shards.get(name) or _frozen_shard(engine, p) for name, p in named.items()}
    first_replica = engine.mpu.get_data_parallel_rank() == 0
    stages = getattr(engine.module, "everywhere", None)  # with a pipeline: the tensors of all stages
    for name, shard in shards.items():
        shard.partition = partition_of(named[name])
    for name, buffer, part in named_buffers(engine.module):
        shards[name] = Shard(buffer.shape, 0, {WEIGHT: buffer.view(-1)}, part, replicated=True, trained=False)
    for shard in shards.values():
        shard.everywhere = shard.replicated and shard.partition.parts == 1 and stages is None
        shard.speaks = shard.partition.owner and (first_replica or not shard.replicated)
    if stages is None:
        return shards
    return {
        name: shards.get(name) or Shard(shape, 0, {}, part, speaks=False, trained=trained)
        for name, (shape, part, trained) in stages.items()
    }


def _local_shards(engine: DeepSpeedEngine, named: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Shard]:
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        rank = engine.mpu.get_data_parallel_rank()
        return {name: _stage_3_shard(p, keys, rank) for name, p in named.items()}
    if isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        return {name: _stage_1_2_shard(p, keys) for name, p in named.items()}
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        masters = {low: master for lows, highs in groups for low, master in zip(lows, highs, strict=True)}
        state = optimizer.optimizer.state
    else:
        masters, state = {p: p for p in named.values()}, optimizer.state
    shards = {}
    for name, p in named.items():
        tensors = {WEIGHT: masters[p].data} | {key: state[masters[p]][key] for key in keys}
        shards[name] = Shard(p.shape, 0, {key: t.view(-1) for key, t in tensors.items()}, replicated=True)
    return shards


def _stage_1_2_shard(p: Any, keys: tuple[str, ...]) -> Shard:
    mapping = p._hp_mapping
    if mapping is None:
        return Shard(p.shape, 0, {})
    tensors = {WEIGHT: mapping.get_hp_fragment()} | {key: mapping.get_hp_fragment(key) for key in keys}
    return Shard(p.shape, mapping.lp_fragment_address.start, {key: t.data for key, t in tensors.items()})


def _stage_3_shard(p: Any, keys: tuple[str, ...], rank: int) -> Shard:
    tensors = {WEIGHT: safe_get_local_fp32_param(p)}
    tensors |= {key: safe_get_local_optimizer_state(p, key) for key in keys}
    # Partitions have equal size, so the last ones may extend beyond, or lie beyond, the parameter's end.
    size = tensors[WEIGHT].numel()
    start = min(rank * size, p.ds_numel)
    held = min(size, p.ds_numel - start)
    return Shard(p.ds_shape, start, {key: t.data[:held] for key, t in tensors.items()} if held else {})


def _frozen_shard(engine: DeepSpeedEngine, p: Any) -> Shard:
    shape, start, held = p.shape, 0, p.data
    stage_3 = isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3)
    if stage_3:
        shape, size = p.ds_shape, p.ds_tensor.numel()
        start = min(engine.mpu.get_data_parallel_rank() * size, p.ds_numel)
        held = p.ds_tensor.data[: p.ds_numel - start]
    if not hasattr(p, "whole"):
        p.whole = held.detach().float().cpu().view(-1).clone()
    tensors = {WEIGHT: p.whole} if p.whole.numel() else {}
    return Shard(shape, start, tensors, replicated=not stage_3, trained=False)


def gather(shards: dict[str, Shard], keys: tuple[str, ...]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield whole tensors as (key, name, fp32 CPU tensor): each on one rank, with about equal total size per rank.

    Collective: every rank must exhaust the iterator.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    load = [0] * world_size
    for name, shard in shards.items():
        owner = load.index(min(load))
        shape = shard.logical_shape
        load[owner] += shape.numel()
        for key in keys if shard.trained else (WEIGHT,):
            if world_size == 1 or shard.everywhere:
                whole = shard.tensors[key]
            else:
                # At most one rank has a nonzero value, and a sum of the bits as integers keeps them all (even -0.0).
                device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
                bits = torch.zeros(shape, dtype=torch.int32, device=device)
                if shard.tensors and shard.speaks:
                    part = shard.tensors[key]
                    mine = torch.zeros(shard.shape.numel(), dtype=torch.int32, device=device)
                    mine[shard.start : shard.start + part.numel()] = part.view(torch.int32)
                    shard.partition.cut(bits).copy_(mine.view(shard.shape))
                dist.reduce(bits, dst=owner)
                whole = bits.view(torch.float32)
            if owner == rank:
                yield key, name, whole.detach().cpu().view(shape)


@torch.no_grad()
def scatter(engine: DeepSpeedEngine, shards: dict[str, Shard], read: Callable[[str, str], Tensor | None]) -> None:
    """Write the whole tensors ``read(key, name)`` into the shards, and update the model's weights. Where it returns
    None, the values stay."""
    for name, shard in shards.items():
        for key, part in shard.tensors.items():
            whole = read(key, name)
            if whole is None:
                continue
            # `read` has checked this.
            assert whole.shape == shard.logical_shape and whole.dtype == torch.float32, (key, name)
            part.copy_(shard.partition.cut(whole).flatten()[shard.start : shard.start + part.numel()])
    _refresh_model(engine)


def _refresh_model(engine: DeepSpeedEngine) -> None:
    """Copy the fp32 weights into the model's weights, as DeepSpeed does after an optimizer step in each stage."""
    optimizer = engine.optimizer
    for p in engine.module.parameters():
        if hasattr(p, "whole"):
            held = p.ds_tensor.data[: p.whole.numel()] if hasattr(p, "ds_tensor") else p.data.view(-1)
            held.copy_(p.whole)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif isinstance(optimizer, (DeepSpeedZeroOptimizer, BF16_Optimizer)):
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for lows, highs in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                low.data.copy_(high.data)
