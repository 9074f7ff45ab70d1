"""Times decoding: one query token per sequence on caches of several lengths, and steps of a whole decoder.

    python benchmarks/decode.py [--shapes A B] [--lengths 4096 65536] [--batches 1 8 32] [--out FILE]
        [--decoder 1b] [--prompt 32768] [--no-decoder]

bf16; the median of replays of a CUDA graph with the L2 cache flushed between them. Dense decoding by torch's
FlashAttention and cuDNN is timed beside ours. Sparse methods attend to 1/16 of the tokens: pages of 16 that Quest
chooses (`quest`: with the estimation; `pages`: without) and single tokens (`tokens`). NSA has its own sizes (`nsa`: 16
blocks of 64, window 512, compressed blocks of 32 at 16). `gb_per_s` and `floor_share` are of the bytes that a method
must read at least, at the ceiling in benchmarks/measure.py. `over_dense`: the time of the fastest dense call over this
one. The crossover is the shortest length from which on a method is faster than all dense calls. `error`: the relative
error against the reference in fp32, at the shortest length.

The decoder: milliseconds of a token after a prompt, for each kind of attention, as steps that a CUDA graph replays
(`nsa.models.DecodingSteps`) and with caches that grow (`new_caches`). All of it takes some minutes.
"""

import argparse
import json
import shlex
import statistics
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
from benchmarks.attention_inputs import SHAPES, Shape
from benchmarks.measure import environment, need_gpu, relative_error, row, time_ms
from nsa import ops
from nsa.config import load_config
from nsa.models import Decoder, DecodingSteps

ROOT = Path(__file__).parents[1]
PAGE, SHARE = 16, 16  # tokens of a page; one of so many tokens is attended to
DENSE = ("flash", "cudnn", "ours")
ITEM = 2  # bytes of an element


class Memory:
    """Caches of one layer that are full, and one query for each sequence."""

    def __init__(self, shape: Shape, batch: int, tokens: int) -> None:
        self.shape, self.batch, self.tokens = shape, batch, tokens
        self.q, self.gates = self.normal(shape.heads, shape.width), torch.rand(batch, shape.heads, 3, device="cuda")
        self.gates = self.gates.bfloat16()
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")
        self.kv, self.window = self.pair(tokens), self.pair(shape.window)
        self.compressed = self.pair(shape.num_compressed(tokens))
        self.bounds = ops.page_bounds(self.kv[0], self.lengths, page_size=PAGE)
        self.topk = max(1, tokens // SHARE // PAGE)
        listed = torch.rand(batch, shape.groups, tokens, device="cuda").argsort(-1)[..., : tokens // SHARE]
        self.listed = listed.sort(-1).values.int()
        self.pages = self.quest_pages()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, device="cuda", dtype=torch.bfloat16)

    def pair(self, slots: int) -> tuple[Tensor, Tensor]:
        groups = self.shape.groups
        return self.normal(slots, groups, self.shape.width), self.normal(slots, groups, self.shape.v_width)

    def quest_pages(self) -> Tensor:
        return ops.quest_pages(self.q, *self.bounds, self.lengths, page_size=PAGE, topk=self.topk)

    def library(self, backend: SDPBackend) -> Tensor:
        with sdpa_kernel([backend]):
            k, v = (x.transpose(1, 2) for x in self.kv)
            return scaled_dot_product_attention(self.q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

    def attend(self, backend: str = "auto", **lists: Any) -> Tensor:
        return ops.decode_attention(self.q, *self.kv, self.lengths, **lists, backend=backend)[0]

    def nsa(self, backend: str = "auto") -> Tensor:
        sizes = {key: value for key, value in self.shape.sizes.items() if key != "window"}
        return ops.native_sparse_decode(
            self.q, self.compressed, self.kv, self.window, self.gates, self.lengths, **sizes, backend=backend
        )

    def calls(self) -> dict[str, tuple[Callable[[], Tensor], float]]:
        """By name: the call, and the elements that it must read at least."""
        shape, pages = self.shape, -(-self.tokens // PAGE)
        both, each = shape.width + shape.v_width, self.batch * shape.groups
        listed, chosen = self.listed.shape[2], self.topk * PAGE
        blocks = min(self.tokens, shape.num_blocks * shape.block_size)
        near = min(self.tokens, shape.window) + shape.num_compressed(self.tokens)
        calls: dict[str, tuple[Callable[[], Tensor], float]] = {
            "flash": (lambda: self.library(SDPBackend.FLASH_ATTENTION), each * self.tokens * both),
            "cudnn": (lambda: self.library(SDPBackend.CUDNN_ATTENTION), each * self.tokens * both),
            "ours": (self.attend, each * self.tokens * both),
            "pages": (lambda: self.attend(pages=self.pages, page_size=PAGE), each * chosen * both),
            "tokens": (lambda: self.attend(pages=self.listed), each * listed * both),
            "quest": (
                lambda: self.attend(pages=self.quest_pages(), page_size=PAGE),
                each * (chosen * both + pages * 2 * shape.width),
            ),
            "nsa": (self.nsa, each * (blocks + near) * both),
        }
        return calls

    def errors(self) -> dict[str, float]:
        """Of ours against the reference, computed in fp32 from the same numbers."""
        exact = object.__new__(Memory)
        for name, value in vars(self).items():
            pair = isinstance(value, tuple) and isinstance(value[0], Tensor)
            value = tuple(x.float() for x in value) if pair else value
            setattr(exact, name, value.float() if isinstance(value, Tensor) and value.is_floating_point() else value)
        found = {"nsa": relative_error(self.nsa(), exact.nsa("naive"))}
        for name, lists in {
            "ours": {},
            "pages": {"pages": self.pages, "page_size": PAGE},
            "tokens": {"pages": self.listed},
        }.items():
            found[name] = relative_error(self.attend(**lists), exact.attend("naive", **lists))
        return {name: float(f"{error:.2g}") for name, error in found.items()}


def rows_of(shape: Shape, batch: int, tokens: int, stream: torch.cuda.Stream) -> list[dict[str, Any]]:
    memory, rows = Memory(shape, batch, tokens), []
    for name, (call, elements) in memory.calls().items():
        found: dict[str, Any] = {"shape": shape.name, "batch": batch, "tokens": tokens, "call": name}
        try:
            with torch.no_grad():
                milliseconds, recorded = time_ms(call, stream)
        except RuntimeError as error:  # a library that does not take these shapes
            if name not in DENSE[:2]:
                raise
            rows.append(found | {"failed": str(error).splitlines()[0][:100]})
            continue
        rows.append(found | row(milliseconds, None, elements * ITEM) | {"recorded": recorded})
    dense = min(x["ms"] for x in rows if x["call"] in DENSE and "ms" in x)
    for x in rows:
        if "ms" in x:
            x["over_dense"] = round(dense / max(x["ms"], 1e-6), 2)
    return rows


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each shape, batch and sparse call: the shortest length from which on it is faster than all dense calls."""
    found = []
    for key in dict.fromkeys((x["shape"], x["batch"], x["call"]) for x in rows if x["call"] not in DENSE):
        ours = sorted((x["tokens"], x["over_dense"]) for x in rows if (x["shape"], x["batch"], x["call"]) == key)
        since = None
        for tokens, ratio in reversed(ours):
            if ratio <= 1:
                break
            since = tokens
        found.append(dict(zip(("shape", "batch", "call"), key, strict=True)) | {"faster_from": since})
    return found


def steps_of(config_name: str, kind: str, prompt: int, steps: int = 64) -> dict[str, Any]:
    """Milliseconds of a token of a whole decoder, batch 1."""
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [f"attention.kind={kind}"])
    with torch.device("cuda"):
        decoder = Decoder(config.model, config.attention).bfloat16().eval()
    ids = torch.randint(0, config.model.vocab_size, (1, prompt), device="cuda")
    found: dict[str, Any] = {"decoder": config_name, "kind": kind, "prompt": prompt}
    found["weights_gb"] = round(sum(p.nbytes for p in decoder.parameters()) / 1e9, 2)
    fixed = DecodingSteps(decoder, ids, prompt + steps + 8)
    found["steps_ms"] = _median_ms(partial(fixed.step, ids[:, 0]), steps)
    del fixed
    caches = decoder.new_caches()
    with torch.no_grad():
        for piece in ids.split(4096, 1):
            decoder(piece, caches=caches)
        found["growing_ms"] = _median_ms(lambda: decoder(ids[:, :1], caches=caches), 16)
    return found


def _median_ms(call: Callable[[], object], times: int) -> float:
    """As a user sees it: with the host, and what the GPU still has to do."""
    call()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["B", "A"], choices=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--decoder", default="1b", help="configuration of the decoder")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--no-decoder", action="store_true", help="time the operators alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    stream, rows = torch.cuda.Stream(), []
    result: dict[str, Any] = {"errors": {}, "decoder": []}
    for shape in (SHAPES[name] for name in options.shapes):
        result["errors"][shape.name] = Memory(shape, 2, min(options.lengths)).errors()
        print(shape, result["errors"][shape.name], flush=True)
        for batch in options.batches:
            for tokens in options.lengths:
                for found in rows_of(shape, batch, tokens, stream):
                    print(json.dumps(found), flush=True)
                    rows.append(found)
                torch.cuda.empty_cache()
    result |= {"rows": rows, "crossovers": crossovers(rows)}
    for found in result["crossovers"]:
        print(json.dumps(found), flush=True)
    for kind in () if options.no_decoder else ("nsa", "dense"):
        result["decoder"].append(steps_of(options.decoder, kind, options.prompt))
        print(json.dumps(result["decoder"][-1]), flush=True)
        torch.cuda.empty_cache()
    if options.out:
        report = environment() | {"command": shlex.join(["python", *sys.argv]), "decode": result}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
