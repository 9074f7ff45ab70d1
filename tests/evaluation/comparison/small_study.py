"""The study of configs/compare/study.yaml, as small as it can be, and its parts as somebody would run them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nsa.config import dump_config, load_config
from nsa.strict_yaml import read_tree
from tests.conftest import ROOT

STUDY = ROOT / "configs/compare/study.yaml"
SHAPE = [
    "model.vocab_size=512", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=4", "model.head_dim=16",
    "model.intermediate_size=64", "model.max_position=128", "model.init_std=0.1",
    "attention.nsa={compress_length: 4, compress_stride: 4, block_size: 8, num_blocks: 4, window: 16}",
    "attention.dsa={topk: 32, index_heads: 2, index_head_dim: 8, index_rotary_dims: 4}",
    "data.sequence_length=128", "data.tokenizer.vocab_size=512", "data.tokenizer.train_bytes=100_000",
    "data.sources.0.weight=0.02", "data.sources.0.include=['json/*.py']",
    "training={steps: 6, global_batch_size: 2, micro_batch_size: 2, validation_samples: 2, log_every: 3}",
    "optimizer.warmup_steps=1", "checkpoint.every=2", "engine={zero_stage: 1, precision: fp32}",
]  # fmt: skip


def write(folder: Path, siblings: Sequence[str] = (), seeds: int = 2) -> Path:
    """Write it into ``folder``: two methods, samples of 64 tokens; returns its file.

    Args:
        siblings: those that are in it; empty: all. seeds: of each sibling.
    """
    for name in ("study-25m", "study-125m"):
        (folder / f"{name}.yaml").write_text(dump_config(load_config(STUDY.parent / f"{name}.yaml", SHAPE)))
    tree = read_tree(STUDY)
    quest, snapkv = {"name": "quest", "page": 4}, {"name": "snapkv"}
    tree |= {"methods": [quest, snapkv], "budgets": [0.5, 0.25], "tasks": ["mqar", "mqar_wide"], "lengths": [64]}
    tree |= {"samples": 2, "queries": 2, "floor": 0.0}
    tree["siblings"] = [s for s in tree["siblings"] if not siblings or s["name"] in ("tokenizer", *siblings)]
    for sibling in tree["siblings"]:
        sibling["seeds"] = sibling.get("seeds", [])[:seeds]
        sibling["overrides"] = [_smaller(override) for override in sibling.get("overrides", [])]
    there = [sibling["name"] for sibling in tree["siblings"]]
    for stage in tree["stages"]:
        stage["siblings"] = [name for name in stage.get("siblings", []) if name in there]
        stage["methods"] = {"first": ["quest,page=4"], "methods": ["snapkv"]}.get(stage["name"], [])
    path = folder / "study.yaml"
    path.write_text(json.dumps(tree, indent=1))
    return path


def _smaller(override: str) -> str:
    key, _, value = override.partition("=")
    small = {"training.steps": 4, "optimizer.warmup_steps": 1, "model.intermediate_size": 48}
    return f"{key}={small.get(key, 28 if key == 'attention.dsa.num_local' else value)}"


def entrance(folder: Path) -> Path:
    """A folder whose launch.sh is set up with the environment of this process."""
    root = folder / "root"
    (root / ".venv").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith("setup-"):
            (root / ".venv" / path.name).symlink_to(path)
    (root / "nsa").symlink_to(ROOT / "nsa")
    checksum = subprocess.run(["cksum"], stdin=(ROOT / "pyproject.toml").open(), capture_output=True, text=True).stdout
    (root / ".venv/setup-stamp").write_text(f"{root} cpu {checksum}")
    return root / "launch.sh"


def start(launch: Path, *arguments: str) -> "subprocess.Popen[str]":
    """`launch.sh compare` in a session of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        ["bash", str(launch), "compare", *arguments],
        cwd=launch.parent.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill(process: "subprocess.Popen[str]") -> None:
    """With all that it started, at once, as a machine that is taken away."""
    mine = process.pid
    for _ in range(3):  # what was started meanwhile
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError, ValueError):
                if int((folder / "stat").read_text().rpartition(")")[2].split()[3]) == mine:
                    os.kill(int(folder.name), signal.SIGKILL)
        time.sleep(0.1)
    process.wait()
