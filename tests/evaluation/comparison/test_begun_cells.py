"""A cell that is not finished keeps the batches that were answered, and goes on from there with the same results."""

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reading_once import compared, run

from nsa.baselines.ledger import Counts
from nsa.compare import main
from nsa.evaluation.comparison import commands
from nsa.evaluation.comparison.answers import Answer
from nsa.evaluation.comparison.begun import Begun
from nsa.evaluation.comparison.cells import Asked, Cells
from nsa.evaluation.comparison.decoding import Prompts
from nsa.evaluation.comparison.folder import ResultsFolder
from tests.small_run import small_export

# Of five samples two, two and one are read at once.
SMALL: Any = ("{name: quest, page: 4}, {name: block_sparse, block: 4}, twilight", ("dense",))
Whole = tuple[dict[str, Any], int, int, int]
OVERRIDES = ("question=[after]", "budgets=[0.5, 0.25]", "samples=5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"dense": small_export(tmp_path_factory.mktemp("dense"), "dense")}


def begun(out: Path, folders: dict[str, Path]) -> commands.Work:
    return compared(out, folders, *SMALL, *OVERRIDES)


class Counted:
    """Calls of a method of a class that went well, while ``kill_at`` may kill at one."""

    def __init__(self, patch: pytest.MonkeyPatch, where: Any, name: str) -> None:
        self.calls, self.kill_at = 0, -1
        real = getattr(where, name)

        def called(*arguments: Any, **named: Any) -> Any:
            if self.calls == self.kill_at:
                self.kill_at = -1
                raise SystemExit("killed")
            found = real(*arguments, **named)
            self.calls += 1
            return found

        patch.setattr(where, name, called)


@pytest.fixture(scope="module")
def whole(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """What an undisturbed run says, and how many batches it answers, thresholds it fits and thresholds it tries."""
    with pytest.MonkeyPatch.context() as patch:
        batches, fits = Counted(patch, Asked, "go_on"), Counted(patch, Cells, "_fit")
        trials = Counted(patch, Cells, "_spent")
        found = run(begun(tmp_path_factory.mktemp("whole") / "in", folders))
    assert fits.calls == 3 and batches.calls > 30  # oracle_topp and twilight; one of its budgets cannot be met
    assert trials.calls > 10
    return found, batches.calls, fits.calls, trials.calls


def test_a_kill_at_any_batch_or_trial_costs_none_before_it(
    folders: dict[str, Path], whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial is what one threshold spends, while one is fitted."""
    batches, fits = Counted(monkeypatch, Asked, "go_on"), Counted(monkeypatch, Cells, "_fit")
    trials = Counted(monkeypatch, Cells, "_spent")
    work = begun(tmp_path / "in", folders)
    for counted, at in ((batches, 1), (trials, 1), (trials, 3), (batches, 10), (batches, 23), (batches, 31)):
        counted.kill_at = at
        with pytest.raises(SystemExit):
            run(work)
        assert list((work.whole.folder / "begun").glob("*.jsonl"))
    assert run(work) == whole[0]
    assert (batches.calls, fits.calls, trials.calls) == whole[1:]


@pytest.mark.parametrize("removed", [False, True])
def test_a_kill_while_cells_are_written_costs_no_batch(
    removed: bool,
    folders: dict[str, Path],
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before a cell is there, and between the cell and the removal of what was known of it."""
    batches, work = Counted(monkeypatch, Asked, "go_on"), begun(tmp_path / "in", folders)
    Counted(monkeypatch, *((Path, "unlink") if removed else (ResultsFolder, "write"))).kill_at = 4
    with pytest.raises(SystemExit):
        run(work)
    assert run(work) == whole[0] and batches.calls == whole[1]


def test_prompts_are_read_for_all_after_a_kill(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a round, some are a batch ahead."""
    batches, work = Counted(monkeypatch, Asked, "go_on"), begun(tmp_path / "in", folders)
    forgets = Counted(monkeypatch, Prompts, "forget")
    run(begun(tmp_path / "other", folders))
    undisturbed, forgets.calls = forgets.calls, 0
    batches.calls, batches.kill_at = 0, 8
    with pytest.raises(SystemExit):
        run(work)
    run(work)
    assert forgets.calls == undisturbed + 1  # the batch of that round


def damaged(text: bytes) -> bytes:
    lines = text.splitlines(keepends=True)
    return b"".join([*lines[:-1], lines[-1][: len(lines[-1]) // 2]])


@pytest.mark.parametrize(
    ("change", "again"),
    [
        (damaged, 1),
        (lambda text: text[:-1], 1),
        (lambda text: text.replace(b'"seconds"', b'"hours"'), 2),
        (lambda text: text.replace(b'"origin": "', b'"origin": "of another '), 2),
        (lambda text: text.replace(b'"weights": "', b'"weights": "of another training '), 2),
        (lambda text: text.replace(b'"hardware": "', b'"hardware": "another GPU, '), 2),
        (lambda text: b"", 2),
        (lambda text: b"\xff" + text, 2),
        (lambda text: b"[]\n" + text, 2),
    ],
)
def test_what_is_damaged_or_of_another_run_is_answered_again(
    change: Callable[[bytes], bytes],
    again: int,
    folders: dict[str, Path],
    whole: Whole,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The dense run was killed after two batches of three."""
    batches, work = Counted(monkeypatch, Asked, "go_on"), begun(tmp_path / "in", folders)
    batches.kill_at = 2
    with pytest.raises(SystemExit):
        run(work)
    (path,) = (work.whole.folder / "begun").glob("*")
    text = path.read_bytes()
    assert text.count(b"\n") == 3 and change(text) != text
    path.write_bytes(change(text))
    assert run(work) == whole[0]
    assert batches.calls == whole[1] + again


def test_other_batches_go_on_with_the_same_questions(
    folders: dict[str, Path], whole: Whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = begun(tmp_path / "in", folders)
    with monkeypatch.context() as patch:
        Counted(patch, Asked, "go_on").kill_at = 23
        with pytest.raises(SystemExit):
            run(work)
    found, expected = run(compared_again(work, "batch_tokens=64")), whole[0]
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith(".jsonl") and "random" not in name:
            assert found[name] == expected[name]


def compared_again(work: commands.Work, *overrides: str) -> commands.Work:
    return commands.work_of(str(work.whole.folder.parent / "c.yaml"), [*OVERRIDES, *overrides])


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_told_and_costs_no_batch_before_it(
    workers: int, folders: dict[str, Path], whole: Whole, tmp_path: Path
) -> None:
    """No file can grow beyond 1,500 bytes: the last line of a cell's is written in part."""
    work = begun(tmp_path / "in", folders)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        Counted(patch, Asked, "go_on").kill_at = 1
        run(work)
    comparison = work.comparison("cpu", workers)
    folder = work.folder(comparison)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1500, limit[1]))
    try:
        with pytest.raises(ValueError, match=r"File too large\. The answers so far are in .*in/small: mend this"):
            comparison.run(folder, lambda cells: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path for path in (work.whole.folder / "begun").iterdir() if path.read_bytes()[-1:] != b"\n"]
    assert run(work) == whole[0]


def test_a_folder_that_cannot_be_made_is_told(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun(tmp_path / "in", folders)
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "in/c.yaml"), f"output_dir={tmp_path}/file/results"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_nothing_is_left_of_it_at_the_end(folders: dict[str, Path], tmp_path: Path) -> None:
    """Nor of what was begun by somebody else, and left out later."""
    work = begun(tmp_path / "in", folders)
    run(work)
    left = work.whole.folder / "begun"
    assert list(left.iterdir()) == []
    (left / "other.jsonl").write_text("{}\n")
    comparison = work.comparison()
    work.folder(comparison).finish("now")
    assert not left.exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_bar_moves_with_each_batch(
    workers: int, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several workers, too: the messages of one are handed on."""
    moves: list[float] = []
    work = begun(tmp_path / "in", folders)
    comparison = work.comparison("cpu", workers)
    comparison.run(work.folder(comparison), moves.append)
    cells = len(list((work.whole.folder / "cells").iterdir())) + 1  # that is left out
    assert sum(moves) == pytest.approx(cells)
    assert sum(0 < move < 0.99 for move in moves) > 2 * cells and min(moves) >= 0


def test_what_is_kept_is_what_was_counted(tmp_path: Path) -> None:
    """In all bits, in the order in which it came."""
    generator = torch.Generator().manual_seed(0)
    path, by = tmp_path / "begun/cell.jsonl", {"made": {"code": "a"}, "cell": ("quest", 1 / 3)}
    one = Begun(path, by)
    one.begin(0.1 + 0.2)
    for seconds, key in ((1.0, ("prefill", 1)), (1 / 3, ("decode", 0)), (2.5, ("prefill", 1))):
        counts = Counts(*torch.rand(7, 3, generator=generator, dtype=torch.float64))
        one.ledger.add(*key, counts)
        one.ledger.add(*key, counts + counts, beside=True)
        one.ledger.ran.add(key)
        one.add([Answer(int(seconds), 1, None), Answer(2, 3, 0.1)], seconds, [*one.figures, {"sink_mass": seconds}])
    other = Begun(path, by)
    assert (other.threshold, other.answers, other.seconds) == (0.1 + 0.2, one.answers, 2.5)
    assert other.figures == [{"sink_mass": seconds} for seconds in (1.0, 1 / 3, 2.5)]
    assert other.ledger.ran == one.ledger.ran
    for mine, theirs in ((one.ledger.counts, other.ledger.counts), (one.ledger.beside, other.ledger.beside)):
        assert list(mine) == list(theirs) == [("prefill", 1), ("decode", 0)]
        for key in mine:
            for name, value in vars(mine[key]).items():
                assert torch.equal(value, vars(theirs[key])[name])
    assert json.loads(path.read_text().splitlines()[0])["by"]["cell"] == ["quest", 1 / 3]
    assert Begun(path, {**by, "cell": ("quest", 0.5)}).answers == []


def test_trials_are_kept_until_a_threshold_is(tmp_path: Path) -> None:
    """In all bits, and after a second kill, too. What is damaged is tried again."""
    path, tried = tmp_path / "begun/cell.jsonl", {0.0: 1 / 3, 1.0: 0.7, 0.1 + 0.2: 0.1}
    for count in (1, 3):
        one = Begun(path, {})
        one.begin(None)
        for threshold in list(tried)[len(one.tried) : count]:
            one.keep_trial(threshold, tried[threshold])
        other = Begun(path, {})
        assert other.threshold is None and list(other.tried.items()) == list(tried.items())[:count]
        assert one.tried == other.tried
    path.write_text(path.read_text()[:-5])
    assert len(Begun(path, {}).tried) == 2 and Begun(path, {"made": "elsewhere"}).tried == {}
    one.begin(0.25)
    one.add([Answer(0, 1, 0.5)], 1.0, [])
    other = Begun(path, {})
    assert (other.threshold, other.tried, other.answers) == (0.25, {}, [Answer(0, 1, 0.5)])
