"""A Hugging Face folder's own tokenizer: its tokens, its bytes, its special tokens, and what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from nsa.data import byte_level
from nsa.data.config import DataConfig, TokenizerConfig
from nsa.data.encoders import encoders
from nsa.data.load_tokenizer import load_tokenizer, tokenizer_files
from nsa.data.loader import SampleStream
from nsa.data.prepare import prepare
from nsa.exporting.proof import hostile_texts
from tests.byte_level import BOS, EOS, TEXT, write_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("qwen"), nfc=True)


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "folder"))


def texts() -> list[str]:
    """A part of the hostile ones: the proof of an export asks them all."""
    found = hostile_texts()
    return [
        *TEXT,
        BOS,
        f"a {EOS} b",
        "<tool>",
        "x<tool> y",
        *(t for t in found[:400] if len(t) < 9999),
        *found[400::20],
    ]


@pytest.mark.parametrize("name", ["llama", "qwen"])
def test_tokens_are_those_of_transformers_and_lose_nothing(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    tokenizer, theirs = load_tokenizer(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    for text in texts():
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True, truncation=False).input_ids
        assert tokenizer.decode_bytes(ids) == tokenizer.normal(text.encode())
        assert name == "qwen" or tokenizer.normal(text.encode()) == text.encode()
        assert tokenizer.byte_lengths[ids].sum() == len(tokenizer.normal(text.encode()))
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.vocab_size == len(theirs) == 380
    assert tokenizer.control_pieces() == {BOS: theirs.bos_token_id, EOS: theirs.eos_token_id}
    assert tokenizer.byte_lengths[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    assert tokenizer.encode("<tool>") == [379] and tokenizer.byte_lengths[379] == 6
    assert tokenizer.normal("e\u0301".encode()) == ("é" if name == "qwen" else "e\u0301").encode()


def test_each_id_is_its_bytes(llama: Path) -> None:
    """As the library decodes it, where that is text."""
    tokenizer, theirs = load_tokenizer(llama), PreTrainedTokenizerFast.from_pretrained(llama)
    for i in range(377):
        if "\ufffd" not in (text := theirs.decode([i], clean_up_tokenization_spaces=False)):
            assert tokenizer.decode_bytes([i]) == text.encode()
    assert {tokenizer.decode_bytes([i]) for i in range(256)} == {bytes([b]) for b in range(256)}
    assert b"\n" not in {tokenizer.decode_bytes([int(i)]) for i in tokenizer.ordinary_ids()}
    with pytest.raises(IndexError):
        tokenizer.decode_bytes([380])


@pytest.mark.parametrize("few", [3, 1 << 20])
def test_many_texts_at_once_are_encoded_as_each_alone(qwen: Path, monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Bytes that are no UTF-8 included, and lone surrogates."""
    monkeypatch.setattr(byte_level, "AT_ONCE", few)
    tokenizer = load_tokenizer(qwen)
    many = [
        b"",
        b"one two",
        b"\xff\xfe a\x80",
        "e\u0301 \u212b".encode(),
        b"",
        b"\n\n",
        "\ud800".encode("utf-8", "surrogatepass"),
    ]
    with encoders(qwen, 1) as encode:
        tokens, ends = encode(many).result()
    for text, part in zip(many, np.split(tokens, ends[:-1]), strict=True):
        assert part.tolist() == [tokenizer.bos_id, *tokenizer.encode_bytes(text), tokenizer.eos_id]
        assert tokenizer.decode_bytes(part.tolist()) == tokenizer.normal(text)


def test_long_texts_are_cut_after_a_newline(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(llama)
    whole = tokenizer.encode("one\ntwo three\n" * 3 + "x" * 30)
    monkeypatch.setattr(byte_level, "MAX_TEXT", 16)
    assert tokenizer.encode("one\ntwo three\n" * 3) == whole[: len(tokenizer.encode("one\ntwo three\n" * 3))]
    for text in ("one\ntwo three\n" * 3 + "x" * 30, "é" * 50, ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_text_is_prepared_with_it(
    qwen: Path, tmp_path: Path, make_config: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In worker processes. Documents come back, bytes are those of the tokens, and recall tasks are made of its ids."""
    (tmp_path / "text").mkdir()
    documents = [f"{i} e\u0301 {EOS} <tool> {'word ' * i}" for i in range(40)]
    for i, text in enumerate(documents):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    config = make_config(tmp_path / "text", "copy", tokenizer=TokenizerConfig(path=str(qwen)), workers=2)
    prepared = prepare(config, seed=0)
    files = {path.name: path.read_bytes() for path in prepared.folder.iterdir() if path.name.startswith("tokenizer")}
    assert files["tokenizer.json"] == (qwen / "tokenizer.json").read_bytes() and files == tokenizer_files(qwen)
    found = [text for split in ("train", "validation") for _, text in prepared.texts(split)]
    assert sorted(found) == sorted(text.replace("e\u0301", "é").encode() for text in documents)
    counts = prepared.manifest["sources"]["text"]
    assert sum(counts[split]["bytes"] for split in ("train", "validation")) == sum(map(len, found))
    assert prepared.vocab_size == 380
    assert len(SampleStream(prepared, config, "train", 0)) > 0
    assert prepare(config, seed=0).folder == prepared.folder
    stored = load_tokenizer(prepared.folder)
    assert stored.sha256 == load_tokenizer(qwen).sha256 and stored.files == load_tokenizer(qwen).files


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_special_tokens_may_be_named_by_the_config_alone(folder: Path, tmp_path: Path) -> None:
    """As Qwen's: no begin, and the end is an id. What is copied has the names."""
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="names the token that ends a text: set eos_token"):
        load_tokenizer(folder)
    edit(folder, "config.json", lambda c: c.update(eos_token_id=[378, 377], bos_token_id=None))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (378, 378, 378)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.control_pieces() == {EOS: 378} and again.sha256 == tokenizer.sha256
    assert again.files == tokenizer.files


def test_which_tokens_begin_and_end_a_document_is_part_of_its_identity(folder: Path) -> None:
    """Of one tokenizer.json: text that was prepared with another end has other tokens."""
    found = {load_tokenizer(folder).sha256}
    for name, piece in (("eos_token", BOS), ("bos_token", EOS), ("pad_token", BOS)):
        before = (folder / "tokenizer_config.json").read_text()
        edit(folder, "tokenizer_config.json", lambda c, name=name, piece=piece: c.update({name: piece}))
        found.add(load_tokenizer(folder).sha256)
        (folder / "tokenizer_config.json").write_text(before)
    assert len(found) == 4


def test_an_end_that_is_no_special_token_in_the_file_cannot_be_forged(folder: Path) -> None:
    edit(folder, "tokenizer_config.json", lambda c: c.update(eos_token="<tool>"))  # noqa: S106 - no password
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == 379 and 379 not in tokenizer.encode("a <tool> b")
    assert tokenizer.decode(tokenizer.encode("a <tool> b")) == "a <tool> b"


def of_unigram(c: dict[str, Any]) -> None:
    c["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}


def of_metaspace(c: dict[str, Any]) -> None:
    c["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


def without_a_byte(c: dict[str, Any]) -> None:
    c["model"]["merges"] = []
    c["model"]["vocab"] = {piece: i for piece, i in c["model"]["vocab"].items() if piece != "q"}


def of_a_piece(c: dict[str, Any]) -> None:
    """A special token that one word of a text is."""
    c["model"]["ignore_merges"] = True
    c["model"]["vocab"]["return"] = 376
    c["added_tokens"].append({**c["added_tokens"][0], "id": 376, "content": "return"})


REFUSED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (of_unigram, "its model is Unigram"),
    (of_metaspace, "it does not spell bytes (ByteLevel)"),
    (without_a_byte, "no token for byte 113"),
    (of_a_piece, "the text 'return' would be taken for the special token"),
    (lambda c: c.update(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    (lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "removes what it finds"),
    (
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "a space is put before every text",
    ),
    (lambda c: c["model"].update(dropout=0.1), "model.dropout is 0.1"),
    (lambda c: c["added_tokens"][2].update(lstrip=True), "the added token '<tool>' takes spaces with it"),
    (lambda c: c["model"]["vocab"].update(far=1 << 31), "a token has the id 2147483648, at most 16777216"),
    (lambda c: c.pop("model"), "no tokenizer"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_would_lose_text_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], words: str) -> None:
    edit(folder, "tokenizer.json", change)
    with pytest.raises(ValueError, match=re.escape(words)):
        load_tokenizer(folder)


def test_other_mistakes_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"has neither tokenizer.model nor tokenizer.json; set data.tokenizer.path"):
        load_tokenizer(tmp_path)
    edit(folder, "tokenizer_config.json", lambda c: c.update(bos_token="<s>"))  # noqa: S106
    with pytest.raises(ValueError, match=r"bos_token is '<s>', and tokenizer.json has no such token"):
        load_tokenizer(folder)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ValueError, match=r"comes with transformers: pip install 'nsa-train\[eval\]'"):
            load_tokenizer(folder)
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match="is a link; copy what it points to"):
        load_tokenizer(folder)
