"""A sentencepiece tokenizer that loses nothing: any byte string encodes, and decodes to itself.

Sentencepiece alone is not lossless. It writes a space as U+2581 and so reads a U+2581 of the text back as a space, and
it takes no bytes that are not UTF-8. Both go around it here, as byte pieces (`<0x00>` .. `<0xFF>`), and decoding joins
the bytes of the pieces instead of asking sentencepiece. Text that looks like a control token ("</s>") is text:
sentencepiece never parses its control pieces.

The rule, for whoever rebuilds the tokenizer elsewhere: BPE with byte fallback over the raw text, pieces written with
real spaces (no U+2581 anywhere), no normaliser and no prefix space; a newline is always a token of its own.
"""

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.untrusted import UntrustedError, regular_size

SPACE = "\u2581"
# Characters that sentencepiece would not give back: its space mark, and the bytes that are not UTF-8 (PEP 383).
FOREIGN = re.compile("([\udc80-\udcff\u2581]+)")
# Sentencepiece's cost per byte grows with the length of what it is given (4x from a line to a megabyte) and so does
# its memory (100 bytes per byte). A cut after a newline never changes the tokens, since no piece spans it; longer lines
# are cut at this many characters, where a cut can part one piece in two.
MAX_LINE = 1 << 16
LINES = re.compile(rf"[^\n]{{0,{MAX_LINE - 1}}}\n|[^\n]{{1,{MAX_LINE}}}")
AT_ONCE = 1 << 20  # characters of short texts that sentencepiece gets in one call
MAX_SENTENCE = 4096  # bytes of a training sentence: sentencepiece leaves out what is longer
# Every way of losing text that we know of: spaces, normalisation, control tokens, unknown characters.
PROBE = (
    "  a  b \t\r\n\n c\u00a0\u2581\u2581 e\u0301 \u00e9 \ufb01 \uff21 \u2028 \x00\x7f"
    "<s></s><unk><0x41> \U0001f600\U0010ffff 1234 "
)


def read_model(path: Path) -> bytes:
    """The file of a model. Raises ValueError if it is no regular one, or a link to one, or cannot be read."""
    try:
        regular_size(path, follow=True)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); set data.tokenizer.path") from error
    except UntrustedError as error:
        raise ValueError(f"{error}; set data.tokenizer.path") from None


class Tokenizer(BaseTokenizer):
    """A sentencepiece tokenizer. See `BaseTokenizer`."""

    def __init__(self, path: str | Path, model: bytes | None = None):
        """``model``: the file's content, if it was read.

        Raises ValueError if the file is no sentencepiece model or its tokenizer would lose text.
        """
        self.path = Path(path)
        if model is None:
            model = read_model(self.path)
        self.model = model
        self.files = {"tokenizer.model": model}
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except RuntimeError as error:
            raise ValueError(
                f"{path}: not a sentencepiece model; set data.tokenizer.path to one, or to a Hugging Face folder with "
                "tokenizer.model or tokenizer.json, or to null to train a tokenizer"
            ) from error
        processor = self._processor
        self.vocab_size = processor.vocab_size()
        self.bos_id = processor.bos_id()
        self.eos_id = processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(f"{path}: the tokenizer has no bos or no eos piece; train it with bos_id and eos_id set")
        self.pad_id = processor.pad_id() if processor.pad_id() >= 0 else self.eos_id
        self._bytes = [_piece_bytes(processor, i) for i in range(self.vocab_size)]
        self.byte_lengths = np.array([len(b) for b in self._bytes], np.int64)
        ids = {processor.id_to_piece(i): i for i in range(self.vocab_size) if processor.is_byte(i)}
        self._byte_ids = [ids.get(f"<0x{b:02X}>", -1) for b in range(256)]
        if -1 in self._byte_ids or self.decode_bytes(self.encode(PROBE)) != PROBE.encode():
            raise ValueError(
                f"{path}: this tokenizer loses text. It must be trained with byte_fallback=true, "
                "normalization_rule_name=identity, add_dummy_prefix=false and remove_extra_whitespaces=false; "
                "or leave data.tokenizer.path null to train one"
            )

    def encode_bytes(self, text: bytes) -> list[int]:
        """Ids of any byte string; UTF-8 where it is UTF-8, byte pieces elsewhere."""
        return [i for ids in self._encode_parts(text) for i in ids]

    def encode_array(self, text: bytes) -> np.ndarray:
        """(n,) int32, the same ids in a tenth of the memory: for long documents."""
        return np.concatenate([np.empty(0, np.int32), *(np.array(ids, np.int32) for ids in self._encode_parts(text))])

    def encode_all(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """`encode_array` of texts, one after another: in few calls, for texts that are many and short.

        Returns:
            (n,) int32 ids, and (texts,) int64, where each text ends.
        """
        parts, counts = [np.empty(0, np.int32)], np.zeros(len(texts), np.int64)
        lines: list[str] = []
        owners: list[int] = []  # of each line, the text that it is of
        characters = 0

        def flush() -> None:
            nonlocal characters
            encoded = self._processor.encode(lines, num_threads=1)
            lengths = list(map(len, encoded))
            np.add.at(counts, owners, lengths)
            parts.append(np.fromiter(chain.from_iterable(encoded), np.int32, sum(lengths)))
            lines.clear()
            owners.clear()
            characters = 0

        for number, text in enumerate(texts):
            string = text.decode("utf-8", "surrogateescape")
            if len(string) > AT_ONCE or (not string.isascii() and FOREIGN.search(string)):
                flush()
                parts.append(self.encode_array(text))
                counts[number] = len(parts[-1])
                continue
            if len(string) > MAX_LINE or "\n" in string:
                found = LINES.findall(string)
                lines += found
                owners += [number] * len(found)
            else:
                lines.append(string)
                owners.append(number)
            characters += len(string)
            if characters > AT_ONCE:
                flush()
        flush()
        return np.concatenate(parts), np.cumsum(counts)

    def _encode_parts(self, text: bytes) -> Iterator[list[int]]:
        for i, part in enumerate(FOREIGN.split(text.decode("utf-8", "surrogateescape"))):
            if i % 2:
                yield [self._byte_ids[b] for b in part.encode("utf-8", "surrogateescape")]
                continue
            lines = (match.group() for match in LINES.finditer(part))
            for line in lines:  # a list of lines would start threads, which take longer than a short document
                yield self._processor.encode(line)

    def control_pieces(self) -> dict[str, int]:
        """Name and id of the begin, the end and the padding of a document: "</s>" and the like."""
        return {self._processor.id_to_piece(i): i for i in (self.bos_id, self.eos_id, self.pad_id)}

    def check_exportable(self) -> None:
        """Raise ValueError if tokenizer.json, and so an export, cannot say exactly what this tokenizer does."""
        model = ModelProto.FromString(self.model)
        kinds = ModelProto.SentencePiece
        if model.trainer_spec.model_type != TrainerSpec.BPE:
            name = TrainerSpec.ModelType.Name(model.trainer_spec.model_type).lower()
            raise ValueError(
                f"{self.path}: only a BPE tokenizer can be exported exactly, this one is of kind {name}; train it with "
                "model_type=bpe, or leave data.tokenizer.path null to train one"
            )
        text = [entry.type in (kinds.NORMAL, kinds.USER_DEFINED) for entry in model.pieces]
        pieces = [e.piece.replace(SPACE, " ") if t else e.piece for e, t in zip(model.pieces, text, strict=True)]
        if twice := [piece for piece, count in Counter(pieces).items() if count > 1]:
            raise ValueError(f"{self.path}: two pieces stand for {twice[0]!r}; it cannot be exported")


def train(texts: Iterable[str], vocab_size: int, path: str | Path) -> Tokenizer:
    """Train BPE with byte fallback on `texts` and write it to `path`. The same texts give the same file, bit for bit.

    Raises ValueError if the texts are too few for the vocabulary.
    """
    model = io.BytesIO()
    stopped: list[BaseException] = []  # by what, while texts were read: the trainer makes an error of its own of it

    def sentences() -> Iterator[str]:
        try:
            yield from _sentences(texts)
        except BaseException as error:
            stopped.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,  # a number is its digits, so that arithmetic and copying see them
            allow_whitespace_only_pieces=True,  # indentation is one token
            user_defined_symbols=["\n"],
            character_coverage=0.9995,  # rarer characters are bytes, and do not fill a small vocabulary
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # the order of merges must not depend on the machine
            max_sentence_length=MAX_SENTENCE,
            minloglevel=2,
        )
    except RuntimeError as error:
        if stopped:
            raise stopped[0] from None
        # Characters that a vocabulary must have can be more than its pieces.
        small = "smaller than required" in str(error)
        advice = (
            "raise data.tokenizer.vocab_size (and model.vocab_size)"
            if small
            else ("lower data.tokenizer.vocab_size (and model.vocab_size), or add text")
        )
        raise ValueError(f"cannot train a tokenizer of {vocab_size} pieces on this text: {error}\n{advice}") from error
    if stopped:
        raise stopped[0]
    path = Path(path)
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut to what the trainer takes; without U+2581, which it would learn as a space, and NUL."""
    most = MAX_SENTENCE // 4
    for text in texts:
        if not text.isascii():
            text = text.replace(SPACE, "").encode("utf-8", "replace").decode()
        for line in text.replace("\0", "").split("\n"):
            if len(line) > most:
                yield from (line[start : start + most] for start in range(0, len(line), most))
            elif line:
                yield line


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, index: int) -> bytes:
    if processor.is_control(index) or processor.is_unknown(index):
        return b""
    piece: str = processor.id_to_piece(index)
    if processor.is_byte(index):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode()
