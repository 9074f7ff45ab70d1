"""Benchmarks on a machine without a GPU, and processes of a benchmark whose parent ends."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import start

from tests.conftest import HAS_GPU, ROOT

NEED_A_GPU = (
    *("attention", "decode", "dense_attention", "layer", "models", "prefill", "scaling", "steady", "training"),
    "tune_attention",
)

CHILD = """
import time
from nsa.training.signals import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(100)
"""
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.skipif(HAS_GPU, reason="there is one")
def test_a_benchmark_that_needs_a_gpu_says_so():
    path = ROOT / "benchmarks/training.py"
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "needs an NVIDIA GPU" in done.stderr, done.stderr
    for name in NEED_A_GPU:  # a start of each takes ten seconds
        assert "need_gpu(parser)" in (ROOT / f"benchmarks/{name}.py").read_text(), name


def test_a_crossover_is_the_length_from_which_on_a_call_is_faster() -> None:
    pytest.importorskip("triton")
    from benchmarks.decode import crossovers

    ratios = {"quest": {4: 1.2, 8: 0.9, 16: 1.1, 32: 2.0}, "nsa": {4: 3.0, 8: 2.0, 32: 1.0}, "ours": {4: 9.0}}
    rows = [
        {"shape": "B", "batch": 1, "call": call, "tokens": tokens, "over_dense": ratio}
        for call, found in ratios.items()
        for tokens, ratio in found.items()
    ]
    assert {x["call"]: x["faster_from"] for x in crossovers(rows)} == {"quest": 16, "nsa": None}


class Clock:
    """What Triton asks of a device when it times a call: here each takes 10 ms, and the cache is some memory."""

    def __init__(self) -> None:
        self.memory = torch.full((8,), 7, dtype=torch.int32)

    def get_device_interface(self):
        return SimpleNamespace(synchronize=lambda: None, Event=lambda enable_timing: self)

    def get_empty_cache_for_benchmark(self):
        return self.memory

    def clear_cache(self, cache):
        cache.zero_()

    def record(self): ...

    def elapsed_time(self, other):
        return 10.0


@pytest.mark.parametrize("clean", [False, True])
def test_a_flush_by_reading_writes_nothing(clean: bool, monkeypatch) -> None:
    """Before each call that is timed; and the next call flushes as usual."""
    pytest.importorskip("triton")
    from benchmarks import measure

    clock, written, read = Clock(), [], []
    monkeypatch.setattr(measure, "driver", SimpleNamespace(active=clock))
    monkeypatch.setattr("triton.testing.runtime", SimpleNamespace(driver=measure.driver))
    monkeypatch.setattr(torch, "amax", lambda cache: read.append(cache is clock.memory))
    assert measure.called_ms(lambda: written.append(bool((clock.memory == 0).all())), 30, clean) == 10
    assert not any(written[:1]) and all(written[1:]) != clean
    assert len(read) == (5 + 15) * clean and all(read)  # five calls guess at 2 ms, so 15 are timed
    measure.called_ms(lambda: None, 30)
    assert not clock.memory.any()


def test_blocks_by_means_of_keys() -> None:
    """A key's mean by a loop, from keys that were never rotated; nobody holds more than the best blocks do."""
    from benchmarks.block_choice import by_means, shares
    from nsa import ops
    from nsa.baselines.plan import Turn

    dice, turn = torch.Generator().manual_seed(0), Turn(10000.0 ** -(torch.arange(0, 8, 2) / 8))
    raw, q = (torch.randn(1, 1024, heads, 8, generator=dice) for heads in (2, 4))
    at = torch.arange(1024)[None]
    k, q = turn(raw, at), turn(3 * q, at)
    starts = range(0, 1024 - 32 + 1, 16)
    means = torch.cat([turn(raw[:, i : i + 32].mean(1, keepdim=True), torch.tensor([[i + 31]])) for i in starts], 1)
    lse = ops.compressed_attention(q, means, means, length=32, stride=16, backend="naive")[1]
    sizes = {"length": 32, "stride": 16, "block_size": 64, "num_blocks": 8, "num_initial": 1, "num_local": 2}
    assert torch.equal(by_means(q, k, turn, 32), ops.select_blocks(q, means, lse, **sizes, backend="naive"))
    found = shares(q, k, turn)
    best, there, _ = found["best"]
    assert all((held <= best + 1e-6).all() for held, _, _ in found.values()) and (best <= there + 1e-6).all()
    assert found["random"][0].sum() < 0.8 * best.sum()


def test_a_compression_is_taught_the_attention_of_blocks() -> None:
    """NSA's importance by a loop; and a token that counts, which a mean hides among noise, is learned by weights."""
    from benchmarks.taught_choice import BLOCK, FAR, FIRST, QUERIES, TOKENS, Mean, Pooled, importance, share, teach
    from nsa.baselines.plan import Turn

    dice, turn = torch.Generator().manual_seed(0), Turn(torch.zeros(4))  # nothing is turned
    keys, q = torch.randn(1, TOKENS, 8, generator=dice), torch.randn(1, 2, len(QUERIES), 8, generator=dice)
    found = importance(Mean(32, 8), q, keys, turn).detach()
    starts = range(0, TOKENS - 31, 16)
    means = torch.stack([keys[0, start : start + 32].mean(0) for start in starts])
    for n in (0, 100, len(QUERIES) - 1):
        seen = [m for m, start in enumerate(starts) if start + 31 <= QUERIES[n]]
        p = (q[0, :, n] @ means[seen].T * 8**-0.5).softmax(-1).sum(0)
        for block in (0, 7, 20):
            units = [p[m] for m in seen for unit in (0, 16) if (starts[m] + unit) // BLOCK == block]
            assert found[0, n, block] == pytest.approx(float(sum(units)), rel=1e-4)
    keys[..., :2], q[..., 1] = 0, 6.0
    needles = torch.randint(TOKENS, (20,), generator=dice)
    keys[0, needles, 0], keys[0, needles, 1] = 8.0, 8.0  # the first channel says that a token counts
    mass = torch.zeros(1, len(QUERIES), len(FIRST))
    mass[..., needles // BLOCK] = 1.0
    rows = [(q, keys, mass * FAR)]
    before = share(pooled := Pooled(32, 8), rows, turn)
    teach(pooled, rows, turn, 30)
    assert share(None, rows, turn, "random") < before < share(pooled, rows, turn) <= share(None, rows, turn)


@pytest.mark.parametrize("neighbours", [1, 3, 8])
def test_how_much_the_lists_of_neighbours_share(neighbours: int) -> None:
    """Against sets; a query that is left over, and slots without a token, do not count."""
    pytest.importorskip("triton")
    from benchmarks.dsa import union_over_topk

    tokens, slots, queries = 40, 5, 25
    lists = torch.stack([torch.randperm(tokens)[:slots] for _ in range(2 * queries)]).view(2, queries, slots)
    lists[:, ::4, 3:] = -1
    groups = [
        {int(x) for row in sequence[start : start + neighbours] for x in row if x >= 0}
        for sequence in lists
        for start in range(0, queries - neighbours + 1, neighbours)
    ]
    expected = sum(map(len, groups)) / len(groups) / slots
    assert union_over_topk(lists.int(), tokens, neighbours, at_once=2) == pytest.approx(expected)
    same = torch.arange(slots).int().expand(1, 16, slots)
    assert union_over_topk(same, tokens) == 1 and union_over_topk(torch.arange(80).view(1, 16, 5), 80) == 8


def test_the_share_of_wanted_tokens_that_lists_have() -> None:
    """Against sets; lists are ascending."""
    pytest.importorskip("triton")
    from benchmarks.dsa import share_found

    lists = torch.stack([torch.randperm(30)[:7].sort().values for _ in range(40)]).int().view(2, 2, 10, 7)
    pairs = zip(*(x.reshape(-1, 7).tolist() for x in lists), strict=True)
    expected = sum(len({*ours} & {*theirs}) for ours, theirs in pairs) / 140
    assert share_found(*lists, at_once=3) == pytest.approx(expected)
    assert share_found(lists[0], lists[0]) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="what the kernel of Linux does")
def test_no_process_of_a_benchmark_outlives_its_parent():
    parent = start(["-c", PARENT])
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    stat = ROOT.joinpath(f"/proc/{child}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("it lives on")


def test_the_density_of_a_prompts_lists() -> None:
    """Against a mask of all pairs; the tokens do not fill the last block, and columns lie in listed blocks, too."""
    pytest.importorskip("triton")
    from benchmarks.prefill import BLOCK, density, size_of
    from nsa import ops
    from nsa.baselines.prompt import BlockLists

    tokens = 3 * BLOCK + 11
    made = torch.Generator().manual_seed(0)
    keep = (torch.rand(1, 2, 4, 4, generator=made) < 0.6).tril()
    columns = torch.tensor([[[0, 5, 70, 150, 200], [1, 64, 65, 202, -1]]], dtype=torch.int32)
    mask = keep.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)[:, :, :tokens, :tokens]
    for lists, found in ((None, mask.clone()), (columns, mask.clone())):
        for n in range(2):
            for column in () if lists is None else lists[0, n].tolist():
                found[0, n, :, column] |= column >= 0
        expected = found.tril().sum() / 2 / (tokens * (tokens + 1) / 2)
        assert density(BlockLists(*ops.block_lists(keep), lists), tokens) == pytest.approx(float(expected))

    def nearest(size: int) -> BlockLists:
        number = torch.arange(8)
        back = number[:, None] - number
        return BlockLists(*ops.block_lists(((back >= 0) & (back < size))[None, None]))

    densities = {size: density(nearest(size), 8 * BLOCK) for size in range(2, 9)}
    for wanted in (0.0, 0.31, 0.5, 0.72, 1.0):
        best = min(densities, key=lambda size: abs(densities[size] - wanted))
        assert size_of(nearest, wanted, 8 * BLOCK, 8) == best


def test_the_tables_of_a_prompts_benchmark() -> None:
    from benchmarks.headlines import PREFILL, prefilling
    from benchmarks.report_prefill import prefill

    dense = {"tokens": 65536, "method": "dense", "density": 1.0, "over_cudnn": 1.0}
    row = {"tokens": 65536, "method": "block_sparse", "wanted": 0.1, "size": 52, "density": 0.1}
    row |= {"error": 0.002, "missing": 0.0}
    rows = [dense | {"call": "cudnn", "ms": 60.0, "tflops": 586}, dense | {"call": "flash", "failed": "no"}]
    rows += [row | {"call": "choose", "ms": 0.5}, row | {"call": "attend", "ms": 6.0, "tflops": 586}]
    rows += [row | {"call": "both", "ms": 6.5, "over_cudnn": 9.2}]
    text = "\n".join(prefill({"rows": rows}))
    assert "| 64K | dense, cudnn | 1 | - | 60.0 | 60.0 | 586 | 1.0 | - | - | - |" in text
    assert "| 64K | dense, flash | 1 | - | no | no | - | 1.0 | - | - | - |" in text
    assert "| 64K | block_sparse | 0.1 | 0.50 | 6.00 | 6.50 | 586 | 9.2 | - | 0.002 | 0.0 |" in text
    assert not list(prefill(None))
    found = {
        "device": "NVIDIA H200",
        "torch": "2",
        "triton": "3",
        "cuda": "13",
        "commit": "0123456789",
        "date": "today",
    }
    text = "\n".join(prefilling({PREFILL: found | {"prefill": {"rows": rows}}}))
    assert "| block_sparse, 64K | 0.50 | 6.00 | 9.2 | - | 9 |" in text
    assert not list(prefilling({}))
