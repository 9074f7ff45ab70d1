"""Gradients of a micro batch go straight to the fp32 sums that DeepSpeed takes its step with.

Otherwise each is copied out of the recording, kept as the parameter's ``grad``, converted and added, parameter by
parameter, while the GPU waits for Python to ask for it.
"""

import itertools
from collections.abc import Callable, Mapping

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from nsa.parallel.grid import Axis
from nsa.parallel.partition import add_up, axes_of


def _add_in_one_launch(total: Tensor, parts: dict[int, Tensor]) -> Callable[[], None]:
    """``parts``: by their first element in ``total``."""
    from nsa.ops.kernels.accumulate import Accumulator  # Triton exists on Linux only

    accumulator = Accumulator(total, [part.contiguous() for part in parts.values()], list(parts))
    if not torch.cuda.is_current_stream_capturing():
        accumulator.fill()
    accumulator.run()
    return accumulator.fill


class GradientSinks:
    """The buffers of DeepSpeed's bf16 optimizer (ZeRO 1), one for each group of parameters."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self.optimizer = optimizer
        self.alike: dict[tuple[Axis, ...], list[Tensor]] = {}
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, its_sum in zip(parameters, sums, strict=True):
                if axes := axes_of(parameter):
                    self.alike.setdefault(axes, []).append(its_sum)

    def add(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> Callable[[], None]:
        """Add each parameter's gradient, None for 0; can be recorded, and then what is returned is to be called once
        the recording has ended."""
        optimizer, fills = self.optimizer, []
        for parameters, total in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients_flat, strict=True):
            ends = itertools.accumulate(p.numel() for p in parameters)
            placed = [(end, gradients[p]) for p, end in zip(parameters, ends, strict=True)]
            found = {end - g.numel(): g for end, g in placed if g is not None}
            if total.is_cuda and found:
                fills.append(_add_in_one_launch(total, found))
            elif found:
                for first, g in found.items():
                    total[first : first + g.numel()] += g.flatten()

        def fill() -> None:
            for each in fills:
                each()

        return fill

    def filled(self) -> None:
        """Tell DeepSpeed that its buffers hold gradients: it takes the others for not there."""
        for has in self.optimizer.fp32_groups_has_gradients:
            has[:] = [True] * len(has)

    def sum_alike(self) -> None:
        """The sum over the ranks that hold a parameter alike, each having seen a part of the tokens or heads: once a
        step, in one message for each set of ranks. See `nsa.parallel.partition.sum_over`."""
        for axes, sums in self.alike.items():
            message = torch.cat(sums).float()
            add_up(message, axes)
            for its_sum, part in zip(sums, message.split([len(x) for x in sums]), strict=True):
                its_sum.copy_(part)
