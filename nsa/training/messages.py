"""Messages between the ranks of a job, as JSON: torch's own object collectives unpickle what they receive."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATH = "__path__"


def encode(value: Any) -> bytes:
    """JSON of ``value``: what JSON has, tuples (they become lists) and paths."""
    return json.dumps(value, default=_encode_path).encode()


def decode(message: bytes) -> Any:
    """The value of a message. Raises ValueError if it is none."""
    return json.loads(message, object_hook=_decode_path)


def broadcast(value: Any, group: dist.ProcessGroup) -> Any:
    """``value`` of rank 0 on every rank. Collective over a CPU group that holds all ranks."""
    message = bytearray(encode(value) if dist.get_rank() == 0 else b"")
    size = torch.tensor([len(message)])
    dist.broadcast(size, src=0, group=group)
    buffer = _tensor(message, int(size))
    dist.broadcast(buffer, src=0, group=group)
    return decode(buffer.numpy().tobytes())


def gather(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """The values of all ranks, in order of rank, on every rank. Collective as `broadcast`."""
    message, world_size = bytearray(encode(value)), dist.get_world_size(group)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([len(message)]), group=group)
    longest = max(int(size) for size in sizes)
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(buffers, _tensor(message, longest), group=group)
    return [decode(b[: int(n)].numpy().tobytes()) for b, n in zip(buffers, sizes, strict=True)]


def _tensor(message: bytearray, size: int) -> torch.Tensor:
    """(size,) uint8, zeros after the message."""
    return torch.frombuffer(message.ljust(size, b"\0"), dtype=torch.uint8)


def _encode_path(value: Any) -> dict[str, str]:
    if isinstance(value, Path):
        return {PATH: str(value)}
    raise TypeError(f"{type(value).__name__} is no part of a message between ranks")


def _decode_path(value: dict[str, Any]) -> Any:
    return Path(value[PATH]) if set(value) == {PATH} else value
