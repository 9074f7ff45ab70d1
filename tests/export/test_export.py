"""The exported folder: complete, usable without this project, and refused when it is not the trained model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from small_run import TEXT, small_config, small_run

from nsa import export as command
from nsa.data.config import DataConfig
from nsa.data.prepare import prepare
from nsa.data.tokenizer import Tokenizer
from nsa.exporting import ExportError, export, folder, load_decoder, proof
from nsa.exporting.tokenizer import write_tokenizer
from nsa.models.hf.modeling_nsa import NSAForCausalLM
from nsa.training import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export in it."""
    path = small_run(tmp_path_factory.mktemp("export"), ["dense", "nsa", "dsa"], num_layers=3)
    metrics = [{"step": 1, "validation/bits_per_byte": 9.0}, {"step": 3, "validation/bits_per_byte": 2.5}, {"step": 3}]
    metrics.append({"step": 4, "validation/bits_per_byte": 1.0})  # after the last checkpoint
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    export(path)
    return path


def test_folder_is_complete(run: Path) -> None:
    exported = run / "export"
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "attention_nsa.py",
        "cache_nsa.py",
        "configuration_nsa.py",
        "entmax_nsa.py",
        "entries_nsa.py",
        "indexer_nsa.py",
        "latent_nsa.py",
        "modeling_nsa.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "training_config.yaml",
        "training_state.json",
    }
    config = json.loads((exported / "config.json").read_text())
    assert config["architectures"] == ["NSAForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_nsa.NSAForCausalLM"
    assert config["dtype"] == "float32"
    assert config["attention_kinds"] == ["dense", "nsa", "dsa"]
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    state = json.loads((exported / "training_state.json").read_text())
    assert "2.5000 bits per byte" in card and f"3 steps, {state['tokens']:,} tokens" in card
    assert card.count("from_pretrained(") == card.count(", trust_remote_code=True)") == 2, "nothing is asked for"
    assert not (run / "export.tmp").exists()
    assert not (run / "export.old").exists()


def test_experts_are_exported_and_proven(tmp_path: Path) -> None:
    """Also in bf16, where the router stays fp32: rounded, it would choose other experts."""
    moe = {"num_experts": 6, "top_k": 2, "num_shared": 1, "expert_size": 8}
    trained_run = small_run(tmp_path, ["dense", "nsa"], moe=moe)
    path, proof = export(trained_run, dtype="bfloat16")
    assert proof.difference < 1e-4
    exported = NSAForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    router, weights = exported.layers[1].mlp.router, checkpoint.load_weights(trained_run / "step_00000003")
    assert router.bias.dtype == router.weight.dtype == torch.float32
    assert exported.layers[1].mlp.experts.up.dtype == torch.bfloat16
    assert router.bias.abs().min() > 0
    for found in (router, load_decoder(path)[0].layers[1].mlp.router):
        assert torch.equal(found.bias, weights["layers.1.mlp.router.bias"]), "to the bits of the checkpoint"
        assert torch.equal(found.weight, weights["layers.1.mlp.router.weight"])
    assert "6 routed and 1 shared of width 8, 2 routed ones per token" in (path / "README.md").read_text()


STRANGER = """
import importlib.util, sys
assert importlib.util.find_spec("nsa") is None, "the project is in reach"
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
tokenizer = AutoTokenizer.from_pretrained("export", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("export", trust_remote_code=True)
ids = tokenizer("def write(self):\\n    return", return_tensors="pt")
assert model.generate(**ids, max_new_tokens=5, min_new_tokens=5).shape[1] == ids.input_ids.shape[1] + 5
model.save_pretrained("saved"), tokenizer.save_pretrained("saved")
again = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
assert torch.equal(again(ids.input_ids).logits, model(ids.input_ids).logits)
text = pipeline("text-generation", model=model, tokenizer=tokenizer)("def ", max_new_tokens=3)[0]["generated_text"]
assert text.startswith("def ")
print(model.head.weight is model.embedding.weight, sum(p.numel() for p in model.parameters()))
"""


def test_works_where_this_project_is_not(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "export", tmp_path / "export")
    root = str(Path(folder.__file__).resolve().parents[2])
    # -I ignores PYTHONPATH and the current folder; an editable install of the project must not be found either.
    hide = f"import sys; sys.path = [p for p in sys.path if p != {root!r}]\n"
    hide += "sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", hide + STRANGER],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    decoder, *_ = load_decoder(run / "export")
    assert done.stdout.split() == ["True", str(sum(p.numel() for p in decoder.parameters()))]


def test_native_decoder_loads_from_the_export(run: Path) -> None:
    decoder, config, tokenizer = load_decoder(run / "export")
    assert config.name == "run"
    assert tokenizer.vocab_size == 400
    expected = folder.checkpoint.load_weights(run / "step_00000003")
    for name, tensor in decoder.state_dict().items():
        assert torch.equal(tensor, expected["embedding.weight" if name == "head.weight" else name])


def perturb_weights(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    weights["layers.1.attention.compress.key.inner.weight"][0] += 0.5
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def split_special_tokens(path: Path) -> None:
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**settings, "split_special_tokens": True}))


def another_special_token(path: Path) -> None:
    """Ordinary text that would become special."""
    settings = json.loads((path / "tokenizer.json").read_text())
    settings["added_tokens"].append({**settings["added_tokens"][-1], "id": 300, "content": "\n\n"})
    (path / "tokenizer.json").write_text(json.dumps(settings))


TAMPERED = [
    (perturb_weights, r"logits of sequence \d differ.*float64"),
    (split_special_tokens, "does not take <s> for a special token"),
    (another_special_token, "takes a part of"),
]


@pytest.mark.parametrize(("tamper", "message"), TAMPERED)
def test_an_export_that_differs_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, tamper, message: str) -> None:
    before = {path.name: path.read_bytes() for path in (run / "export").iterdir()}
    write = folder.write_folder

    def write_and_tamper(path: Path, *arguments) -> None:
        write(path, *arguments)
        tamper(path)

    monkeypatch.setattr(folder, "write_folder", write_and_tamper)
    monkeypatch.setattr(proof, "hostile_texts", lambda: ["a </s> b", "\n\n x"])
    with pytest.raises(ExportError, match=message):
        export(run)
    assert {path.name: path.read_bytes() for path in (run / "export").iterdir()} == before
    assert not (run / "export.tmp").exists()


def keep(answer: dict, tensors: dict) -> None:
    pass


def another_token(answer: dict, tensors: dict) -> None:
    answer["ids"][0][0] += 1


def a_special_token_more(answer: dict, tensors: dict) -> None:
    answer["default"][1] = [2]


def a_special_token_less(answer: dict, tensors: dict) -> None:
    answer["marked"][1] = [7]


def another_text(answer: dict, tensors: dict) -> None:
    answer["decoded"][0] += " "


def another_logit(answer: dict, tensors: dict) -> None:
    tensors["logits.1"][1, 5] += 2e-4 * tensors["logits.1"].abs().max()


def no_number(answer: dict, tensors: dict) -> None:
    tensors["logits.0"][0, 0] = torch.nan


def another_step(answer: dict, tensors: dict) -> None:
    tensors["steps.2"][-1] *= 1.001


def one_row_less(answer: dict, tensors: dict) -> None:
    tensors["logits.1"] = tensors["logits.1"][1:]


CHANGES = [
    (another_token, "tokenizer differs"),
    (a_special_token_more, "takes a part of .* for a special token"),
    (a_special_token_less, "does not take </s> for a special token"),
    (another_text, "tokenizer decodes"),
    (another_logit, "logits of sequence 1 differ: 0.0002 of the largest at token 1"),
    (no_number, "logits of sequence 0 differ"),
    (another_step, "with cache and without differ"),
    (one_row_less, "shape"),
]


@pytest.mark.parametrize(("change", "message"), [(keep, None), *CHANGES])
def test_every_difference_is_seen(run: Path, monkeypatch: pytest.MonkeyPatch, change, message: str | None) -> None:
    decoder, _, tokenizer = load_decoder(run / "export")
    monkeypatch.setattr(proof, "hostile_texts", lambda: ["a </s> b", "\n\n x"])

    def answer_of_the_decoder(path: Path, question: dict) -> tuple[dict, dict]:
        ids = [tokenizer.encode(text) for text in question["texts"]]
        with torch.no_grad():
            tensors = {f"logits.{i}": decoder(torch.tensor([x]))[0] for i, x in enumerate(question["inputs"])}
        for i in range(len(question["prompts"])):
            tensors[f"again.{i}"] = torch.randn(5, 420)
            tensors[f"steps.{i}"] = tensors[f"again.{i}"].clone()
        marked = [[*tokenizer.encode("a "), i, *tokenizer.encode(" b")] for i in tokenizer.control_pieces().values()]
        answer = {"ids": ids, "decoded": list(question["texts"]), "default": list(ids), "marked": marked}
        change(answer, tensors)
        return answer, tensors

    monkeypatch.setattr(proof, "_ask", answer_of_the_decoder)
    if message is None:
        assert proof.prove(run / "export", decoder, tokenizer).difference == 0
    else:
        with pytest.raises(ExportError, match=message):
            proof.prove(run / "export", decoder, tokenizer)


def test_a_model_that_is_not_finite_is_said_to_be_so() -> None:
    nan = torch.tensor([[1.0, torch.nan]])
    with pytest.raises(ExportError, match="logits: the model itself gives values that are not finite"):
        proof._difference("logits", nan, nan)


def test_a_tie_that_fp32_rounds_either_way_is_no_difference(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def compare(path: Path, decoder, tokenizer, question: dict) -> float:
        asked.append((question["dtype"], decoder.embedding.weight.dtype))
        if question["dtype"] == "float32":
            raise proof.LogitsDiffer("a tie")
        return 1e-9

    monkeypatch.setattr(proof, "_compare", compare)
    decoder, _, tokenizer = load_decoder(run / "export")
    assert proof.prove(run / "export", decoder, tokenizer).dtype == "float64"
    assert asked == [("float32", torch.float32), ("float64", torch.float64)]


def test_wrong_arguments_are_explained(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(tmp_path)]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err
    (tmp_path / "broken/step_00000003").mkdir(parents=True)
    assert command.main([str(tmp_path / "broken")]) == 2
    assert capsys.readouterr().err.endswith("Mend one of them. To export another run, name its folder\n")
    (tmp_path / "photos").mkdir()
    assert command.main([str(run), "--out", str(tmp_path / "photos")]) == 2
    assert "is no export" in capsys.readouterr().err
    shutil.copytree(run / "step_00000003", tmp_path / "step_00000003")
    part = tmp_path / "step_00000003" / "tokenizer.model"
    part.write_bytes(part.read_bytes()[:-1])
    assert command.main([str(tmp_path / "step_00000003")]) == 2
    assert "cut short" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tokenizers(run: Path, tmp_path_factory: pytest.TempPathFactory):
    """The training tokenizer, and what `transformers` makes of its export."""
    from transformers import AutoTokenizer

    path = tmp_path_factory.mktemp("tokenizer")
    native = Tokenizer(run / "export" / "tokenizer.model")
    write_tokenizer(native, path, 512)
    return native, AutoTokenizer.from_pretrained(path)


def test_tokens_of_hostile_texts_are_the_trainings(tokenizers) -> None:
    native, fast = tokenizers
    texts = proof.hostile_texts()
    assert sum(map(len, texts)) > 100_000
    for text in texts:
        ids = fast(text, split_special_tokens=True).input_ids
        assert ids == native.encode(text), text[:80]
        assert fast.decode(ids) == text


def test_pieces_in_every_order_are_merged_as_in_training(tokenizers) -> None:
    native, fast = tokenizers
    pieces = [native.decode([i]) for i in range(native.vocab_size)]
    pieces = [piece for piece in pieces if piece and "\ufffd" not in piece]
    texts = [a + b + a for a in pieces[::3] for b in pieces[::5]]
    for text, ids in zip(texts, fast(texts).input_ids, strict=True):
        assert ids == native.encode(text), text


def test_special_tokens_in_text_are_special_unless_they_are_split(tokenizers) -> None:
    native, fast = tokenizers
    assert fast("yes" + fast.eos_token).input_ids == [*native.encode("yes"), native.eos_id]
    assert fast.tokenize("a</s>b")[1] == "</s>"
    padded = fast(["x</s>", "y"], padding=True)
    assert padded.input_ids[0][-1] == native.eos_id
    assert [row[0] for row in padded.attention_mask] == [1, 0], "padded where no text is continued"
    assert padded.attention_mask[1][-1] == 1
    split = fast("yes</s>", split_special_tokens=True).input_ids
    assert split == native.encode("yes</s>") and native.eos_id not in split


def test_chat_templates_and_added_tokens_work(run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    native = Tokenizer(run / "export" / "tokenizer.model")
    write_tokenizer(native, tmp_path, 512)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    assert fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}) == 2
    fast.add_tokens("<tool>")
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ eos_token }}{% endfor %}"
    )
    fast.save_pretrained(tmp_path / "tuned")
    fast = AutoTokenizer.from_pretrained(tmp_path / "tuned")
    start, end, tool = fast.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<tool>"])
    messages = [{"role": "user", "content": "a <tool> b"}]
    ids = fast.apply_chat_template(messages, return_dict=True)["input_ids"]
    text = [*native.encode("user\na "), tool, *native.encode(" b")]
    assert ids == [start, *text, end, native.eos_id]
    assert fast.decode(ids, skip_special_tokens=True) == "user\na <tool> b"


@pytest.mark.parametrize("kind", ["unigram", "char"])
def test_a_tokenizer_that_no_export_can_carry_is_refused_before_training(tmp_path: Path, kind: str) -> None:
    config = small_config(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(TEXT).splitlines()),
        model_prefix=str(tmp_path / "own"),
        model_type=kind,
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    data = config.data.model_dump()
    data["tokenizer"]["path"] = str(tmp_path / "own.model")
    with pytest.raises(ValueError, match=f"only a BPE tokenizer can be exported exactly, this one is of kind {kind}"):
        prepare(DataConfig.model_validate(data), 0)
    with pytest.raises(ValueError, match="only a BPE tokenizer"):
        write_tokenizer(Tokenizer(tmp_path / "own.model"), tmp_path, 512)


def test_special_tokens_are_known(tokenizers) -> None:
    native, fast = tokenizers
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (native.bos_id, native.eos_id, native.pad_id)
    assert fast.decode([native.bos_id, *native.encode("x"), native.eos_id], skip_special_tokens=True) == "x"
    assert len(fast) == native.vocab_size
