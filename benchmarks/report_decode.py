"""The tables of benchmarks/decode.py, for benchmarks/report.py."""

from collections.abc import Iterator
from typing import Any

from benchmarks.headlines import DECODED
from benchmarks.markdown import length, table, words


def cells_of(rows: list[dict[str, Any]]) -> Iterator[list[object]]:
    """A row of the table for each shape, batch and call: microseconds and the ratio at each length."""
    lengths = sorted({row["tokens"] for row in rows})
    by: dict[tuple[str, int, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault((row["shape"], row["batch"], row["call"]), {})[row["tokens"]] = row
    for (shape, batch, call), found in sorted(by.items(), key=lambda item: item[0][:2]):
        cells: list[object] = [shape, batch, call]
        for tokens in lengths:
            row = found.get(tokens, {})
            cells += [f"{row['ms'] * 1e3:.0f}" if "ms" in row else row.get("failed"), row.get("over_dense")]
        last = found.get(lengths[-1], {})
        yield [*cells, last.get("floor_share")]


def decode(result: dict[str, Any] | None) -> Iterator[str]:
    """The result of benchmarks/decode.py."""
    if not result:
        return
    if result["rows"]:
        yield from _attention(result)
    if result.get("projections"):
        yield "### Linear projections of a few rows\n"
        yield words(
            "Microseconds of one, the weights from memory, by cuBLAS and by the kernel of `nsa.ops.few_rows_linear`.",
            "Over cuBLAS: the time by cuBLAS over that of the kernel. Errors are relative to float64.\n",
        )
        keys = ("projection", "outputs", "columns", "rows", "cublas_us", "us", "over_cublas", "tb_per_s")
        errors = ("cublas_error", "error")
        header = ["projection", "outputs", "columns", "rows", "us, cuBLAS", "us, kernel", "over cuBLAS", "TB/s, kernel"]
        cells = [[row.get(key) for key in keys + errors] for row in result["projections"]]
        yield from table([*header, "error, cuBLAS", "error, kernel"], cells)
    if result["decoder"]:
        yield "### A step of a whole decoder\n"
        keys = ("decoder", "kind", "batch", "prompt", "weights_gb", "steps_ms", "growing_ms")
        header = ["model", "attention", "batch", "prompt", "GB of weights", "ms, CUDA graph", "ms, caches that grow"]
        if any("cublas_ms" in row for row in result["decoder"]):
            keys = (*keys, "back_to_back_ms", "cublas_ms", "cublas_back_to_back_ms")
            header += ["ms back to back", "ms, all by cuBLAS", "ms back to back, all by cuBLAS"]
        earlier = {"batch": 1}  # of rows that do not say it
        yield from table(header, [[(earlier | row).get(key) for key in keys] for row in result["decoder"]])


def _attention(result: dict[str, Any]) -> Iterator[str]:
    lengths = sorted({row["tokens"] for row in result["rows"]})
    yield "### Attention of one query token a sequence\n"
    described = "; ".join(f"{name}: {what}" for name, what in DECODED.items())
    yield words(
        f"{described}. Sparse calls attend to 1/16 of the tokens, NSA to its own sizes, `latent_dsa` to 2,048. What",
        "each call does is in `benchmarks/decode.py`. Over dense: the time of the fastest of FlashAttention, cuDNN and",
        "ours (`latent`: of ours) over this one.",
        *(["The L2 cache is flushed by reading before each call."] if result.get("l2_flush") == "read" else []),
        "\n",
    )
    header = ["shape", "batch", "call"]
    for tokens in lengths:
        header += [f"us, {length(tokens)}", "over dense"]
    yield from table([*header, f"share of the floor, {length(lengths[-1])}"], list(cells_of(result["rows"])))
    slower = [x for x in result["crossovers"] if x["faster_from"] != lengths[0] and x["call"] != "ours"]
    if slower:
        yield "Slower than dense at the shortest length, and faster from:\n"
        yield from table(
            ["shape", "batch", "call", "tokens"],
            [[x["shape"], x["batch"], x["call"], x["faster_from"] or "none of these"] for x in slower],
        )
    at = f"{result['errors_at']:,} tokens" if "errors_at" in result else "the shortest length"
    yield words(f"Relative errors against fp32 at {at}:", _errors(result["errors"]) + ".\n")


def _errors(errors: dict[str, dict[str, float]]) -> str:
    def said(error: float | str) -> str:
        return error if isinstance(error, str) else f"{error:g}"

    return "; ".join(f"{shape} {', '.join(f'{k} {said(v)}' for k, v in x.items())}" for shape, x in errors.items())
