"""A report as one HTML page that needs no other file, and as Markdown with its pictures beside it."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
h1 { font-size: 1.7em; } h2 { font-size: 1.3em; margin-top: 2.2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: 3px 9px; border-bottom: 1px solid #e2e2e2; text-align: left; vertical-align: top; }
th { background: #f3f3f3; position: sticky; top: 0; } td.number { text-align: right; white-space: nowrap; }
caption { text-align: left; color: #555; padding-bottom: 4px; }
img { max-width: 100%; height: auto; } figure { margin: 1.2em 0; } figcaption { color: #555; font-size: 13px; }
.rings { background: #fdecea; border-left: 5px solid #c62828; padding: 6px 12px; margin: 6px 0; }
.quiet { background: #eef6ee; border-left: 5px solid #2e7d32; padding: 6px 12px; margin: 6px 0; }
nav { columns: 2; font-size: 14px; } summary { cursor: pointer; }
"""
NUMBER = re.compile(r"^[-+]?[\d.,]+ ?[%x*†]*$|^-$|^[-+]?[\d.]+ \[.*\]$|^[\d.]+ %$")


@dataclass(frozen=True)
class Grid:
    """A table. folded: shown on demand in HTML, left out of Markdown."""

    head: Sequence[str]
    lines: Sequence[Sequence[str]]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Picture:
    """name: of its file, without ending. png: its bytes."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Note:
    """A paragraph that stands out. rings: as a warning."""

    text: str
    rings: bool


@dataclass
class Section:
    """A heading and what stands below: paragraphs, notes, tables and pictures."""

    title: str
    parts: list[str | Note | Grid | Picture] = field(default_factory=list)


def write_html(path: Path, title: str, sections: Sequence[Section]) -> None:
    """The page with all pictures inside; it runs no script and loads nothing."""
    body = [f"<h1>{html.escape(title)}</h1>", "<nav>"]
    body += [f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a><br>' for s in sections]
    body.append("</nav>")
    for section in sections:
        body.append(f'<h2 id="{_anchor(section.title)}">{html.escape(section.title)}</h2>')
        body += [_html(part) for part in section.parts]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"
    )


def write_markdown(path: Path, title: str, sections: Sequence[Section]) -> None:
    """The same as Markdown; pictures are written to the folder ``figures`` beside it."""
    folder = path.parent / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):  # of a report before
        old.unlink()
    blocks = [f"# {title}"]
    for section in sections:
        blocks.append(f"## {section.title}")
        for part in section.parts:
            if isinstance(part, Picture):
                (folder / f"{part.name}.png").write_bytes(part.png)
                blocks.append(f"![{part.caption}](figures/{part.name}.png)\n\n{part.caption}")
            elif isinstance(part, Grid):
                blocks.append(_markdown_grid(part))
            elif isinstance(part, Note):
                blocks.append(f"**{'Alarm' if part.rings else 'Note'}:** {part.text}")
            else:
                blocks.append(part)
    path.write_text("\n\n".join(blocks) + "\n")


def _html(part: str | Note | Grid | Picture) -> str:
    if isinstance(part, Note):
        return f'<div class="{"rings" if part.rings else "quiet"}">{html.escape(part.text)}</div>'
    if isinstance(part, Picture):
        data = base64.b64encode(part.png).decode()
        caption = html.escape(part.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
    if isinstance(part, Grid):
        head = "".join(f"<th>{html.escape(word)}</th>" for word in part.head)
        lines = "\n".join("<tr>" + "".join(map(_cell, line)) + "</tr>" for line in part.lines)
        caption = f"<caption>{html.escape(part.caption)}</caption>" if part.caption and not part.folded else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>"
        return f"<details><summary>{html.escape(part.caption)}</summary>{table}</details>" if part.folded else table
    return f"<p>{html.escape(part)}</p>"


def _cell(text: str) -> str:
    mark = ' class="number"' if NUMBER.match(text) else ""
    return f"<td{mark}>{html.escape(text)}</td>"


def _markdown_grid(grid: Grid) -> str:
    if grid.folded:
        return f"*{grid.caption}: {len(grid.lines)} lines, in report.html.*"
    right = [bool(grid.lines) and all(NUMBER.match(line[i]) for line in grid.lines) for i in range(len(grid.head))]
    lines = [grid.head, ["--:" if r else "---" for r in right], *grid.lines]
    table = "\n".join("| " + " | ".join(word.replace("|", "\\|") for word in line) + " |" for line in lines)
    return f"{grid.caption}\n\n{table}" if grid.caption else table


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
