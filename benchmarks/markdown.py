"""Tables and paragraphs of the pages that benchmarks/report.py writes."""

import textwrap
from collections.abc import Iterator


def table(header: list[str], rows: list[list[object]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "|".join(["---"] + ["--:"] * (len(header) - 1)) + "|"
    for row in rows:
        yield "| " + " | ".join("-" if cell is None else str(cell) for cell in row) + " |"
    yield ""


def length(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else f"{tokens:,}"


def ms(value: float | None) -> str | None:
    if not value:
        return None
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def words(*sentences: str, indent: str = "") -> str:
    """A paragraph, with an empty line after it where the last sentence ends in a line break."""
    text = " ".join(sentences)
    lines = textwrap.fill(text, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return lines + "\n" * text.endswith("\n")


def card(result: dict) -> str:
    """Which, and the commit."""
    return f"{result['device'].split()[1]} at {result['commit'][:7]}"


def source(results: dict[str, dict], *stems: str) -> str:
    """Where the figures are from."""
    first = results[stems[0]]
    versions = f"torch {first['torch']}, Triton {first['triton']}, CUDA {first['cuda']}"
    files = (f"one {card(results[s])}, {results[s]['date']}: [{s}](../benchmarks/results/{s}.md)" for s in stems)
    return words(f"Measured with {versions} on", "; ".join(files) + ".\n")
