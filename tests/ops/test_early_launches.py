"""Launches of a decoding step that begin before the one before has ended: what their programs do first."""

import json

import pytest
import torch

pytest.importorskip("triton")
from nsa.models import Decoder, DecodingSteps
from nsa.ops.kernels import hardware
from tests.models.test_decoder import small
from tests.models.test_decoding_steps import BY_KERNELS

# In the order of its instructions, the first word of each that reads, writes or prefetches memory, or waits.
ORDER = """
import json, re, sys
import torch
from nsa.ops.kernels import compression, decode, few_rows, index_topk, norm, quest, rotary, swiglu, top_p
from tests.ops import compile_kernels as compiled

arch, found = int(sys.argv[1]), {}
IN_PTX = r"\\bgriddepcontrol[.a-z_]*|\\b(?:ld|st|atom|red|prefetch|cp)[.][.:a-zA-Z0-9_]*"
IN_SASS = r"\\b(ACQBULK|PREEXIT|UBLKPF|LDG|STG|LDGSTS|ATOMG?|REDG?|LD|ST|CCTL\\w*)\\b"

def look(self, grid):
    def call(*args, **kwargs):
        kernel = self.warmup(*args, grid=grid, **kwargs)
        words = re.findall(IN_PTX, re.sub("//.*", "", kernel.asm["ptx"]))
        words = [word for word in words if not word.startswith(("ld.param", "ld.shared", "st.shared"))]
        sass = re.findall(IN_SASS, compiled.sass(kernel))
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.__name__}"
        found.setdefault(name, []).append([kernel.metadata.launch_pdl, words, sass])
    return call

compiled.JITFunction.__getitem__ = look
compiled.pretend(arch)
q, rows = torch.zeros(1, 256, 16, 128, dtype=torch.bfloat16), torch.zeros(1, 256, 1, 128, dtype=torch.bfloat16)
compiled.decoding(q, rows, rows.clone())
compiled.projections(torch.bfloat16, 2048, 1)
index = torch.zeros(1, 4, 128), torch.zeros(1, 256, 128), torch.zeros(1, 4)
index_topk.topk_decode(*index, torch.zeros(1, dtype=torch.int32), 64, 0, 0)
size = 2 * index_topk.SHORT_ROW
indices = torch.zeros(2, 64, dtype=torch.int32)
index_topk.choose_rows(torch.zeros(2, size), torch.zeros(2, 2, dtype=torch.int32), indices, 64, 0, 1)
for tokens in (1, 2**16):
    x = torch.empty(tokens, 1024, dtype=torch.bfloat16)
    norm.add_rms_norm(x, x[0], 1e-6, x)
    swiglu.swiglu(x, x)
    heads = [compiled.Heads(8, 128, "rotate")]
    rotary.split_heads(x[None], heads, *torch.empty(2, tokens, 64), None, None)
print(json.dumps(found))
"""
OF_A_STEP = {
    *("compression.newest_kernel", "decode.append_kernel", "decode.merge_kernel", "decode.split_kernel"),
    *("few_rows.few_rows_kernel", "index_topk.bound_kernel", "index_topk.candidate_kernel"),
    *("index_topk.short_row_kernel", "index_topk.token_score_kernel", "index_topk.topk_kernel"),
    *("native_sparse_decode.chosen_kernel", "native_sparse_decode.importance_kernel"),
    *("native_sparse_decode.near_kernel", "norm.norm_kernel", "quest.bound_kernel", "rotary.heads_kernel"),
    *("swiglu.swiglu_kernel", "top_p.estimate_kernel", "top_p.list_kernel", "top_p.threshold_kernel"),
}
ALSO_OF_TRAINING = {"norm.norm_kernel", "rotary.heads_kernel", "swiglu.swiglu_kernel"}
WAIT, LET = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


@pytest.fixture
def launches(run_python, tmp_path):
    def of(arch: int) -> dict[str, list]:
        done = run_python(
            "-c", ORDER, str(arch), timeout=300, TRITON_INTERPRET="0", OMP_NUM_THREADS="1",
            TRITON_CACHE_DIR=str(tmp_path),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    return of


@pytest.mark.parametrize("arch", [90, pytest.param(100, marks=pytest.mark.slow)])
def test_a_program_waits_before_it_reads_or_writes(launches, arch: int) -> None:
    """See `device_functions.begin_launch`. Only a prefetch of weights to the L2 cache comes before the wait."""
    found = launches(arch)
    assert found.keys() == OF_A_STEP
    for name, kernels in found.items():
        assert [early for early, _, _ in kernels].count(False) == (name in ALSO_OF_TRAINING), name
        for early, ptx, sass in kernels:
            waits = [word for word in ptx if word.startswith("griddepcontrol")]
            assert waits == ([WAIT, LET] if early else []), name
            if not early:
                continue
            first = ptx.index(WAIT)
            assert ptx[first + 1] == LET, (name, ptx)
            prefetched = ptx[:first]
            if name == "few_rows.few_rows_kernel":
                assert prefetched, name
                assert set(prefetched) == {"cp.async.bulk.prefetch.L2.global"}, (name, prefetched)
            else:
                assert not prefetched, (name, prefetched)
            if arch == 90:
                before = sass[: sass.index("ACQBULK")]
                assert set(before) <= {"UBLKPF"}, (name, sass)
                assert sass.index("PREEXIT") > sass.index("ACQBULK"), (name, sass)


def test_older_gpus_launch_one_after_the_other(launches) -> None:
    for name, kernels in launches(80).items():
        for early, ptx, _ in kernels:
            assert not early, name
            assert not any("griddepcontrol" in word or "prefetch" in word for word in ptx), name


def test_large_launches_of_training_or_with_much_shared_memory_begin_as_usual(monkeypatch) -> None:
    monkeypatch.setattr(hardware, "capability", lambda: 90)
    for programs, each, expected in ((0, 1, True), (132, 1, True), (133, 1, False), (264, 2, True), (265, 2, False)):
        options = hardware.early(programs, each)
        assert options["EARLY"] == options.get("launch_pdl", False) == expected
    monkeypatch.setattr(hardware, "capability", lambda: 0)  # the interpreter's
    assert hardware.early() == {"EARLY": False}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_steps_of_a_graph_have_the_bits_of_launches_one_after_the_other(kind: str, monkeypatch) -> None:
    """A launch that does not wait for all before it would read what they have not written yet, now and then."""
    torch.manual_seed(0)
    decoder = Decoder(*small(kind, **BY_KERNELS)).cuda().eval()
    ids, more = torch.randint(0, 97, (2, 40), device="cuda"), torch.randint(0, 97, (64, 2), device="cuda")

    def logits(capture: bool) -> torch.Tensor:
        steps = DecodingSteps(decoder, ids, 104, products="triton", capture=capture)
        return torch.stack([steps.step(x).clone() for x in more])

    found = [logits(capture=True) for _ in range(5)]
    monkeypatch.setattr(hardware, "EARLY_FROM", 10**6)  # none does
    alone = logits(capture=False)
    assert all(torch.equal(x, alone) for x in found)
