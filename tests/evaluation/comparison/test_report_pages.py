"""A report as HTML and as Markdown: what stands in the files, sign by sign."""

from pathlib import Path

from nsa.evaluation.comparison.reading.pages import Grid, Note, Picture, Section, write_html, write_markdown

GRID = Grid(["arm", "a|b", "score", "mixed"], [["x|y", "12 %", "0.5 [0.4, 0.6]", "7"], ["<z>", "-", "0.25", "none"]])
PARTS = ["1 < 2 & 3", Note("<odd>", True), Note("even", False), GRID, Picture("one", b"png", 'of "it"')]


def test_markdown_aligns_columns_of_numbers_alone_and_escapes_bars(tmp_path: Path) -> None:
    folded = Grid(["x"], [["1"], ["2"]], "all of it", folded=True)
    write_markdown(tmp_path / "report.md", "Title", [Section("First", [*PARTS, folded])])
    blocks = (tmp_path / "report.md").read_text().split("\n\n")
    assert blocks[:5] == ["# Title", "## First", "1 < 2 & 3", "**Alarm:** <odd>", "**Note:** even"]
    assert blocks[5].splitlines() == [
        "| arm | a\\|b | score | mixed |", "| --- | --: | --: | --- |",
        "| x\\|y | 12 % | 0.5 [0.4, 0.6] | 7 |", "| <z> | - | 0.25 | none |",
    ]  # fmt: skip
    assert blocks[6:8] == ['![of "it"](figures/one.png)', 'of "it"']
    assert blocks[8] == "*all of it: 2 lines, in report.html.*\n"


def test_pictures_of_a_report_before_are_gone(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_markdown(tmp_path / "report.md", "Title", [Section("First", [Picture(name, name.encode(), "")])])
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "figures").iterdir()] == [("two.png", b"two")]


def test_html_escapes_what_it_shows(tmp_path: Path) -> None:
    write_html(tmp_path / "report.html", "a < b", [Section("At 5 % & more", PARTS)])
    page = (tmp_path / "report.html").read_text()
    for piece in (
        "<h1>a &lt; b</h1>",
        '<a href="#at-5-more">At 5 % &amp; more</a>',
        '<h2 id="at-5-more">At 5 % &amp; more</h2>',
        "<p>1 &lt; 2 &amp; 3</p>",
        '<div class="rings">&lt;odd&gt;</div>',
        '<div class="quiet">even</div>',
        '<td>x|y</td><td class="number">12 %</td><td class="number">0.5 [0.4, 0.6]</td><td class="number">7</td>',
        '<td>&lt;z&gt;</td><td class="number">-</td>',
        '<img alt="of &quot;it&quot;" src="data:image/png;base64,cG5n">',
    ):
        assert piece in page, piece
