"""A sentencepiece tokenizer is made again of the tokenizer.json that it was written as, also where it was saved again.

What is compared with: the tokenizer itself, and transformers.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AddedToken, PreTrainedTokenizerFast

from nsa.data import byte_level, files, tokenizer
from nsa.data.load_tokenizer import load_tokenizer, tokenizer_files
from nsa.data.tokenizer import PROBE, Tokenizer, train
from nsa.exporting.tokenizer import write_tokenizer

TEXT = [Path(str(module.__file__)).read_text() for module in (tokenizer, byte_level, files)]
ADDED = ["<|user|>", "<think>"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train(TEXT, 1200, tmp_path_factory.mktemp("trained") / "own.model")


@pytest.fixture(scope="module")
def saved(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By transformers, as after fine-tuning."""
    written, again = tmp_path_factory.mktemp("written"), tmp_path_factory.mktemp("saved")
    write_tokenizer(trained, written, 512)
    PreTrainedTokenizerFast.from_pretrained(written).save_pretrained(again)
    assert not (again / "tokenizer.model").exists()
    return again


@pytest.fixture(scope="module")
def again(saved: Path) -> Tokenizer:
    found = load_tokenizer(saved)
    assert isinstance(found, Tokenizer)
    return found


def test_it_is_the_same_tokenizer(trained: Tokenizer, again: Tokenizer) -> None:
    for text in (*TEXT, PROBE, "".join(map(chr, range(0x2570, 0x2590)))):
        assert again.encode(text) == trained.encode(text)
    assert (again.bos_id, again.eos_id, again.pad_id) == (trained.bos_id, trained.eos_id, trained.pad_id)
    assert again.vocab_size == trained.vocab_size and again.control_pieces() == trained.control_pieces()
    assert np.array_equal(again.byte_lengths, trained.byte_lengths)
    again.check_exportable()


@settings(max_examples=200, deadline=None)
@given(text=st.binary(max_size=200) | st.text("▁ self\n<s>/\x00é.(_)0").map(str.encode))
def test_any_bytes_are_the_same_tokens(trained: Tokenizer, again: Tokenizer, text: bytes) -> None:
    assert again.encode_bytes(text) == trained.encode_bytes(text)


def test_the_files_are_the_same_each_time(saved: Path) -> None:
    """A checkpoint has them, and a run compares them."""
    assert tokenizer_files(saved) == tokenizer_files(saved / "tokenizer.json")
    assert list(tokenizer_files(saved)) == ["tokenizer.model"]


def test_tokens_that_were_added_since_are_known(trained: Tokenizer, saved: Path, tmp_path: Path) -> None:
    """A special one is no text, another is one token of it, as in transformers."""
    tuned = PreTrainedTokenizerFast.from_pretrained(saved)
    tuned.add_special_tokens({"additional_special_tokens": ADDED[:1]})
    tuned.add_tokens(ADDED[1:])
    tuned.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    text = f"a {ADDED[1]} b {ADDED[0]}{ADDED[1]}"
    assert again.vocab_size == trained.vocab_size + 2
    ids = again.encode(text)
    assert ids == tuned(text, split_special_tokens=True, add_special_tokens=False).input_ids
    assert ids.count(again.vocab_size - 1) == 2 and again.vocab_size - 2 not in ids and again.decode(ids) == text


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("<mask>", lstrip=True, special=False),
        AddedToken("<mask>", rstrip=True, special=False),
        AddedToken("ask", single_word=True, special=False),
        AddedToken("\n\n", special=False),  # lines are cut between them
    ],
)
def test_an_added_token_that_would_be_found_elsewhere_is_refused(
    saved: Path, tmp_path: Path, token: AddedToken
) -> None:
    tuned = PreTrainedTokenizerFast.from_pretrained(saved)
    tuned.add_tokens([token])
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it was made of a sentencepiece model"):
        load_tokenizer(tmp_path)


def parted(merges: list) -> None:
    """Some piece is made by two pairs, one after the other: the second pair comes last of all."""
    at = next(i for i in range(1, len(merges)) if "".join(merges[i]) == "".join(merges[i - 1]))
    merges.append(merges.pop(at))


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: parted(tree["model"]["merges"]),
        lambda tree: tree["model"]["merges"].pop(),
        lambda tree: tree["pre_tokenizer"]["pretokenizers"].pop(),
        lambda tree: tree.update(normalizer={"type": "NFC"}),
        lambda tree: tree["model"]["vocab"].update(more=5000),
        lambda tree: tree["model"].update(type="WordPiece"),
        lambda tree: tree["model"].update(dropout=0.5),
        lambda tree: tree["model"].update(ignore_merges=True),
        lambda tree: tree["model"].update(continuing_subword_prefix="##"),
        lambda tree: tree["model"].update(end_of_word_suffix="</w>"),
        lambda tree: tree["model"]["vocab"].update({"a" * 1_000_000: 1200}),  # hours to cut
    ],
)
def test_another_one_is_refused(saved: Path, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Rather than read as something that gives other tokens."""
    tree = json.loads((saved / "tokenizer.json").read_text())
    before = json.dumps(tree)
    change(tree)
    assert json.dumps(tree) != before
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    (tmp_path / "tokenizer_config.json").write_bytes((saved / "tokenizer_config.json").read_bytes())
    with pytest.raises(ValueError, match=r"it was made of a sentencepiece model|no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_too_large_or_too_deep_or_none_is_refused(saved: Path, tmp_path: Path) -> None:
    """At once, and before its end is waited for."""
    path = tmp_path / "tokenizer.json"
    os.mkfifo(path)
    with pytest.raises(ValueError, match="no regular file"):
        load_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "tokenizer.model")
    for name in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(ValueError, match=r"tokenizer.model is no regular file; set data.tokenizer.path"):
            load_tokenizer(name)
    (tmp_path / "tokenizer.model").unlink()
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(ValueError, match="4294967296 bytes"):
        load_tokenizer(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="recursion"):
        load_tokenizer(tmp_path)
