"""A correct handover between warpgroups, for which compute-sanitizer's racecheck reports false errors.

    compute-sanitizer --tool racecheck python tests/ops/handover.py

Two warpgroups fill a slot each, and a third one reads both. When one is done, its threads synchronise and one of them
arrives at an mbarrier that the others wait for. By PTX's memory model that orders all accesses, and the sums are
correct. racecheck (CUDA 13.0, H200) still reports races between reads and writes: 17 errors. So its reports on the
kernels in nsa/ops/kernels/hopper that use this handover mean nothing.
"""

import sys

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def _write(ring, full, empty, rounds, PART: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [8, 4], [4, 1], [1, 0])
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    for i in range(rounds):
        mbarrier.wait(empty.index(PART), (i & 1) ^ 1)
        ring.index(PART).store(row[:, None] + column[None, :] + i)
        mbarrier.arrive(full.index(PART), count=1)


@gluon.jit
def _read(ring, full, empty, Out, rounds):
    layout: gl.constexpr = gl.BlockedLayout([1, 32], [16, 2], [4, 1], [1, 0])
    total = gl.zeros([64, 64], gl.int32, layout)
    for i in range(rounds):
        for part in range(2):
            mbarrier.wait(full.index(part), i & 1)
            total += ring.index(part).load(layout)
            mbarrier.arrive(empty.index(part), count=1)
    gl.store(Out + gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.sum(total, 1))


@gluon.jit
def handover_kernel(Out, rounds):
    """Out (64,) int32: per row, the sum of what was handed over."""
    ring = gl.allocate_shared_memory(gl.int32, [2, 64, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [
            (_write, (ring, full, empty, rounds, 0)),
            (_write, (ring, full, empty, rounds, 1)),
            (_read, (ring, full, empty, Out, rounds)),
        ],
        [4, 4],
        [64, 128],
    )


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("handover.py needs an NVIDIA GPU, and a torch that is built for it")
    out, rounds = torch.zeros(64, dtype=torch.int32, device="cuda"), 5
    handover_kernel[(1,)](out, rounds, num_warps=4)
    rows = torch.arange(64, dtype=torch.int32, device="cuda")
    once = 2 * (64 * rows + 64 * 63 // 2)
    right = torch.equal(out, rounds * once + 2 * 64 * rounds * (rounds - 1) // 2)
    print("sums are right" if right else "sums are WRONG")
