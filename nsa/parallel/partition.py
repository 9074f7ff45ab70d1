"""Which part of a logical parameter a rank holds, and who speaks for it.

A checkpoint and the norm of the gradient know logical parameters: whole, under one name, whatever the layout. Tensor
parallelism says on each parameter how the rank's one belongs to it.
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
        owner: whether this rank speaks for the part. Of the ranks that hold the same part (not those that only see
            other data) one does.
    """

    dim: int = 0
    index: int = 0
    parts: int = 1
    owner: bool = True

    def whole(self, shape: torch.Size) -> torch.Size:
        """Shape of the logical parameter, from the part's."""
        sizes = list(shape)
        sizes[self.dim] *= self.parts
        return torch.Size(sizes)

    def cut(self, whole: Tensor) -> Tensor:
        """The part's view of a logical tensor."""
        size = whole.shape[self.dim] // self.parts
        return whole.narrow(self.dim, self.index * size, size)


WHOLE = Partition()


def partition_of(parameter: Tensor) -> Partition:
    return getattr(parameter, "logical_part", WHOLE)


def mark(parameter: nn.Parameter, partition: Partition) -> None:
    """Attach ``partition``. DeepSpeed counts a marked parameter in the norm of the gradient on every model-parallel
    rank and an unmarked one on the first alone, which is the owner of all that it holds."""
    parameter.logical_part = partition  # type: ignore[attr-defined]
    parameter.model_parallel = partition.owner  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = partition.owner  # type: ignore[attr-defined]


def mark_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """As `mark`, for DeepSpeed's optimizer of bf16 without ZeRO, which looks for the mark at the gradient."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.model_parallel = partition_of(parameter).owner  # type: ignore[attr-defined]


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor, Partition]]:
    """The buffers of a model by name; a rank holds them, and speaks for them, as the parameters of their module."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            yield name, buffer, partition_of(next(module.parameters()))


def part_of(whole: Tensor, partition: Partition) -> nn.Parameter:
    """A parameter with a copy of this rank's part of ``whole``."""
    part = nn.Parameter(partition.cut(whole.detach()).clone(memory_format=torch.contiguous_format))
    mark(part, partition)
    return part


def materialise(model: nn.Module, draw: Callable[[str, torch.Size], Tensor], dtype: torch.dtype) -> None:
    """Give a model on the meta device its values, in place: of each parameter this rank's part, cut from the logical
    one that ``draw(name, shape)`` returns, in ``dtype``. So no more than one of them is ever whole. Buffers are 0."""
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
    """Say that the gradient is to be summed over ``axis``, before DeepSpeed averages it over the replicas: ranks along
    it hold the parameter alike, while each computes from a part of the heads, tokens or layers."""
    if axis.size > 1:
        parameter.summed_over = (*axes_of(parameter), axis)  # type: ignore[attr-defined]


def axes_of(parameter: Tensor) -> tuple[Axis, ...]:
    """What `sum_over` said."""
    return getattr(parameter, "summed_over", ())


def add_up(gradient: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """The fp32 sum of a gradient over ``axes``, in place."""
    for axis in axes:
        all_reduce(gradient, axis, "gradients")
    return gradient


def add_up_in_backward(parameters: Iterable[nn.Parameter]) -> None:
    """Let each backward pass sum gradients as soon as they are computed."""
    for parameter in parameters:
        if axes := axes_of(parameter):
            parameter.register_hook(partial(_summed, axes))


def _summed(axes: tuple[Axis, ...], gradient: Tensor | None) -> Tensor | None:
    """None: of samples that are too short for a compression block, where the passes are recorded."""
    return None if gradient is None else add_up(gradient.to(torch.float32, copy=True), axes).to(gradient.dtype)


def gradient_norm(parameters: Iterable[nn.Parameter], grid: Grid) -> float:
    """2-norm of the gradient of the whole model, from gradients that are already averaged over the replicas.

    For engines that have no norm of their own (no ZeRO, fp32). Collective over ``grid.model``.
    """
    parameters = list(parameters)
    owned = [p.grad for p in parameters if p.grad is not None and partition_of(p).owner]
    norm = torch.nn.utils.get_total_norm(owned).to(parameters[0].device)  # of none: on the CPU
    if grid.model.size == 1:
        return norm.item()
    square = norm.double().square()
    dist.all_reduce(square, group=grid.model.group)
    return square.sqrt().item()
