"""Every kernel compiles for GPUs that are not here, fits their shared memory, and spills no more than is recorded."""

import json
from pathlib import Path

import pytest

from tests.ops.compile_kernels import SHAPES, SHARED_LIMIT, record_of

# That of the larger shipped configurations; the others take minutes more.
FEW = ("128",)


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
