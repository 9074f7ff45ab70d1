"""A folder of transformers as SmolLM2's is: nine heads on three, tied embeddings, another rotary base, no BOS."""

import os
import re
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from nsa.baselines import Budget, method_named
from nsa.compare import main
from nsa.evaluation.comparison.folder import read_results
from nsa.evaluation.comparison.hugging_face import attached, session_of
from nsa.evaluation.comparison.models import OpenedTransformers, open_model

END, WIDTH, LAYERS = "<|endoftext|>", 8, 2
CONFIG = """
name: small
output_dir: {out}
siblings: [{{name: llama, export: {folder}}}]
methods: [{{name: quest, page: 4}}, h2o]
budgets: [1.0, 0.5]
tasks: [passkey]
lengths: [256]
samples: 1
question: [before]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    bytes_alone = tokenizers.models.BPE(vocab={END: 0, **{c: i for i, c in enumerate(sorted(alphabet), 1)}}, merges=[])
    fast = tokenizers.Tokenizer(bytes_alone)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END)
    assert tokenizer.bos_token_id is None
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=9 * WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def opened(folder: Path) -> OpenedTransformers:
    model = open_model("llama", folder)
    assert isinstance(model, OpenedTransformers)
    return model


def test_sizes_are_those_of_the_model(opened: OpenedTransformers) -> None:
    named = {name for name, _ in opened.model.named_parameters()}
    assert "lm_head.weight" not in named, "tied embeddings are counted once"
    assert opened.parameters == sum(opened.model.get_parameter(name).numel() for name in named)
    assert opened.kv_elements == LAYERS * 3 * 2 * WIDTH and opened.reaches == 512


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).unlink()
    os.mkfifo(tmp_path / "copy" / name)
    with pytest.raises(ValueError, match=f"{name} is no regular file"):
        open_model("llama", tmp_path / "copy")


def test_keys_turn_as_the_model_turns_them(opened: OpenedTransformers) -> None:
    turn = session_of(opened.model, method_named("dense")()).turn
    assert turn is not None
    x, positions = torch.randn(1, 300, 3, WIDTH), torch.arange(300)[None]
    cos, sin = opened.model.model.rotary_emb(x, positions)
    theirs, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    torch.testing.assert_close(turn(x, positions), theirs.transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dense", "quest", "h2o", "block_sparse"])
def test_a_full_budget_generates_what_the_model_does(name: str, opened: OpenedTransformers) -> None:
    ids = torch.randint(1, 257, (2, 60), generator=torch.Generator().manual_seed(1))
    control = opened.model.generate(ids, max_new_tokens=8, do_sample=False)
    with attached(opened.model, method_named(name)(budget=Budget(share=1.0))):
        assert torch.equal(opened.model.generate(ids, max_new_tokens=8, do_sample=False), control)


def test_a_length_that_is_too_short_for_a_task_is_said_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = CONFIG.format(out=tmp_path, folder=folder).replace("[passkey]", "[passkey, niah_single_1]")
    (tmp_path / "c.yaml").write_text(text)
    assert main([str(tmp_path / "c.yaml")]) == 2
    assert "task niah_single_1: a sample needs 512 tokens or more, not 256" in capsys.readouterr().err
    assert not list((tmp_path / "small" / "cells").glob("*")), "nothing was run"


def test_it_is_compared_and_no_alarm_of_the_harness_rings(folder: Path, tmp_path: Path) -> None:
    """Without a token that begins a sequence the one that ends texts begins it, once."""
    (tmp_path / "c.yaml").write_text(CONFIG.format(out=tmp_path, folder=folder))
    assert main([str(tmp_path / "c.yaml")]) == 0
    results = read_results(tmp_path / "small")
    assert not results.left_out and all((cell.bos == 1).all() for cell in results.cells)
    report = (tmp_path / "small" / "report.md").read_text()
    for alarm in ("not exactly one BOS", "full budget unlike dense", "reads what its plan leaves out"):
        assert re.search(rf"{alarm} \|.*\| silent", report), alarm
