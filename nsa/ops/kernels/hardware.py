"""What all kernels need at launch: tensor descriptors, tile sizes, and whether the kernels can run here at all."""

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
MAX_WIDTH = 256  # columns of a head
MAX_ROW_BYTES = 512  # of a head
TMA_BYTES = 16  # TMA needs addresses and strides that are multiples of this
# Integers that differ between calls. Triton would compile a kernel anew where one is 1 or a multiple of 16: these
# arguments are excluded from that (do_not_specialize).
INTEGERS = (
    *("num_tokens", "num_keys", "num_tiles", "num_rows", "num_splits", "num_blocks", "num_lists", "num_slots"),
    *("num_initial", "num_local", "chunk", "list0", "list1"),
)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Head dimensions (keys, values) that Hopper's kernels support: in both passes, and in the forward pass alone.
BOTH_PASSES = ((64, 64), (128, 128))
FORWARD = (*BOTH_PASSES, (192, 128))
VECTOR = 8  # elements: 16 bytes of a 16-bit type, the widest load
EARLY_FROM = 90  # compute capability: launches may begin before the one before has ended
MULTIPROCESSORS = 132  # of an H100 or H200


def why_not(*tensors: Tensor, heads: bool = True) -> str | None:
    """Why the kernels cannot run on these tensors; None if they can.

    Meta tensors are accepted, because the operators know the shapes of their results.

    Args:
        tensors: the first one decides the dtype. heads: whether their last axis is the width of a head.
    """
    if not all(x.is_cuda or x.is_meta for x in tensors) and not INTERPRETED:
        return "tensors must be on a CUDA device (or TRITON_INTERPRET=1 be set before the start)"
    if tensors[0].dtype not in DTYPES or any(x.dtype != tensors[0].dtype for x in tensors):
        return f"tensors must share one of float16, bfloat16, float32; got {', '.join(str(x.dtype) for x in tensors)}"
    if heads and any(
        x.shape[-1] * x.element_size() > MAX_ROW_BYTES or x.shape[-1] * x.element_size() % TMA_BYTES for x in tensors
    ):
        return f"head widths must be multiples of 16 bytes, at most {MAX_ROW_BYTES} (256 in 16 bits, 128 in fp32)"
    return None


def tile_width(width: int) -> int:
    """Columns of a tile that holds ``width``: a power of two, and at least 16, which tl.dot needs."""
    return max(16, triton.next_power_of_2(width))


def split_width(width: int) -> tuple[int, int]:
    """A head's columns as two powers of two, the second 0 if one is enough: 128 -> 128, 0; 192 -> 128, 64."""
    if width <= 16:
        return 16, 0
    whole = triton.next_power_of_2(width)
    if whole == width:
        return width, 0
    rest = tile_width(width - whole // 2)
    return (whole, 0) if rest == whole // 2 else (whole // 2, rest)


def vector_of(*counts: int) -> int:
    """How many consecutive elements share their mask in an elementwise kernel: VECTOR if it divides all counts, or 1.

    A count is not a compile-time constant, so the compiler would load single elements. Instead a kernel gets
    ``count // vector`` and multiplies. Then the compiler knows that all ``vector`` elements exist or none does.
    """
    return 1 if any(count % VECTOR for count in counts) else VECTOR


def warpgroups(
    q: Tensor, k: Tensor, v: Tensor, scale: float, widths: tuple[tuple[int, int], ...] = BOTH_PASSES,
    heads: int | None = None,
) -> bool:  # fmt: skip
    """Whether the kernels for Hopper's warpgroups (nsa/ops/kernels/hopper) support these tensors.

    ``heads``: query heads that are rows of one token; None: those of a KV head.
    """
    heads = q.shape[2] // k.shape[2] if heads is None else heads
    rows = triton.next_power_of_2(heads)  # of a token
    # With three eighths of the rows idle, the Triton kernels are about as fast.
    fits = heads == rows <= 64 or (rows <= 16 and 8 * heads >= 5 * rows)
    fits = fits and (q.shape[3], v.shape[3]) in widths
    return architecture() == "sm_90" and q.element_size() == 2 and fits and scale > 0


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of a contiguous (B, S, G, D), seen as a (B * S, G * D) matrix, in boxes of (rows, columns).

    If D is no power of two, a box extends into the next head's columns. The other factor of the product is 0 there.
    """
    height, width = x.shape[0] * x.shape[1], x.shape[2] * x.shape[3]
    return TensorDescriptor(x, [height, width], [width, 1], [rows, columns])


def head_descriptor(x: Tensor, rows: int, heads: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of a contiguous (B, T, H, D), seen as (B * T, H, D), in boxes of ``rows / heads`` tokens."""
    shape = [x.shape[0] * x.shape[1], *x.shape[2:]]
    return TensorDescriptor(x, shape, [x.stride(1), x.stride(2), 1], [rows // heads, heads, columns])


@functools.cache
def _table() -> dict:
    return json.loads(Path(__file__).with_name("tiles.json").read_text())


@functools.cache
def capability() -> int:
    """Compute capability of the current device: 90 for 9.0. The interpreter has 0."""
    if INTERPRETED:
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@functools.cache
def architecture() -> str:
    """The current device's key in tiles.json."""
    if INTERPRETED:
        return "interpreter"
    name = f"sm_{capability()}"
    return name if name in _table() else "sm_80"


def early(programs: int = 0, each: int = 1) -> dict[str, bool]:
    """The constant EARLY of a kernel, and its launch option: see `nsa.ops.kernels.device_functions.begin_launch`.

    Two kinds of launches begin as usual if they are large. Those of training, since their start is a small part of
    their time. And those that need much shared memory: while a multiprocessor still has programs of the launch before,
    which need little, it keeps most of this memory as a cache, and a second program finds no room.

    Args:
        programs: of such a launch; 0 for others. each: how many of them a multiprocessor may get.
    """
    if capability() >= EARLY_FROM and programs <= each * MULTIPROCESSORS:
        return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


@functools.cache
def _entry(arch: str, kernel: str, width: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    """(tile constants, launch options) of the first entry that admits the width and the bytes of an element."""
    for entry in _table()[arch][kernel]:
        if width <= entry.get("max_width", MAX_WIDTH) and itemsize <= entry.get("max_itemsize", 4):
            tile = {key: value for key, value in entry.items() if key.isupper()}
            return tile, {
                key: value for key, value in entry.items() if not key.isupper() and not key.startswith("max_")
            }
    raise AssertionError(f"no tile sizes for {kernel} at width {width} on {arch}")


def tile_sizes(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[dict[str, int], dict[str, int]]:
    """(tile constants, launch options) of a kernel from tiles.json: the first entry for these widths and this dtype."""
    tile, options = _entry(architecture(), kernel, max(q.shape[3], v.shape[3]), q.element_size())
    return dict(tile), dict(options)
