"""Pipeline parallelism: each stage holds consecutive layers, and micro batches flow through the stages (1F1B).

The first stage has the embedding, the last the norm and the head. After a warm-up every stage alternates one forward
and one backward pass (PipeDream-Flush, arXiv 2006.09503). Stage i of n keeps the activations of n - i micro batches
(from i = 0), and the share of idle time is (n - 1) / (micro batches + n - 1).

The decoder's own forward runs on every stage: a module of another stage is replaced by one that returns its input.
Gradients of all micro batches are summed here, in fp32, and DeepSpeed takes the sum as the gradient of one backward
pass. So the gradients of replicated parameters (tied embeddings on two stages, norms on tensor-parallel ranks) are
summed over their ranks once per step, before DeepSpeed averages over the replicas.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa.models import Decoder
from nsa.parallel.config import stage_layers
from nsa.parallel.grid import Axis
from nsa.parallel.partition import Partition, add_up, axes_of, mark, named_buffers, partition_of, sum_over


class Elsewhere(nn.Module):
    """In the place of a module of another stage: returns its first argument."""

    def forward(self, x: Tensor, *others: Any) -> Tensor:
        return x


class NormElsewhere(nn.Module):
    """In the place of the last norm: returns the residual stream for both of its results."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class StageInput(nn.Module):
    """In the place of the embedding on later stages: returns the activations of the stage before, (B, tokens, C).

    ``weight``: on the last stage its copy of a tied embedding, which its head reads.
    """

    def __init__(self, weight: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.received: Tensor | None = None

    def forward(self, input_ids: Tensor) -> Tensor:
        assert self.received is not None
        return self.received


def split_over_stages(model: Decoder, axis: Axis, ends: Axis) -> None:
    """Keep this stage's part of a decoder. ``ends``: the first and last stage, which share tied embeddings.

    Sets ``model.everywhere``: name -> (shape on its stage, `Partition`, whether it is trained) of the parameters and
    then the buffers of all stages, each in the order of the whole model.
    """
    if axis.size == 1:
        return
    everywhere = {n: (p.shape, partition_of(p), True) for n, p in model.named_parameters()}
    everywhere |= {n: (b.shape, part, False) for n, b, part in named_buffers(model)}
    model.everywhere = everywhere  # type: ignore[assignment]
    first, last = axis.rank == 0, axis.rank == axis.size - 1
    tied = model.head.weight is model.embedding.weight
    here = stage_layers(len(model.layers), axis.size, axis.rank)
    for number in range(len(model.layers)):
        if number not in here:
            model.layers[number] = Elsewhere()
    if not first:
        shared: Any = model.embedding.weight if tied and last else None
        model.embedding = StageInput(shared)  # type: ignore[assignment]
    if not last:
        model.norm, model.head = NormElsewhere(), Elsewhere()  # type: ignore[assignment]
    for parameter in model.parameters():
        mark(parameter, partition_of(parameter))
    if tied and (first or last):
        weight: Any = model.embedding.weight
        part = partition_of(weight)
        mark(weight, Partition(part.dim, part.index, part.parts, part.owner and first))
        sum_over(weight, ends)


class Engine(Protocol):
    """What a `Pipeline` uses of a DeepSpeedEngine."""

    module: Any

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> Any: ...


class Pipeline:
    """The schedule of one stage.

    Args:
        engine: wraps the stage. To it a step has one micro batch, whose gradient is the sum of all.
        stage: forward pass of the stage on a micro batch; returns losses on the last stage, else activations.
        shape: micro batch -> shape (B, tokens, C) of its activations.
    """

    def __init__(
        self,
        engine: Engine,
        axis: Axis,
        stage: Callable[[Any], Tensor],
        shape: Callable[[Any], tuple[int, ...]],
    ) -> None:
        self.engine, self.axis, self.stage, self.shape = engine, axis, stage, shape
        self.first, self.last = axis.rank == 0, axis.rank == axis.size - 1
        self.parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self.dtype = self.parameters[0].dtype
        self.device = self.parameters[0].device

    @torch.no_grad()
    def forward(self, batch: Any) -> Tensor:
        """Losses of a micro batch on the last stage, zero on the others; no gradients."""
        _, x = self._exchange(receive_forward=not self.first, shape=self.shape(batch))
        out = self._run(batch, x)
        self._exchange(send_forward=None if self.last else out)
        return out if self.last else out.new_zeros(())

    def backward(self, batches: list[Any], scale: float) -> Tensor:
        """Forward and backward passes of ``batches``, of equal shape.

        The engine gets the gradient of ``scale`` times the sum of all losses.

        Returns:
            The sum of the losses (fp64) on the last stage, zero on the others.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = self._no_gradients()
        waiting: deque[tuple[Tensor | None, Tensor]] = deque()  # (input, output) of the backward passes still to run
        shape, warm_up = self.shape(batches[0]), min(self.axis.size - 1 - self.axis.rank, len(batches))

        def forward(batch: Any, x: Tensor | None) -> Tensor | None:
            if x is not None:
                x.requires_grad_()
            out = self._run(batch, x)
            if self.last:
                total.add_(out.detach().sum(dtype=torch.float64))
                out = out.sum() * scale
            waiting.append((x, out))
            return None if self.last else out.detach()

        def backward(gradient: Tensor | None) -> Tensor | None:
            x, out = waiting.popleft()
            wanted = self.parameters if x is None else [x, *self.parameters]
            gradients = list(torch.autograd.grad(out, wanted, gradient, allow_unused=True))
            d_x = None if x is None else gradients.pop(0)
            _add(sums, gradients)
            return d_x

        for batch in batches[:warm_up]:
            _, x = self._exchange(receive_forward=not self.first, shape=shape)
            self._exchange(send_forward=forward(batch, x))
        steady = batches[warm_up:]
        x = None
        if steady:
            _, x = self._exchange(receive_forward=not self.first, shape=shape)
        for number, batch in enumerate(steady):
            out = forward(batch, x)
            d_out, _ = self._exchange(send_forward=out, receive_backward=not self.last, shape=shape)
            more = number + 1 < len(steady)
            d_x = backward(d_out)
            _, x = self._exchange(send_backward=d_x, receive_forward=more and not self.first, shape=shape)
        for _ in range(warm_up):
            d_out, _ = self._exchange(receive_backward=not self.last, shape=shape)
            self._exchange(send_backward=backward(d_out))
        self._hand_over(sums)
        return total

    def backward_within(self, batches: list[Any], take: Callable[[], Tensor]) -> None:
        """As `backward`, for a stage that trains by losses of its own layers alone: no gradient goes to another stage.

        So each stage has one micro batch under way, and is idle only while the first one comes and the last one goes.

        Args:
            take: the sum of these losses in the last forward pass, as the objective has it: a scalar, without a
                gradient if the stage trains nothing.
        """
        sums, shape = self._no_gradients(), self.shape(batches[0])
        for batch in batches:
            _, x = self._exchange(receive_forward=not self.first, shape=shape)
            out = self._run(batch, x)
            self._exchange(send_forward=None if self.last else out.detach())
            loss = take()
            if loss.requires_grad:
                _add(sums, torch.autograd.grad(loss, self.parameters, allow_unused=True))
        self._hand_over(sums)

    def _no_gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p, dtype=torch.float32) for p in self.parameters]

    def _hand_over(self, sums: list[Tensor]) -> None:
        """Give the engine the gradients of all micro batches."""
        for parameter, gradient in zip(self.parameters, sums, strict=True):
            add_up(gradient, axes_of(parameter))
        self.engine.backward(_Gradient.apply(sums, *self.parameters), scale_wrt_gas=False)

    def _run(self, batch: Any, x: Tensor | None) -> Tensor:
        if x is not None:
            self.engine.module.embedding.received = x
        out = self.stage(batch)
        if x is not None:
            self.engine.module.embedding.received = None
        return out

    def _exchange(
        self,
        *,
        send_forward: Tensor | None = None,
        send_backward: Tensor | None = None,
        receive_forward: bool = False,
        receive_backward: bool = False,
        shape: tuple[int, ...] = (),
    ) -> tuple[Tensor | None, Tensor | None]:
        """Exchange with both neighbours in one batch, which cannot deadlock.

        Returns:
            What the stage after sent (gradients), and what the stage before sent (activations).
        """
        axis, moves = self.axis, []
        before, after = axis.ranks[axis.rank - 1], axis.ranks[(axis.rank + 1) % axis.size]

        def send(x: Tensor, peer: int, what: str) -> None:
            moves.append(dist.P2POp(dist.isend, x.contiguous(), peer, group=axis.group))
            axis.traffic.add(f"{axis.name}/{what}", x.nbytes)

        def receive(peer: int) -> Tensor:
            x = torch.empty(shape, dtype=self.dtype, device=self.device)
            moves.append(dist.P2POp(dist.irecv, x, peer, group=axis.group))
            return x

        from_before = receive(before) if receive_forward else None
        if send_backward is not None:
            send(send_backward, before, "gradients")
        from_after = receive(after) if receive_backward else None
        if send_forward is not None:
            send(send_forward, after, "activations")
        if moves:
            for work in dist.batch_isend_irecv(moves):
                work.wait()
        return from_after, from_before


def _add(sums: list[Tensor], parts: Iterable[Tensor | None]) -> None:
    """In place; None: no gradient."""
    for total, part in zip(sums, parts, strict=True):
        if part is not None:
            total += part


class _Gradient(torch.autograd.Function):
    """Zero, whose gradients with respect to the parameters are given in fp32 and rounded once to their dtypes."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = [g.to(p.dtype) for g, p in zip(gradients, parameters, strict=True)]
        return gradients[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(g * scale for g in ctx.gradients)
