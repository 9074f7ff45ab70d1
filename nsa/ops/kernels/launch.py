"""What all kernels need at launch: tensor descriptors, tile sizes, and whether kernels can run here at all."""

import functools
import json
import math
import os
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1 / math.log(2)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_WIDTH = 256
MAX_ROW_BYTES = 512
# What differs between calls must not compile a kernel anew, as it would where it is 1 or a multiple of 16.
INTEGERS = (
    *("num_tokens", "num_keys", "num_tiles", "num_rows", "num_splits", "num_blocks", "num_lists", "num_slots"),
    *("num_initial", "num_local", "chunk", "list0", "list1"),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Widths of keys and values that Hopper's kernels serve.
BOTH_PASSES = ((64, 64), (128, 128))
FORWARD = (*BOTH_PASSES, (192, 128))


def why_not(*tensors: Tensor, heads: bool = True) -> str | None:
    """Why the kernels cannot run on these tensors, (.., width of a head) if ``heads``; None if they can.

    On meta tensors they "run", too: their operators know the shapes of their results.
    """
    if not all(x.is_cuda or x.is_meta for x in tensors) and not INTERPRETED:
        return "tensors must be on a CUDA device (or TRITON_INTERPRET=1 be set before the start)"
    if tensors[0].dtype not in DTYPES or any(x.dtype != tensors[0].dtype for x in tensors):
        return f"tensors must share one of float16, bfloat16, float32; got {', '.join(str(x.dtype) for x in tensors)}"
    if heads and any(
        x.shape[-1] * x.element_size() > MAX_ROW_BYTES or x.shape[-1] * x.element_size() % 16 for x in tensors
    ):
        return f"head widths must be multiples of 16 bytes, at most {MAX_ROW_BYTES} (256 in 16 bits, 128 in fp32)"
    return None


def split_width(width: int) -> tuple[int, int]:
    """A head width as a power of two, and a second one (or 0) for the rest: 128 -> 128, 0; 192 -> 128, 64."""
    if width <= 16:
        return 16, 0
    whole = triton.next_power_of_2(width)
    if whole == width:
        return width, 0
    rest = max(16, triton.next_power_of_2(width - whole // 2))
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)


def vector_of(*counts: int) -> int:
    """Elements in a row of which all or none exist, for masks of elementwise kernels: a count that is no constant
    would make every load a single element's. 8, or 1."""
    return 1 if any(count % 8 for count in counts) else 8


def warpgroups(
    q: Tensor, k: Tensor, v: Tensor, scale: float, widths: tuple[tuple[int, int], ...] = BOTH_PASSES
) -> bool:
    """Whether the kernels written for Hopper's warpgroups (nsa/ops/kernels/hopper) serve these tensors."""
    heads = q.shape[2] // k.shape[2]
    rows = triton.next_power_of_2(heads)  # of a token; with three eighths of them idle the portable kernels are as fast
    fits = heads == rows <= 64 or (rows <= 16 and 8 * heads >= 5 * rows)
    fits = fits and (q.shape[3], v.shape[3]) in widths
    return architecture() == "sm_90" and q.element_size() == 2 and fits and scale > 0


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """(B, S, G, D) contiguous as a (B * S, G * D) matrix of which (rows, columns) boxes are loaded by the copy engine.

    A box may reach into the next head's columns where D is no power of two: the other factor is 0 there.
    """
    height, width = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    return TensorDescriptor(x, [height, width], [width, 1], [rows, columns])


def head_descriptor(x: Tensor, rows: int, heads: int, columns: int) -> TensorDescriptor:
    """(B, T, H, D) contiguous as (B * T, H, D), in boxes of ``heads`` heads of ``rows / heads`` tokens."""
    shape = [x.shape[0] * x.shape[1], *x.shape[2:]]
    return TensorDescriptor(x, shape, [x.stride(1), x.stride(2), 1], [rows // heads, heads, columns])


@functools.cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("tiles.json").read_text())


@functools.cache
def architecture() -> str:
    """Key of the tile table for the current device."""
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    return name if name in _table() else "sm_80"


@functools.cache
def _entry(arch: str, kernel: str, width: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    for entry in _table()[arch][kernel]:
        if width <= entry.get("max_width", MAX_WIDTH) and itemsize <= entry.get("max_itemsize", 4):
            tile = {key: value for key, value in entry.items() if key.isupper()}
            return tile, {
                key: value for key, value in entry.items() if not key.isupper() and not key.startswith("max_")
            }
    raise AssertionError(f"no tile sizes for {kernel} at width {width} on {arch}")


def tile_sizes(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """(tile constants, launch options) of a kernel from tiles.json: the first entry that is wide enough."""
    tile, options = _entry(architecture(), kernel, max(q.shape[3], v.shape[3]), q.element_size())
    return dict(tile), dict(options)
