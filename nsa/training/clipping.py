"""Clipping of gradients by sections of the parameters, inside DeepSpeed's optimizers.

DeepSpeed clips all gradients by one norm. The gradient of an indexer, whose loss is not the model's, would then decide
how far the model's is clipped. So each section (`nsa.training.optimizer.build_optimizer`) is clipped by its own norm,
to the same bound. The norm that DeepSpeed reports remains that of all gradients.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import (
    clip_grad_norm_,
    get_global_norm_of_tensors,
    get_norm_with_moe_layers,
    get_weight_norm,
)
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

EPSILON = 1e-6  # as DeepSpeed adds to a norm


def clip_by_section(engine: DeepSpeedEngine) -> None:
    """Change ``engine`` so that it clips each section by its own norm.

    This relies on internals of DeepSpeed 0.19.8, which tests/training/test_stages.py tests.
    """
    bound = float(engine.gradient_clipping())
    optimizer = engine.optimizer
    sections = [group["section"] for group in getattr(optimizer, "optimizer", optimizer).param_groups]
    if len(set(sections)) == 1 or not bound:
        return
    if isinstance(optimizer, BF16_Optimizer):
        optimizer.get_grads_for_norm = partial(_bf16, optimizer, sections, bound, optimizer.get_grads_for_norm)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _partitioned(optimizer, "_get_norm_groups", [sections[i] for i in _groups_of_stage_3(optimizer)])
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        _partitioned(optimizer, "scaled_global_norm", sections)
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        optimizer.unscale_and_clip_grads = partial(_unfused, optimizer, sections, bound)
    else:
        engine.clip_fp32_gradients = partial(_plain, engine, sections, bound)


def _by_section(sections: list[str], items: Iterable[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for section, item in zip(sections, items, strict=True):
        found.setdefault(section, []).append(item)
    return found


def _scale(gradients: Iterable[Tensor], norm: Any, bound: float) -> None:
    factor = bound / (torch.as_tensor(norm) + EPSILON)
    torch._foreach_mul_([g.data for g in gradients], factor.clamp(max=1.0))


def _bf16(
    optimizer: Any, sections: list[str], bound: float, original: Callable[..., Any], for_clipping: bool = False
) -> Any:
    """`BF16_Optimizer.get_grads_for_norm`. Where DeepSpeed asks for gradients to clip, they are clipped here."""
    if not for_clipping:
        return original()
    numbers = range(len(sections))
    for members in _by_section(sections, numbers).values():
        # The norm of a section is that of all gradients while DeepSpeed sees no other groups.
        hidden = {i: optimizer.fp32_groups_has_gradients[i] for i in numbers if i not in members}
        for i, seen in hidden.items():
            optimizer.fp32_groups_has_gradients[i] = [False] * len(seen)
        owned, of_experts = BF16_Optimizer.get_grads_for_norm(optimizer)
        everything = BF16_Optimizer.get_grads_for_norm(optimizer, for_clipping=True)
        for i, seen in hidden.items():
            optimizer.fp32_groups_has_gradients[i] = seen
        owned = owned or [torch.zeros(1, device=optimizer.fp32_groups_gradients_flat[0].device)]
        norm = get_global_norm_of_tensors(owned, mpu=optimizer.mpu)
        if of_experts:
            norm = get_norm_with_moe_layers(norm, mpu=optimizer.mpu, expert_tensors=of_experts, norm_type=2)
        _scale(everything, norm, bound)
    return []


def _groups_of_stage_3(optimizer: Any) -> list[int]:
    """The group of parameters that each of ZeRO 3's sub-groups is of."""
    return [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp16_groups))]


def _partitioned(optimizer: Any, norms_of: str, sections: list[str]) -> None:
    """ZeRO 1 to 3: its step takes the norm of each (sub-)group in order, then clips one after the other."""
    norms: list[Any] = []
    names = ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload")
    originals = {name: getattr(optimizer, name) for name in names}

    def recorded(name: str, *args: Any, **kwargs: Any) -> Any:
        norms.append(originals[name](*args, **kwargs))
        return norms[-1]

    for name in names:
        setattr(optimizer, name, partial(recorded, name))
    take, clip = getattr(optimizer, norms_of), optimizer.unscale_and_clip_grads
    clipped = [0]

    def anew(*args: Any, **kwargs: Any) -> Any:
        norms.clear()
        clipped[0] = 0
        return take(*args, **kwargs)

    def clip_one(gradient: Any, total_norm: Any) -> Any:
        section = sections[clipped[0]]
        clipped[0] += 1
        own = torch.stack([torch.as_tensor(n).float() for n in _by_section(sections, norms)[section]])
        return clip(gradient, torch.linalg.vector_norm(own))

    setattr(optimizer, norms_of, anew)
    optimizer.unscale_and_clip_grads = clip_one


def _unfused(optimizer: Any, sections: list[str], bound: float, total_norm: Any, apply_scale: bool = True) -> float:
    """`FP16_UnfusedOptimizer.unscale_and_clip_grads`, for a loss scale of 1."""
    low = [[p.grad for p in group if p.grad is not None] for group in optimizer.fp16_groups]
    norms = [get_weight_norm(gradients, mpu=optimizer.mpu) for gradients in low]
    of_sections, groups = _by_section(sections, norms), _by_section(sections, optimizer.fp32_groups)
    for section, members in groups.items():
        norm = torch.linalg.vector_norm(torch.tensor([float(n) for n in of_sections[section]]))
        _scale([p.grad for group in members for p in group], norm, bound)
    return 1.0


def _plain(engine: DeepSpeedEngine, sections: list[str], bound: float) -> None:
    """`DeepSpeedEngine.clip_fp32_gradients`."""
    for groups in _by_section(sections, engine.optimizer.param_groups).values():
        clip_grad_norm_([p for group in groups for p in group["params"]], max_norm=bound, mpu=engine.mpu)
