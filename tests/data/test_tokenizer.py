"""Nothing is lost between text and tokens."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa.data import tokenizer as module
from nsa.data.shards import PreparedData
from nsa.data.tokenizer import PROBE, Tokenizer, train

HOSTILE = [
    "",
    " ",
    "\n",
    "   a\n\n  b\t\r\n ",
    "<s></s><pad><unk><0x0A>",
    "▁ ▁▁a▁ ▁",
    "\x00\x01\x7f\x80",
    "\ud800 lone \udc80 surrogates \ud83d\ude00",
    "e\u0301 \u00e9 \ufb01 \uff21 \u00a0 \u2028 \ufeff \ufffe",
    "😀👩‍👩‍👧 \U0010ffff",
    PROBE,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_comes_back(prepared: PreparedData, text: str) -> None:
    tokenizer = prepared.tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, 0}.isdisjoint(ids)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=())) | st.text("▁ a\n<s>/\x00\ud800é"))
def test_any_str_comes_back(prepared: PreparedData, text: str) -> None:
    ids = prepared.tokenizer.encode(text)
    assert prepared.tokenizer.decode(ids) == text
    assert prepared.tokenizer.byte_lengths[ids].sum() == len(text.encode("utf-8", "surrogatepass"))


@settings(max_examples=300, deadline=None)
@given(text=st.binary(max_size=200) | st.lists(st.sampled_from([b"\xe2\x96", b"\x81", b"a ", b"\xff\n"])).map(b"".join))
def test_any_bytes_come_back(prepared: PreparedData, text: bytes) -> None:
    ids = prepared.tokenizer.encode_bytes(text)
    assert prepared.tokenizer.decode_bytes(ids) == text
    assert prepared.tokenizer.encode_array(text).tolist() == ids


def test_cutting_at_newlines_changes_no_token(prepared: PreparedData) -> None:
    text = "def f(self):\n    return 12\n\n\n  the  value \n" * 3
    assert prepared.tokenizer.encode(text) == prepared.tokenizer._processor.encode(text)


def test_a_line_longer_than_the_limit(prepared: PreparedData, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "value of number é漢 " * 500_000
    assert len(text) > 100 * module.MAX_LINE
    assert prepared.tokenizer.decode(prepared.tokenizer.encode(text)) == text


@pytest.mark.parametrize("pad_id", [3, -1])
def test_documents_are_padded_by_the_piece_for_it(tmp_path: Path, pad_id: int) -> None:
    """Not by the end of a document, where there is another: a loss that leaves padding out would leave ends out."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a line " * 9] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=290,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        pad_id=pad_id,
        minloglevel=2,
    )
    (tmp_path / "model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(tmp_path / "model")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 3 if pad_id == 3 else 2)
    assert len(tokenizer.control_pieces()) == (3 if pad_id == 3 else 2)


def test_training_is_deterministic_and_reads_back(tmp_path: Path) -> None:
    texts = [f"line {i} {hex(i**5)} of the text\n  and {i * i} more ▁ \x00" for i in range(300)]
    first, second = train(texts, 320, tmp_path / "a"), train(iter(texts), 320, tmp_path / "b")
    assert first.sha256 == second.sha256
    assert first.vocab_size == 320


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lower data\.tokenizer\.vocab_size"):
        train(["abc"], 4096, tmp_path / "model")


def test_more_characters_than_pieces(tmp_path: Path) -> None:
    """Chinese text and a small vocabulary: more text would not help, more pieces do."""
    texts = ["".join(chr(0x4E00 + (17 * i + j) % 3000) for j in range(60)) for i in range(400)]
    with pytest.raises(ValueError, match=r"raise data\.tokenizer\.vocab_size"):
        train(texts, 400, tmp_path / "model")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("the corpus is gone")])
def test_what_ends_the_reading_of_texts_ends_the_training(tmp_path: Path, error: BaseException) -> None:
    def texts():
        yield "some text " * 50
        raise error

    with pytest.raises(type(error)) as found:
        train(texts(), 300, tmp_path / "model")
    assert found.value is error and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_dummy_prefix": True}, "loses text"),
        ({"remove_extra_whitespaces": True}, "loses text"),
        ({"normalization_rule_name": "nfkc"}, "loses text"),
        ({"byte_fallback": False}, "loses text"),
        ({"eos_id": -1}, "no bos or no eos"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    lossless = {
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the text of a line " * 9] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=290 if {**lossless, **changes}["byte_fallback"] else 30,
        minloglevel=2,
        **{**lossless, **changes},
    )
    (tmp_path / "model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path / "model")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(b"\x00text")
    with pytest.raises(ValueError, match=r"not a sentencepiece model; set data\.tokenizer\.path") as refused:
        Tokenizer(tmp_path / "model")
    assert "INTERNAL" not in str(refused.value)
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path"):
        Tokenizer(tmp_path / "missing")
