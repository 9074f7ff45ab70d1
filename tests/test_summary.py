"""nsa.summary: the end of the demo."""

import json
import os

import pytest

from nsa.summary import main, summarise


def test_tells_the_last_validation_and_what_is_there(tmp_path):
    lines = [
        {"step": 1, "train/loss": 7.0},
        {"step": 10, "validation/bits_per_byte": 3.5},
        {"step": 20, "validation/bits_per_byte": 2.25, "train/loss": 3.0},
        {"step": 21, "train/loss": 3.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (10, 20):
        (tmp_path / f"step_{step:08d}").mkdir()
        (tmp_path / f"step_{step:08d}" / "manifest.json").touch()
    (tmp_path / "step_00000030").mkdir()  # not complete
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "recall.png").touch()
    text = summarise(tmp_path)
    assert "2.250 after 20 steps (3.500 after 10)" in text
    assert f"{tmp_path}/step_00000020" in text
    assert "step_00000010" not in text
    assert "step_00000030" not in text
    assert f"plot:          {tmp_path}/evaluation/recall.png" in text
    assert "export" not in text


@pytest.mark.parametrize("content", [None, "a pipe", '{"step": 1, "train/loss": 7.0}\n'])
def test_a_folder_that_is_no_finished_run_is_reported(tmp_path, capsys, content):
    if content == "a pipe":
        os.mkfifo(tmp_path / "metrics.jsonl")
    elif content:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
