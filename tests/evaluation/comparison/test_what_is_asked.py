"""Which cells a comparison has, which siblings go together, and what a cell says of how it was asked."""

from pathlib import Path
from typing import Any

import pytest
from small_comparison import configured

from nsa.evaluation.comparison import commands, runner
from nsa.evaluation.comparison.arms import Arm, Place
from nsa.evaluation.comparison.cells import Cells
from nsa.evaluation.comparison.config import MethodConfig, load
from nsa.evaluation.comparison.models import Candidate
from nsa.evaluation.comparison.runner import Comparison
from nsa.strict_yaml import ConfigError


def candidate(name: str, seed: int | None = None, trained: str = "dense") -> Candidate:
    return Candidate(name, seed, Path(f"{name}{seed or ''}"), trained, seed or 0)


def test_controls_come_first_unless_they_are_named_and_what_sets_its_threshold_has_no_budget(tmp_path: Path) -> None:
    """A control with settings of its own stands beside the usual one."""
    paths = {"dense": Path("dense"), "nsa": Path("nsa")}
    methods = "methods=[{name: twilight, p: 0.9}, twilight, random, {name: sink_window, num_sinks: 2}]"
    config = load(str(configured(tmp_path, paths)), [methods, "budgets=[0.5, 0.25]"])
    dense, nsa = candidate("dense"), candidate("nsa", trained="nsa")
    comparison = Comparison(config, [dense, nsa], print)

    def arms(model: Candidate, methods: bool) -> list[tuple[str, Any]]:
        return [(arm.label.partition("+")[2], arm.budget) for arm in comparison.arms(model, methods=methods)]

    assert arms(dense, False) == [("dense", None)] and arms(nsa, False) == [("own", None), ("dense", None)]
    asked = [
        "oracle_topk",
        "oracle_topp",
        "sink_window",
        "twilight,p=0.9",
        "twilight",
        "random",
        "sink_window,num_sinks=2",
    ]
    expected = [(n, b) for n in asked for b in ([None] if "p=" in n else [0.5, 0.25])]
    assert arms(dense, True) == arms(nsa, True) == expected
    assert comparison.most == (3 + 2 * len(expected)) * 2  # at two lengths of one task


@pytest.mark.parametrize("written", ["{name: quest, fp8: false}", "{name: quest, page: 16, over_group: sum}"])
def test_a_setting_that_says_the_default_makes_no_other_arm(written: str, tmp_path: Path) -> None:
    """Nor another configuration: results that were begun with the one are gone on with by the other."""
    path = str(configured(tmp_path, {"dense": Path("dense"), "nsa": Path("nsa")}))
    said, plain = (load(path, [f"methods=[{method}]"]) for method in (written, "quest"))
    assert [method.label for method in said.methods] == ["quest"]
    assert said == plain and said.model_dump_json() == plain.model_dump_json()
    with pytest.raises(ConfigError, match="quest is there twice"):
        load(path, [f"methods=[{written}, quest]"])


RANGES = {"samples": (1, 0), "queries": (1, 0), "batch_tokens": (1, 0), "decode_batch_tokens": (1, 0)}
RANGES |= {"calibration_samples": (1, 0), "trainings_per_gpu": (1, 0), "floor": (0.0, -0.1)}


@pytest.mark.parametrize(("key", "there", "beyond"), [(key, *values) for key, values in RANGES.items()])
def test_the_least_of_a_number_is_taken_and_less_is_refused(key: str, there: Any, beyond: Any, tmp_path: Path) -> None:
    path = str(configured(tmp_path, {"dense": Path("dense"), "nsa": Path("nsa")}))
    assert getattr(load(path, [f"{key}={there}"]), key) == there
    with pytest.raises(ConfigError, match=key):
        load(path, [f"{key}={beyond}"])
    assert load(path, ["floor=1.0"]).floor == 1
    with pytest.raises(ConfigError, match="floor"):
        load(path, ["floor=1.01"])


def test_a_threshold_that_is_its_default_is_said_all_the_same(tmp_path: Path) -> None:
    """Said, it is not fitted to the budgets; a default beside it goes."""
    path = configured(tmp_path, {"dense": Path("dense"), "nsa": Path("nsa")})
    (method,) = load(str(path), ["methods=[{name: double_p, p2: 0.7, p1: 0.95}]"]).methods
    assert method.label == "double_p,p2=0.7" and method.settings == {"p2": 0.7}


@pytest.mark.parametrize(
    ("tokenizers", "message"),
    [
        ({("dense", 1): 1, ("dense", 2): 2}, "dense#1 and dense#2"),
        ({("dense", None): 1, ("nsa", None): 2}, "dense and nsa"),
        ({("dense", None): 1, ("large", None): 2, ("nsa", None): 2}, None),
        ({("nsa", None): 1, ("dsa", None): 2}, None),
        ({("nsa", 1): 1, ("nsa", 2): 2}, "nsa#1 and nsa#2"),
        ({("dense", None): 1, ("large", None): 2, ("nsa", None): 3}, "large and nsa"),
    ],
)
def test_siblings_that_are_compared_have_one_tokenizer(
    tokenizers: dict[tuple[str, int | None], int], message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainings of one sibling, and what was trained sparse with one that was trained dense; others may differ."""
    models = {candidate(*key, key[0] if key[0] in ("nsa", "dsa") else "dense"): t for key, t in tokenizers.items()}
    by_folder = {model.folder: str(number) for model, number in models.items()}
    monkeypatch.setattr(runner, "tokenizer_digest", by_folder.get)
    comparison = Comparison(None, list(models), print)  # type: ignore[arg-type]
    if message is None:
        comparison._check_tokenizers()
        return
    with pytest.raises(ValueError, match=f"siblings {message} have different tokenizers"):
        comparison._check_tokenizers()


@pytest.mark.parametrize("watch", [True, False])
def test_a_cell_says_how_it_was_asked(watch: bool, siblings: dict[str, Path], tmp_path: Path) -> None:
    overrides = ["dense_layers=[1]", f"watch={watch}".lower(), "budgets=[0.5, 24, 1]", "lengths=[64]"]
    work = commands.work_of(str(configured(tmp_path, siblings)), overrides)
    comparison = work.comparison()
    model, place = comparison.candidates[0], Place("mqar", 64, False)
    cells = Cells(work.config, work.folder(comparison), lambda *_: None, "cpu", lambda: 999.0)
    quest = MethodConfig(name="quest", page=4)  # type: ignore[call-arg]
    arms = [Arm(model, MethodConfig(name="dense"), None), *(Arm(model, quest, budget) for budget in (0.5, 24, 1))]
    for arm in arms:
        cells._answer([arm], place, lambda arm, part: None)
    dense, half, tokens, full = (
        cells.folder.cell(arm.label, share, *place, model.train_seed)
        for arm, share in zip(arms, (None, 0.5, 24 / 64, 1.0), strict=True)
    )
    assert dense is not None and half is not None and tokens is not None and full is not None
    assert [(cell.budget, cell.budget_tokens) for cell in (dense, half, tokens, full)] == [
        (None, None), (0.5, None), (24 / 64, 24), (1.0, None),
    ]  # fmt: skip
    assert dense.dense_layers == [] and half.dense_layers == full.dense_layers == [1]
    assert dense.settings == {} and half.settings == quest.build(cells._method(arms[1], None, None).budget).settings()  # type: ignore[arg-type,union-attr]
    assert len(half.settings) > 0 and half.settings["page"] == 4
    assert (half.group, half.scope, half.phases, dense.phases) == ("retrieval", "single", ["decode"], [])
    assert [("changes" in cell.figures, "kept_mass" in cell.figures) for cell in (half, tokens, full)] == [
        (watch, watch), (False, watch), (False, watch),
    ]  # fmt: skip


def test_what_is_left_out_is_said_once(siblings: dict[str, Path], tmp_path: Path) -> None:
    work = commands.work_of(str(configured(tmp_path, siblings)), [])
    said: list[tuple[str, str]] = []
    cells = Cells(work.config, work.folder(work.comparison()), lambda *what: said.append(what), "cpu", lambda: 999.0)
    for why in ("first", "second"):
        cells.leave_out("a cell", why)
    assert said == [("a cell", "first")] and cells.left == {"a cell": "first"}


def test_the_bar_counts_all_methods_that_are_not_asked(siblings: dict[str, Path], tmp_path: Path) -> None:
    """Nothing here is solved outright, so below a floor of 1 all methods are left out, and the bar is full."""
    work = commands.work_of(str(configured(tmp_path, siblings)), ["floor=1.0"])
    comparison, moves = work.comparison(), list[float]()
    folder = work.folder(comparison)
    comparison.run(folder, moves.append)
    assert len(folder.left_out()) == 4 and sum(moves) == pytest.approx(comparison.most)
