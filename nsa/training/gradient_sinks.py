"""Gradients of a micro batch go straight to the fp32 sums that DeepSpeed takes its step with.

Otherwise each is copied out of the recording, kept as the parameter's ``grad``, converted and added, parameter by
parameter, while the GPU waits for Python to ask for it.
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor, nn

from nsa.parallel.grid import Axis
from nsa.parallel.partition import add_up, axes_of


class GradientSinks:
    """The buffers of DeepSpeed's bf16 optimizer (ZeRO 1), one for each group of parameters."""

    def __init__(self, optimizer: BF16_Optimizer) -> None:
        self.optimizer = optimizer
        self.accumulators: dict[tuple[int, ...], Any] = {}
        self.alike: dict[tuple[Axis, ...], list[Tensor]] = {}
        for parameters, sums in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True):
            for parameter, its_sum in zip(parameters, sums, strict=True):
                if axes := axes_of(parameter):
                    self.alike.setdefault(axes, []).append(its_sum)

    def add(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> Callable[[], None]:
        """Add each parameter's gradient, None for 0.

        Returns:
            If this was recorded: what is to be called once the recording has ended, and kept as long as it.
        """
        optimizer, places = self.optimizer, []
        for number, parameters in enumerate(optimizer.bf16_groups):
            total = optimizer.fp32_groups_gradients_flat[number]
            ends = itertools.accumulate(p.numel() for p in parameters)
            placed = [(end, gradients[p]) for p, end in zip(parameters, ends, strict=True)]
            found = {end - g.numel(): g.contiguous() for end, g in placed if g is not None}
            if total.is_cuda and found:
                places.append(self._accumulator(number, total, found).add(list(found.values())))
            elif found:
                for first, g in found.items():
                    total[first : first + g.numel()] += g.flatten()

        def place_all() -> None:
            for place in places:
                place()

        return place_all

    def _accumulator(self, number: int, total: Tensor, found: dict[int, Tensor]) -> Any:
        """One for each group and choice of parameters: made before they are recorded."""
        from nsa.ops.kernels.accumulate import Accumulator  # Triton exists on Linux only

        key = (number, *found)
        if key not in self.accumulators:
            self.accumulators[key] = Accumulator(total, [g.numel() for g in found.values()], list(found))
        return self.accumulators[key]

    def filled(self) -> None:
        """Tell DeepSpeed that its buffers hold gradients. It ignores those that it has not filled itself."""
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
