"""Times a prompt's attention to chosen blocks and lines (MInference's patterns) against dense attention.

    python benchmarks/prefill.py [--tokens 16384 32768 65536 131072] [--densities 0.05 0.1 0.2] [--out FILE]
        [--methods block_sparse vertical_slash] [--milliseconds 150] [--seconds 300]

bf16, batch 1, causal, 32 query heads on 8 KV heads of 128; the median of replays of a CUDA graph with the L2 cache
flushed between them. Dense attention by torch's cuDNN and FlashAttention is timed in the same run. Each method has
three rows: its choice (`choose`: from q and k to lists), attention to the lists (`attend`), and both together (`both`).
`over_cudnn`, `over_flash`: the time of dense attention over this one.

A density is the share of all visible pairs of a query and a key that are attended to, of blocks of 64. `size` is the
setting that comes closest: blocks of each block of queries, or lines, of which 1000 : 6096 are columns and diagonals,
as in MInference's release. Blocks that diagonals cross are attended to whole.

Queries and keys are random beside a part that turns with the position, slowly, and that all tokens of a head share. So
scores depend on the distance, as with rotary embedding, and the chosen diagonals lie beside each other. How much
blocks of scattered diagonals would cost is not measured: they cover nearly everything.

`error`: the relative error of a few tiles of queries at this length against fp32. `missing`: the share of the blocks
that the portable path chooses and the kernels do not.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.measure import ceilings, environment, need_gpu, relative_error, row, time_ms
from nsa import ops
from nsa.baselines.prompt import BlockLists, mask_of, pairs

HEADS, GROUPS, WIDTH, BLOCK = 32, 8, 128, 64
COLUMNS = 1000 / 7096  # share of the lines that are columns
TURNING = 32  # pairs of dims that turn with the position
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Prompt:
    """Queries, keys and values of one layer."""

    def __init__(self, tokens: int, device: str = "cuda") -> None:
        self.tokens = tokens
        made = torch.Generator(device).manual_seed(tokens)
        normal = partial(torch.randn, device=device, generator=made)
        wavelengths = 256 * 2 ** (torch.arange(TURNING, device=device) / TURNING * 9)  # up to 131,072 tokens
        angles = torch.arange(tokens, device=device)[:, None, None] * (2 * torch.pi / wavelengths)  # (T, 1, pairs)

        def turning(heads: int) -> Tensor:
            phases = 2 * torch.pi * torch.rand(heads, TURNING, device=device, generator=made)
            x = normal(1, tokens, heads, WIDTH)
            x[0, :, :, :TURNING] = 3 * (angles + phases).cos()
            x[0, :, :, TURNING : 2 * TURNING] = 3 * (angles + phases).sin()
            return x.bfloat16()

        self.q, self.k = turning(HEADS), turning(GROUPS)
        self.v = normal(1, tokens, GROUPS, WIDTH).bfloat16()

    def dense(self, backend: SDPBackend) -> Tensor:
        with sdpa_kernel([backend]):
            q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def attend(self, lists: BlockLists) -> Tensor:
        return ops.block_sparse_attention(
            self.q, self.k, self.v, lists.blocks, lists.counts, columns=lists.columns, tile_size=BLOCK, block_size=BLOCK
        )

    def block_sparse(self, size: int, backend: str = "auto") -> BlockLists:
        return BlockLists(*ops.pooled_blocks(self.q, self.k, block_size=BLOCK, num_blocks=size, backend=backend))

    def vertical_slash(self, size: int, backend: str = "auto") -> BlockLists:
        columns = min(size - 1, max(1, round(COLUMNS * size)))
        lines = ops.vertical_slash_lines(
            self.q, self.k, num_columns=columns, num_diagonals=size - columns, backend=backend
        )
        return BlockLists(*ops.slash_blocks(lines[1], tokens=self.tokens, block_size=BLOCK, backend=backend), lines[0])

    def error(self, lists: BlockLists) -> float:
        """Of a few tiles of queries, over all keys that they see, in fp32 from the same numbers."""
        tiles = -(-self.tokens // BLOCK)
        out, worst = self.attend(lists), 0.0
        for tile in sorted({0, tiles // 3, 2 * tiles // 3, tiles - 1}):
            start, stop = tile * BLOCK, min((tile + 1) * BLOCK, self.tokens)
            q, k, v = self.q[:, start:stop].float(), self.k[:, :stop].float(), self.v[:, :stop].float()
            here = lists.blocks[:, :, tile : tile + 1], lists.counts[:, :, tile : tile + 1]
            options: dict[str, Any] = {"tile_size": BLOCK, "block_size": BLOCK, "columns": lists.columns}
            exact = ops.block_sparse_attention(q, k, v, *here, **options, backend="torch")
            worst = max(worst, relative_error(out[:, start:stop], exact))
        return float(f"{worst:.2g}")


METHODS: dict[str, Callable[..., BlockLists]] = {
    "block_sparse": Prompt.block_sparse,
    "vertical_slash": Prompt.vertical_slash,
}


def attended(lists: BlockLists, tokens: int) -> float:
    """Pairs of a query and a key of one query head, mean over the KV heads."""
    return float(pairs(lists, tokens, BLOCK).mean())


def density(lists: BlockLists, tokens: int) -> float:
    """The share of all visible pairs."""
    return attended(lists, tokens) / (tokens * (tokens + 1) / 2)


def size_of(choose: Callable[[int], BlockLists], wanted: float, tokens: int, most: int) -> int:
    """The setting in 2 .. ``most`` whose density is closest to the wanted one; density rises with it."""
    low, high = 2, most
    while low < high:
        middle = (low + high) // 2
        if density(choose(middle), tokens) < wanted:
            low = middle + 1
        else:
            high = middle
    return min((low, max(2, low - 1)), key=lambda size: abs(density(choose(size), tokens) - wanted))


def missing(lists: BlockLists, exact: BlockLists) -> float:
    """The share of the blocks of ``exact`` that ``lists`` lacks."""
    rows = exact.blocks.shape[2]
    masks = []
    for blocks, counts, _ in (exact, lists):
        there = torch.arange(blocks.shape[3], device=blocks.device) < counts[..., None]
        masks.append(mask_of(blocks.masked_fill(~there, -1), rows))
    return float(f"{(masks[0] & ~masks[1]).sum() / masks[0].sum():.2g}")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def rows_of(options: argparse.Namespace, tokens: int, stream: torch.cuda.Stream, end: float) -> list[dict[str, Any]]:
    """Rows of one length. None begins after ``end`` (`time.monotonic`)."""
    prompt, rows = Prompt(tokens), []
    visible = tokens * (tokens + 1) / 2
    flops = 4.0 * HEADS * WIDTH
    once = 2.0 * tokens * WIDTH * (2 * HEADS + 2 * GROUPS)  # bytes of q, k, v and the output

    def add(found: dict[str, Any], call: Callable[[], object], operations: float | None) -> None:
        found = {"tokens": tokens} | found
        if time.monotonic() > end:
            found["left_out"] = True
        else:
            try:
                with torch.no_grad():
                    milliseconds, recorded = time_ms(call, stream, each=options.milliseconds)
                found |= row(milliseconds, operations, once if operations else None) | {"recorded": recorded}
            except Exception as error:  # the others go on
                found["failed"] = _said(error)
        for name in DENSE:
            theirs = [x["ms"] for x in rows if x["method"] == "dense" and x["call"] == name and "ms" in x]
            if theirs and "ms" in found:
                found[f"over_{name}"] = round(theirs[0] / max(found["ms"], 1e-6), 2)
        print(json.dumps(found), flush=True)
        rows.append(found)

    for name, backend in DENSE.items():
        add({"method": "dense", "call": name, "density": 1.0}, partial(prompt.dense, backend), flops * visible)
    for method in options.methods:
        for wanted in options.densities:
            found: dict[str, Any] = {"method": method, "wanted": wanted}
            try:
                choose = partial(METHODS[method], prompt)
                most = -(-tokens // BLOCK) if method == "block_sparse" else max(3, int(wanted * tokens))
                portable = partial(choose, backend="torch")  # the kernels compile for a size
                size = size_of(portable, wanted, tokens, most)
                lists = choose(size)
                found |= {"size": size, "density": round(density(lists, tokens), 4), "error": prompt.error(lists)}
                found["missing"] = missing(lists, portable(size))
            except Exception as error:  # the others go on
                found |= {"call": "both", "tokens": tokens, "failed": _said(error)}
                print(json.dumps(found), flush=True)
                rows.append(found)
                continue
            operations = flops * attended(lists, tokens)
            add(found | {"call": "choose"}, partial(choose, size), None)
            add(found | {"call": "attend"}, partial(prompt.attend, lists), operations)
            add(found | {"call": "both"}, lambda: prompt.attend(choose(size)), operations)  # noqa: B023 - called here
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768, 65536, 131072])
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--milliseconds", type=int, default=150, help="of the warm-up and of the measuring of a row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no row begins")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    end, stream, rows = time.monotonic() + options.seconds, torch.cuda.Stream(), []
    for tokens in sorted(options.tokens):
        rows += rows_of(options, tokens, stream, end)
        torch.cuda.empty_cache()
    if options.out:
        report = environment() | {"command": shlex.join(["python", *sys.argv])}
        report |= {"measured_ceiling": ceilings(), "prefill": {"rows": rows}}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
