"""The forward and backward pass of a micro batch, each replayed as one CUDA graph.

A layer of NSA launches about a hundred kernels. In models of up to about a hundred million parameters a launch takes
the host longer than the kernel takes the GPU, so the GPU waits. A graph launches all kernels at once. It is captured
once, for tensors at fixed addresses and of fixed shapes. Micro batches are copied into them, and their document
boundaries are padded with empty documents to a fixed number.

Collectives of tensor- and context-parallel ranks are captured, too. These ranks get the same samples, so they capture
and replay at the same time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsa.config import Config
from nsa.layers.around import Around
from nsa.layers.auxiliary_loss import untallied
from nsa.models.moe import Experts
from nsa.ops.geometry import KnownLengths, known_lengths, tell_lengths
from nsa.parallel.traffic import Traffic
from nsa.training.memory import out_of_memory_behind

FEWEST_DOCUMENTS = 64


class Sinks(Protocol):
    """Where gradients are accumulated instead of in ``grad`` (`nsa.training.gradient_sinks`)."""

    def add(self, gradients: Mapping[nn.Parameter, Tensor | None]) -> Callable[[], None]: ...

    def filled(self) -> None: ...

    def sum_alike(self) -> None: ...


def graphs_serve(config: Config, device: torch.device) -> bool:
    """Whether a micro batch can be captured: on a GPU, if the host decides nothing during the passes.

    It cannot with a kind of attention whose operators wait for the device (`nsa.layers.kind.Kind.recordable`).
    It cannot with ZeRO 3, which gathers weights, nor with a pipeline, which alternates micro batches. Nor with experts
    that are sharded or not computed by one kernel: then the host reads how many tokens each expert gets.
    """
    if not config.engine.cuda_graphs or device.type != "cuda":
        return False
    if config.train != "all":
        return False
    parallel, moe = config.parallel, config.model.moe
    if moe is not None and (parallel.expert > 1 or parallel.tensor > 1 or config.engine.precision != "bf16"):
        return False
    if moe is not None and not Experts.one_kernel(config.model.hidden_size, moe.expert_size):
        return False
    if not all(kind.recordable for kind in config.attention.kinds(config.model.num_layers)):
        return False
    return parallel.pipeline == 1 and config.engine.zero_stage < 3


class GraphedDecoder(Around):
    """A decoder whose losses with gradients are computed by CUDA graphs; all else by the decoder itself.

    Gradients reach the parameters through autograd, all at the end of the backward pass. With ``sinks`` the graph adds
    them there instead, and the parameters get none.

    Dense layers are faster if all documents have the same length (one that fills the sample). So a graph is captured
    either for one length or for any lengths. After the first batch of documents of different lengths, all graphs are
    for any lengths.

    Args:
        longest: tokens of a document at most; None: of all.
        traffic: counter of the bytes that the ranks of a sharded decoder send.
    """

    def __init__(
        self,
        inside: nn.Module,
        longest: int | None = None,
        traffic: Traffic | None = None,
        sinks: Sinks | None = None,
    ) -> None:
        super().__init__(inside)
        self.longest, self.traffic, self.sinks = longest, traffic or Traffic(), sinks
        self.trained = [p for p in inside.parameters() if p.requires_grad]
        self.recorded: _Recording | None = None
        self.by_lengths = any(getattr(module, "asks_for_lengths", False) for module in inside.modules())
        _graphed.add(self)

    def forward(
        self, input_ids: Tensor, targets: Tensor | None = None, cu_seqlens: Tensor | None = None, **others: Any
    ) -> Tensor:
        """As `nsa.models.Decoder.forward`."""
        if not torch.is_grad_enabled() or targets is None or cu_seqlens is None or others:
            return self.inside(input_ids, targets=targets, cu_seqlens=cu_seqlens, **others)
        lengths = known_lengths(cu_seqlens) if self.by_lengths else None
        lengths = lengths if lengths is not None and lengths.equal else None
        if self.recorded is None or not self.recorded.has_room(input_ids, cu_seqlens, lengths):
            size = documents_size(len(cu_seqlens))
            if self.recorded is not None and self.recorded.lengths != lengths:
                self.by_lengths, lengths = False, None
            torch.cuda.synchronize()  # the last replay may still run, in memory that is freed here
            self.recorded = None
            self.recorded = _Recording(self, input_ids, targets, pad_borders(cu_seqlens, size), lengths)
        borders = pad_borders(cu_seqlens, len(self.recorded.inputs[2]))
        return _Replay.apply(self.recorded, input_ids, targets, borders, *self.trained)


_graphed: WeakSet[GraphedDecoder] = WeakSet()


def forget_recordings() -> None:
    """Delete all CUDA graphs of the process.

    Must be called before it leaves a process group: NCCL then waits until all graphs with its collectives are deleted.
    """
    for decoder in _graphed:
        recorded, decoder.recorded = decoder.recorded, None
        with suppress(RuntimeError):  # the device may have failed, and the process then ends
            for graph in (recorded.forward, recorded.backward) if recorded else ():
                graph.reset()  # even if the recording is still referenced


def documents_size(borders: int) -> int:
    """The number of boundaries to pad to: a power of two, so that few graphs are captured."""
    return max(FEWEST_DOCUMENTS, 1 << (borders - 1).bit_length())


def pad_borders(cu_seqlens: Tensor, size: int) -> Tensor:
    """(N+1,) -> (size,): repeats the last boundary, which makes empty documents."""
    return torch.cat((cu_seqlens, cu_seqlens[-1:].expand(size - len(cu_seqlens))))


class _Recording:
    """The two captured graphs of one shape, and the tensors that they read and write."""

    def __init__(
        self, decoder: GraphedDecoder, ids: Tensor, targets: Tensor, borders: Tensor, lengths: KnownLengths | None
    ) -> None:
        self.inputs, self.traffic = [x.clone() for x in (ids, targets, borders)], decoder.traffic
        self.lengths, self.sinks = lengths, decoder.sinks
        self.told = KnownLengths(decoder.longest, False) if lengths is None and decoder.longest else lengths
        self.parameters = decoder.trained
        # Stand-ins that share the parameters' memory: autograd accumulates a parameter's gradient on the stream on
        # which it was first used, and that stream cannot be captured.
        stand_ins = {
            f"model.{name}": p.detach().requires_grad_(p.requires_grad) for name, p in decoder.inside.named_parameters()
        }
        leaves = [leaf for leaf in stand_ins.values() if leaf.requires_grad]
        record = partial(self._record, decoder.inside, leaves, borders)
        random_state = torch.cuda.get_rng_state()
        functional_call(_Holder(decoder.inside), stand_ins, (record,))
        torch.cuda.set_rng_state(random_state)  # the first replay draws what the pass would draw without a recording

    def _record(self, model: nn.Module, leaves: Sequence[Tensor], borders: Tensor) -> None:
        def run() -> Tensor:
            input_ids, targets, cu_seqlens = self.inputs
            return model(input_ids, targets=targets, cu_seqlens=cu_seqlens)

        def gradients(losses: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(losses, leaves, self.d_losses, allow_unused=True)

        def write_borders() -> None:
            """Write the boundaries again, so that what is derived from them is computed again, inside the capture."""
            self.inputs[2].copy_(borders)
            if self.told is not None:
                tell_lengths(self.inputs[2], self.told)

        stream = torch.cuda.Stream()  # warm-up: what the first pass sets up (compiled kernels, handles) is not captured
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), self.traffic.apart(), untallied(model):
            write_borders()
            losses = run()
            self.d_losses = torch.ones_like(losses)
            warm_up = gradients(losses)
            if self.sinks:  # adds zeros, to compile the kernel
                self.sinks.add({p: None if g is None else torch.zeros_like(g) for p, g in self._named(warm_up)})
            del losses, warm_up
            write_borders()
        torch.cuda.current_stream().wait_stream(stream)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        # Other threads read data and write checkpoints meanwhile: their calls must not invalidate the capture.
        mode: dict[str, Any] = {"pool": pool, "capture_error_mode": "thread_local"}
        try:
            with self.traffic.apart() as self.sent_forward, torch.cuda.graph(self.forward, **mode):
                losses = run()
            with self.traffic.apart() as self.sent_backward, torch.cuda.graph(self.backward, **mode):
                self.gradients = gradients(losses)
                if self.sinks:
                    self.added = self.sinks.add(dict(self._named(self.gradients)))
        except RuntimeError as error:
            if memory := out_of_memory_behind(error):
                raise memory from None
            raise
        if self.sinks:
            self.added()
        self.losses = losses.detach()

    def _named(self, gradients: Sequence[Tensor | None]) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
        return zip(self.parameters, gradients, strict=True)

    def has_room(self, ids: Tensor, borders: Tensor, lengths: KnownLengths | None) -> bool:
        fits = ids.shape == self.inputs[0].shape and len(borders) <= len(self.inputs[2])
        return fits and self.lengths in (None, lengths)


class _Holder(nn.Module):
    """Calls a function while `functional_call` has replaced the model's parameters by other tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], None]) -> None:
        function()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: _Recording, *tensors: Tensor) -> Tensor:
        for fixed, given in zip(recording.inputs, tensors, strict=False):  # the parameters need no copy
            fixed.copy_(given)
        recording.forward.replay()
        recording.traffic.add_all(recording.sent_forward)
        ctx.recording, ctx.num_inputs = recording, len(recording.inputs)
        return recording.losses.clone()

    @staticmethod
    def backward(ctx: Any, d_losses: Tensor) -> tuple[Tensor | None, ...]:
        recording = ctx.recording
        recording.d_losses.copy_(d_losses)
        recording.backward.replay()
        recording.traffic.add_all(recording.sent_backward)
        if recording.sinks:
            recording.sinks.filled()
            return None, *[None] * ctx.num_inputs, *[None] * len(recording.parameters)
        # Copies, since the receiver may keep or modify them beyond the next replay.
        gradients = [None if g is None else g.clone() for g in recording.gradients]
        return None, *[None] * ctx.num_inputs, *gradients
