"""A comparison that is stopped at any point goes on, in stages, and gives what an uninterrupted one gives."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_study
import torch
from safetensors.torch import load_file, save_file
from simulated import MANIFEST, cell, rows_of, write

from nsa.compare import main
from nsa.config import load_config
from nsa.data.tasks import UnavailableError, task_named
from nsa.evaluation.comparison import cells, commands
from nsa.evaluation.comparison.config import load, trainings_of
from nsa.evaluation.comparison.folder import ResultsFolder, read_results
from nsa.evaluation.comparison.identity import READERS, code_digest, export_digest
from nsa.evaluation.comparison.reading.report import write_report
from nsa.evaluation.comparison.rows import ResultsError
from nsa.strict_yaml import ConfigError
from tests.conftest import ROOT
from tests.small_run import small_config, small_export
from tests.test_architecture import IMPORTS

CONFIG = """
name: small
output_dir: {out}
siblings:
  - {{name: dense, export: "{exports}/dense-{{seed}}", seeds: [1, 2]}}
  - {{name: nsa, export: "{exports}/nsa-1"}}
methods: [{{name: quest, page: 4}}, {{name: snapkv, window: 4}}]
budgets: [0.5]
tasks: [mqar]
lengths: [64]
samples: 2
queries: 2
stages:
  - {{name: first, siblings: [dense], methods: ["quest,page=4"]}}
  - {{name: second, siblings: [nsa], methods: ["snapkv,window=4"]}}
"""
CELLS = [cell("dense", samples=3), cell("quest", budget=0.25, samples=3)]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    for name in ("dense-1", "dense-2", "nsa-1"):
        kind, seed = name.split("-")
        config = small_config(folder / f"made-{name}", kind)
        small_export(folder / f"made-{name}", kind, config.model_copy(update={"seed": int(seed)})).rename(folder / name)
    weights = load_file(folder / "dense-2/model.safetensors")  # of another seed
    save_file({name: 1.5 * tensor for name, tensor in weights.items()}, folder / "dense-2/model.safetensors")
    return folder


def configured(out: Path, exports: Path, change: str = "", by: str = "") -> Path:
    path = out / "small.yaml"
    path.write_text(CONFIG.format(out=out, exports=exports).replace(change, by))
    return path


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take time."""
    monkeypatch.setattr(commands, "write_report", lambda folder: None)


def answers(folder: Path) -> dict[str, Any]:
    """All that the cells say, by file."""
    return {str(path.relative_to(folder)): path.read_text() for path in sorted((folder / "cells").rglob("*.json*"))}


@pytest.fixture(scope="module")
def whole(exports: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of both stages, without an interruption."""
    out = tmp_path_factory.mktemp("whole")
    path = configured(out, exports)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "write_report", lambda folder: None)
        assert main([str(path)]) == 0
    first = read_results(out / "small")
    assert {c.model for c in first.cells} == {"dense"} and "snapkv" not in {c.method for c in first.cells}
    assert {c.train_seed for c in first.cells} == {1, 2} and "quest" in {c.method for c in first.cells}
    assert main([str(path)]) == 0
    return out / "small"


def test_stages_add_to_one_another(whole: Path) -> None:
    results = read_results(whole)
    assert results.manifest.stage == 1 and len(results.cells) == results.manifest.planned
    assert {(c.model, c.method) for c in results.cells} >= {("dense", "snapkv"), ("nsa", "quest"), ("nsa", "own")}
    assert all(len(c.score) == 4 for c in results.cells)  # two questions of each of two samples
    assert len({c.id for c in results.cells}) == len(results.cells)


@pytest.mark.usefixtures("unreported")
def test_an_interruption_anywhere_changes_no_answer(
    exports: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped by the clock after each third cell, and killed while every seventh is written."""
    path = configured(tmp_path, exports)
    begun: list[str] = []
    write = ResultsFolder.write

    def interrupted(self: ResultsFolder, rows: Any, *more: Any) -> Any:
        begun.append(rows[0].arm)
        if len(begun) % 7 == 0:
            with monkeypatch.context() as patch:
                patch.setattr("nsa.evaluation.comparison.rows.Cell.answers", killed)
                return write(self, rows, *more)
        return write(self, rows, *more)

    def killed(_: Any) -> None:
        raise SystemExit("killed")

    def clock() -> Iterator[float]:
        """Of one run: the time is over at the fourth look at it, the first being at the beginning."""
        yield from (0, 0, 0, *[100] * 1000)

    monkeypatch.setattr(ResultsFolder, "write", interrupted)
    codes: list[Any] = []
    for _ in range(60):
        looks = clock()
        monkeypatch.setattr(commands.time, "monotonic", lambda looks=looks: next(looks))
        try:
            codes.append(main([str(path), "--minutes", "1"]))
        except SystemExit as end:
            codes.append(str(end))
            assert list((tmp_path / "small/cells").glob(".unfinished-*/cell.json"))
        if codes[-1] == 75:
            with pytest.raises(ResultsError, match="half-written"):
                read_results(tmp_path / "small")
        if codes.count(0) == 2:
            break
    assert codes.count(75) >= 5 and codes.count("killed") >= 2 and codes.count(0) == 2
    assert answers(tmp_path / "small") == answers(whole)


def test_every_run_gets_further(exports: Path, tmp_path: Path) -> None:
    path = configured(tmp_path, exports)
    for number in (1, 2):
        assert main([str(path), "--minutes", "0"]) == 75
        assert len(list((tmp_path / "small/cells").iterdir())) == number


@pytest.mark.usefixtures("unreported")
def test_methods_are_asked_where_dense_reaches_the_floor(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the mean over the seeds of the dense sibling; others keep their dense run and their own."""
    path = configured(tmp_path, exports, "tasks: [mqar]", "tasks: [mqar, mqar_wide]\nfloor: 0.5")
    path.write_text(path.read_text().partition("stages:")[0])
    ask = cells.ask

    def answered(reader: Any, tokenizer: Any, task: Any, samples: Any, **options: Any) -> Any:
        right = {"mqar": 0.75, "mqar_wide": 0.2}[task.name]
        for batch in ask(reader, tokenizer, task, samples, **options):
            yield [answer._replace(score=right) for answer in batch]

    monkeypatch.setattr(cells, "ask", answered)
    for _ in range(2):  # again: nothing is left out twice
        assert main([str(path)]) == 0
        results = read_results(tmp_path / "small")
        assert {c.task for c in results.cells if c.method not in ("dense", "own")} == {"mqar"}
        assert {c.method for c in results.cells if c.task == "mqar_wide"} == {"dense", "own"}
        assert results.left_out == {
            f"methods on {sibling} mqar_wide 64 agnostic": "dense reaches 0.200, below 0.5"
            for sibling in ("dense#1", "dense#2", "nsa")
        }


@pytest.mark.usefixtures("unreported")
def test_a_task_without_samples_is_left_out_and_said(exports: Path, tmp_path: Path) -> None:
    path = configured(tmp_path, exports, "tasks: [mqar]", "tasks: [mqmtar]")
    path.write_text(path.read_text().replace("lengths: [64]", "lengths: [48, 64]"))
    assert main([str(path)]) == 0
    left = read_results(tmp_path / "small").left_out
    assert len(left) == 2 * 6 and all("48" in what for what in left)
    assert "a sample needs" in left["dense#2+quest,page=4@0.5 mqmtar 48 agnostic"]


@pytest.mark.usefixtures("unreported")
def test_a_task_without_its_data_set_is_left_out_and_said(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*_: Any) -> None:
        raise UnavailableError("the data set cannot be loaded")

    monkeypatch.setattr(task_named("mqar_wide").__class__, "draw", absent)
    path = configured(tmp_path, exports, "tasks: [mqar]", "tasks: [mqar, mqar_wide]")
    assert main([str(path)]) == 0
    left = read_results(tmp_path / "small").left_out
    assert len(left) == 2 * 6 and all("mqar_wide" in what for what in left)
    assert "cannot be loaded" in left["dense#2+quest,page=4@0.5 mqar_wide 64 agnostic"]


@pytest.mark.usefixtures("unreported")
def test_another_training_under_the_same_name_is_refused(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "exports"
    shutil.copytree(exports, there)
    path = configured(tmp_path, there)
    assert main([str(path)]) == 0
    config = there / "nsa-1" / "training_config.yaml"
    before = export_digest(there / "nsa-1")
    config.write_text(config.read_text().replace("num_blocks: 4", "num_blocks: 3"))
    changed = export_digest(there / "nsa-1")
    assert changed != before
    hours = re.sub("max_hours: .*", "max_hours: 0.25", config.read_text())
    assert hours != config.read_text()
    config.write_text(hours)
    assert export_digest(there / "nsa-1") == changed, "the time that it was given changes no weight"
    assert main([str(path)]) == 0  # no cell of it was there
    config = there / "dense-2" / "training_config.yaml"
    config.write_text(config.read_text() + "\n")
    shutil.rmtree(next((tmp_path / "small/cells").glob("dense+dense*-2-*")))
    assert main([str(path)]) == 2
    assert "two trainings of sibling dense, seed 2" in capsys.readouterr().err
    assert not list((tmp_path / "small/cells").glob("dense+dense*-2-*")), "it is refused before it answers"


def test_too_little_memory_is_said_with_what_to_do(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("80 GiB")

    monkeypatch.setattr(cells.Cells, "_answer", full)
    assert main([str(configured(tmp_path, exports)), "batch_tokens=128"]) == 2
    assert "at once, batch_tokens=64 (80 GiB)" in capsys.readouterr().err
    assert main([str(configured(tmp_path, exports)), "batch_tokens=128", "decode_batch_tokens=512"]) == 2
    assert "at once, batch_tokens=64 and decode_batch_tokens=256 (80 GiB)" in capsys.readouterr().err


@pytest.mark.parametrize(("changed", "other"), [("dense-2", "dense#1"), ("nsa-1", "dense#1")])
def test_siblings_that_would_be_asked_different_questions_are_refused(
    changed: str, other: str, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "exports"
    shutil.copytree(exports, there)
    model = there / changed / "tokenizer.model"
    model.write_bytes(model.read_bytes() + b" ")
    path = configured(tmp_path, there)
    path.write_text(path.read_text().partition("stages:")[0])
    assert main([str(path)]) == 2
    assert f"siblings {other} and {changed.replace('-2', '#2').replace('-1', '')} have" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ what is one


def test_results_are_of_one_code_and_not_of_one_commit(tmp_path: Path) -> None:
    """A commit that changed documentation alone has the same code."""
    first = ResultsFolder(tmp_path, replace(MANIFEST, planned=2))
    first.write(rows_of(CELLS[0]))
    later = ResultsFolder(tmp_path, replace(MANIFEST, planned=2, commit="fedcba987654", hardware="another"))
    later.write(rows_of(CELLS[1]))
    results = later.finish("now")
    write_report(tmp_path, say=lambda text: None)
    report = (tmp_path / "report.md").read_text()
    assert f"1 cell | commit {MANIFEST.commit}, {MANIFEST.hardware}" in report
    assert "1 cell | commit fedcba987654, another, torch 2.13.0" in report
    assert results.manifest.commit == MANIFEST.commit
    assert {made["commit"] for made in results.made.values()} == {MANIFEST.commit, "fedcba987654"}
    with pytest.raises(ResultsError, match=rf"two commits.*git checkout {MANIFEST.commit}"):
        ResultsFolder(tmp_path, replace(MANIFEST, code="other", commit="fedcba987654"))


def test_the_code_is_all_that_can_change_an_answer(tmp_path: Path) -> None:
    package, data = tmp_path / "nsa", tmp_path / "data"
    (package / READERS).mkdir(parents=True)
    (data / "cache/a").mkdir(parents=True)  # where texts are prepared by default
    (package / "data").symlink_to(data)
    files = [
        package / "ops.py",
        data / "tasks.py",
        package / "fastest.json",
        package / "evaluation/comparison/runner.py",
    ]
    prepared = [data / "cache/a/manifest.json", data / "cache/a/tokens-00000.bin", package / "ops.cpython-311.pyc"]
    others = [package / "README.md", *prepared, package / READERS / "report.py", package / READERS / "new.py"]
    for path in (*files, *others):
        path.write_text("one")
    first = code_digest(package)
    for path in others:
        path.write_text("two")
    assert code_digest(package) == first
    for path in files:
        path.write_text("two")
        assert code_digest(package) != first
        path.write_text("one")
    assert code_digest(package) == first
    (package / "new.py").touch()
    assert code_digest(package) != first
    assert (ROOT / "nsa" / READERS / "report.py").is_file()


def test_what_only_reads_results_is_not_used_to_make_them() -> None:
    package = "nsa.evaluation.comparison."
    used, look = set(), [f"{package}runner"]
    while look:
        used.add(name := look.pop())
        look += [other for other in IMPORTS.get(name, ()) if other.startswith(package) and other not in used]
    assert f"{package}answers" in used
    readers = {name for name in used if name.startswith(f"{package}reading.")}
    # Results are read with the one, and what is missing is named with the other.
    assert readers == {f"{package}reading.packed", f"{package}reading.partial"}


def test_lists_grow_and_do_not_shrink(tmp_path: Path) -> None:
    one, two = {"name": "quest"}, {"name": "quest", "page": 4}
    small = replace(
        MANIFEST, planned=1, config={"seed": 0, "methods": [one], "siblings": [{"name": "a", "seeds": [1]}]}
    )
    free = {"batch_tokens": 2, "decode_batch_tokens": 4}
    large = replace(small, planned=2, config={**small.config, "methods": [two, one], **free})
    ResultsFolder(tmp_path, small).write(rows_of(CELLS[0]))
    ResultsFolder(tmp_path, small).finish("now")
    grown = ResultsFolder(tmp_path, large)
    assert grown.manifest.finished is None and grown.has("dense", None, "mqar", 1024, True)
    with pytest.raises(ResultsError, match="half-written: 1 of 2"):
        read_results(tmp_path)
    grown.write(rows_of(CELLS[1]))
    grown.finish("now")
    with pytest.raises(ResultsError, match=r"begun with more methods \(quest page=4\)"):
        ResultsFolder(tmp_path, small)
    with pytest.raises(ResultsError, match=r"begun with more siblings \(a 1\)"):
        ResultsFolder(tmp_path, replace(large, config={**large.config, "siblings": [{"name": "a", "seeds": [2]}]}))
    with pytest.raises(ResultsError, match="two configurations"):
        ResultsFolder(tmp_path, replace(large, config={**large.config, "seed": 1}))


def test_a_folder_that_was_only_begun_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "results/cells").mkdir(parents=True)
    (tmp_path / "results/manifest.json.tmp").write_text("{")
    assert ResultsFolder(tmp_path / "results", MANIFEST).manifest == MANIFEST


def test_two_processes_do_not_answer_into_one_folder(tmp_path: Path) -> None:
    mine, another = (commands.alone_in(tmp_path / "small") for _ in range(2))
    with mine, pytest.raises(ResultsError, match="another process writes"):
        another.__enter__()
    with commands.alone_in(tmp_path / "small"):
        pass


@pytest.mark.parametrize(
    ("change", "by", "message"),
    [
        ("siblings: [nsa]", "siblings: [nsb]", "there is no sibling nsb: did you mean nsa"),
        ("siblings: [nsa]", "siblings: [nsa, dense]", "sibling dense must be in one stage, not in 2"),
        ('methods: ["snapkv,window=4"]', "methods: []", "method snapkv,window=4 must be in one stage, not in 0"),
        ("seeds: [1, 2]", "seeds: [1, 1]", "has a seed twice"),
        ("dense-{seed}", "dense", r"its export needs \{seed\}"),
    ],
)
def test_mistakes_in_stages_and_seeds_are_named(change: str, by: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(configured(tmp_path, tmp_path, change, by))


# -------------------------------------------------------------------------------------------------------- packed


def test_packed_results_give_the_same_report(whole: Path, tmp_path: Path) -> None:
    assert main(["report", str(whole), "--pack", str(tmp_path / "one")]) == 0
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "manifest.json", "cells.jsonl.gz", "report.html", "report.md", "figures", "siblings",
    }  # fmt: skip
    there = {path.name: path.read_text() for path in (tmp_path / "one/siblings").iterdir()}
    assert there.keys() == {"dense#1.yaml", "dense#2.yaml", "nsa.yaml"} and "seed: 2" in there["dense#2.yaml"]
    commands.pack(tmp_path / "one", tmp_path / "two")
    assert main(["report", str(tmp_path / "two")]) == 0  # from what is committed alone
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert len(files) > 6
    for file in files:
        content = (tmp_path / "one" / file).read_bytes()
        assert content == (tmp_path / "two" / file).read_bytes()
        if file.suffix in (".html", ".png"):
            assert content == (whole / file).read_bytes()
    one, other = read_results(whole), read_results(tmp_path / "one")
    assert one.made == other.made and [c.head() for c in one.cells] == [c.head() for c in other.cells]
    assert [c.answers() for c in one.cells] == [c.answers() for c in other.cells]


@pytest.mark.parametrize("arguments", [["small.yaml"], ["report", "one", "two"], ["report"]])
def test_one_folder_is_packed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--pack", "out"])
    assert "--pack goes with report and one folder" in capsys.readouterr().err


def test_damaged_packed_results_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "results", CELLS)
    commands.pack(tmp_path / "results", tmp_path / "packed")
    packed = tmp_path / "packed/cells.jsonl.gz"
    content = packed.read_bytes()
    packed.write_bytes(content[:-40])
    with pytest.raises(ResultsError, match=r"damaged: .*git checkout"):
        read_results(tmp_path / "packed")
    packed.write_bytes(content[:200] + b"\0" * 20 + content[220:])
    with pytest.raises(ResultsError, match="damaged"):
        read_results(tmp_path / "packed")
    packed.write_bytes(content)
    manifest = tmp_path / "packed/manifest.json"
    manifest.write_text(manifest.read_text().replace(MANIFEST.code, "another"))
    with pytest.raises(ResultsError, match="two commits"):
        read_results(tmp_path / "packed")
    with pytest.raises(ResultsError, match="name another folder"):
        commands.pack(tmp_path / "results", tmp_path / "results")


# ---------------------------------------------------------------------------------------------------- the study


def test_the_study_is_what_was_registered() -> None:
    """Its siblings train at the longest length that is asked, with four KV heads or more, and start from their own."""
    config = load(small_study.STUDY)
    assert [stage.name for stage in config.stages] == ["first", "siblings", "larger", "methods"]
    assert len(config.budgets) == 5 and config.lengths == [4096, 8192] and config.floor == 0.8
    runs = {}
    for training in trainings_of(config, small_study.STUDY):
        assert training.arguments is not None
        run = load_config(training.arguments[0], training.arguments[1:])
        runs[f"{run.output_dir}/{run.name}"] = run
        assert run.model.num_kv_heads >= 4 and run.data.sequence_length == max(config.lengths)
        assert training.sibling.name == "tokenizer" or run.data.tokenizer.path == "checkpoints/study-tokenizer/export"
        if run.start_from is not None:
            assert run.start_from in runs and run.start_from[-1] == str(training.seed)
    steps = [runs[f"checkpoints/study-{name}-1"].training.steps for name in ("dense", "staged-dense", "staged")]
    assert steps[0] == steps[1] + steps[2]


@pytest.mark.slow
def test_a_study_that_is_killed_and_stopped_gives_what_an_uninterrupted_one_gives(tmp_path: Path) -> None:
    """`launch.sh compare` with two seeds: killed in a training and among cells, then run by parts."""
    folders = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        small_study.write(tmp_path / name, ["dense"])
        launch = small_study.entrance(tmp_path / name)
        for said in ("saved checkpoints/study-dense-2/step_00000002", "cell/s") if name == "parts" else ():
            process = small_study.start(launch, "study.yaml")
            assert process.stdout is not None
            assert any(said in line for line in process.stdout)
            small_study.kill(process)
        codes = []
        while not codes or codes[-1] == 75:
            minutes = ["--minutes", "1"] if name == "parts" else []
            process = small_study.start(launch, "study.yaml", *minutes)
            output = process.communicate()[0]
            codes.append(process.returncode)
        assert codes[-1] == 0, output
        folders.append(tmp_path / name / "checkpoints/study")
    one, other = (read_results(folder) for folder in folders)
    assert [json.dumps(c.head()) for c in one.cells] == [json.dumps(c.head()) for c in other.cells]
    assert [c.answers() for c in one.cells] == [c.answers() for c in other.cells]
    assert one.manifest.stage == 3
