"""Every kernel compiles for GPUs that are not here, fits their shared memory, and spills no more than is recorded."""

import json
from pathlib import Path

import pytest

from tests.ops.compile_kernels import SHARED_LIMIT, overwritten_operands, record_of


@pytest.mark.parametrize(
    "arch", [90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)]
)
def test_kernels_compile(arch: int, run_python, tmp_path: Path) -> None:
    """After a change that is meant: python tests/ops/compile_kernels.py --arch 90 --write, likewise 80 and 100."""
    done = run_python(
        "tests/ops/compile_kernels.py", "--arch", str(arch), timeout=900, TRITON_INTERPRET="0", OMP_NUM_THREADS="1",
        TRITON_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    report, known = json.loads(done.stdout), json.loads(record_of(arch).read_text())
    for kernel, used in report.items():
        assert used["shared"] <= SHARED_LIMIT[arch], f"{kernel} needs {used['shared']} bytes of shared memory"
        assert not used.get("overwritten"), f"{kernel}: ptxas gave registers away that later products read"
        assert kernel in known, f"{kernel} is not in {record_of(arch).name}"
        assert used["stack"] <= known[kernel]["stack"], f"{kernel} spills: {used['stack']} bytes of stack"
        assert bool(used["wgmma"]) == bool(known[kernel]["wgmma"]), f"{kernel} lost or gained wgmma"


LOOP = """
LDSM.16.M88.4 R132, [R4+UR22] ;
HGMMA.64x64x16.F32.BF16 R24, R132, gdesc[UR32], RZ, !UPT ;
WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
{pack}
HGMMA.64x64x16.F32.BF16 R88, {left}, gdesc[UR16].tnspB, R88 ;
{last}
@P1 BRA `(.L_x_9) ;
{after}
"""


@pytest.mark.parametrize(
    ("pack", "left", "last", "after", "count"),
    [
        ("F2FP.BF16.F32.PACK_AB R152, R120, R25 ;", "R152", "", "MOV R132, R1 ;", 0),  # used again when all is done
        ("F2FP.BF16.F32.PACK_AB R133, R120, R25 ;", "R132", "", "", 1),
        ("@P0 LDG.E.64 R134, desc[UR14][R24.64] ;", "R152", "", "", 2),
        ("", "R152", "IMAD.WIDE R132, R7, R8, R9 ;", "", 2),  # on the way back
    ],
)
def test_operands_that_are_overwritten_are_found(pack: str, left: str, last: str, after: str, count: int) -> None:
    assert overwritten_operands(LOOP.format(pack=pack, left=left, last=last, after=after)) == count
