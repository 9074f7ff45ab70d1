"""Adds the gradients of a micro batch directly to the fp32 buffers that DeepSpeed's optimizer steps with.

Without it each gradient is copied out of the CUDA graph's memory, kept as ``grad``, converted and added, parameter by
parameter, and the GPU waits for Python to launch these kernels.
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
        """Add each parameter's gradient; None stands for 0.

        Returns:
            A function that, if this was captured, must be called after the capture and kept as long as the graph.
        """
        optimizer, places = self.optimizer, []
        for number, parameters in enumerate(optimizer.bf16_groups):
            total = optimizer.fp32_groups_gradients_flat[number]
            ends = itertools.accumulate(p.numel() for p in parameters)
            placed = [(end, gradients[p]) for p, end in zip(parameters, ends, strict=True)]
            by_start = {end - g.numel(): g.contiguous() for end, g in placed if g is not None}
            if total.is_cuda and by_start:
                places.append(self._accumulator(number, total, by_start).add(list(by_start.values())))
            elif by_start:
                for first, g in by_start.items():
                    total[first : first + g.numel()] += g.flatten()

        def place_all() -> None:
            for place in places:
                place()

        return place_all

    def _accumulator(self, number: int, total: Tensor, by_start: dict[int, Tensor]) -> Any:
        """The accumulator of a group and set of parameters, which is made in the warm-up, before the capture."""
        from nsa.ops.kernels.accumulate import Accumulator  # Triton exists on Linux only

        key = (number, *by_start)
        if key not in self.accumulators:
            self.accumulators[key] = Accumulator(total, [g.numel() for g in by_start.values()], list(by_start))
        return self.accumulators[key]

    def filled(self) -> None:
        """Tell DeepSpeed that its buffers hold gradients. It ignores buffers that it has not filled itself."""
        for has in self.optimizer.fp32_groups_has_gradients:
            has[:] = [True] * len(has)

    def sum_alike(self) -> None:
        """Sum the gradients of replicated parameters over their ranks (`nsa.parallel.partition.sum_over`).

        To be called once per step. Sends one message for each set of ranks.
        """
        for axes, sums in self.alike.items():
            message = torch.cat(sums).float()
            add_up(message, axes)
            for its_sum, part in zip(sums, message.split([len(x) for x in sums]), strict=True):
                its_sum.copy_(part)
