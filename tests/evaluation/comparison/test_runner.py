"""A comparison from its configuration to its report: small untrained siblings, and a Hugging Face Llama."""

import json
import re
from dataclasses import replace
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from nsa.baselines import METHODS, Budget, Ledger, method_named
from nsa.baselines.ledger import Counts
from nsa.compare import main
from nsa.config import load_config
from nsa.data.tasks import Query, task_named
from nsa.data.tasks.narrow import Mqar
from nsa.evaluation.comparison import commands
from nsa.evaluation.comparison.answers import Answer, ask
from nsa.evaluation.comparison.arms import Arm, Place
from nsa.evaluation.comparison.begun import Begun
from nsa.evaluation.comparison.cells import Asked, Cells, fit
from nsa.evaluation.comparison.config import MethodConfig, budget_of, load, trainings_of
from nsa.evaluation.comparison.folder import read_results
from nsa.evaluation.comparison.models import Candidate, OpenedDecoder, open_model
from nsa.evaluation.comparison.runner import CONTROLS, Comparison
from nsa.strict_yaml import ConfigError
from tests.conftest import ROOT

CONFIG = """
name: small
output_dir: {out}
siblings:
  - {{name: dense, export: {dense}}}
  - {{name: nsa, export: {nsa}}}
methods: [{{name: quest, page: 4}}, snapkv]
budgets: [1.0, 0.5]
tasks: [mqar, mqar_wide]
lengths: [64]
samples: 2
question: [after, before]
"""


@pytest.fixture(scope="module")
def finished(siblings: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    path = folder / "small.yaml"
    path.write_text(CONFIG.format(out=folder, **siblings))
    assert main([str(path)]) == 0
    return folder


def test_every_arm_answers_the_same_questions(finished: Path) -> None:
    results = read_results(finished / "small")
    by_arm: dict[str, list[Any]] = {}
    for cell in results.cells:
        by_arm.setdefault(cell.arm, []).append(cell)
    assert {arm.partition("+")[2] for arm in by_arm} == {*CONTROLS, "quest,page=4", "snapkv", "own"}
    assert not results.left_out
    for cells in by_arm.values():
        blocks = {(c.budget, c.task, c.question_aware) for c in cells}
        assert len(blocks) == len(cells) == 4 * len({c.budget for c in cells})
        assert all(c.ran and (c.bos == 1).all() and c.parsed.all() for c in cells)
    one, *rest = (c for c in results.cells if c.task == "mqar" and c.question_aware)
    assert all(np.array_equal(c.sample, one.sample) and np.array_equal(c.query, one.query) for c in rest)


def beside(cells: list[Any], cell: Any) -> float:
    """What the layers of a sibling attend to beside any method, as a share: nothing if it is dense."""
    (dense,) = (
        c.counted["attended"]
        for c in cells
        if (c.arm, c.task, c.question_aware) == (f"{cell.model}+dense", cell.task, cell.question_aware)
    )
    assert dense == 1 if cell.model == "dense" else dense > 1.2
    return dense - 1


def test_a_full_budget_answers_as_dense_does(finished: Path) -> None:
    cells = read_results(finished / "small").cells
    dense = {(c.model, c.task, c.question_aware): c.score for c in cells if c.method == "dense"}
    checked = 0
    for cell in cells:
        if cell.budget == 1 and cell.method not in ("dense", "own"):
            assert np.array_equal(cell.score, dense[cell.model, cell.task, cell.question_aware]), cell.arm
            assert cell.counted["attended"] == pytest.approx(1 + beside(cells, cell))
            checked += 1
    assert checked == 2 * 4 * 6


def test_what_is_counted_follows_the_budget(finished: Path) -> None:
    cells = read_results(finished / "small").cells
    for cell in cells:
        if cell.method in ("oracle_topk", "random", "sink_window") and cell.budget == 0.5:  # whole tokens of about 60
            assert cell.counted["attended"] == pytest.approx(0.5 + beside(cells, cell), abs=0.01), cell.arm
        if cell.method == "quest" and cell.budget == 0.5:
            assert cell.counted["reads"] > cell.counted["attended"]
        if cell.method == "snapkv" and cell.budget == 0.5 and cell.model == "dense":
            assert 0.4 < cell.counted["resident"] < 0.7
        assert len(cell.figures["reads"]) == 2


def test_a_finished_comparison_runs_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nsa.evaluation.comparison.cells.Cells._answer", None)
    assert main([str(finished / "small.yaml")]) == 0
    assert {"report.html", "report.md"} <= {path.name for path in (finished / "small").iterdir()}


class Said(Mqar):
    """Its score is the tokens that were generated: those of a small model are never right."""

    def score(self, query: Query, output: Any) -> float:
        return float(np.asarray(output)[: len(query.answer)].sum())


def test_answers_are_those_of_a_loop_over_single_sequences(siblings: dict[str, Path]) -> None:
    """Batches, taken sequences and both readings of the question against one sequence at a time, without caches."""
    opened = open_model("dense", siblings["dense"])
    assert isinstance(opened, OpenedDecoder)
    task = Said(**vars(task_named("mqar")))
    samples = [task.sample(opened.tokenizer, length, "test", i) for i, length in enumerate((64, 64, 48))]
    expected = {}
    for i, sample in enumerate(samples):
        for j, query in enumerate(sample.queries):
            ids = [*sample.context, *query.tokens]
            for _ in query.answer:
                with torch.no_grad():
                    ids.append(int(opened.decoder(torch.tensor([ids]))[0, -1].argmax()))
            expected[i, j] = float(sum(ids[-len(query.answer) :]))
    assert len(expected) > 6 and len(set(expected.values())) > 2
    for aware in (False, True):
        reader = opened.reader(None, dense_layers=[], watch=False, ledger=Ledger())
        found = [
            a for batch in ask(reader, opened.tokenizer, task, samples, aware=aware, batch_tokens=140) for a in batch
        ]
        assert {(a.sample, a.query): a.score for a in found} == expected


def test_a_threshold_is_fitted_to_a_budget() -> None:
    threshold, spent = fit(lambda x: x**2, 0.25, 0.0, 1.0)
    assert abs(threshold - 0.5) < 0.01 and abs(spent - 0.25) <= 0.0025
    assert abs(fit(lambda x: x**2, 0.02, 0.0, 1.0)[1] - 0.02) <= 0.0002, "near, by the budget's own measure"
    assert fit(lambda x: 1 - x, 0.3, 1.0, 0.0)[0] == pytest.approx(0.7, abs=0.01)
    assert fit(lambda x: 0.5 + x / 2, 0.1, 0.0, 1.0) == (0.0, 0.5)  # out of reach: the nearest


def test_a_llama_of_transformers_is_an_arm(siblings: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(siblings["dense"], trust_remote_code=True)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    opened = open_model("llama", tmp_path / "llama")
    task = task_named("mqar")
    samples = [task.sample(opened.tokenizer, 64, "test", i) for i in range(2)]
    for name in ("dense", "quest", "h2o", "block_sparse", "twilight", "snapkv", "streaming_llm", "sparq", "pyramidkv"):
        kind = method_named(name)
        ledger = Ledger()
        reader = opened.reader(kind(budget=Budget(tokens=24), **kind.small), dense_layers=[], watch=True, ledger=ledger)
        answers = [a for b in ask(reader, opened.tokenizer, task, samples, aware=False, batch_tokens=999) for a in b]
        assert len(answers) == sum(len(s.queries) for s in samples)
        assert {(phase, layer) for phase in kind.phases for layer in range(2)} <= ledger.ran


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("methods: [quets]", r"no method 'quets': did you mean 'quest'\?"),
        ("methods: [{name: quest, pages: 4}]", r"quest has no setting pages: did you mean page\?"),
        ("methods: [{name: quest, fp8: 'false'}]", "quest: fp8 must be true or false, got 'false'"),
        ("methods: [{name: quest, page: true}]", "quest: page cannot be true or false, got True"),
        ("methods: [{name: twilight, base: {name: quest}}]", "twilight: base is a method, which no file can give"),
        ("methods: [quest, quest]", "quest is there twice"),
        ("tasks: [mqra]", r"unknown task 'mqra'; did you mean 'mqar'\?"),
        ("budgets: [1.5]", r"must be in \(0, 1\], got 1.5"),
        ("budgets: [0.0]", r"must be in \(0, 1\], got 0"),
        ("budgets: [0.5, 32]", "two budgets are the same at 64 tokens"),
        ("budgets: [1.0, 99]", "two budgets are the same at 64 tokens"),
        ("tasks: [mqar, mqar]", "tasks has a value twice"),
    ],
)
def test_mistakes_in_a_configuration_are_named(change: str, message: str, tmp_path: Path) -> None:
    key = change.partition(":")[0]
    lines = [line for line in CONFIG.format(out=tmp_path, dense="a", nsa="b").splitlines() if not line.startswith(key)]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join([*lines, change]))
    with pytest.raises(ConfigError, match=message):
        load(path)


def test_a_sibling_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.format(out=tmp_path, dense=tmp_path / "none", nsa="b"))
    assert main([str(path)]) == 2
    assert "no export and no Hugging Face folder" in capsys.readouterr().err


def test_a_budget_that_cannot_be_met_is_left_out_and_said(siblings: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    text = CONFIG.format(out=tmp_path, **siblings)
    text = text.replace("budgets: [1.0, 0.5]", "budgets: [2]").replace("tasks: [mqar, mqar_wide]", "tasks: [mqar]")
    path.write_text(text)
    assert main([str(path)]) == 0
    left = json.loads((tmp_path / "small" / "left_out.json").read_text())
    assert "dense+sink_window@2 mqar 64 agnostic" in left
    assert "2 tokens cannot be met: 5 tokens are the least" in left["dense+sink_window@2 mqar 64 agnostic"]


def two_bos(draw: Any) -> Any:
    def drawn(*args: Any) -> Any:
        sample = draw(*args)
        return replace(sample, context=np.concatenate([sample.context[:1], sample.context]))

    return drawn


def nothing(select: Any) -> Any:
    def selected(method: Any, view: Any, state: Any) -> Any:
        plan = select(method, view, state)
        return replace(plan, parts=tuple(replace(part, keep=part.keep & False) for part in plan.parts))

    return selected


def all_of_it(attend: Any) -> Any:
    return lambda view, plan: attend(view, None)


@pytest.mark.parametrize(
    ("where", "fault", "alarm"),
    [
        ("nsa.data.tasks.narrow.Mqar.draw", two_bos, r"not exactly one BOS \|.*\| rings"),
        ("nsa.baselines.methods.quest.Quest.decode_select", nothing, "nothing was attended to"),
        (
            "nsa.baselines.methods.quest.Quest.decode_select",
            lambda _: lambda *args: None,
            "not in each layer and phase",
        ),
        ("nsa.baselines.session.attend", all_of_it, r"reads what its plan leaves out \|.*\| rings"),
        ("nsa.cache.evicting.EvictingCache.keep", lambda _: lambda *args: None, "were counted as dense"),
    ],
    ids=["double BOS", "empty selection", "path that does not run", "dense behind a plan", "nothing is forgotten"],
)
def test_alarms_ring_on_a_harness_with_a_fault(
    where: str, fault: Any, alarm: str, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are silent without it: `finished` has these tasks and this method."""
    monkeypatch.setattr(where, fault(resolve_name(where)))
    text = CONFIG.format(out=tmp_path, **siblings).replace("[1.0, 0.5]", "[0.5]").replace("[mqar, mqar_wide]", "[mqar]")
    text = text.replace("[after, before]", "[after]")
    text = text.replace("{name: quest, page: 4}, " if "evicting" in where else ", snapkv", "")
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(line for line in text.splitlines() if "name: nsa" not in line))
    assert main([str(path)]) == 0
    assert re.search(alarm, (tmp_path / "small" / "report.md").read_text())


def test_no_alarm_of_the_harness_rings_on_a_good_one(finished: Path) -> None:
    report = (finished / "small" / "report.md").read_text()
    assert "nothing was attended to" not in report and "not in each layer and phase" not in report
    for alarm in ("not exactly one BOS", "reads what its plan leaves out"):
        assert re.search(rf"{alarm} \|.*\| silent \|", report)


def test_tasks_with_long_answers_are_said(siblings: dict[str, Path], tmp_path: Path) -> None:
    path, said = tmp_path / "small.yaml", list[str]()
    path.write_text(CONFIG.format(out=tmp_path, **siblings))
    config = load(str(path), ["tasks=[copy_wide, mqar]", "lengths=[64, 1024]"])
    cells, model = begun(siblings, tmp_path)
    Comparison(config, [model], said.append)._check_tasks(cells)
    assert said == ["copy_wide takes long: at 1024 tokens an answer has up to 511 tokens, decoded one at a time"]
    config = load(str(path), ["tasks=[copy_wide, mqar]", "lengths=[64, 256]"])
    Comparison(config, [model], said.append)._check_tasks(cells)
    assert len(said) == 1


def test_the_floor_is_that_of_a_siblings_own_dense_run_or_of_the_nearest_in_size(tmp_path: Path) -> None:
    """By the mean over its trainings; what just reaches the floor is asked."""
    sizes = {"one": 300, "two": 300, "nsa": 310, "big": 900, "tiny": 30}
    means = {("one", 0): 0.4, ("one", 1): 0.6, ("two", 0): 0.3, ("nsa", 0): 0.9, ("big", 0): 0.1, ("tiny", 0): 0.9}

    def candidate(key: tuple[str, int]) -> Candidate:
        return Candidate(key[0], key[1], tmp_path, "nsa" if key[0] == "nsa" else "dense", key[1])

    def cell(arm: str, budget: None, task: str, length: int, aware: bool, seed: int) -> Any:
        name = arm.partition("+")[0]
        return SimpleNamespace(mean=means[name, seed], parameters=sizes[name])

    path = tmp_path / "c.yaml"
    path.write_text(CONFIG.format(out=tmp_path, dense="a", nsa="b") + "floor: 0.5\n")
    candidates = [candidate(key) for key in (("two", 0), *(key for key in means if key[0] != "two"))]
    comparison, folder = Comparison(load(path), candidates, print), SimpleNamespace(cell=cell)
    whys = {key: comparison._below(folder, candidate(key), Place("mqar", 64, True)) for key in means}  # type: ignore[arg-type]
    low = {"two": "dense reaches 0.300, below 0.5", "big": "dense reaches 0.100, below 0.5"}
    assert whys == {key: low.get("two" if key[0] == "nsa" else key[0]) for key in means}


def test_listing_and_explaining() -> None:
    listing = commands.listing()
    assert all(f"  {method.name} " in listing for method in METHODS)
    for method in METHODS:
        text = commands.explain(method.name)
        assert method.paper in text and method.formula in text and method.licence in text
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        commands.explain("snapvk")
    with pytest.raises(ValueError, match=f"name one or more of {', '.join(method.name for method in METHODS)}"):
        commands.explanations([])


def test_budgets_are_shares_or_tokens() -> None:
    assert budget_of(1.0, "reads") == Budget(share=1.0, counts="reads")
    assert budget_of(64, "attended") == Budget(tokens=64)


def test_the_comparison_of_a_folder_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load(ROOT / "configs/compare/smollm2.yaml")
    assert len(config.methods) >= 8 and len(config.budgets) >= 2
    monkeypatch.delenv("SMOLLM2", raising=False)
    with pytest.raises(ValueError, match="the environment has no"):
        commands.compare(str(ROOT / "configs/compare/smollm2.yaml"), [f"output_dir={tmp_path}"])


def test_the_shipped_comparison_and_its_siblings_are_valid() -> None:
    path = ROOT / "configs/compare/demo.yaml"
    config = load(path)
    assert len(config.budgets) >= 3 and len(config.tasks) >= 6 and len(config.methods) + len(CONTROLS) >= 10
    trainings = trainings_of(config, path)
    assert len({training.run for training in trainings}) == len(trainings)
    for training in trainings:
        assert training.arguments is not None
        trained = load_config(training.arguments[0], training.arguments[1:])
        assert max(config.lengths) <= trained.data.sequence_length <= trained.model.max_position


def begun(siblings: dict[str, Path], folder: Path, *lines: str) -> tuple[Cells, Candidate]:
    """Cells of the small comparison with other settings, and its dense sibling."""
    path = folder / "c.yaml"
    path.write_text("\n".join([CONFIG.format(out=folder, **siblings), *lines]))
    work = commands.work_of(str(path), [])
    comparison = work.comparison()
    cells = Cells(work.config, work.folder(comparison), lambda *_: None, "cpu", lambda: 1.0)
    return cells, comparison.candidates[0]


def test_what_is_measured_is_of_the_seed_and_no_threshold_has_seen_it(
    siblings: dict[str, Path], tmp_path: Path
) -> None:
    cells, model = begun(siblings, tmp_path, "seed: 3", "queries: 2", "calibration_samples: 3")
    tokenizer, task = cells.opened(model).tokenizer, task_named("mqar")
    for length in (64, 48, 64):  # lists are kept, each under its own name
        place = Place("mqar", length, True)
        measured, fitted = (cells._block(model, place, calibrate=c).samples for c in (False, True))
        expected = [task.sample(tokenizer, length, "comparison 3", i) for i in range(2)]
        assert len(measured) == 2 and len(fitted) == 3
        for mine, theirs in zip(measured, expected, strict=True):
            assert np.array_equal(mine.context, theirs.context)
            there = len(theirs.queries)
            asked = [theirs.queries[0], theirs.queries[there // 2]]  # spread over all of them
            assert there > 2 and [q.tokens.tolist() for q in mine.queries] == [q.tokens.tolist() for q in asked]
            assert not any(np.array_equal(mine.context, other.context) for other in fitted)


@pytest.mark.parametrize(
    ("name", "counts", "power"),
    [("oracle_topp", "attended", 1), ("twilight", "reads", 2), ("flexprefill", "attended", 3)],
)
def test_a_threshold_is_fitted_to_what_its_method_spends(
    name: str, counts: str, power: int, siblings: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While decoding what the budget counts, else pairs of the prompt; without what a layer attends to beside it."""
    cells, model = begun(siblings, tmp_path, f"counts: {counts}")
    one = torch.ones(1, dtype=torch.float64)

    def spends(self: Cells, arm: Arm, method: Any, block: Any, ledger: Ledger, *, watch: bool) -> Any:
        name, low, high = method.knob
        part = (getattr(method, name) - low) / (high - low)
        for phase, attended, reads in (("decode", part, part**2), ("prefill", part**3, 0.0)):
            ledger.add(phase, 0, Counts(one, one * attended, 0 * one, one, one * reads, one, one))
        ledger.add("decode", 0, Counts(0 * one, one, 0 * one, 0 * one, one, 0 * one, one), beside=True)
        return iter(()), None

    monkeypatch.setattr(Cells, "_ask", spends)
    arm = Arm(model, MethodConfig(name=name), 0.3)
    known = Begun(tmp_path / "begun/cell.jsonl", {})
    method = cells._method(arm, cells._block(model, Place("mqar", 64, True)), known)
    assert method is not None and method.knob is not None
    field, low, high = method.knob
    assert (getattr(method, field) - low) / (high - low) == pytest.approx(0.3 ** (1 / power), rel=0.01)


def test_what_was_answered_is_written_as_it_was(siblings: dict[str, Path], tmp_path: Path) -> None:
    cells, model = begun(siblings, tmp_path, "dense_layers: [1]", "watch: false")
    place, opened = Place("mqar", 64, True), cells.opened(model)
    block = cells._block(model, place)
    twice = [replace(s, context=np.concatenate([s.context[:1], s.context])) for s in block.samples]
    block = replace(block, samples=[block.samples[0], twice[1]])
    figures = [
        {"layer": layer, "prompt": prompt, "sink_mass": mass, "kept_mass": [mass, mass / 2]}
        for layer in (0, 1)
        for prompt, mass in ((True, 0.9), (False, 0.2), (False, 0.4))
    ]
    reader: Any = SimpleNamespace(session=SimpleNamespace(figures=figures))
    answers = [Answer(0, 0, None), Answer(0, 1, 0.5), Answer(1, 0, 0.0)]
    for budget, ran in ((0.5, {("decode", 0)}), (0.25, {("decode", 1), ("prefill", 0)})):
        arm = Arm(model, MethodConfig(name="quest", page=4), budget)
        known: Any = SimpleNamespace(ledger=Ledger(ran=ran), answers=answers)
        cells._write(Asked(arm, block, cells._method(arm, block, known), reader, iter(()), known), place)
        cell = cells.folder.cell(arm.label, budget, *place, model.train_seed)
        assert cell is not None
        assert cell.parsed.tolist() == [False, True, True] and cell.score.tolist() == [0.0, 0.5, 0.0]
        assert cell.bos.tolist() == [1, 1, 2] and cell.length == 64 and cell.dense_layers == [1]
        assert cell.ran == (budget == 0.5), "in the layer that is not left dense, while decoding"
        assert cell.figures["sink_mass"] == [0.3, 0.3] and cell.figures["kept_mass"] == [[0.3, 0.15]] * 2
        assert cell.figures["kv_bytes"] == opened.kv_elements * 64 * 2
    oracle = method_named("oracle_topk")(budget=Budget(share=0.5))
    assert not cells._ran(opened, oracle, Ledger(ran={("decode", 0)})), "it claims the prompt, too"
