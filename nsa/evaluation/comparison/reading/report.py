"""Writes the report of a comparison: report.html, which needs no other file, and report.md with figures/."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nsa.evaluation.comparison.folder import Results, read_results
from nsa.evaluation.comparison.reading import alarms, cards, figures
from nsa.evaluation.comparison.reading.analysis import EFFECTIVE, FLOOR, MARGIN, TOLERANCE, Point, Table
from nsa.evaluation.comparison.reading.internals import internals, iso_cost
from nsa.evaluation.comparison.reading.pages import Grid, Note, Picture, Section, write_html, write_markdown
from nsa.evaluation.comparison.reading.partial import NOT_ANSWERED
from nsa.evaluation.comparison.rows import DENSE, OWN, RANDOM, digest

TITLE = "Trained against training-free sparse attention"
SCOPES = ("single", "multi", "high")


def write_report(
    folder: Path | str, out: Path | str | None = None, say: Callable[[str], None] = print, partial: bool = False
) -> Path:
    """Write the report of a results folder.

    Args:
        folder: of results. out: folder for the report; None: the same.
        say: called with each alarm that rings, and with where the report is.
        partial: the comparison may have been stopped.

    Returns:
        The path of report.html.

    Raises:
        ResultsError: the folder is half-written, or holds results of two commits or configurations.
    """
    results = read_results(folder, partial)
    out = Path(out if out is not None else folder)
    out.mkdir(parents=True, exist_ok=True)
    table = Table(results.cells)
    findings = alarms.ring(table)
    sections = make_sections(results, table, findings)
    write_html(out / "report.html", TITLE, sections)
    write_markdown(out / "report.md", TITLE, sections)
    for finding in findings:
        if finding.rings:
            say(f"alarm: {finding.alarm}: {finding.text}")
    say(f"report written to {out / 'report.html'}")
    return out / "report.html"


def make_sections(results: Results, table: Table, findings: list[alarms.Finding]) -> list[Section]:
    """All sections that the cells give something for, in reading order."""
    made = [
        _unfinished(results),
        _alarms(table, findings),
        _summary(table),
        _filtered(table),
        _fronts(table),
        _noninferiority(table),
        _effective(table),
        _required(table),
        _sensitivity(table),
        _matrix(table),
        iso_cost(table),
        internals(table),
        _cards(table),
        _provenance(results),
    ]
    return [section for section in made if section.parts]


def _unfinished(results: Results) -> Section:
    section = Section("An unfinished comparison")
    if results.planned is None:
        return section
    section.parts.append(
        Note(
            f"This comparison was stopped: {len(results.cells):,} of {results.planned:,} cells are there, and "
            f"{_not_answered(results):,} were not answered. All that follows is of the cells that are there.",
            True,
        )
    )
    lines = [[what, why] for what, why in sorted(results.left_out.items())]
    if lines:
        section.parts.append(Grid(["cell", "why"], lines, "All that is left out", True))
    return section


def _not_answered(results: Results) -> int:
    return sum(why == NOT_ANSWERED for why in results.left_out.values())


def _alarms(table: Table, findings: list[alarms.Finding]) -> Section:
    section = Section("Alarms")
    ringing = [f for f in findings if f.rings]
    for alarm in alarms.ALARMS:
        texts = [f.text for f in ringing if f.alarm == alarm.name]
        for text in texts[:5]:
            section.parts.append(Note(f"{alarm.name}: {text}", True))
        if len(texts) > 5:
            section.parts.append(
                Grid(["finding"], [[text] for text in texts], f"{alarm.name}: all {len(texts)} findings", True)
            )
    if not ringing:
        section.parts.append(Note("No alarm rings.", False))
    section.parts += [f"Not looked at ({f.alarm}): {f.text}" for f in findings if not f.rings]
    lines = []
    for alarm in alarms.ALARMS:
        number = sum(f.alarm == alarm.name for f in ringing)
        lines.append([alarm.name, alarm.meaning, f"rings, {number} findings" if number else "silent"])
    section.parts.append(Grid(["alarm", "rings when", "here"], lines))
    disclosed = sorted({(p.cell.arm, tuple(p.cell.dense_layers)) for p in table.points if p.cell.dense_layers})
    text = "; ".join(f"{arm}: layers {', '.join(map(str, layers))}" for arm, layers in disclosed)
    section.parts.append(f"Layers that stay dense: {text or 'none'}.")
    return section


def _summary(table: Table) -> Section:
    section = Section("Summary")
    lengths, marked = table.values("length"), alarms.marked(table)
    lines = []
    groups: dict[tuple, list[Point]] = {}
    for p in table.points:
        groups.setdefault(
            (p.cell.trained != DENSE, p.cell.model, not p.cell.dense, p.label, -(p.cell.budget or 1)), []
        ).append(p)
    for key in sorted(groups):
        points = groups[key]
        budget = points[0].cell.budget
        line = [key[3], "-" if budget is None else _percent(budget), _counted(points)]
        line[2] += "*" if budget is not None and (key[3], budget) in marked else ""
        line += [{"reads": "reads", "prefill": "pairs of the prompt"}[points[0].cell.axis], _share(points, "resident")]
        for n in lengths:
            kept = [p for p in table.informative(points) if p.cell.length == n]
            line.append(f"{np.mean([p.mean for p in kept]):.3f}" if kept else "-")
        bases = [(p, base) for p in table.informative(points) if (base := table.base(p)) is not None]
        line.append(f"{100 * np.mean([p.mean - base.mean for p, base in bases]):+.1f}" if bases else "-")
        line.append(f"{100 * np.mean([c.unparsed for p in points for c in p.cells]):.1f} %")
        line.append(str(len(points[0].cells)))
        lines.append(line)
    head = ["arm", "budget", "counted", "of dense", "KV kept", *(f"score, {n:,} tokens" for n in lengths)]
    head += ["minus dense (points)", "unparsed", "training seeds"]
    caption = (
        f"Mean scores of the tasks that dense solves to {100 * FLOOR:.0f} %. * is counted over 2 % off its budget."
    )
    section.parts.append(Grid(head, lines, caption))
    section.parts.append(
        "Budget is the nominal share of dense reads. Counted is the ledger's: KV bytes read per step of decoding, "
        "sketches and estimates included; pairs of the prompt for arms that work there only."
    )
    return section


def _filtered(table: Table) -> Section:
    section = Section("What was filtered, and why")
    lines, solved = [], []
    for p in table.points:
        if p.cell.reference and p.mean < FLOOR:
            low, high = p.interval
            lines.append([p.label, p.cell.task, f"{p.cell.length:,}", f"{p.mean:.3f}", f"[{low:.3f}, {high:.3f}]"])
        base = table.base(p)
        if p.cell.method == RANDOM and p.cell.trained == DENSE and base is not None and base.mean >= FLOOR:
            smallest = min(table.values("budget"))
            if p.cell.budget == smallest and p.mean >= base.mean - MARGIN:
                solved.append(f"{p.cell.task} at {p.cell.length:,}")
    if lines:
        caption = f"Dense is below {100 * FLOOR:.0f} %: left out of means, tests and fits, still in cells.parquet"
        section.parts.append(Grid(["dense arm", "task", "length", "score", "95 % interval"], lines, caption))
    else:
        section.parts.append(f"Nothing: dense reaches {100 * FLOOR:.0f} % in all cells.")
    if solved:
        section.parts.append(
            f"Solved without looking (random at the smallest budget is within {100 * MARGIN:.0f} points of dense), so "
            f"they tell no arms apart: {', '.join(sorted(set(solved)))}. They were kept."
        )
    return section


def _fronts(table: Table) -> Section:
    section = Section("Quality against counted budget")
    for axis in ("reads", "prefill", "resident"):
        chosen = [p for p in table.informative(table.points) if _on_axis(p, axis)]
        if not chosen:
            continue
        dense, best = _dense_lines(table, chosen), []
        panels: dict[tuple[str, int], list[tuple[float, float, str, bool]]] = {}
        for (group, n), arms in _by_panel([p for p in chosen if not p.control], axis).items():
            for x, y, label, model in arms:
                beaten = any(a <= x and b >= y and (a, b) != (x, y) for a, b, *_ in arms)
                panels.setdefault((group, n), []).append((x, y, model, not beaten))
                if not beaten:
                    best.append([group, f"{n:,}", label, _percent(x), f"{y:.3f}"])
        siblings = sorted({p.cell.model for p in chosen})
        section.parts.append(
            Picture(
                f"front-{axis}",
                figures.frontiers(
                    panels, {key: dense[key] for key in dense if key[0] in {g for g, _ in panels}}, siblings, axis
                ),
                f"Pareto front, without oracles and random: {figures.SHARES[axis]}. Means over the tasks that count.",
            )
        )
        head = ["tasks", "length", "arm", f"counted {axis}", "score"]
        best.sort(key=lambda line: (line[0], int(line[1].replace(",", "")), float(line[3].split()[0])))
        section.parts.append(Grid(head, best, f"Arms on the front ({axis})", True))
        if axis == "resident":
            continue
        for model in siblings:
            mine = [p for p in chosen if p.cell.model == model]
            dense = _dense_lines(table, mine)
            curves: dict[tuple[str, int], list[figures.Curve]] = {}
            grouped: dict[tuple, dict[str, list[tuple[float, float]]]] = {}
            for key, arms in _by_panel(mine, axis).items():
                for x, y, label, _ in arms:
                    grouped.setdefault(key, {}).setdefault(label.removeprefix(f"{model}+"), []).append((x, y))
            for key, methods in grouped.items():
                curves[key] = [figures.Curve(name, points) for name, points in sorted(methods.items())]
            title = f"Sibling {model}, all methods"
            png = figures.fronts(
                curves, {k: v for k, v in dense.items() if k[0] in {g for g, _ in curves}}, axis, title
            )
            section.parts.append(Picture(f"methods-{axis}-{model}", png, f"{title}: {figures.SHARES[axis]}."))
    return section


def _noninferiority(table: Table) -> Section:
    section = Section("Budgets that lose nothing")
    reductions = table.reductions()
    if not reductions:
        return section
    section.parts.append(
        f"Non-inferior: the loss is below {100 * MARGIN:.0f} points (one-sided, level 5 %, samples as clusters, Holm "
        "over all cells of an arm). The table gives the smallest budget from which on, upwards, this holds on each "
        "task that counts. A dash says that it was not shown, not that the arm is worse: few samples show little."
    )
    lines = [
        [r.label, f"{r.length:,}", str(r.tasks), *(["-", "-", "-"] if r.budget is None or r.cost is None else
         [_percent(r.budget), _percent(r.cost), f"{1 / r.cost:.1f} x"])]
        for r in reductions
    ]  # fmt: skip
    section.parts.append(Grid(["arm", "length", "tasks", "budget", "counted", "reduction"], lines))
    detail = [
        [c.point.label, _percent(c.point.cell.budget or c.point.cost), c.point.cell.task, f"{c.point.cell.length:,}",
         f"{100 * c.difference:+.1f} [{100 * c.low:+.1f}, {100 * c.high:+.1f}]", f"{c.p:.2g}",
         "non-inferior" if c.noninferior else "not shown"]
        for c in table.comparisons
    ]  # fmt: skip
    head = ["arm", "budget", "task", "length", "minus dense (points, 95 %)", "p (Holm)", "verdict"]
    section.parts.append(Grid(head, detail, "All comparisons", True))
    return section


def _effective(table: Table) -> Section:
    section = Section("Effective length")
    lines = []
    for label, budget, length, tasks in table.effective_lengths():
        shown = "below the shortest" if length is None else f"{length:,}"
        lines.append([label, "-" if budget is None else _percent(budget), shown, str(tasks)])
    if lines:
        caption = f"The longest measured length with {100 * EFFECTIVE:.0f} % of dense's score at the shortest length"
        section.parts.append(Grid(["arm", "budget", "effective length (tokens)", "tasks"], lines, caption))
    return section


def _required(table: Table) -> Section:
    section = Section("Required budget against length")
    needs = table.required()
    if not needs:
        return section
    models = {p.label: p.cell.model for p in table.points}
    by_sibling: dict[str, list] = {}
    for need in needs:
        if len(need.lengths) > 1:
            model = models[need.label]
            by_sibling.setdefault(model, []).append((need.label.removeprefix(f"{model}+"), need))
    if by_sibling:
        caption = (
            f"Tokens that a method needs to lose at most {100 * TOLERANCE:.0f} % of dense's score. An arrow: already "
            "the smallest budget suffices, so the need is lower and the point is left out of the fit."
        )
        section.parts.append(Picture("required", figures.required(by_sibling), caption))
    lines = []
    for need in needs:
        tokens = [f"{'<' if bound else ''}{t:,.0f}" for t, bound in zip(need.tokens, need.bounds, strict=True)]
        law = need.law
        fit = ["-", "-"] if law is None else [f"{law.beta:.2f} [{law.low:.2f}, {law.high:.2f}]", f"{law.c:.3g}"]
        at = ", ".join(f"{t} at {n:,}" for t, n in zip(tokens, need.lengths, strict=True))
        lines.append([need.label, at, *fit, str(len(need.tasks))])
    head = ["arm", "tokens needed", "exponent (95 %)", "factor", "tasks"]
    section.parts.append(Grid(head, lines, "b = c n^exponent, fitted to the logarithms; the interval is a bootstrap's"))
    section.parts.append("An exponent below 1 says that longer inputs tolerate sparser attention.")
    return section


def _sensitivity(table: Table) -> Section:
    section = Section("Sensitivity by kind of task")
    found = {p.cell.scope for p in table.points}
    scopes = [s for s in SCOPES if s in found] + sorted(found - set(SCOPES))
    lines = []
    for label, points in table.arms():
        for budget in sorted({p.cell.budget for p in points if p.cell.budget is not None}, reverse=True):
            line = [label, _percent(budget)]
            for scope in scopes:
                losses = [
                    1 - p.mean / base.mean
                    for p in table.informative(points)
                    if (p.cell.scope, p.cell.budget) == (scope, budget) and (base := table.base(p)) is not None
                ]
                line.append(f"{100 * np.mean(losses):.0f} %" if losses else "-")
            lines.append(line)
    if lines:
        caption = "Share of dense's score that is lost, mean over tasks and lengths"
        section.parts.append(Grid(["arm", "budget", *scopes], lines, caption))
    return section


def _matrix(table: Table) -> Section:
    section = Section("Trained as, run with")
    siblings = sorted({(p.cell.trained != DENSE, p.cell.model) for p in table.points})
    budgets = table.values("budget")
    if len(siblings) < 2 or not budgets:
        return section
    lengths = table.values("length")
    # The budget that most arms were measured at; the middle one of several such.
    arms = {b: len({p.label for p in table.points if p.cell.budget == b}) for b in budgets}
    often = [b for b in budgets if arms[b] == max(arms.values())]
    budget = often[len(often) // 2]
    kept = [p for p in table.informative(table.points) if p.cell.length == lengths[-1] and p.cell.question_aware]
    points = [p for p in kept if p.cell.dense or p.cell.method == OWN or p.cell.budget == budget]
    methods = sorted({p.cell.method for p in points}, key=lambda m: (m != DENSE, m != OWN, m))
    values = np.full((len(siblings), len(methods)), np.nan)
    for i, (_, model) in enumerate(siblings):
        for j, name in enumerate(methods):
            scores = [p.mean for p in points if (p.cell.model, p.cell.method) == (model, name)]
            if scores:
                values[i, j] = np.mean(scores)
    if not points:
        return section
    title = f"Score at a budget of {_percent(budget)}, {lengths[-1]:,} tokens"
    png = figures.matrix(values, [model for _, model in siblings], methods, title)
    section.parts.append(
        Picture("matrix", png, f"{title}. 'own' runs as trained, at its own budget; 'dense' attends to all.")
    )
    return section


def _cards(table: Table) -> Section:
    lines = []
    for card in cards.CARDS:
        figure, verdict = card.measure(table)
        lines.append([card.claim, card.source, card.form, figure or "-", verdict])
    section = Section("Reproduction cards")
    section.parts.append(Grid(["claim", "source", "our form", "our figure", "verdict"], lines))
    section.parts.append(
        "A verdict compares signs on small models and synthetic tasks: it says whether the effect shows here, not "
        "whether the paper's number is right. Undecided: the interval holds both signs, or parts of the claim differ."
    )
    return section


def _provenance(results: Results) -> Section:
    m = results.manifest
    left = f"{len(results.left_out):,} left out"
    if results.planned is not None:
        left += f", of which {_not_answered(results):,} were not answered"
    section = Section("Where this comes from")
    answers = sum(len(cell.score) for cell in results.cells)
    made: Counter[tuple[str, str, str]] = Counter()
    for of in results.made.values():
        versions = ", ".join(f"{name} {version}" for name, version in sorted(of["versions"].items()))
        made[of["commit"], of["hardware"], versions] += 1
    lines = [
        ["code", f"fingerprint {m.code}"], ["configuration", f"digest {digest(m.config)[:12]}, whole in manifest.json"],
        *([f"{number:,} cell{'s' * (number > 1)}", f"commit {commit}, {hardware}, {versions}"]
          for (commit, hardware, versions), number in made.most_common()),
        ["began, ended", f"{m.started}, {m.finished or 'stopped before its end'}"],
        ["cells, answers", f"{len(results.cells):,} and {answers:,}; {left}"],
    ]  # fmt: skip
    section.parts.append(Grid(["", ""], lines))
    return section


def _on_axis(point: Point, axis: str) -> bool:
    cell = point.cell
    if cell.dense or cell.counted.get(axis) is None:
        return False
    return (cell.counted["resident"] or 1) < 0.999 if axis == "resident" else cell.axis == axis


def _by_panel(points: list[Point], axis: str) -> dict[tuple[str, int], list[tuple[float, float, str, str]]]:
    """By group and length: (share, score, arm, sibling) of each arm and budget, means over tasks."""
    arms: dict[tuple, list[Point]] = {}
    for p in points:
        arms.setdefault((p.cell.group, p.cell.length, p.label, p.cell.budget, p.cell.model), []).append(p)
    panels: dict[tuple[str, int], list[tuple[float, float, str, str]]] = {}
    for (group, n, label, _, model), mine in arms.items():
        share = float(np.mean([c.counted[axis] for p in mine for c in p.cells]))
        panels.setdefault((group, n), []).append((share, float(np.mean([p.mean for p in mine])), label, model))
    return panels


def _dense_lines(table: Table, points: list[Point]) -> dict[tuple[str, int], float]:
    """By group and length: what the points are compared with, mean over tasks; of several sizes the largest."""
    bases: dict[tuple[str, int], dict[str, Point]] = {}
    for p in points:
        base, key = table.base(p), (p.cell.group, p.cell.length)
        if base is not None:
            old = bases.setdefault(key, {}).setdefault(p.cell.task, base)
            if base.cell.parameters > old.cell.parameters:
                bases[key][p.cell.task] = base
    return {key: float(np.mean([base.mean for base in tasks.values()])) for key, tasks in sorted(bases.items())}


def _counted(points: list[Point]) -> str:
    cost = float(np.mean([p.cost for p in points]))
    return _percent(cost)


def _share(points: list[Point], name: str) -> str:
    values = [v for p in points for c in p.cells if (v := c.counted[name]) is not None]
    return _percent(float(np.mean(values))) if values else "-"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
