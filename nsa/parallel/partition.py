"""Which part of a logical parameter a rank holds, and which rank owns that part.

Checkpoints and the gradient norm are about logical parameters: whole ones, under the same name in every layout. Each
parameter of a rank carries a `Partition`, which says which part of the logical parameter it is.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa.parallel.collectives import all_reduce
from nsa.parallel.grid import Axis, Grid


@dataclass(frozen=True)
class Partition:
    """The rank's part: the ``index``-th of ``parts`` equal ones along ``dim``.

    Attributes:
        owner: whether this rank counts the part in the gradient norm and writes it to a checkpoint. Among the ranks
            of one replica that hold the same part, one is the owner.
    """

    dim: int = 0
    index: int = 0
    parts: int = 1
    owner: bool = True

    def whole(self, shape: torch.Size) -> torch.Size:
        """Shape of the logical parameter, from the shape of the part."""
        sizes = list(shape)
        sizes[self.dim] *= self.parts
        return torch.Size(sizes)

    def cut(self, whole: Tensor) -> Tensor:
        """The part of a logical tensor, as a view."""
        size = whole.shape[self.dim] // self.parts
        return whole.narrow(self.dim, self.index * size, size)


WHOLE = Partition()


def partition_of(parameter: Tensor) -> Partition:
    return getattr(parameter, "logical_part", WHOLE)


def mark(parameter: nn.Parameter, partition: Partition) -> None:
    """Attach ``partition`` to a parameter, and tell DeepSpeed whether this rank counts it in the gradient norm.

    DeepSpeed counts a parameter with ``model_parallel`` set on every model-parallel rank, and any other parameter on
    the first of these ranks only. The first rank owns all that it holds, so each part is counted once.
    """
    parameter.logical_part = partition  # type: ignore[attr-defined]
    parameter.model_parallel = partition.owner  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = partition.owner  # type: ignore[attr-defined]


def mark_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """As `mark`, for DeepSpeed's bf16 optimizer without ZeRO, which reads the attribute of the gradient instead."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.model_parallel = partition_of(parameter).owner  # type: ignore[attr-defined]


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, Partition]]:
    """The buffers of a model by name. Their partition is that of the parameters of their module."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            yield name, buffer, partition_of(next(module.parameters()))


def part_of(whole: Tensor, partition: Partition) -> nn.Parameter:
    """A new parameter: a copy of this rank's part of ``whole``."""
    part = nn.Parameter(partition.cut(whole.detach()).clone(memory_format=torch.contiguous_format))
    mark(part, partition)
    return part


def materialise(model: nn.Module, draw: Callable[[str, torch.Size], Tensor], dtype: torch.dtype) -> None:
    """Give a model on the meta device its values, in place.

    Each parameter becomes this rank's part of the logical one that ``draw(name, shape)`` returns, in ``dtype``. So at
    most one logical parameter is in memory at a time. Buffers become 0.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        partition = partition_of(parameter)
        whole = draw(name, partition.whole(parameter.shape))
        part = partition.cut(whole).to(dtype, memory_format=torch.contiguous_format, copy=True)
        made[parameter] = nn.Parameter(part)
        made[parameter].__dict__.update(parameter.__dict__)
        device = whole.device
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, made[parameter])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def sum_over(parameter: nn.Parameter, axis: Axis) -> None:
    """Request that the gradient is summed over ``axis``, before DeepSpeed averages it over the replicas.

    The parameter is replicated along ``axis``, but each rank computes its gradient from a part of the heads, tokens or
    layers alone.
    """
    if axis.size > 1:
        parameter.summed_over = (*axes_of(parameter), axis)  # type: ignore[attr-defined]


def axes_of(parameter: Tensor) -> tuple[Axis, ...]:
    """The axes that `sum_over` requested."""
    return getattr(parameter, "summed_over", ())


def add_up(gradient: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Sum an fp32 gradient over ``axes``, in place."""
    for axis in axes:
        all_reduce(gradient, axis, "gradients")
    return gradient


def add_up_in_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Make each backward pass sum gradients as soon as they are computed."""
    for parameter in parameters:
        if axes := axes_of(parameter):
            parameter.register_hook(partial(_summed, axes))


def _summed(axes: tuple[Axis, ...], gradient: Tensor | None) -> Tensor | None:
    """None remains None: in a CUDA graph, NSA's compression has no gradient if samples are too short for a block."""
    return None if gradient is None else add_up(gradient.to(torch.float32, copy=True), axes).to(gradient.dtype)


def gradient_norm(parameters: Iterable[nn.Parameter], grid: Grid) -> float:
    """2-norm of the gradient of the whole model, from gradients that are already averaged over the replicas.

    For engines that do not compute it themselves (no ZeRO, fp32). Collective over ``grid.model``.
    """
    parameters = list(parameters)
    owned = [p.grad for p in parameters if p.grad is not None and partition_of(p).owner]
    norm = torch.nn.utils.get_total_norm(owned).to(parameters[0].device)  # for an empty list it is on the CPU
    if grid.model.size == 1:
        return norm.item()
    square = norm.double().square()
    dist.all_reduce(square, group=grid.model.group)
    return square.sqrt().item()
