"""The tables of benchmarks/prefill.py and prompts.py, for benchmarks/report.py."""

from collections.abc import Iterator
from typing import Any

from benchmarks.markdown import length, ms, table, words


def prefill(result: dict[str, Any] | None) -> Iterator[str]:
    """The result of benchmarks/prefill.py."""
    if not result:
        return
    yield "### Attention of a prompt to chosen blocks and lines\n"
    yield words(
        "32 query heads on 8 KV heads of 128. A density is the share of the visible pairs of a query and a key that",
        "are attended to. The ratios are the time of dense attention over choice and attention together. The error is",
        "that of a few tiles of queries against fp32; missing is the share of the portable path's blocks that the",
        "kernels do not choose. How the inputs are made is in `benchmarks/prefill.py`.\n",
    )
    cells: list[list[object]] = []
    groups: dict[tuple[object, ...], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        key = row["tokens"], row["method"], row.get("wanted", row["call"])
        groups.setdefault(key, {})[row["call"]] = row
    for (tokens, method, name), calls in groups.items():
        if method == "dense":
            row = calls[str(name)]
            cells.append([length(tokens), f"dense, {name}", 1, None, _ms(row), _ms(row), row.get("tflops")])
            cells[-1] += [row.get("over_cudnn"), row.get("over_flash"), None, None]
            continue
        both, attend = calls.get("both", {}), calls.get("attend", {})
        times = [_ms(calls.get(call, {})) for call in ("choose", "attend", "both")]
        ratios = [both.get("over_cudnn"), both.get("over_flash")]
        cells.append([length(tokens), method, both.get("density"), *times, attend.get("tflops"), *ratios])
        cells[-1] += [both.get("error"), both.get("missing")]
    header = ["tokens", "method", "density", "choice ms", "attention ms", "both ms", "TFLOP/s of attention"]
    yield from table([*header, "over cuDNN", "over FlashAttention", "error", "missing"], cells)


def _ms(row: dict[str, Any]) -> object:
    return ms(row["ms"]) if "ms" in row else row.get("failed")


def prompts(result: dict[str, Any] | None) -> Iterator[str]:
    """The result of benchmarks/prompts.py."""
    if not result:
        return
    yield "### A layer of a prompt, in the comparison\n"
    yield words(
        "Two prompts of 4,096 tokens, 8 query heads on 4 KV heads of 64, a budget of an eighth: choice, attention and",
        "ledger. The first rows are attention alone.\n",
    )
    before = {row["call"]: row for row in result.get("before", [])}
    cells = [
        [row["call"], *(x.get(key) for x in (row, before.get(row["call"], {})) for key in ("ms", "mib"))]
        for row in result["rows"]
    ]
    yield from table(["call", "ms", "MiB", "ms before", "MiB before"], cells)
