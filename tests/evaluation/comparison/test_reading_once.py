"""Prompts that are read once for several methods give what each method gives that reads them by itself, in all bits."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest
import torch
import transformers

from nsa.baselines import METHODS, Budget, Ledger, Method, Session, method_named
from nsa.baselines.methods.dense import DenseForOthers
from nsa.evaluation.comparison import commands
from nsa.evaluation.comparison.arms import Arm
from nsa.evaluation.comparison.cells import Asked, TimeUpError, seconds_for
from nsa.evaluation.comparison.decoding import Prompts
from nsa.evaluation.comparison.models import open_model
from tests.small_run import small_config, small_export

WHILE_DECODING = [kind for kind in METHODS if kind.phases == ("decode",)]
CONFIG = """
name: small
output_dir: {out}
siblings: [{siblings}]
methods: [{methods}]
budgets: [0.5, 8]
tasks: [mqar]
lengths: [64]
samples: 3
queries: 2
batch_tokens: 130  # two prompts, or four with the question
question: [after, before]
"""
SOME = """{name: quest, page: 4}, {name: sparq, dims: 4}, twilight, h2o, tova,
  {name: snapkv, window: 4}, {name: double_p, recent: 8, cluster_size: 4}, {name: block_sparse, block: 4}"""

SMALLER: Any = ("{name: quest, page: 4}, h2o", ("dense",), "question=[after]", "budgets=[0.5, 0.25]", "samples=5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {kind: small_export(tmp_path_factory.mktemp(kind), kind) for kind in ("dense", "nsa")}
    folder = tmp_path_factory.mktemp("ungrouped")
    shape = {"num_kv_heads": 4, "head_dim": 16, "v_head_dim": 16, "hidden_size": 64}
    found["ungrouped"] = small_export(folder, "dense", small_config(folder, "dense", **shape))
    tokenizer = transformers.AutoTokenizer.from_pretrained(found["dense"], trust_remote_code=True)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
    )
    found["llama"] = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(found["llama"])
    tokenizer.save_pretrained(found["llama"])
    return found


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: open_model(kind, folder) for kind, folder in folders.items()}


def prompts_of(model: Any) -> Prompts:
    return Prompts(lambda: model.reader(DenseForOthers(), dense_layers=[], watch=False, ledger=Ledger()))


def small(kind: type[Method]) -> Method:
    knob = {} if kind.knob is None else {kind.knob[0]: (kind.knob[1] + kind.knob[2]) / 2}
    return kind(budget=Budget(tokens=16), **{**kind.small, **knob})


def gone_through(model: Any, method: Method, read: Callable[[Any], None]) -> dict[str, Any]:
    """All that decoding eight tokens shows after a prompt that was ``read``, once itself and once from a copy."""
    ledger = Ledger()
    reader = model.reader(method, dense_layers=[1], watch=True, ledger=ledger)
    read(reader)
    reader.end_prompt()
    after = torch.randint(2, 60, (7, 8), generator=torch.Generator().manual_seed(2))
    copied = reader.take(torch.tensor([0, 1, 1, 2, 6, 5, 4]))
    logits = [copied.read(after[:, t : t + 1]) for t in range(8)] + [reader.read(after[:, t : t + 1]) for t in range(8)]
    return {
        "logits": torch.stack([row for step in logits for row in step]),
        "counts": {key: vars(counts) for key, counts in ledger.counts.items()},
        "beside": {key: vars(counts) for key, counts in ledger.beside.items()},
        "ran": ledger.ran,
        "figures": [f for f in reader.session.figures if not f["prompt"]],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


IDS = torch.randint(2, 60, (7, 93), generator=torch.Generator().manual_seed(1))


def by_itself(reader: Any) -> None:
    reader.begin()
    reader.read(IDS)


@pytest.mark.parametrize("model", ["dense", "ungrouped", "nsa", "llama"])
@pytest.mark.parametrize("kind", WHILE_DECODING, ids=lambda kind: kind.name)
def test_a_method_goes_on_from_a_prompt_that_was_read_for_others(
    kind: type[Method], model: str, opened: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are compared with those of masks, pair by pair."""
    method, prompts = small(kind), prompts_of(opened[model])
    found = [gone_through(opened[model], method, lambda reader: reader.follow(prompts.read(IDS))) for _ in range(2)]
    monkeypatch.setattr("nsa.baselines.ledger.is_dense", lambda view, plan: False)
    expected = gone_through(opened[model], method, by_itself)
    assert same(found[0], expected)
    assert same(found[1], expected)  # the first one has left the prompt as it was
    assert expected["counts"]["prefill", 0]["visible"].sum() > 0 and expected["figures"]


def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda one, other: True)


def unkept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is evicted at the end of the prompt is not evicted."""
    monkeypatch.setattr("nsa.baselines.methods.h2o.H2O.evict", lambda *more: None)


def uncopied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second reader goes on where the first one has decoded."""
    follow = Session.follow

    def followed(self: Session, other: Any) -> None:
        follow(self, other)
        self.caches = other.__dict__.setdefault("shared", self.caches)

    monkeypatch.setattr(Session, "follow", followed)


@pytest.mark.parametrize("fault", [stale, unkept, uncopied])
def test_faults_of_it_are_seen(fault: Any, opened: dict[str, Any]) -> None:
    method, prompts = small(method_named("h2o")), prompts_of(opened["dense"])
    expected = gone_through(opened["dense"], method, by_itself)
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        prompts.read(IDS.flip(1))
        found = [
            gone_through(opened["dense"], method, lambda reader: reader.follow(prompts.read(IDS))) for _ in range(2)
        ]
    assert not all(same(one, expected) for one in found)


@pytest.mark.parametrize("name", ["block_sparse", "sink_window", "streaming_llm"])
def test_a_method_that_changes_the_prompt_does_not_go_on(name: str, opened: dict[str, Any]) -> None:
    reader = opened["dense"].reader(small(method_named(name)), dense_layers=[], watch=False, ledger=Ledger())
    with pytest.raises(ValueError, match=f"{name} does not leave the prompt dense"):
        reader.follow(prompts_of(opened["dense"]).read(IDS))


# ----------------------------------------------------------------------------------------------- whole comparisons


def compared(
    out: Path, folders: dict[str, Path], methods: str, kinds: tuple[str, ...], *overrides: str
) -> commands.Work:
    out.mkdir(parents=True)
    siblings = ", ".join(f"{{name: {kind}, export: {folders[kind]}}}" for kind in kinds)
    (out / "c.yaml").write_text(CONFIG.format(out=out, siblings=siblings, methods=methods))
    return commands.work_of(str(out / "c.yaml"), list(overrides))


def run(work: commands.Work, time_left: Callable[[], float] = lambda: 1e9) -> dict[str, Any]:
    comparison = work.comparison()
    folder = work.folder(comparison)
    comparison.run(folder, lambda cells: None, time_left)
    return told(folder.path)


def told(folder: Path) -> dict[str, Any]:
    """All that the cells say, and what was left out."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_text() for path in sorted((folder / "cells").rglob("*.json*"))
    }
    for name, text in found.items():
        if name.endswith("cell.json"):
            found[name] = {key: value for key, value in json.loads(text).items() if key not in ("origin", "made")}
    left = folder / "left_out.json"
    return {**found, "left out": json.loads(left.read_text()) if left.is_file() else {}}


def test_a_comparison_is_the_one_in_which_each_cell_reads_for_itself(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    attend = Session.attend

    def counted(self: Session, layer: int, q: Any, *more: Any) -> Any:
        read.append(int(layer == 0 and self.prompt))
        return attend(self, layer, q, *more)

    monkeypatch.setattr(Session, "attend", counted)
    once = run(compared(tmp_path / "once", folders, SOME, ("dense", "nsa")))
    prompts = sum(read)
    read.clear()
    monkeypatch.setattr(Arm, "leaves_prompts_dense", False)
    each = run(compared(tmp_path / "each", folders, SOME, ("dense", "nsa")))
    assert once.keys() == each.keys() and len(once) > 100
    assert [name for name in once if once[name] != each[name]] == []
    assert 0 < len(once["left out"]) < 20  # 8 tokens are too few for some
    assert prompts < 0.7 * sum(read)


def test_arms_that_leave_prompts_dense_may_read_more_at_once(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three samples all, where the others read two: the same answers and counts, of all but draws."""
    rows: dict[bool, set[int]] = {False: set(), True: set()}
    attend = Session.attend

    def counted(self: Session, layer: int, q: Any, *more: Any) -> Any:
        rows["prefill" in self.method.phases].add(len(q) if self.prompt else 0)
        return attend(self, layer, q, *more)

    monkeypatch.setattr(Session, "attend", counted)
    methods = "{name: quest, page: 4}, h2o, {name: block_sparse, block: 4}"
    few = run(compared(tmp_path / "few", folders, methods, ("dense",), "question=[after]"))
    assert rows == {False: {0, 1, 2}, True: {0, 1, 2}}
    rows[False].clear(), rows[True].clear()
    more = "question=[after]", "decode_batch_tokens=200"
    many = run(compared(tmp_path / "many", folders, methods, ("dense",), *more))
    assert rows == {False: {0, 1, 3}, True: {0, 1, 2}}  # leaks are looked for in one sample
    assert few.keys() == many.keys()
    for name in few:
        if name.endswith("cell.json") and "random" not in name:
            assert few[name]["counted"] == pytest.approx(many[name]["counted"])
        elif "random" not in name:
            assert few[name] == many[name]


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(compared(tmp_path_factory.mktemp("whole") / "in", folders, *SMALLER))


def test_the_time_may_end_anywhere(folders: dict[str, Path], whole: dict[str, Any], tmp_path: Path) -> None:
    """Each run finishes a cell or more; what was half done is gone on with."""
    work, done, several = compared(tmp_path / "parts", folders, *SMALLER), 0, 0
    for looks in range(100):  # at the clock until it is over
        clock = iter([1e6] * looks)
        try:
            found = run(work, lambda clock=clock: next(clock, 0.0))  # type: ignore[misc]
            break
        except TimeUpError:
            there = len(list((tmp_path / "parts/small/cells").iterdir()))
            assert there > done
            several, done = several + (there > done + 1), there
    assert looks > 3 and several > 0 and found == whole


def test_what_was_killed_goes_on(
    folders: dict[str, Path], whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, batches, go_on = compared(tmp_path / "parts", folders, *SMALLER), [0], Asked.go_on

    def killed(self: Asked) -> bool:
        batches[0] += 1
        if batches[0] % 13 == 0:
            raise SystemExit("killed")
        return go_on(self)

    monkeypatch.setattr(Asked, "go_on", killed)
    kills = 0
    while True:
        try:
            found = run(work)
            break
        except SystemExit:
            kills += 1
    assert kills > 2 and found == whole


def test_one_batch_is_kept_at_a_time(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the prompt that was read for all, one reader has a prompt."""
    sessions: WeakSet[Session] = WeakSet()
    holding: list[int] = []
    begin, follow = Session.begin, Session.follow

    def begun(self: Session, *more: Any) -> None:
        sessions.add(self)
        begin(self, *more)

    def followed(self: Session, other: Session) -> None:
        follow(self, other)
        holding.append(sum(session.length > 0 for session in sessions))

    monkeypatch.setattr(Session, "begin", begun)
    monkeypatch.setattr(Session, "follow", followed)
    run(compared(tmp_path / "one", folders, *SMALLER))
    assert len(holding) > 10 and set(holding) == {2}


def test_how_long_cells_will_take_is_known_from_those_that_have_begun() -> None:
    """Five of ten questions took 3 and 2 seconds; the last one has not begun."""

    def asked(answers: int, seconds: float) -> Any:
        known: Any = SimpleNamespace(answers=[None] * answers, seconds=seconds)
        return Asked(*[None] * 5, begun=known)  # type: ignore[arg-type]

    begun, fresh = [asked(5, 3.0), asked(5, 2.0)], asked(0, 0.0)
    assert [seconds_for(cells, 10) for cells in ([], begun[:1], begun, [*begun, fresh])] == [0, 3, 5, 5 + 4]
    assert seconds_for(begun, 5) == 0
