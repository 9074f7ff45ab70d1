"""What several files of tests here ask of the proof."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from nsa.exporting import ExportError, load_alone, proof


@pytest.fixture
def asked_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The proof's question is answered in this process, which has loaded `transformers` already."""

    def ask(folder: Path, question: dict) -> tuple[dict, dict]:
        try:
            load_alone.answer(str(folder), question, tmp_path)
        except Exception as e:  # there the process would fail
            raise ExportError(f"transformers cannot use the export: {e}") from e
        return json.loads((tmp_path / "answer.json").read_text()), load_file(tmp_path / "answer.safetensors")

    monkeypatch.setattr(proof, "_ask", ask)
    monkeypatch.setattr(proof, "hostile_texts", lambda: ["a </s> b"])
    monkeypatch.setattr(proof, "NEW_TOKENS", 3)
