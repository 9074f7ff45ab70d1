"""A Llama and its own tokenizer: imported, trained for some steps, exported, evaluated."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from small_run import small_config
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from nsa import evaluate
from nsa.data.load_tokenizer import load_tokenizer
from nsa.exporting import export, proof
from nsa.exporting.folder import write_folder
from nsa.exporting.proof import hostile_texts
from nsa.importing import read_config
from nsa.models import Decoder
from tests.byte_level import BOS, EOS, TEXT, write_tokenizer
from tests.training import tiny

TOLD = "a <tool> b\n\n    12345 naïve 漢字\u2028"


def test_an_export_has_the_tokenizer_of_the_folder(tmp_path: Path, asked_here: None) -> None:
    """Of a vocabulary that is padded. Planted: settings that strip spaces are kept; the end is not named."""
    tokenizer, config = load_tokenizer(write_tokenizer(tmp_path / "theirs")), small_config(tmp_path, "dense")
    decoder = Decoder(config.model, config.attention).eval()
    weights = {name: tensor for name, tensor in decoder.state_dict().items() if name != "head.weight"}
    write_folder(tmp_path, config, weights, tokenizer)
    assert proof.prove(tmp_path, decoder, tokenizer).texts == 1
    assert (tmp_path / "tokenizer.json").read_bytes() == (tmp_path / "theirs/tokenizer.json").read_bytes()
    ours = AutoTokenizer.from_pretrained(tmp_path)
    ids = ours(TOLD, truncation=False).input_ids
    assert ids == [ours.bos_token_id, *tokenizer.encode(TOLD)]  # it adds a begin, as its file says
    assert ours.decode(ids, skip_special_tokens=True) == TOLD
    assert load_tokenizer(tmp_path).sha256 == tokenizer.sha256


@pytest.mark.slow
@pytest.mark.time_limit(300)
def test_from_a_folder_to_a_folder(tmp_path: Path, asked_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text has the names of special tokens. Bits per byte and recall are of its tokens."""
    folder = write_tokenizer(tmp_path / "llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 384, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 128}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads)).save_pretrained(folder)
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(30):
        (corpus / f"{i}.txt").write_text(f"{i} {EOS} <tool> " + "".join(TEXT) + f"{BOS} {i * 'word '}")
    tree = yaml.safe_load(tiny.write_yaml(tmp_path).read_text()) | read_config(folder) | {"start_from": str(folder)}
    tree["data"] |= {"tokenizer": {"path": str(folder)}, "cache_dir": str(tmp_path / "cache")}
    tree["data"]["sources"][0]["path"] = str(corpus)
    tree["training"] |= {"steps": 4, "validation_every": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    process = tiny.start(["-m", "nsa.train", str(tmp_path / "run.yaml")])
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    step = tmp_path / "runs/run/step_00000004"
    assert (step / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert not (step / "tokenizer.model").exists()

    hostile = hostile_texts()[:300]
    monkeypatch.setattr(proof, "hostile_texts", lambda: [*hostile, TOLD, f"a{EOS}"])
    out, proven = export(step.parent)
    assert proven.texts == 302 and proven.difference < proof.TOLERANCE
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    theirs, ours = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    for text in (*TEXT, TOLD, f"a {EOS} b"):
        ids = theirs(text, truncation=False).input_ids
        assert ours(text, truncation=False).input_ids == ids
        assert ours.decode(ids, skip_special_tokens=True) == text.replace(f" {EOS}", " ")
    assert (ours.bos_token, ours.eos_token, ours.pad_token) == (BOS, EOS, EOS)
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"

    assert evaluate.main([str(out), "evaluation.recall_samples=2", "evaluation.bpb_samples=2"]) == 0
    found = json.loads((out.parent / "evaluation/evaluation.json").read_text())
    lines = [json.loads(line) for line in (step.parent / "metrics.jsonl").read_text().splitlines()]
    trained = [line["validation/bits_per_byte"] for line in lines if "validation/bits_per_byte" in line]
    assert found["left_out"] is None and 1 < found["bits_per_byte"][0]["bits_per_byte"] < 12
    assert 1 < trained[-1] < 12
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1  # not prepared again
    assert {row["task"] for row in found["recall"]} == {"mqar", "passkey", "copy"}
