"""Process groups: one process without a launcher, or many under `deepspeed`, torchrun or Slurm."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from nsa.training import messages
from nsa.training.exit_codes import DONE, USER

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
CONTROL_TIMEOUT = timedelta(hours=24)  # others wait while rank 0 prepares the data: that may take hours


class ReportedError(ValueError):
    """Raised on the other ranks when rank 0 raised an error, with exit code ``code``. Only rank 0 prints it."""

    def __init__(self, message: str, code: int = USER) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Ranks:
    """The rank of this process, its device, and messages between all processes.

    Attributes:
        rank, world_size: among all processes. local_rank: within this node.
        device: the device that this process computes on.
        control: a gloo group with a long timeout, for messages between the processes.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone and return its result (JSON or paths) on every rank.

        Raises:
            ValueError, OSError: what ``action`` raised, on rank 0; `ReportedError` on the others.
        """
        message: tuple[int, T | str] = (USER, "rank 0 stopped")
        error: Exception | None = None
        if self.is_main:
            try:
                message = (DONE, action())
            except (ValueError, OSError) as e:
                error, message = e, (getattr(e, "exit_code", USER), str(e))
        code, result = messages.broadcast(message, self.control)
        if error is not None:
            raise error
        if code != DONE:
            raise ReportedError(result, code)
        return result

    def gather(self, value: T) -> list[T]:
        """The values (JSON or paths) of all ranks, in order of rank, on every rank."""
        return messages.gather(value, self.control)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        dist.all_reduce(tensor)
        return tensor


def initialize() -> Ranks:
    """Join the process group that the launcher's environment describes; without a launcher it has one process.

    Raises:
        ValueError: the processes cannot meet at MASTER_ADDR:MASTER_PORT, or there is no GPU for this process.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)  # warns that CPU ranks have no device id
    # DeepSpeed calls functions by names that torch has deprecated.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # see nsa/training/__init__.py
    # NCCL would register the memory of captured collectives, and crashes if the allocator maps memory in pieces
    # (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True).
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    # Collectives of two groups may be parallel in a CUDA graph. This makes them start in the order of the calls.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    alone = "RANK" not in os.environ
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)
    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))

    if torch.cuda.is_available():
        if local_rank >= (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, and the process sees {gpus} GPUs. Start as many processes on a machine "
                "as it has GPUs, and let each see all of them (CUDA_VISIBLE_DEVICES; with Slurm --gpus-per-node, "
                "not --gpus-per-task)"
            )
        device, backend = torch.device("cuda", local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
    if alone:
        # No port, so none that can be in use.
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        try:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        except (dist.DistNetworkError, dist.DistStoreError, ValueError) as e:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ValueError(
                f"the {world_size} processes cannot meet at {address} (rank {rank}): {str(e).splitlines()[0]}. "
                "Choose a free port with `--master_port` (deepspeed, torchrun) or MASTER_PORT"
            ) from e
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
    return Ranks(rank, world_size, local_rank, device, control)


def make_deterministic(device: torch.device) -> None:
    """Make computations bitwise reproducible: deterministic kernels and a fixed number of CPU threads."""
    # On a GPU an operation without a deterministic kernel only warns, so that the run goes on.
    torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if device.type == "cpu":
        # OMP_NUM_THREADS decides where set; otherwise the processes of a machine share its cores.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"])
        threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // processes))
        torch.set_num_threads(threads)
