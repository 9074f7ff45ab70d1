"""The page on fine-tuning, run as it is written, and trl's supervised fine-tuning."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import small_export

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tuning")
    small_export(path, ["dense", "nsa"]).rename(path / "export")
    return path


def run(folder: Path, code: str) -> str:
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHECKS = """
assert rows[0]["input_ids"][0] == tokenizer.bos_token_id and rows[0]["input_ids"][-1] == tokenizer.eos_token_id
before = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True)
ids = torch.tensor([rows[0]["input_ids"]])
for name in ("merged", "full"):
    after = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    assert (after(ids).logits - before(ids).logits).abs().max() > 1e-5, name
"""


def test_the_page_runs(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/fine-tuning.md").read_text(), re.DOTALL)
    assert len(blocks) == 6
    code = "\n".join(blocks).replace("report_to=[]", "report_to=[], use_cpu=True")  # the tests have no GPU to rely on
    assert "def double(" in run(folder, code + CHECKS)


SFT = """
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

tokenizer = AutoTokenizer.from_pretrained("export", trust_remote_code=True)
for packing in (False, True):
    model = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True)
    rows = Dataset.from_dict({"text": ["def f(x):\\n    return x\\n", "x = 1\\n"] * 8})
    options = SFTConfig(
        "sft", max_steps=2, per_device_train_batch_size=2, max_length=64, packing=packing,
        report_to=[], bf16=False, use_cpu=True
    )
    trainer = SFTTrainer(model, args=options, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
"""


@pytest.mark.slow
def test_trl_tunes_with_and_without_packing(folder: Path) -> None:
    pytest.importorskip("trl")
    run(folder, SFT)
