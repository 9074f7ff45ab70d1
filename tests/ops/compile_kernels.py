"""Compiles every kernel at every entry of the tile table, without a GPU, and prints the resources that it uses.

    python tests/ops/compile_kernels.py [--arch 90] [--shapes NAME ...] [--write]

-> JSON: registers, stack (spills), shared memory, number of wgmma, and number of waits for them that ptxas adds to ours
(it then runs them one by one, for lack of registers). --write stores it as the record that CI compares with.

The host functions run on CPU tensors with a driver that only names the GPU, and each launch becomes a compilation. So
exactly what would be launched is compiled, with its alignment and constants.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).parents[2]))
from nsa.ops.geometry import BlockSizes, Documents, Heads, RotaryLayout, compression_layout, visible_blocks
from nsa.ops.kernels import (
    accumulate,
    block_sparse,
    compression,
    cross_entropy,
    decode,
    few_rows,
    gates,
    hardware,
    index_topk,
    indexer_kl,
    indexer_kl_dense,
    indexer_kl_tiles,
    latents,
    mass,
    native_sparse_decode,
    norm,
    quest,
    ranges,
    rotary,
    row_masks,
    selected,
    selection,
    selection_kl,
    swiglu,
    token_tiles,
    top_p,
)
from nsa.ops.kernels import (
    tokens as listed,
)
from nsa.ops.kernels.hopper import gradient

RECORD = Path(__file__).with_name("kernel_resources.json")
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}
# One shape for each row of the table: head dimensions up to 128, to 192 (two loads of the keys), to 256, and fp32.
SHAPES = {
    "128": (16, 128, 128, torch.bfloat16),
    "128, pairs": (2, 128, 128, torch.bfloat16),
    "64": (16, 64, 64, torch.bfloat16),
    "128, idle rows": (6, 128, 128, torch.bfloat16),
    "128, 5 heads": (5, 128, 128, torch.bfloat16),
    "128, uneven group": (9, 128, 128, torch.bfloat16),
    "192/128": (16, 192, 128, torch.bfloat16),
    "192/128, pairs": (2, 192, 128, torch.bfloat16),
    "192/128, 12 heads": (12, 192, 128, torch.float16),
    "192/128, 32 heads": (32, 192, 128, torch.bfloat16),
    "192/128, uneven group": (9, 192, 128, torch.bfloat16),
    "256": (16, 256, 256, torch.bfloat16),
    "fp32": (6, 64, 64, torch.float32),
}


class NamedOnly:
    """A driver that names a GPU, but has none."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def pretend(arch: int) -> str:
    """Compile for a GPU that is not here. Returns its key in the table of tiles."""
    driver.set_active(NamedOnly(arch))
    table = f"sm_{arch}" if f"sm_{arch}" in hardware._table() else "sm_80"
    hardware.architecture = lambda: table  # type: ignore[assignment]
    hardware.capability = lambda: arch  # type: ignore[assignment]
    return table


def record_of(arch: int) -> Path:
    return RECORD if arch == 90 else RECORD.with_stem(f"{RECORD.stem}_sm_{arch}")


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    ptx = kernel.asm["ptx"]
    wgmma, waits = ptx.count("wgmma.mma_async"), 0
    text = _tool("-res-usage", kernel)
    if wgmma:
        waits = sass(kernel).count("WARPGROUP.DEPBAR") - ptx.count("wgmma.wait_group")
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match, text
    used = {"registers": int(match[1]), "stack": int(match[2]), "shared": kernel.metadata.shared, "wgmma": wgmma}
    return used | {"more_waits": max(0, waits)}


def sass(kernel: triton.compiler.CompiledKernel) -> str:
    return _tool("-sass", kernel)


def _tool(option: str, kernel: triton.compiler.CompiledKernel) -> str:
    """What cuobjdump says about the kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def decoding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Launches of decoding by a query of q (B, T, H, D): all keys; pages, weights and terms; Quest; Twilight; NSA."""
    q, lengths, pages = q[:, 0], torch.zeros(1, dtype=torch.int32), torch.zeros(1, 1, 16, dtype=torch.int32)
    log_weights = torch.zeros(1, 1, 16)
    decode.attention(q, k, v, lengths, None, 1, None, None, 1.0)
    decode.attention(q, k, v, lengths, pages, 16, None, None, 1.0)
    decode.attention(q, k, v, lengths, pages, 16, log_weights, (k, v, pages, log_weights), 1.0)
    for bounds in (k[:, :64], k[:, :64].to(torch.float8_e4m3fn)):
        quest.pages(q, bounds, bounds.clone(), lengths, 16, 16, 0, 1, "sum")
    sketch = k.new_zeros(*k.shape[:3], k.shape[3] // 2, dtype=torch.uint8), torch.zeros(*k.shape[:3], 2)
    top_p.choose(q, *sketch, lengths, pages, 16, 0.9, 1.0)
    decode.append([k, v[:, :1]], [k[:, :1], v[:, :1]], lengths.long())
    rings, tables = [x[:, :32] for x in (k, v)], torch.zeros(2, 1, k.shape[3] // 2)
    weights = [[x.new_zeros(n or x.shape[3], x.shape[3] * m) for x in (k, v)] for n, m in ((0, 32), (32, 1))]
    outer = [x.new_zeros(x.shape[3], x.shape[3]) for x in (k, v)]
    memories, rows = [*rings, k, v], [x[:, :1].contiguous() for x in (k, v, k, v)]
    compression.extend(memories, rows, *weights, outer, [k, v], *tables, lengths.long(), 16)
    gates = q.new_zeros(1, q.shape[1], 3)
    native_sparse_decode.attention(q, [k, v] * 3, gates, lengths, 32, 16, 64, 16, 1, 2, 1.0)


def prefill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Launches of a prompt's attention to blocks, with columns and without, and of the choice of both."""
    blocks, counts = block_sparse.lists_of(torch.zeros(1, 1, len(q[0]) // 64, 4, dtype=torch.bool))
    for columns in (None, torch.zeros(1, 1, 16, dtype=torch.int32)):
        block_sparse.forward(q, k, v, blocks, counts, columns, 64, 64, 1.0)
    mass.lines(mass.probabilities(q[:, -64:].contiguous(), k, 1.0))
    means = mass.means(q, 64), mass.means(k, 64)
    if q.dtype != torch.float32:
        mass.probabilities(*means, 1.0)


def projections(dtype: torch.dtype, width: int, rows: int) -> None:
    """Linear projections of a few rows: plain, with a bias, and with SwiGLU; by many weights, and by few."""
    x, weight = torch.zeros(rows, width, dtype=dtype), torch.empty(8192, width, dtype=dtype)
    few_rows.linear(x, weight, None)
    few_rows.linear(x, weight[:96], weight[:96, 0].contiguous())
    few_rows.swiglu(x, weight, weight)


def long_decoding(heads: int, width: int, v_width: int, tokens: int) -> None:
    """As `decoding`, of memory that has more parts than a merge takes at once; lists with weights alone, too."""
    q, lengths = torch.zeros(1, heads, width, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    k, v = q.new_empty(1, tokens, 1, width), q.new_empty(1, tokens, 1, v_width)
    listed, log_weights = lengths.new_empty(1, 1, tokens // 16), torch.empty(1, 1, tokens // 16)
    terms = k[:, : tokens // 16], v[:, : tokens // 16], listed, log_weights
    decode.attention(q, k, v, lengths, None, 1, None, None, 1.0)
    decode.attention(q, k, v, lengths, listed, 1, None, None, 1.0)
    decode.attention(q, k, v, lengths, listed, 1, log_weights, None, 1.0)
    decode.attention(q, k, v, lengths, None, 1, None, terms, 1.0)
    decode.attention(q, k, v, lengths, listed, 16, None, terms, 1.0)
    low = k[:, : tokens // 16]
    for over_group in ("sum", "max"):
        quest.pages(q, low, low, lengths, 16, tokens // 256, 0, 1, over_group)
    near, compressed = ([x[:, :slots] for x in (k, v)] for slots in (512, tokens // 16 - 1))
    sketch = k.new_empty(1, tokens, 1, width // 2, dtype=torch.uint8), torch.empty(1, tokens, 1, 2)
    top_p.choose(q, *sketch, lengths, listed, 16, 0.9, 1.0)
    top_p.choose(q, *sketch, lengths, None, 1, 0.9, 1.0)
    gate = q.new_zeros(1, heads, 3)
    native_sparse_decode.attention(q, [*compressed, k, v, *near], gate, lengths, 32, 16, 64, 16, 1, 2, 1.0)
    index = q.new_zeros(1, 64, 128), q.new_empty(1, tokens, 128), torch.zeros(1, 64)
    index_topk.topk_decode(*index, lengths, 2048, 0, 0)


def latent_decoding(heads: int, tokens: int) -> None:
    """Decoding from latents of 512 columns and 64 rotary ones, of which the values are a view."""
    q, lengths = torch.zeros(1, heads, 576, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int32)
    latent = q.new_empty(1, tokens, 1, 576)
    decode.attention(q, latent, latent[..., :512], lengths, None, 1, None, None, 1.0)
    decode.attention(q, latent, latent[..., :512], lengths, lengths.new_empty(1, 1, 2048), 1, None, None, 1.0)


def latent_training(heads: int, width: int, v_width: int, dtype: torch.dtype) -> None:
    """Both passes over lists of latents, with the indexer's loss, without, and the loss apart."""
    q, row = torch.zeros(1, 64, heads, width, dtype=dtype), torch.zeros(1, 64, 1, width, dtype=dtype)
    out, lse, lists = q.new_zeros(1, 64, heads, v_width), torch.zeros(1, 64, heads), torch.zeros(1, 64, 2048).int()
    index = q.new_zeros(1, 64, 64, 128), q.new_zeros(1, 64, 128), torch.zeros(1, 64, 64)
    learner = indexer_kl_tiles.ListLearner(*index, latents.head_blocks(q), "tf32")
    latents.forward(q, row, v_width, lists, 1.0)
    latents.backward(q, row, v_width, lists, out, lse, lse, 1.0)
    latents.backward(q, row, v_width, lists, out, lse, lse, 1.0, learner)
    latents.learn(q, row, lists, lse, 1.0, learner)


def compile_all(arch: int, shapes: Collection[str]) -> dict[str, dict[str, int]]:
    """Resources by kernel and shape; ``shapes``: those of SHAPES that are compiled."""
    table = pretend(arch)
    report: dict[str, dict[str, int]] = {}
    shape_name = ""

    def compile_instead(self: JITFunction, grid: tuple) -> object:
        def call(*args: object, **kwargs: object) -> None:
            module = self.fn.__module__.removeprefix("nsa.ops.kernels.")
            of = ""
            if module == "hopper.gradient":
                of = {(1, False): " of a run", (0, True): " of lists", (2, True): " of all"}[
                    kwargs["RUNS"], kwargs["LISTED"]
                ]
            elif kwargs.get("Bits") is not None:
                of = " of lists"
            elif module == "top_p":
                of = " of lists" if kwargs["LISTED"] else " of all"
            elif module.endswith("block_sparse") and "COLUMNS" in kwargs:
                of = " with columns" if kwargs["COLUMNS"] else ""
            elif module == "selection_kl" and "DELTA" in kwargs:
                of = (
                    " of tokens"
                    if kwargs["UNITS"] == 1
                    else " and deltas"
                    if kwargs["DELTA"]
                    else " of compressed keys"
                )
            elif module == "quest" and args[1].element_size() == 1:
                of = " of fp8"
            elif module == "mass" and args[0].dtype == torch.float32 and "fp32" not in shape_name:
                of = " of means"
            elif "Sums" in kwargs and "P" in kwargs and kwargs["P"] is None:
                of = " of sums alone"
            elif kwargs.get("Sums") is not None:
                of = " with sums"
            elif kwargs.get("BACKWARD") is True:
                of = " backward"
            elif module == "few_rows":
                of = " with SwiGLU" if args[2] is not None else " with a bias" if args[3] is not None else ""
            elif "TERMS" in kwargs:
                of = (" of lists" if kwargs["LISTED"] else " of all") + (" with terms" if kwargs["TERMS"] else "")
                of += " with weights" if kwargs["WEIGHTED"] and not kwargs["TERMS"] else ""
            key = f"{module}.{self.__name__}{of} {shape_name}"
            compiled = self.warmup(*args, grid=grid, **kwargs)
            if key not in report:
                report[key] = resources(compiled)

        return call

    JITFunction.__getitem__ = compile_instead  # type: ignore[method-assign]
    for name in shapes:
        heads, width, v_width, dtype = SHAPES[name]
        shape_name = name
        tokens = 256
        q = torch.zeros(1, tokens, heads, width, dtype=dtype)
        k, v = torch.zeros(1, tokens, 1, width, dtype=dtype), torch.zeros(1, tokens, 1, v_width, dtype=dtype)
        lse = torch.zeros(1, tokens, heads)
        documents = Documents.of(tokens, 0, None, q.device)
        run = visible_blocks(documents, 32, 16)
        out, _ = ranges.forward(q, k, v, *ranges.int32_runs(run), 1.0)
        delta = ranges.delta(out, out)
        ranges.backward(q, k, v, out, lse, delta, *ranges.int32_runs(run), 1.0)
        selection.select(q, k, lse, documents, run, 32, 16, 64, 16, 1, 2, 1.0)
        teaching = BlockSizes(32, 16, 64, 1, 2, 512)
        selection_kl.divergence(q, k[:, :15].contiguous(), k, lse, None, 0, None, teaching, tokens, 1.0)
        indices = torch.zeros(1, tokens, 1, 16, dtype=torch.int32)
        layout = selected.BlockLayout.of(documents, indices, tokens, 64)
        selected.forward(q, k, v, layout, 64, 1.0)
        selected.backward(q, k, v, out, lse, delta, layout, 64, 1.0)
        blocks = compression_layout(documents, 32, 16)
        inner, position, outer = (k.new_zeros(size) for size in ((width, 32 * width), (32, width), (v_width, width)))
        out_cmp, pre = compression.forward(k, inner, position, outer, blocks.start, 32)
        compression.backward(out_cmp, k, inner, position, outer, pre, blocks, 32, 16)
        lists = torch.zeros(1, tokens, 64, dtype=torch.int32)
        listed.forward(q, k, v, lists, 1.0)
        listed.backward(q, k, v, lists, out, lse, delta, 1.0)
        if max(width, v_width) * q.element_size() <= token_tiles.WIDEST:
            token_tiles.forward(q, k, v, lists, 1.0)
            token_tiles.tiles_of_mask(torch.zeros(1, tokens, tokens, dtype=torch.bool), q.element_size())
            token_tiles.backward(q, k, v, lists, out, lse, delta, 1.0)
        index = torch.zeros(1, tokens, 4, 128, dtype=dtype), torch.zeros(1, tokens, 128, dtype=dtype)
        indexer_kl.divergence(*index, torch.zeros(1, tokens, 4), q, k, lse, lists, 1.0)
        for number in (16, 64) if name == "128" else (16,):
            shape_name = f"{name}, 64 index heads" if number == 64 else name
            wide = torch.zeros(1, tokens, number, 128, dtype=dtype), index[1], torch.zeros(1, tokens, number)
            indexer_kl_tiles.attention_backward(q, k, v, lists, out, lse, delta, 1.0, *wide)
        shape_name = name
        seen = documents.bounds[documents.query_document].int(), documents.query_position.int()
        indexer_kl_dense.divergence(*index, torch.zeros(1, tokens, 4), q, k, lse, *seen, 1.0)
        indexer_kl_dense.divergence(*index, torch.zeros(1, tokens, 4), q, k, lse, *seen, 1.0, lists)
        weights = torch.zeros(1, tokens, heads, 3, dtype=dtype)
        gates.combine(weights, [out] * 3)
        gates.combine_backward(weights, out, [out] * 3, [lse] * 3)
        if selected.on_hopper(q, k, v, 64, 1.0):
            lists, runs = selected.unions(layout, gradient.tokens_per_tile(heads), 64), [*ranges.int32_runs(run)] * 2
            gradient.query_gradient(
                q, [k, v] * 3, out, *[torch.stack([lse] * 3)] * 2, runs, lists, layout.position, 1.0, q
            )
        prefill(q, k, v)
        decoding(q, k, v)
        parts = [
            Heads(heads, width, "rotate"),
            Heads(1, width, "rotate"),
            Heads(1, v_width),
            Heads(heads, 3, "sigmoid"),
        ]
        joint = torch.zeros(1, tokens, sum(part.columns for part in parts), dtype=dtype, requires_grad=True)
        tables, bias = torch.zeros(2, tokens, width // 2), torch.zeros(3 * heads, dtype=dtype)
        split = rotary.split_heads(joint, parts, *tables, None, bias)
        torch.autograd.grad(split, joint, [torch.zeros_like(part) for part in split])
        shape_name = f"{name}, rows"  # of compressed keys
        k = k.flatten(2).requires_grad_()
        (rotated,) = rotary.split_heads(k, parts[1:2], *tables, torch.arange(tokens), None)
        torch.autograd.grad(rotated, k, rotated)
    for dtype in (torch.bfloat16, torch.float32):
        shape_name = str(dtype).removeprefix("torch.")
        gate, up = (torch.zeros(64, 64, dtype=dtype, requires_grad=True) for _ in range(2))
        out = swiglu.swiglu(gate, up)
        torch.autograd.grad(out, (gate, up), out)
        for width in (768, 2048, 8192):
            shape_name = f"{str(dtype).removeprefix('torch.')}, {width} wide"
            x, weight = torch.zeros(64, width, dtype=dtype, requires_grad=True), torch.zeros(width, dtype=dtype)
            for delta in (None, x.detach()):
                both = norm.add_rms_norm(x, weight, 1e-6, delta)
                torch.autograd.grad(both, x, both)
        shape_name = str(dtype).removeprefix("torch.")
        logits, targets, row = torch.zeros(64, 32768, dtype=dtype), torch.zeros(64, dtype=torch.int64), torch.zeros(64)
        cross_entropy.statistics(logits, targets, 0)
        cross_entropy.logit_gradients(logits, targets, row, row, 0)
        q_idx, k_idx = torch.zeros(1, 256, 4, 128, dtype=dtype), torch.zeros(1, 256, 128, dtype=dtype)
        seen = torch.zeros(256, dtype=torch.int32), torch.arange(256, dtype=torch.int32)
        index_topk.topk(q_idx, k_idx, torch.zeros(1, 256, 4), *seen, 0, 64, 0, 0, False)
        if table == "sm_90" and dtype == torch.bfloat16:
            shape_name = "fp8"
            index_topk.topk(q_idx, k_idx, torch.zeros(1, 256, 4), *seen, 0, 64, 0, 0, True)
            shape_name = "bfloat16"
        index_topk.topk_decode(q_idx[:, 0], k_idx, torch.zeros(1, 4), torch.zeros(1, dtype=torch.int32), 64, 0, 0)
        for width, rows in (*itertools.product((2048, 8192), (1, 2)), (5504, 2), (28672, 1), (28672, 2)):
            shape_name = f"{str(dtype).removeprefix('torch.')}, {rows} rows of {width}"
            projections(dtype, width, rows)
        shape_name = str(dtype).removeprefix("torch.")
        accumulate.Accumulator(torch.zeros(64), [64], [0]).add([torch.zeros(64, dtype=dtype)])
    shape_name = "short rows"
    seen = torch.zeros(2, 512, dtype=torch.int32)
    index_topk.choose_rows(torch.zeros(512, 1024), seen, torch.zeros(512, 64, dtype=torch.int32), 64, 0, 1)
    for size in (4096, 16384):
        shape_name = f"rows of {size}"
        row_masks.top(torch.zeros(2, size), 3)
        row_masks.cover(torch.zeros(2, size), 0.5)
        row_masks.drawn(torch.zeros(2, 3).long(), torch.zeros(2, size).long(), 5, 3)
    for tokens in (2**16, 2**19):
        shape_name = f"128, memory of {tokens}"
        long_decoding(16, 128, 128, tokens)
    for heads in (16, 128):
        shape_name = f"latents, {heads} heads"
        latent_decoding(heads, 2**16)
        latent_training(heads, 576, 512, torch.bfloat16)
    shape_name = "latents of 320, 20 heads"
    latent_training(20, 320, 256, torch.bfloat16)
    shape_name = "latents of 288, 40 heads, fp32"
    latent_training(40, 288, 256, torch.float32)
    for place, pairs in itertools.product(("first", "last"), ("half-split", "interleaved")):
        shape_name = f"{place} 64 of 192, {pairs}"
        x = torch.zeros(1, 256, 2 * 192, dtype=torch.bfloat16, requires_grad=True)
        turning = [Heads(2, 192, "rotate", RotaryLayout(64, place, pairs))]
        (turned,) = rotary.split_heads(x, turning, *torch.zeros(2, 256, 32), None, None)
        torch.autograd.grad(turned, x, turned)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if options.write and len(options.shapes) < len(SHAPES):
        parser.error("--write keeps all shapes: leave out --shapes")
    text = json.dumps(compile_all(options.arch, options.shapes), indent=1)
    if options.write:
        record_of(options.arch).write_text(text + "\n")
    print(text)
