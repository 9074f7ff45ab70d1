"""Every kernel compiles for GPUs that are not here, fits their shared memory, and spills no more than is recorded."""

import json
import re
from pathlib import Path

import pytest

from tests.ops.compile_kernels import SHAPES, SHARED_LIMIT, record_of

# That of the larger shipped configurations; the others take minutes more.
FEW = ("128",)
# Loads of weights, loads of x and products of a launch, in the order of its instructions.
ORDER = """
import re
import torch
from tests.ops.compile_kernels import JITFunction, few_rows, pretend, sass

def show(self, grid):
    def call(*args, **kwargs):
        names = re.findall("LDG[.A-Z0-9]*|FMUL|FFMA", sass(self.warmup(*args, grid=grid, **kwargs)))
        kinds = {"LDG.E.EF.128": "w", "LDG.E.128": "x", "FMUL": ".", "FFMA": "."}
        print("".join(kinds.get(name, "?") for name in names))
    return call

pretend(90)
JITFunction.__getitem__ = show
for rows in (1, 2):
    for outputs, columns in ((2912, 2048), (2048, 8192)):
        x, w = (torch.empty(n, columns, dtype=torch.bfloat16) for n in (rows, outputs))
        few_rows.linear(x, w, None)
    few_rows.swiglu(x[:, :2048].contiguous(), *torch.empty(2, 8192, 2048, dtype=torch.bfloat16))
"""


@pytest.mark.parametrize(
    ("arch", "shapes"),
    [(90, FEW), *(pytest.param(arch, tuple(SHAPES), marks=pytest.mark.slow) for arch in (90, 80, 100))],
    ids=lambda value: value if isinstance(value, int) else "few" if value == FEW else "all",
)
@pytest.mark.time_limit(1800)
def test_kernels_compile(arch: int, shapes: tuple[str, ...], run_python, tmp_path: Path) -> None:
    """After a change that is meant: python tests/ops/compile_kernels.py --arch 90 --write, likewise 80 and 100."""
    done = run_python(
        "tests/ops/compile_kernels.py", "--arch", str(arch), "--shapes", *shapes, timeout=900, TRITON_INTERPRET="0",
        OMP_NUM_THREADS="1", TRITON_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report, known = json.loads(done.stdout), json.loads(record_of(arch).read_text())
    if shapes == tuple(SHAPES):
        assert not known.keys() - report.keys(), "recorded, but not compiled"
    for kernel, used in report.items():
        assert used["shared"] <= SHARED_LIMIT[arch], f"{kernel} needs {used['shared']} bytes of shared memory"
        assert kernel in known, f"{kernel} is not in {record_of(arch).name}"
        assert used["stack"] <= known[kernel]["stack"], f"{kernel} spills: {used['stack']} bytes of stack"
        assert used["more_waits"] <= known[kernel]["more_waits"], f"ptxas has {kernel} wait for single products"
        assert bool(used["wgmma"]) == bool(known[kernel]["wgmma"]), f"{kernel} lost or gained wgmma"


def test_weights_of_few_rows_are_under_way_before_the_first_product(run_python, tmp_path: Path) -> None:
    """ptxas likes to move a load behind products of earlier ones, which then waits for them. All are of 16 bytes."""
    done = run_python(
        "-c", ORDER, timeout=300, TRITON_INTERPRET="0", OMP_NUM_THREADS="1", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    loads = [re.match("(w+)x[^w?]*$", line) for line in done.stdout.split()]
    assert all(loads), done.stdout
    assert [len(found[1]) for found in loads if found] == [4, 8, 8] * 2
