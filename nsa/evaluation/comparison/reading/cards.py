"""Reproduction cards: what was published, in which form it is asked here, and what these results say of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from nsa.evaluation.comparison.reading import statistics
from nsa.evaluation.comparison.reading.analysis import MARGIN, Point, Table, paired
from nsa.evaluation.comparison.rows import DENSE, OWN, RANDOM, Cell

AGREES, DISAGREES, UNDECIDED, ABSENT = "agrees", "disagrees", "undecided", "not measured here"
NEAR = 1.25  # ratio of counted budgets that are compared as equal
BLIND = ("streaming_llm", "lm_infinite", "sink_window")  # methods that choose by position alone
RECALL = ("mqar", "niah", "recall", "retrieval", "passkey")
TRACKING = ("variable_tracking", "vt", "filtering", "hop")

Answer = tuple[str, str]  # our figure, verdict
Pairs = list[tuple[Point, Point]]


@dataclass(frozen=True)
class Card:
    """claim, source: published. form: what is asked here. measure: our figure and the verdict, from the cells."""

    claim: str
    source: str
    form: str
    measure: Callable[[Table], Answer]


def contrast(pairs: Pairs, margin: float = 0.0) -> Answer:
    """The mean difference of pairs of points, first minus second, each pair with the same weight.

    It agrees if the 95 % interval lies above -``margin``, and disagrees if it lies below.
    """
    differences = [d for one, other in pairs if (d := paired(one, other)) is not None]
    if not differences:
        return "", ABSENT
    mean = float(np.mean([d.mean for d in differences]))
    low, high = statistics.interval(np.mean([statistics.draw_means(d) for d in differences], axis=0))
    verdict = AGREES if low > -margin else DISAGREES if high < -margin else UNDECIDED
    return (
        f"{100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] over {len(differences)} pairs of cells",
        verdict,
    )


def between(
    table: Table,
    first: Callable[[Cell], bool],
    second: Callable[[Cell], bool],
    tasks: Iterable[str] = ("",),
    margin: float = 0.0,
) -> Answer:
    """`contrast` of points of dense-trained siblings at the same budget, task and length."""
    words = tuple(tasks)

    def chosen(keep: Callable[[Cell], bool]) -> dict[tuple, Point]:
        points = table.select(lambda c: c.trained == DENSE and keep(c) and any(word in c.task for word in words))
        return {(p.cell.model, p.cell.budget, p.cell.task, p.cell.length, p.cell.question_aware): p for p in points}

    ours, theirs = chosen(first), chosen(second)
    return contrast([(ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys(), key=str)], margin)


def method(*names: str) -> Callable[[Cell], bool]:
    return lambda cell: cell.method in names


def _all(answers: Iterable[tuple[str, Answer]]) -> Answer:
    """Several answers as one: it agrees or disagrees if all do."""
    answers = list(answers)
    verdicts = {verdict for _, (_, verdict) in answers}
    text = "; ".join(f"{name}: {figure or verdict}" for name, (figure, verdict) in answers)
    return ("", ABSENT) if verdicts == {ABSENT} else (text, verdicts.pop() if len(verdicts) == 1 else UNDECIDED)


def _budget_law(table: Table) -> Answer:
    laws = [(need.label, need.law) for need in table.required() if need.law is not None]
    dense = {p.label for p in table.points if p.cell.trained == DENSE and p.cell.method != RANDOM}
    laws = [(label, law) for label, law in laws if label in dense]
    if not laws:
        return "", ABSENT
    below, above = sum(law.high < 1 for _, law in laws), sum(law.low > 1 for _, law in laws)
    text = ", ".join(f"{label} {law.beta:.2f} [{law.low:.2f}, {law.high:.2f}]" for label, law in laws)
    verdict = AGREES if 2 * below > len(laws) and not above else DISAGREES if 2 * above > len(laws) else UNDECIDED
    return f"exponents: {text}", verdict


def _small_blocks(table: Table) -> Answer:
    """Of block-sparse arms that differ in their block alone, the smallest block against the largest."""

    def block(cell: Cell) -> int | None:
        sizes = [v for k, v in cell.settings.items() if k in ("block", "block_size") and isinstance(v, int)]
        return sizes[0] if sizes and "block" in cell.method else None

    found: dict[tuple, list[Point]] = {}
    for p in table.select(lambda c: c.trained == DENSE and block(c) is not None):
        key = (p.cell.model, p.cell.method, p.cell.budget, p.cell.task, p.cell.length, p.cell.question_aware)
        found.setdefault(key, []).append(p)
    pairs = []
    for points in found.values():
        points.sort(key=lambda p: block(p.cell) or 0)
        if block(points[0].cell) != block(points[-1].cell):
            pairs.append((points[0], points[-1]))
    return contrast(pairs)


def _columns_and_blocks(table: Table) -> Answer:
    columns, blocks = method("vertical_slash", "minference"), method("block_sparse")
    return _all(
        [
            ("columns minus blocks, retrieval", between(table, columns, blocks, RECALL)),
            ("blocks minus columns, tracking and filtering", between(table, blocks, columns, TRACKING)),
        ]
    )


def _trained_against_post_hoc(table: Table) -> Answer:
    """A sparse-trained sibling as it was trained, against the best post-hoc method on dense at about its budget.

    Length by length: what a sibling reads is no fixed share, so another method is near at another length, or none. The
    best is chosen on these very answers, which favours post-hoc.
    """
    answers = []
    own = [p for p in table.informative(table.points) if p.cell.method == OWN and p.cell.trained != DENSE]
    for arm, length in sorted({(p.label, p.cell.length) for p in own}):
        mine = [p for p in own if (p.label, p.cell.length) == (arm, length)]
        rivals: dict[str, Pairs] = {}
        for p in mine:
            base = table.base(p)
            for q in table.points:
                c = q.cell
                post_hoc = (
                    base is not None
                    and c.model == base.cell.model
                    and not (c.dense or c.method in (OWN, RANDOM) or c.method.startswith("oracle"))
                )
                same = (c.task, c.length, c.question_aware) == (p.cell.task, p.cell.length, p.cell.question_aware)
                if post_hoc and same and c.axis == p.cell.axis and 1 / NEAR <= q.cost / p.cost <= NEAR:
                    rivals.setdefault(f"{q.label} at {c.budget or q.cost:g}", []).append((p, q))
        rivals = {name: pairs for name, pairs in rivals.items() if len(pairs) == len(mine)}
        if rivals:
            best = max(rivals, key=lambda name: float(np.mean([q.mean for _, q in rivals[name]])))
            answers.append((f"{arm} minus {best}, {length:,} tokens", contrast(rivals[best])))
    return _all(answers) if answers else ("", ABSENT)


def _scope(table: Table) -> Answer:
    """Loss on single queries against loss on the rest, at the smallest budgets."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    for _, points in table.arms():
        points = [p for p in table.informative(points) if p.cell.trained == DENSE and p.cell.method != RANDOM]
        smallest = min((p.cell.budget for p in points if p.cell.budget is not None), default=None)
        for p in points:
            base = table.base(p)
            if p.cell.budget == smallest and base is not None:
                losses["single" in p.cell.scope].append(1 - p.mean / base.mean)
    if not losses[True] or not losses[False]:
        return "", ABSENT
    single, other = float(np.mean(losses[True])), float(np.mean(losses[False]))
    return (
        f"single query loses {100 * single:.0f} %, the rest {100 * other:.0f} % (means, not tested)",
        AGREES if single < other else DISAGREES,
    )


def _random(table: Table) -> Answer:
    """On recall, each method that looks at content against random at the same budget and question."""

    def place(cell: Cell) -> tuple:
        return cell.model, cell.budget, cell.task, cell.length, cell.question_aware

    def asked(cell: Cell) -> bool:
        return cell.trained == DENSE and any(word in cell.task for word in RECALL)

    def informed(cell: Cell) -> bool:
        return not (cell.dense or cell.method in (OWN, RANDOM, *BLIND)) and asked(cell)

    chance = {place(p.cell): p for p in table.select(lambda c: c.method == RANDOM and asked(c))}
    return contrast([(p, chance[place(p.cell)]) for p in table.select(informed) if place(p.cell) in chance])


def _own_on(task: tuple[str, ...], kind: str, margin: float = 0.0) -> Callable[[Table], Answer]:
    """A sibling of a kind as it was trained, against dense, on some tasks."""

    def measure(table: Table) -> Answer:
        points = table.select(lambda c: c.trained == kind and c.method == OWN and any(word in c.task for word in task))
        return contrast([(p, base) for p in points if (base := table.base(p)) is not None], margin)

    return measure


def _dense_again(table: Table) -> Answer:
    """Each sibling that was trained sparse: as it was trained, against the same weights attending to all."""
    answers = []
    for model in sorted({p.cell.model for p in table.points if p.cell.trained != DENSE}):
        mine = [p for p in table.informative(table.points) if p.cell.model == model]
        places = {(p.cell.task, p.cell.length, p.cell.question_aware): p for p in mine if p.cell.dense}
        pairs = [
            (p, places[key])
            for p in mine
            if p.cell.method == OWN and (key := (p.cell.task, p.cell.length, p.cell.question_aware)) in places
        ]
        if pairs:
            answers.append((f"{model} as trained minus dense", contrast(pairs, MARGIN)))
    return _all(answers) if answers else ("", ABSENT)


def _oracle(table: Table) -> Answer:
    """Oracle top-k at a sixteenth, against dense."""
    points = table.select(lambda c: c.trained == DENSE and c.method == "oracle_topk" and c.budget == 1 / 16)
    return contrast([(p, base) for p in table.informative(points) if (base := table.base(p)) is not None], MARGIN)


def at_most(budget: float, *names: str) -> Callable[[Cell], bool]:
    """Methods at this budget or a smaller one."""
    return lambda cell: cell.method in names and cell.budget is not None and cell.budget <= budget


def _forgetting(table: Table) -> Answer:
    rivals = ("snapkv", "streaming_llm")
    return _all([(f"quest minus {name}", between(table, method("quest"), at_most(1 / 8, name))) for name in rivals])


def _absent(table: Table) -> Answer:
    return "", ABSENT


CARDS = (
    Card(
        "Longer inputs tolerate sparser attention: at a fixed loss the budget grows as n^0.5 or so",
        "The Sparse Frontier, arXiv 2504.17768, section 4.3: relative error 0.2 at 1/10, 1/15, 1/20 of 16K, 32K, 64K",
        "exponent of the tokens needed for a loss of 10 %, on dense-trained siblings; agrees if most lie below 1",
        _budget_law,
    ),
    Card(
        "Small blocks are better (16 before 32 before 64)",
        "The Sparse Frontier, arXiv 2504.17768, appendix A",
        "block-sparse attention at one budget, smallest block minus largest",
        _small_blocks,
    ),
    Card(
        "Trained sparsity beats post-hoc sparsity at tight budgets",
        "SSA, arXiv 2511.20102: perplexity 15.96 to 16.54 against 17.05 at 256 tokens; NSA, arXiv 2502.11089",
        "the sibling as trained minus the best post-hoc method on dense at most 25 % away in counted budget",
        _trained_against_post_hoc,
    ),
    Card(
        "Columns and diagonals win on retrieval, blocks on variable tracking and filtering",
        "The Sparse Frontier, arXiv 2504.17768, figure 3",
        "Vertical-Slash and Block-Sparse at one budget, on the same samples",
        _columns_and_blocks,
    ),
    Card(
        "A single query tolerates high sparsity, several queries and high scope do not",
        "The Sparse Frontier, arXiv 2504.17768, findings",
        "loss relative to dense at the smallest budget, by scope",
        _scope,
    ),
    Card(
        "Quest with top-p is no worse than Quest, at fewer tokens",
        "Twilight, arXiv 2502.02770",
        "twilight minus quest at one nominal budget; agrees if it loses less than 2 points",
        lambda table: between(table, method("twilight"), method("quest"), margin=MARGIN),
    ),
    Card(
        "Budgets by head are better: Ada-SnapKV above SnapKV",
        "Ada-KV, arXiv 2407.11550; The Sparse Frontier, arXiv 2504.17768",
        "ada_snapkv minus snapkv at one budget",
        lambda table: between(table, method("ada_snapkv"), method("snapkv")),
    ),
    Card(
        "Double-P is 1 to 4 points above Quest (RULER, 16K to 64K)",
        "Double-P, arXiv 2602.05191; no code was released",
        "double_p minus quest at one budget, sign only",
        lambda table: between(table, method("double_p"), method("quest")),
    ),
    Card(
        "A random gate is about as good as a learned one (perplexity 48.73 against 49.83)",
        "Routing Absorption, arXiv 2603.02227",
        "the other half: on recall, informed methods minus random; agrees if perplexity alone is no evidence",
        _random,
    ),
    Card(
        "On recall a random choice is no choice, however near it is in perplexity",
        "Routing Absorption, arXiv 2603.02227, and what it does not measure",
        "oracle top-k minus random at an eighth or less, on recall; agrees above 50 points",
        lambda table: between(table, at_most(1 / 8, "oracle_topk"), method(RANDOM), RECALL, margin=-0.5),
    ),
    Card(
        "The loss is the estimator's: the right keys at a sixteenth are enough",
        "arXiv 2606.07703: an oracle stays within a point of dense up to 100K",
        "oracle top-k at 1/16 minus dense; agrees if it loses less than 2 points",
        _oracle,
    ),
    Card(
        "A model that was trained sparse gains nothing by attending to all",
        "SSA, arXiv 2511.20102: NSA's perplexity is 16.02 sparse and 16.68 in full",
        "each such sibling as trained minus the same with nothing left out; agrees if it loses less than 2 points",
        _dense_again,
    ),
    Card(
        "What forgets loses what later queries need; what reads less does not",
        "Quest, arXiv 2406.10774",
        "Quest minus SnapKV and minus StreamingLLM at an eighth or less, questions after the prompt was thinned out",
        _forgetting,
    ),
    Card(
        "DMS at a compression of 4 is about as good as dense after a few hundred steps",
        "DMS, arXiv 2506.05345",
        "the DMS sibling as trained minus dense; agrees if it loses less than 2 points",
        _own_on(("",), "dms", MARGIN),
    ),
    Card(
        "alpha-entmax copies and sorts where softmax fails (28.5 against 99.4; 4, 53 and 81)",
        "ASEntmax, arXiv 2506.16640",
        "the entmax sibling as trained minus dense, on copy and sort",
        _own_on(("copy", "sort"), "entmax"),
    ),
    Card(
        "ASEntmax reaches 95.3 % on MQMTAR at 65K after training on 64 tokens; an independent try: 0 of 10 runs did",
        "ASEntmax, arXiv 2506.16640; the second figure is second-hand",
        "needs many seeds and the share of them that leave the plateau",
        _absent,
    ),
    Card(
        "vAttention's error follows epsilon (correlation above 0.99), within it with probability 1 - delta",
        "vAttention, arXiv 2510.05688",
        "a property of the estimator, not of answers: tested with the method, not in this comparison",
        _absent,
    ),
)
