"""Times decoding: one query token per sequence on caches of several lengths, and steps of a whole decoder.

    python benchmarks/decode.py [--shapes A B] [--lengths 4096 65536] [--batches 1 8 32] [--out FILE]
        [--decoder 1b] [--decoder-batches 1 4] [--prompt 32768] [--no-decoder | --decoder-alone]
        [--milliseconds 250] [--seconds 170]

bf16; the median of replays of a CUDA graph with the L2 cache flushed between them, for all calls alike by reading 256
MB (`l2_flush`): a step reads weights before its attention. A flush by writing, as the results until 2026-12-01 have it,
adds some 10 us for the eviction of what it wrote. Dense decoding by torch's FlashAttention and cuDNN is timed beside
ours. Sparse methods attend to 1/16 of the tokens: pages of 16 that Quest chooses (`quest`: with the estimation;
`pages`: without) and single tokens (`tokens`). `quest_fp8` estimates from bounds in 8 bits; `same_pages`: the share of
Quest's pages that it chooses, too. `twilight` estimates a quarter of the tokens, Quest's pages, from 4-bit keys; its p
is set so that the heads of a KV head want 1/16 of all tokens together (`twilight_list`: the attention alone). NSA has
its own sizes (`nsa`: 16 blocks of 64, window 512, compressed blocks of 32 at 16). Latents are those of
DeepSeek-V3.2 (128 heads, 512 + 64 columns): all (`latent`), 2,048 of them (`latent_tokens`), their choice by 64 index
heads of 128 (`latent_index`), and both (`latent_dsa`).

`gb_per_s` is of the bytes that a method must read at least; `floor_share` is the time that these, or the operations,
take at the ceiling in benchmarks/measure.py. `over_dense`: the time of the fastest dense call over this one. The
crossover is the shortest length from which on a method is faster than all dense calls. `error`: the relative error
against the reference in fp32, at the shortest length (`errors_at`), but at 8,192 tokens at most: the reference needs
much memory.

The longest memory comes first. A row that fails is reported with its error, and the others go on. With --seconds no row
begins after that time; what is left out is named.

The decoder: milliseconds of a token after a prompt, for each kind of attention, as steps that a CUDA graph replays
(`nsa.models.DecodingSteps`) and with caches that grow (`new_caches`). `cublas_ms` has all linear projections by cuBLAS;
`steps_ms` has the kernel of `nsa.ops.few_rows_linear` where that pays. `back_to_back_ms` and `cublas_back_to_back_ms`
are without a wait after each token. Before that each projection of a layer, for a few rows of x, by both: microseconds
of one of many with their own weights, so that none lies in the L2 cache. `over_cublas`: the time by cuBLAS over that of
the kernel. `error` and `cublas_error` are relative to float64.

All of it takes some minutes; with --decoder-alone, two.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention, silu

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.attention_inputs import SHAPES, Shape
from benchmarks.measure import environment, need_gpu, relative_error, row, time_ms
from nsa import ops
from nsa.config import load_config
from nsa.models import Decoder, DecodingSteps

ROOT = Path(__file__).parents[1]
PAGE, SHARE = 16, 16  # tokens of a page; one of so many tokens is attended to
CANDIDATES = 4  # one of so many tokens is estimated by Twilight
DENSE = ("flash", "cudnn", "ours", "latent")
ITEM = 2  # bytes of an element
CHECKED = 8192  # tokens at most, where errors are measured
STREAMED = 2**30  # bytes of weights, at least, between two uses of one: many times the L2 cache


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
        self.bounds_fp8 = ops.page_bounds(self.kv[0], self.lengths, page_size=PAGE, fp8=True)
        self.topk = max(1, tokens // SHARE // PAGE)
        listed = torch.rand(batch, shape.groups, tokens, device="cuda").argsort(-1)[..., : tokens // SHARE]
        self.listed = listed.sort(-1).values.int()
        self.pages = self.quest_pages()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, device="cuda", dtype=torch.bfloat16)

    def pair(self, slots: int) -> tuple[Tensor, Tensor]:
        groups = self.shape.groups
        return self.normal(slots, groups, self.shape.width), self.normal(slots, groups, self.shape.v_width)

    def quest_pages(self, fp8: bool = False) -> Tensor:
        bounds = self.bounds_fp8 if fp8 else self.bounds
        return ops.quest_pages(self.q, *bounds, self.lengths, page_size=PAGE, topk=self.topk)

    def same_pages(self) -> float:
        """Share of the pages of bounds in 16 bits that are also those of bounds in fp8."""
        exact, found = self.pages, self.quest_pages(fp8=True)
        row = torch.zeros(*exact.shape[:2], -(-self.tokens // PAGE) + 1, dtype=torch.bool, device=exact.device)
        return row.scatter_(2, found.long() + 1, True).gather(2, exact.long() + 1).float().mean().item()

    @cached_property
    def sketch(self) -> ops.KeySketch:
        """One sequence at a time: what is made in between is in fp32."""
        each = [ops.sketch_keys(k) for k in self.kv[0].split(1)]
        return ops.KeySketch(*(torch.cat(parts) for parts in zip(*each, strict=True)))

    def top_p(self, p: float) -> Tensor:
        topk = max(1, self.tokens // CANDIDATES // PAGE)
        pages = ops.quest_pages(self.q, *self.bounds, self.lengths, page_size=PAGE, topk=topk)
        return ops.top_p_tokens(self.q, self.sketch, self.lengths, p=p, pages=pages, page_size=PAGE)

    @cached_property
    def p(self) -> float:
        """With which a KV head gets a share of 1 / SHARE of the tokens, in the mean."""
        low, high = 0.0, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            enough = (self.top_p(middle) >= 0).sum(-1).float().mean() >= self.tokens / SHARE
            low, high = (low, middle) if enough else (middle, high)
        return high

    @cached_property
    def chosen(self) -> Tensor:
        return self.top_p(self.p)

    def twilight(self) -> Tensor:
        return self.attend(pages=self.top_p(self.p))

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
            "quest_fp8": (
                lambda: self.attend(pages=self.quest_pages(fp8=True), page_size=PAGE),
                each * (chosen * both + pages * shape.width),
            ),
            "nsa": (self.nsa, each * (blocks + near) * both),
            "twilight_list": (lambda: self.attend(pages=self.chosen), each * listed * both),
            "twilight": (
                self.twilight,
                each * (listed * both + pages * 2 * shape.width + self.tokens / CANDIDATES * (shape.width + 16) / 4),
            ),
        }
        return calls

    def operations(self, name: str) -> float | None:
        """Floating-point operations, where they may take longer than the bytes."""
        return None

    def facts(self, name: str) -> dict[str, float]:
        """What else belongs into a row."""
        if name == "quest_fp8":
            return {"same_pages": round(self.same_pages(), 4)}
        if not name.startswith("twilight"):
            return {}
        return {"p": round(self.p, 4), "attended": round((self.chosen >= 0).sum(-1).float().mean().item(), 1)}

    def errors(self) -> dict[str, float | str]:
        """Of ours against the reference, computed in fp32 from the same numbers."""
        exact = object.__new__(Memory)
        for name, value in vars(self).items():
            pair = isinstance(value, tuple) and isinstance(value[0], Tensor)
            value = tuple(x.float() for x in value) if pair else value
            setattr(exact, name, value.float() if isinstance(value, Tensor) and value.is_floating_point() else value)
        checks: dict[str, Callable[[], float]] = {"nsa": lambda: relative_error(self.nsa(), exact.nsa("naive"))}
        lists_of: dict[str, Callable[[], dict[str, Any]]] = {
            "ours": lambda: {},
            "pages": lambda: {"pages": self.pages, "page_size": PAGE},
            "tokens": lambda: {"pages": self.listed},
            "twilight": lambda: {"pages": self.chosen},
        }
        for name, lists in lists_of.items():
            checks[name] = partial(self._error, exact, lists)
        return {name: attempted(check) for name, check in checks.items()}

    def _error(self, exact: "Memory", lists: Callable[[], dict[str, Any]]) -> float:
        given = lists()
        return relative_error(self.attend(**given), exact.attend("naive", **given))


class Latents:
    """Caches of one layer of DeepSeek-V3.2: latents, of which the values are a view, and keys of the indexer."""

    name, heads, width, v_width, index_heads, index_width, topk = "latent", 128, 576, 512, 64, 128, 2048

    def __init__(self, batch: int, tokens: int) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device="cuda", dtype=torch.bfloat16)

        self.batch, self.tokens = batch, tokens
        self.q, self.latent = normal(self.heads, self.width), normal(tokens, 1, self.width)
        self.q_idx, self.k_idx = normal(self.index_heads, self.index_width), normal(tokens, self.index_width)
        self.weights = torch.rand(batch, self.index_heads, device="cuda")
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device="cuda")

    def index(self) -> Tensor:
        return ops.index_topk_decode(self.q_idx, self.k_idx, self.weights, self.lengths, topk=self.topk)

    @cached_property
    def listed(self) -> Tensor:
        return self.index()[:, None]

    def attend(self, pages: Tensor | None = None) -> Tensor:
        v = self.latent[..., : self.v_width]
        return ops.decode_attention(self.q, self.latent, v, self.lengths, pages=pages)[0]

    def calls(self) -> dict[str, tuple[Callable[[], Tensor], float]]:
        """As `Memory.calls`."""
        index = self.batch * self.tokens * self.index_width
        chosen = self.batch * min(self.topk, self.tokens) * self.width
        return {
            "latent": (self.attend, self.batch * self.tokens * self.width),
            "latent_tokens": (lambda: self.attend(self.listed), chosen),
            "latent_index": (self.index, index),
            "latent_dsa": (lambda: self.attend(self.index()[:, None]), chosen + index),
        }

    def operations(self, name: str) -> float | None:
        """As `Memory.operations`."""
        scored = 2.0 * self.batch * self.tokens * self.index_heads * self.index_width
        attended = 2.0 * self.batch * self.heads * (self.width + self.v_width)
        chosen = attended * min(self.topk, self.tokens)
        return {
            "latent": attended * self.tokens, "latent_tokens": chosen, "latent_index": scored,
            "latent_dsa": chosen + scored,
        }[name]  # fmt: skip

    def facts(self, name: str) -> dict[str, float]:
        """As `Memory.facts`."""
        return {}

    def errors(self) -> dict[str, float | str]:
        """As `Memory.errors`."""

        def error(pages: Callable[[], Tensor | None]) -> float:
            given = pages()
            q, k = self.q.float(), self.latent.float()
            v = k[..., : self.v_width]
            exact = ops.decode_attention(q, k, v, self.lengths, pages=given, backend="naive")[0]
            return relative_error(self.attend(given), exact)

        return {
            "latent": attempted(lambda: error(lambda: None)),
            "latent_tokens": attempted(lambda: error(lambda: self.listed)),
        }


def errors_of(make: Callable[[], Memory | Latents]) -> dict[str, float | str]:
    """Of a memory; or why there is none."""
    try:
        return make().errors()
    except Exception as error:
        return {"all": _said(error)}


def attempted(check: Callable[[], float]) -> float | str:
    """The error, of two digits; or what went wrong: the others go on."""
    try:
        return float(f"{check():.2g}")
    except Exception as error:
        return _said(error)


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''} {lines[-1] if len(lines) > 1 else ''}"[:300]


def rows_of(
    make: Callable[[], "Memory | Latents"], where: dict[str, Any], stream: torch.cuda.Stream, each: int, end: float
) -> list[dict[str, Any]]:
    """Rows of the calls of a memory; ``where`` names it. None begins after ``end`` (`time.monotonic`)."""
    rows: list[dict[str, Any]] = []
    if time.monotonic() > end:
        return [where | {"call": "all", "left_out": True}]
    try:
        memory = make()
        calls = memory.calls()
    except Exception as error:
        return [where | {"call": "all", "failed": _said(error)}]
    for name, (call, elements) in calls.items():
        found = where | {"call": name}
        if time.monotonic() > end:
            rows.append(found | {"left_out": True})
            continue
        try:
            with torch.no_grad():
                milliseconds, recorded = time_ms(call, stream, each=each, clean=True)
                found |= row(milliseconds, memory.operations(name), elements * ITEM) | {"recorded": recorded}
                found |= memory.facts(name)
        except Exception as error:
            found["failed"] = _said(error)
        rows.append(found)
    dense = [x["ms"] for x in rows if x["call"] in DENSE and "ms" in x]
    for x in rows:
        if "ms" in x and dense:
            x["over_dense"] = round(min(dense) / max(x["ms"], 1e-6), 2)
    return rows


def crossovers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each shape, batch and sparse call: the shortest length from which on it is faster than all dense calls."""
    found = []
    rows = [x for x in rows if "over_dense" in x]
    for key in dict.fromkeys((x["shape"], x["batch"], x["call"]) for x in rows if x["call"] not in DENSE):
        ours = sorted((x["tokens"], x["over_dense"]) for x in rows if (x["shape"], x["batch"], x["call"]) == key)
        since = None
        for tokens, ratio in reversed(ours):
            if ratio <= 1:
                break
            since = tokens
        found.append(dict(zip(("shape", "batch", "call"), key, strict=True)) | {"faster_from": since})
    return found


def projections_of(config_name: str, kind: str) -> dict[str, tuple[int, int]]:
    """(outputs, columns) of each linear projection of a layer and of the head."""
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [f"attention.kind={kind}"])
    with torch.device("meta"):
        decoder: Any = Decoder(config.model, config.attention)
    layer = decoder.layers[0]
    joint = layer.kind.products(config.model.attention_shape, config.attention.of(layer.kind))[0]
    modules = {"output": layer.attention.output, "swiglu": layer.mlp.gate, "down": layer.mlp.down, "head": decoder.head}
    return {"joint": (joint.outer, joint.inner)} | {name: tuple(m.weight.shape) for name, m in modules.items()}


@torch.no_grad()
def projection_rows(
    name: str, outputs: int, columns: int, stream: torch.cuda.Stream, each: int
) -> list[dict[str, Any]]:
    """Rows of a projection: by cuBLAS, and by the kernel, also for more rows than the operator lets it take."""
    from nsa.ops.kernels import few_rows as kernel

    count = -(-STREAMED // (outputs * columns * ITEM))
    weights = torch.randn(2 * count, outputs, columns, device="cuda", dtype=torch.bfloat16) * columns**-0.5
    pairs = list(weights.split(2))

    def ours(x: Tensor, pair: Tensor) -> list[Tensor]:
        return [kernel.swiglu(x, *pair)] if name == "swiglu" else [kernel.linear(x, w, None) for w in pair]

    def theirs(x: Tensor, pair: Tensor) -> list[Tensor]:
        products = [linear(x, w) for w in pair]
        return [ops.swiglu(*products)] if name == "swiglu" else products

    rows = []
    for number in (1, 2, 4):
        found: dict[str, Any] = {"projection": name, "outputs": outputs, "columns": columns, "rows": number}
        x = torch.randn(number, columns, device="cuda", dtype=torch.bfloat16)
        exact = [linear(x.double(), w.double()) for w in pairs[0]]
        exact = [silu(exact[0]) * exact[1]] if name == "swiglu" else exact
        calls = {"cublas_": theirs, "": ours}
        for key, call in calls.items():
            try:
                found[f"{key}error"] = float(f"{relative_error(call(x, pairs[0])[0], exact[0]):.2g}")
                milliseconds, _ = time_ms(
                    lambda call=call, x=x: [call(x, pair) for pair in pairs], stream, each=each, clean=True
                )
                found[f"{key}us"] = round(milliseconds * 1e3 / count / (1 if name == "swiglu" else 2), 2)
            except Exception as error:
                found[f"{key}failed"] = _said(error)
        if "us" in found:
            found["tb_per_s"] = round((1 + (name == "swiglu")) * outputs * columns * ITEM / found["us"] / 1e6, 2)
            found["over_cublas"] = round(found.get("cublas_us", 0) / found["us"], 2)
        rows.append(found)
    return rows


def steps_of(config_name: str, kind: str, prompt: int, batch: int, steps: int = 64) -> dict[str, Any]:
    """Milliseconds of a step of a whole decoder: a token for each of ``batch`` sequences."""
    config = load_config(ROOT / "configs" / f"{config_name}.yaml", [f"attention.kind={kind}"])
    with torch.device("cuda"):
        decoder = Decoder(config.model, config.attention).bfloat16().eval()
    ids = torch.randint(0, config.model.vocab_size, (batch, prompt), device="cuda")
    found: dict[str, Any] = {"decoder": config_name, "kind": kind, "prompt": prompt, "batch": batch}
    found["weights_gb"] = round(sum(p.nbytes for p in decoder.parameters()) / 1e9, 2)
    for products, name in (("auto", ""), ("torch", "cublas_")):
        fixed = DecodingSteps(decoder, ids, prompt + 2 * steps + 8, products=products)
        found[f"{name or 'steps_'}ms"] = _median_ms(partial(fixed.step, ids[:, 0]), steps)
        start = time.perf_counter()
        for _ in range(steps):
            fixed.step(ids[:, 0])
        torch.cuda.synchronize()
        found[f"{name}back_to_back_ms"] = round((time.perf_counter() - start) * 1e3 / steps, 3)
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
    parser.add_argument("--decoder-batches", type=int, nargs="+", default=[1, 4], help="sequences of the decoder")
    parser.add_argument("--prompt", type=int, default=32768)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--no-decoder", action="store_true", help="time the operators of attention alone")
    parts.add_argument("--decoder-alone", action="store_true", help="time the decoder and its projections alone")
    parser.add_argument("--milliseconds", type=int, default=250, help="of the warm-up and of the measuring of a row")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no row begins")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    need_gpu(parser)
    torch.manual_seed(0)
    end = time.monotonic() + options.seconds
    stream, rows = torch.cuda.Stream(), []
    checked = min(CHECKED, *options.lengths)
    result: dict[str, Any] = {"l2_flush": "read", "errors_at": checked, "errors": {}, "projections": [], "decoder": []}
    kinds: dict[str, Callable[[int, int], Memory | Latents]] = {}
    if not options.decoder_alone:
        kinds = {name: partial(Memory, SHAPES[name]) for name in options.shapes} | {Latents.name: Latents}
    for name, kind in kinds.items():
        result["errors"][name] = errors_of(partial(kind, 2, checked))
        print(name, result["errors"][name], flush=True)
    for tokens in sorted(options.lengths, reverse=True):
        for batch in sorted(options.batches, reverse=True):
            for name, kind in kinds.items():
                where = {"shape": name, "batch": batch, "tokens": tokens}
                for found in rows_of(partial(kind, batch, tokens), where, stream, options.milliseconds, end):
                    print(json.dumps(found), flush=True)
                    rows.append(found)
                torch.cuda.empty_cache()
    result |= {"rows": rows, "crossovers": crossovers(rows)}
    for found in result["crossovers"]:
        print(json.dumps(found), flush=True)
    projections = {} if options.no_decoder else projections_of(options.decoder, "nsa")
    for name, (outputs, columns) in projections.items():
        if time.monotonic() > end:
            print(f"left out: projection {name}", flush=True)
            continue
        for found in projection_rows(name, outputs, columns, stream, options.milliseconds):
            print(json.dumps(found), flush=True)
            result["projections"].append(found)
        torch.cuda.empty_cache()
    whole = [] if options.no_decoder else [(b, kind) for b in options.decoder_batches for kind in ("nsa", "dense")]
    for batch, attention in whole:
        if time.monotonic() > end:
            print("left out: steps of the decoder", flush=True)
            break
        result["decoder"].append(steps_of(options.decoder, attention, options.prompt, batch))
        print(json.dumps(result["decoder"][-1]), flush=True)
        torch.cuda.empty_cache()
    if options.out:
        report = environment() | {"command": shlex.join(["python", *sys.argv]), "decode": result}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
