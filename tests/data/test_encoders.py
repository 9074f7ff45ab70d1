"""The workers that tokenize: what they return, and how they end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from nsa.config import MINIMAL
from nsa.data import encoders as module
from nsa.data import tokenizer as tokenizers
from nsa.data.config import DataConfig
from nsa.data.encoders import encode_batch, encoders
from nsa.data.shards import PreparedData

WORK = """
import multiprocessing, sys
from pathlib import Path
from nsa.data.encoders import encoders
if __name__ == "__main__":
    with encoders(Path(sys.argv[1]), 2) as encode:
        encode([b"text"])
        for line in sys.stdin:
            print(*encode([line.encode()]).result()[0], flush=True)
            print(*(p.pid for p in multiprocessing.active_children()), flush=True)
"""


def test_a_batch_is_its_texts(prepared: PreparedData) -> None:
    tokenizer = prepared.tokenizer
    texts = [b"one two", b"", b"\xff\n three " * 50]
    with encoders(tokenizer.path, 1) as encode:
        tokens, ends = encode(texts).result()
        none, no_ends = encode_batch([])
    for text, part in zip(texts, np.split(tokens, ends[:-1]), strict=True):
        assert part.tolist() == [tokenizer.bos_id, *tokenizer.encode_bytes(text), tokenizer.eos_id]
    assert ends[-1] == len(tokens) and tokens.dtype == np.int32
    assert len(none) == len(no_ends) == 0


@pytest.mark.parametrize("few", [3, 50, 1 << 20])
def test_many_texts_at_once_are_encoded_as_each_alone(
    prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    """However much sentencepiece or the proof takes at once. Planted: lines counted for the next text."""
    monkeypatch.setattr(tokenizers, "AT_ONCE", few)
    monkeypatch.setattr(module, "PIECE", few)
    tokenizer = prepared.tokenizer
    texts = [
        b"",
        b"one\n\ntwo",
        b"\n",
        b"\xff a \xfe",
        "\u2581 x \u2581".encode(),
        b"",
        b"a" * 70_000,
        "é漢".encode(),
        b"",
    ]
    with encoders(tokenizer.path, 1) as encode:
        tokens, ends = encode(texts).result()
    parts = [part.tolist() for part in np.split(tokens, ends[:-1])]
    assert parts == [[tokenizer.bos_id, *tokenizer.encode_bytes(text), tokenizer.eos_id] for text in texts]
    assert ends[-1] == len(tokens) and tokens.dtype == np.int32


@pytest.mark.parametrize("loss", ["a byte", "a border"])
def test_lost_text_is_noticed(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """Planted: each half of the proof left out."""
    encode_all = tokenizers.Tokenizer.encode_all

    def lose(self: tokenizers.Tokenizer, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = encode_all(self, texts)
        if loss == "a byte":  # another of as many
            ids[0] = self.encode("q")[0]
        else:
            ends[0] -= 1
        return ids, ends

    monkeypatch.setattr(tokenizers.Tokenizer, "encode_all", lose)
    with encoders(prepared.tokenizer.path, 1) as encode, pytest.raises(AssertionError, match="lost text"):
        encode([b"12", b"34"])


def test_workers_take_no_interrupt_and_end_with_their_parent(prepared: PreparedData, tmp_path: Path) -> None:
    """A Ctrl-C reaches all processes of a job; a killed parent tells nobody. Planted: each of the two left out."""
    script = tmp_path / "work.py"
    script.write_text(WORK)
    command = [sys.executable, str(script), str(prepared.tokenizer.path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as parent:
        assert parent.stdin and parent.stdout and parent.stderr

        def ask() -> tuple[str, set[int]]:
            assert parent.stdin and parent.stdout
            parent.stdin.write("some text\n")
            parent.stdin.flush()
            return parent.stdout.readline(), {int(pid) for pid in parent.stdout.readline().split()}

        tokens, workers = ask()
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        assert ask() == (tokens, workers) and workers
        parent.kill()
        while any(_lives(worker) for worker in workers):
            time.sleep(0.01)
        assert "Traceback" not in parent.stderr.read()


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


UNGUARDED = """
import sys
from nsa.data.config import DataConfig
from nsa.data.prepare import prepare
prepare(DataConfig.model_validate_json(sys.argv[1]), 0, progress=False)
"""
POOL = """
if __name__ == "__main__":
    from multiprocessing import get_context
    with get_context("spawn").Pool(1) as pool:
        print(pool.apply(len, ["ab"]))
"""


UNGUARDED_TRAINER = """
import sys
from nsa.config import load_config
from nsa.training.trainer import Trainer
Trainer(load_config(sys.argv[1]))
"""


def test_a_script_that_trains_is_told_so_too(config: DataConfig, tmp_path: Path) -> None:
    """Its workers said that they found no free port, or another run in the folder."""
    script, file = tmp_path / "script.py", tmp_path / "run.yaml"
    script.write_text(UNGUARDED_TRAINER)
    run = yaml.safe_load(MINIMAL) | {"output_dir": str(tmp_path / "runs"), "data": config.model_dump(mode="json")}
    run["data"] |= {"cache_dir": str(tmp_path / "cache"), "workers": 2}
    run["model"]["vocab_size"] = config.tokenizer.vocab_size
    run["model"]["max_position"] = max(1024, config.sequence_length)
    file.write_text(yaml.safe_dump(run))
    done = subprocess.run([sys.executable, script, file], capture_output=True, text=True, timeout=100)
    assert done.returncode and '`if __name__ == "__main__":`' in done.stderr


def test_a_script_that_its_workers_would_run_again_is_told_so(config: DataConfig, tmp_path: Path) -> None:
    """It hung: a worker that imports the script prepares, too, and waits for its parent's lock."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    settings = config.model_copy(update={"cache_dir": str(tmp_path / "cache"), "workers": 2})
    done = subprocess.run(
        [sys.executable, script, settings.model_dump_json()], capture_output=True, text=True, timeout=100
    )
    assert done.returncode and '`if __name__ == "__main__":`' in done.stderr
    script.write_text(UNGUARDED + POOL)  # workers of its own may prepare what needs none, or is there
    for workers in (1, 2):
        settings = settings.model_copy(update={"workers": workers})
        call = [sys.executable, script, settings.model_dump_json()]
        done = subprocess.run(call, capture_output=True, text=True, timeout=100)
        assert done.stdout.split() == ["2"], done.stderr
