"""Figures: what is measured, and that each step has one point however often a run was resumed."""

import json
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tiny import start, tiny_config, train, write_yaml

from nsa import plan
from nsa.data import prepare
from nsa.layers.figure import values
from nsa.layers.nsa.figures import block_entropy, block_overlap, first_block_share
from nsa.layers.nsa.kind import NSA
from nsa.models import Decoder
from nsa.models import config as model_config
from nsa.ops.geometry import Documents
from nsa.planning.describe import describe, describe_text
from nsa.training.attention_probe import probe
from nsa.training.console import Console
from nsa.training.exit_codes import REQUEUE
from nsa.training.monitor import Monitor, _say_nothing_of_the_disk, charts
from nsa.training.performance import memory_gib, peak_flops

BRANCHES = ("compressed", "selected", "window")
PANELS = {
    "train/loss", "train/grad_norm", "train/learning_rate", "train/tokens", "validation/loss",
    "validation/bits_per_byte", "perf/tokens_per_second", "perf/step_seconds", "perf/data_seconds", "perf/memory_gib",
    "perf/mfu_sparse", "perf/mfu_dense_equivalent", "attention/block_entropy/layer_00",
    "attention/block_overlap/layer_00", "attention/first_block_share/layer_00",
    *(f"attention/gate_{b}/layer_00" for b in BRANCHES), *(f"attention/mass_{b}/layer_00" for b in BRANCHES),
}  # fmt: skip


def test_a_resumed_run_has_one_point_a_step(tmp_path):
    monitor = Monitor(tmp_path, 0)
    for step in range(1, 6):
        monitor.write(step, {"train/loss": float(step)})
    monitor.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/l')  # killed while it wrote

    monitor = Monitor(tmp_path, 3)
    for step in range(4, 8):
        monitor.write(step, {"train/loss": 10.0 * step})
    monitor.close()

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70)]
    assert [(line["step"], line["train/loss"]) for line in lines] == expected
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == expected


def test_an_overview_shows_the_loss_first_and_all_layers_in_one_chart(tmp_path):
    monitor = Monitor(tmp_path, 0)
    monitor.write(1, {"perf/tokens_per_second": 5.0, "train/loss": 1.0})
    monitor.write(2, {"train/loss": 1.0, "attention/recall/layer_10": 0.5, "attention/recall/layer_02": 0.5})
    monitor.write(3, {"train/loss": 1.0, "validation/loss": 1.0, "attention/recall_bound/layer_02": 0.5})
    monitor.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (event,) = board.Tensors("custom_scalars__config__")[-1:]
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    charts_of = {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }
    assert charts_of.pop("overview")["loss"] == ["train/loss", "validation/loss"]
    assert charts_of == {
        "attention/recall by layer": {
            "attention/recall": ["attention/recall/layer_.*"],
            "attention/recall_bound": ["attention/recall_bound/layer_.*"],
        }
    }
    assert layout.category[0].title == "overview" and layout.category[0].chart[0].title == "loss"


def test_a_resumed_run_shows_the_charts_of_its_first_life(tmp_path):
    """What is measured now and then may not be measured again before the end."""
    for resumed, metrics in ((0, {"train/loss": 1.0, "attention/recall/layer_00": 0.5}), (1, {"train/loss": 1.0})):
        monitor = Monitor(tmp_path, resumed)
        monitor.write(resumed + 1, metrics)
        monitor.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    layout = Layout.FromString(board.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["overview", "attention/recall by layer"]


def test_runs_of_several_kinds_have_the_same_charts_in_a_section():
    """TensorBoard merges sections of one title, and of the third run it drops what the first two do not have."""
    layers = [f"attention/{name}/layer_{i:02}" for name in ("gate_window", "mass_window", "recall") for i in (0, 11)]
    few, many = charts(["train/loss", layers[0]]), charts([*layers, "train/loss", "validation/loss"])
    assert few.keys() < many.keys() and all(many[section] == few[section] for section in few)
    dsa, nsa = (charts([f"attention/first_{name}/layer_00"]) for name in ("token_mass", "block_share"))
    assert dsa.keys() & nsa.keys() == {"overview"}
    (pattern,) = many["attention/gate by layer"]["attention/gate_window"][1]
    assert [tag for tag in layers if re.fullmatch(pattern, tag)] == layers[:2]


def test_nothing_is_hidden_where_the_clock_went_back(tmp_path, monkeypatch):
    """Three lives, each begun a day before the one before it, and a fourth in the same second."""
    expected, today = [], 1_800_000_000
    for life, now in enumerate((today, today - 86_400, today - 2 * 86_400, today - 2 * 86_400)):
        monkeypatch.setattr(time, "time", lambda now=now: float(now))
        monitor = Monitor(tmp_path, 3 * life)
        expected = expected[: 3 * life]
        for step in range(3 * life + 1, 3 * life + 6):  # two of them are lost
            monitor.write(step, {"train/loss": float(10 * life + step)})
            expected.append((step, 10 * life + step))
        monitor.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in board.Scalars("train/loss")] == expected


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda lines: lines, ""),
        (lambda lines: [*lines, b'{"step": 11, "tr'], ""),
        (lambda lines: lines[:7], "figures after step 7 up to step 10 are lost"),
        (lambda lines: [], "figures after step 0 up to step 10 are lost"),
        (lambda lines: [*lines[:3], b"\0\0\n", *lines[4:]], "1 of its lines cannot be read"),
    ],
)
def test_lost_lines_are_mentioned(tmp_path, harm, message):
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in range(1, 11)]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(harm(lines)))
    monitor = Monitor(tmp_path, 10)
    monitor.close()
    assert monitor.lost == (f"metrics.jsonl was cut or changed: {message}" if message else "")


def test_lines_of_every_tenth_step_are_all(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10}\n')
    for resumed, lost in ((19, False), (20, True)):
        monitor = Monitor(tmp_path, resumed, log_every=10)
        monitor.close()
        assert bool(monitor.lost) == lost


READ_ONLY = """
import errno, os, sys
from tensorboard.compat.tensorflow_stub.io import gfile
from nsa.training.console import Console
from nsa.training.monitor import Monitor, charts
def refuse(self, filename, *arguments):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fsencode(filename))
write = Monitor.write
def then_read_only(self, step, metrics):
    if step == 3:
        gfile.LocalFileSystem._write = refuse
    write(self, step, metrics)
Monitor.write = then_read_only
from nsa.train import main
sys.exit(main())
"""


def test_a_disk_that_becomes_read_only_is_said_without_a_traceback(tmp_path):
    process = start(["-c", READ_ONLY, str(write_yaml(tmp_path))])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in output, output
    assert "Read-only file system" in output and "b'" not in output


def test_every_panel_of_a_run_is_there(one_rank):
    run = one_rank[0] / "to_step_6/runs/straight"
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) >= PANELS
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert set().union(*lines) >= PANELS
    last = lines[-1]
    assert last["train/tokens"] == 6 * 4 * 64
    assert 0 < last["perf/mfu_sparse"] < 1 and 0 < last["perf/mfu_dense_equivalent"] < 1
    assert 0 < last["validation/bits_per_byte"] < 8.5
    assert (run / "deepspeed.json").is_file() and (run / "config.yaml").is_file()


def test_the_probe_sees_each_sparse_layer_and_leaves_no_hook(tmp_path):
    config = tiny_config(tmp_path)
    torch.manual_seed(0)
    model = Decoder(config.model, config.attention)
    found = {}
    tokens = torch.randint(0, 400, (1, 128))
    borders = torch.tensor([0, 50, 51, 128], dtype=torch.int32)
    with probe(model.layers, found):
        model(tokens, cu_seqlens=borders)
    metrics = values(found)
    assert {name.rsplit("/", 1)[1] for name in metrics} == {"layer_00"}, "layer 1 is dense"
    assert sum(metrics[f"attention/mass_{b}/layer_00"] for b in BRANCHES) == pytest.approx(1)
    assert all(metrics[f"attention/gate_{b}/layer_00"] == pytest.approx(0.5, abs=0.1) for b in BRANCHES)
    assert all(0 <= value <= 1 for value in metrics.values())
    model(tokens)
    assert values(found) == metrics


def test_the_probe_compares_layers_within_a_forward_pass(tmp_path):
    """Notices lists of the last pass that the first layer is compared with."""
    sizes = "attention.dsa={topk: 16, index_heads: 2, index_head_dim: 16, index_rotary_dims: 8}"
    config = tiny_config(tmp_path, "attention.kind=[dsa, dense, dsa]", sizes, "model.num_layers=3")
    model, found = Decoder(config.model, config.attention), {}
    with probe(model.layers, found):
        for _ in range(2):
            model(torch.randint(0, 400, (1, 64)))
    metrics = values(found)
    assert [name for name in metrics if "layer_overlap" in name] == ["attention/layer_overlap/layer_02"]
    assert 0 < metrics["attention/layer_overlap/layer_02"] < 1
    assert not any(layer._forward_pre_hooks for layer in model.layers)


def test_block_statistics():
    document = torch.tensor([0, 0, 0, 1])
    documents = Documents.of(4, 20, torch.tensor([0, 23, 24], dtype=torch.int32), torch.device("cpu"))
    blocks = torch.tensor([[0, -1], [0, 1], [1, 2], [0, -1]])[None, :, None]  # (B, T, G, n)
    # Follow in one document: 1 after 0 (shares 0 of 0, 1), 2 after 1 (shares 1 of 1, 2).
    assert block_overlap(blocks, document).value == pytest.approx(2 / 4)
    # Selected: block 0 twice, 1 twice and 2 once of the first document, block 0 once of the second.
    share = torch.tensor([2, 2, 1, 1]).double() / 6
    assert block_entropy(blocks, documents, 8).value == pytest.approx(
        float(-(share * share.log()).sum() / torch.tensor(4.0).log())
    )
    one = Documents.of(4, 0, None, torch.device("cpu"))
    assert block_entropy(torch.zeros(1, 4, 1, 1, dtype=torch.int32), one, 8).value == 0
    choice = torch.tensor([False, True, True, False])
    assert first_block_share(blocks, choice).value == pytest.approx(0.5)
    assert first_block_share(blocks, torch.zeros(4, dtype=torch.bool)).value == 1


def test_peak_and_memory_are_figures_on_a_cpu():
    flops, source = peak_flops(torch.device("cpu"), "fp32")
    assert flops > 1e8 and source == "measured"
    assert 0 < memory_gib(torch.device("cpu")) < 1000


def test_deepspeed_tells_nothing_of_its_own(tmp_path):
    done = train(tmp_path, "engine.precision=bf16", "engine.zero_stage=1", "training.steps=2")
    assert done.returncode == 0 and "step 2/2" in done.stdout
    assert "bf16_optimizer" not in done.stdout and "CPU Virtual Memory" not in done.stdout


def test_the_farewell_says_what_was_done(tmp_path, capsys):
    console = Console(tiny_config(tmp_path), SimpleNamespace(is_main=True), tmp_path)
    console.farewell(21, "")
    assert f"nothing to do: {tmp_path} has done 21 steps, training.steps is 6" in capsys.readouterr().out
    console.farewell(6, "")
    assert capsys.readouterr().out == f"done: 6 steps in {tmp_path}\n"


def of_tokens(tokens):
    """Prepared data whose text has so many tokens."""
    return SimpleNamespace(manifest={"sources": {"text": {"train": {"tokens": tokens}}}})


def test_rank_0_says_at_the_start_how_often_the_text_is_read(tmp_path, capsys):
    """Over the whole run, also if it is resumed. Planted: the steps that are left; other ranks that compute it, too."""
    config, figures = tiny_config(tmp_path), SimpleNamespace(peak=1e12, peak_source="measured")
    tokens = 6 * 4 * 0.8 * 64  # of the text in all steps
    for step in (0, 4):
        for main in (True, False):
            ranks = SimpleNamespace(is_main=main, world_size=2, device=torch.device("cpu"))
            data = of_tokens(int(tokens) // 5) if main else None
            Console(config, ranks, tmp_path).greet("2 data", figures, None, step, data)
            said = capsys.readouterr().out
            assert ("\ntext: 245 tokens, read 4.96 times\nwarning: this run reads text 4.96 times." in said) == main
            assert bool(said) == main


def test_a_resumed_run_knows_the_lowest_validation_loss(tmp_path):
    """To the last bit, from metrics.jsonl, as if it had not stopped. Planted: lines of before, or dropped lines of
    after the resumption, left out or counted; a loss that is not finite; the last of equal losses."""
    losses = {1: math.nan, 2: 3.1, 3: math.inf, 4: 0.1 + 0.2, 5: 0.1 + 0.2, 6: 0.4}
    expected = {1: None, 2: (3.1, 2), 3: (3.1, 2), **dict.fromkeys((4, 5, 6), (0.1 + 0.2, 4))}
    for resumed in range(7):
        folder = tmp_path / str(resumed)
        folder.mkdir()
        first = Monitor(folder, 0)
        assert first.lowest is None
        for step in range(1, 7):
            first.write(step, {"train/loss": 0.01, "validation/loss": losses[step]})
            assert first.lowest == expected[step]
        first.close()
        again = Monitor(folder, resumed)
        assert again.lowest == expected.get(resumed)
        again.write(resumed + 1, {"train/loss": 0.01})
        assert again.lowest == expected.get(resumed)
        again.write(resumed + 2, {"validation/loss": 0.05})
        assert again.lowest == (0.05, resumed + 2)
        again.close()


def test_the_lowest_validation_loss_is_said_and_survives_a_resumption(tmp_path, capsys):
    """In the lines of real runs: one that goes through and one that is resumed. What they say of their text, the plan
    and nsa.data.prepare say, too. Planted: a resumed run that counts anew; a command that does not say it."""
    often = ["training.validation_every=1", "training.log_every=1", "optimizer.learning_rate=3", "training.steps=4"]

    def said(*overrides):
        done = train(tmp_path, *often, *overrides)
        assert done.returncode in (0, REQUEUE), done.stdout
        lines = [line for line in done.stdout.splitlines() if "validation loss" in line]
        return [re.sub(r"  \|  [^|]* tok/s  eta [^|]*", "", line).split("  bpb")[0] for line in lines], done.stdout

    through, output = said("name=through")
    halves = said("name=halves", "training.max_hours=0.0000001")[0]
    assert len(halves) == 1, "it stopped after its first step"
    assert halves + said("name=halves")[0] == through
    lowest = [math.inf, 0]
    for step, line in enumerate(through, 1):
        loss, best, at = re.search(r"validation loss ([\d.]+), lowest ([\d.]+) at step (\d+)$", line).groups()
        lowest = min(lowest, [float(loss), step])
        assert [float(best), int(at)] == lowest
    assert lowest[1] == 1, "before the resumption"
    (reading,) = [line for line in output.splitlines() if re.match(r"text: .* tokens, read .* times$", line)]
    assert f"  {reading}" in describe_text(tiny_config(tmp_path, "training.steps=4")).splitlines()
    prepare.main([str(write_yaml(tmp_path)), "training.steps=4"])
    assert f"in a run of 4 steps:\n  {reading}\n" in capsys.readouterr().out
    assert plan.main([str(write_yaml(tmp_path)), "--gpus", "1", "training.steps=4"]) == 0
    assert f"Text:\n  {reading}\n" in capsys.readouterr().out


def test_a_kind_that_no_export_carries_is_told_at_the_start(tmp_path, capsys, monkeypatch):
    """Planted: the greeting, and the plan, without the note."""
    config, ranks = tiny_config(tmp_path), SimpleNamespace(is_main=True, world_size=1, device=torch.device("cpu"))
    figures = SimpleNamespace(peak=1e12, peak_source="measured")

    def said() -> list[str]:
        Console(config, ranks, tmp_path).greet("1 data", figures, None, 0, of_tokens(10**6))
        return [capsys.readouterr().out, describe(config, 1)]

    assert all("note:" not in text for text in said())
    monkeypatch.setattr(model_config, "kind_of", lambda name: replace(NSA, export=None, placed=None))
    for text in said():
        assert "no export can carry Native Sparse Attention" in text
        assert "take attention.kind dense or nsa" in text


def test_only_an_error_of_the_disk_in_the_writer_is_not_printed():
    told = []
    hook, writer = _say_nothing_of_the_disk(told.append), type("_AsyncWriterThread", (), {})()
    for error, thread in ((OSError(), writer), (ValueError(), writer), (OSError(), object())):
        hook(SimpleNamespace(exc_value=error, thread=thread))
    assert [type(raised.exc_value) for raised in told] == [ValueError, OSError]
