"""lm-evaluation-harness on an export, offline, with custom tasks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import TEXT, small_export

from nsa.exporting import load_decoder

# The harness lets the tokenizer parse special tokens; the trainer's does not.
PLAIN = TEXT[0].replace("<", "(")
NEEDLE = """
task: needle
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
num_fewshot: 0
metric_list: [{{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""


def score(decoder, tokenizer, text: str, context: str = "") -> float:
    """Log-likelihood of ``text`` after ``context``, or at the beginning of a document if ``context`` is empty."""
    before = tokenizer.encode(context) or [tokenizer.bos_id]
    ids = torch.tensor([before + tokenizer.encode(text)])
    targets = ids[:, 1:].clone()
    targets[:, : len(before) - 1] = -100
    with torch.no_grad():
        return -float(decoder(ids[:, :-1], targets).double().sum())


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("lm_eval"), ["dense", "nsa"])


@pytest.mark.slow  # test_callers.py has the harness in CI, too
def test_harness_gives_the_decoders_own_scores(exported: Path, tmp_path: Path) -> None:
    needles = [
        {"context": f"{PLAIN[i : i + 200]}\nThe key is", "choices": [" red", " blue", " green"], "gold": i % 3}
        for i in range(0, 1200, 100)
    ]
    texts = [{"text": PLAIN[i : i + 300 + i]} for i in (0, 40, 100)]
    for name, task, rows in (("needle", NEEDLE, needles), ("texts", TEXTS, texts)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task.format(data=data))

    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "needle,texts"]
    command += ["--model_args", f"pretrained={exported},trust_remote_code=True,dtype=float32"]
    command += ["--include_path", "tasks", "--device", "cpu", "--batch_size", "4", "--output_path", "out"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_CACHE": str(tmp_path / "hf" / "datasets")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]

    decoder, _, tokenizer = load_decoder(exported)
    nats = sum(score(decoder, tokenizer, row["text"]) for row in texts)
    size = sum(len(row["text"].encode()) for row in texts)
    assert results["texts"]["bits_per_byte,none"] == pytest.approx(-nats / size / math.log(2), rel=1e-4)
    hits = 0
    for row in needles:
        scores = [score(decoder, tokenizer, choice, row["context"]) for choice in row["choices"]]
        hits += scores.index(max(scores)) == row["gold"]
    assert results["needle"]["acc,none"] == pytest.approx(hits / len(needles))
