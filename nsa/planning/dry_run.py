"""Runs one rank's forward and backward passes without a GPU and without the other ranks.

The rank's part of the decoder is built on the meta device, where tensors have shapes but no memory, in a fake process
group. It runs a micro batch through the same code as training. So an invalid layout fails here, and the bytes sent and
kept are counted. The operators are the registered ones of the kernels, which compute the shapes of their results. The
temporary memory of a kernel is not counted.
"""

import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nsa.config import Config, ConfigError
from nsa.layers.auxiliary_loss import AuxiliaryLoss
from nsa.models import Decoder
from nsa.parallel.decoder import parallelize
from nsa.parallel.grid import Grid, build_grid
from nsa.parallel.pipeline import Pipeline
from nsa.training.activation_checkpointing import checkpoint_layers
from nsa.training.deepspeed_config import micro_batches_per_step
from nsa.training.freezing import attached, freeze_others

META = torch.device("meta")


@dataclass(frozen=True)
class DryRun:
    """What one rank does in a step.

    Attributes:
        rank: the world rank. layout: such as "2 data x 4 tensor". parameters: how many the rank holds. trained: how
            many of them have gradients.
        sent: bytes sent within its replica in a step, by the names of `comm/...` in the metrics.
        flops: of its matrix products in a step, recomputation included; without attention and compression.
        peak_bytes: peak memory besides weights, gradients and optimizer: activations and temporary gradients.
        seconds: time that the dry run took.
    """

    rank: int
    layout: str
    parameters: int
    trained: int
    sent: dict[str, int]
    flops: float
    peak_bytes: int
    seconds: float


def dry_run(config: Config, gpus: int, rank: int = 0) -> DryRun:
    """Run a step of ``rank`` among ``gpus`` ranks without computing anything.

    Raises:
        ConfigError: ``gpus`` do not fit the layout, or the kernels do not support the heads.
    """
    started = time.perf_counter()
    try:
        passes = micro_batches_per_step(config, gpus)
        with _fake_ranks(rank, gpus):
            grid = build_grid(config.parallel, rank, gpus, num_kv_heads=config.model.num_kv_heads)
            model = _build(config, grid)
            runs = [_count(config, grid, model, n) for n in sorted({1, min(passes, grid.pipeline.size)})]
    except ValueError as error:
        raise ConfigError(str(error)) from error
    first, last = runs[0], runs[-1]

    def of_step(name: str) -> int:
        """Bytes of the whole step, by extrapolation: each micro batch sends the same, the rest is sent once."""
        a, b, more = first.sent.get(name, 0), last.sent.get(name, 0), last.passes - first.passes
        return a + (b - a) // more * (passes - 1) if more else a * passes

    return DryRun(
        rank=rank,
        layout=grid.describe(),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        sent={name: of_step(name) for name in last.sent},
        flops=first.flops * passes,
        peak_bytes=last.peak,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = hook  # torch sets one per process group, which calls the one before: a search has hundreds


def _build(config: Config, grid: Grid) -> Decoder:
    """The rank's part of the decoder, as in `nsa.training.engine.build_engine`, without DeepSpeed."""
    engine = config.engine
    with META:
        model = Decoder(config.model, config.attention, backend="triton")
    model = parallelize(model, grid)
    if grid.pipeline.group is not None:  # sends look up the backend of the device
        backend = grid.pipeline.group._get_backend(torch.device("cpu"))
        grid.pipeline.group._register_backend(META, dist.ProcessGroup.BackendType.CUSTOM, backend)
    if config.train != "all":
        freeze_others(model, config)
    elif engine.activation_checkpointing != "none":
        checkpoint_layers(model.layers, engine.activation_checkpointing)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        # DeepSpeed, or the pipeline's sum, takes each gradient as soon as it is computed.
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return model.bfloat16() if engine.precision == "bf16" else model


@dataclass(frozen=True)
class _Counts:
    passes: int
    sent: dict[str, int]
    flops: float
    peak: int


def _count(config: Config, grid: Grid, model: Decoder, passes: int) -> _Counts:
    tokens = config.training.micro_batch_size * config.data.sequence_length
    ids = torch.empty(1, tokens, dtype=torch.int64, device=META)
    borders = torch.empty(2, dtype=torch.int32, device=META)

    def run(_: Any = None) -> Tensor:
        return model(ids, targets=ids, cu_seqlens=borders)

    def take() -> Tensor:
        """As `nsa.training.attention_losses.AttentionLosses.take`."""
        losses = [module.take() for module in model.modules() if isinstance(module, AuxiliaryLoss)]
        return sum((loss for loss in losses if loss is not None), torch.zeros((), device=META))

    grid.traffic.take()
    with Ledger([ids, borders, *model.parameters()]) as ledger:
        if grid.pipeline.size == 1:
            assert passes == 1
            losses = run()
            loss = losses.sum() if config.train == "all" or attached(config) else take()
            if loss.requires_grad:  # a layer that `nsa.planning.memory` measures alone may train nothing
                loss.backward()
        else:
            shape = (1, tokens // grid.context.size // grid.tensor.size, config.model.hidden_size)
            pipeline = Pipeline(_Engine(model), grid.pipeline, run, lambda _: shape)
            if config.train == "all":
                pipeline.backward([None] * passes, 1.0)
            else:
                pipeline.backward_within([None] * passes, take)
    return _Counts(passes, grid.traffic.take(), ledger.flops / passes, ledger.peak)


class _Engine:
    def __init__(self, module: Decoder) -> None:
        self.module = module

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        loss.backward()


IN_PLACE = {torch.ops.aten.addmm_: torch.ops.aten.addmm}  # torch has a FLOP formula for the latter only


class Ledger(TorchDispatchMode):
    """A context that counts bytes of the live meta tensors that operators made in it, and FLOPs of matrix products.

    Args:
        given: tensors that are not counted. They must outlive the context.

    Attributes:
        now, peak: bytes. flops: forward and backward.
    """

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = 0.0
        self._known = {x.untyped_storage()._cdata for x in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = IN_PLACE.get(func._overloadpacket, func._overloadpacket)
        if formula := flop_registry.get(packet):
            self.flops += formula(*args, **kwargs, out_val=out)
        for x in (out,) if isinstance(out, Tensor) else tree_leaves(out):
            if isinstance(x, Tensor) and x.is_meta:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
