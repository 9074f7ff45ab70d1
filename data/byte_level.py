"""The tokenizer of a Hugging Face folder: tokenizer.json with byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek).

Its tokens are those of `transformers` with `add_special_tokens=False, split_special_tokens=True`. It is lossless by its
construction: BPE over bytes, each of which has a token. A token's bytes are read from its piece, which spells each byte
as one character. A name of a special token in a text is text. Other added tokens (as Qwen's <tool_call>) are text, too,
and are one token in it, as in `transformers`.

One normalisation is known: NFC (Qwen). The tokens then stand for the normalised text, and bytes are counted of that.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.tokenizer import PROBE
from nsa.untrusted import inside, read_bytes, read_json

MODEL, SETTINGS = "tokenizer.json", "tokenizer_config.json"
AT_ONCE = 1 << 20  # characters that the library gets in one call
# Longer texts are cut after a newline, or here: the library needs a hundred bytes per token of a text.
MAX_TEXT = 1 << 22
MOST = 1 << 24  # tokens
MOST_BYTES = 1 << 28  # of tokenizer.json
INVALID = re.compile("([\udc80-\udcff]+)")  # bytes that are no UTF-8 (PEP 383)
PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are spelt as the character of this number
SPELT = {chr(byte): byte for byte in PLAIN} | {
    chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in PLAIN)
}
HINT = "only byte-level BPE that loses no text can be read, as of Llama 3, Qwen and DeepSeek"


def read_folder(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files: tokenizer.json as it is, and tokenizer_config.json with the names of the special tokens.

    The names of begin and end are those of tokenizer_config.json, or else of the ids in config.json. A text begins with
    the token that ends it if there is no other.

    Raises:
        ValueError: a file cannot be read, or no token ends a text.
    """
    try:
        content = read_bytes(inside(folder, MODEL), MOST_BYTES)
        settings, config = (_optional(folder, name) for name in (SETTINGS, "config.json"))
        names = {}
        if any(token_name(settings.get(name)) is None for name in ("bos_token", "eos_token")):
            names = _names(_object(json.loads(content), folder / MODEL))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be read ({error}); {HINT}") from None
    found = {name: token_name(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    for name, given in found.items():
        number = config.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        if given is None and type(number) is int:
            found[name] = names.get(number)
    if found["eos_token"] is None:
        raise ValueError(
            f"{folder}: neither {SETTINGS} nor config.json names the token that ends a text: set eos_token there"
        )
    found["bos_token"] = found["bos_token"] or found["eos_token"]
    found["pad_token"] = found["pad_token"] or found["eos_token"]
    if any(token_name(settings.get(name)) != piece for name, piece in found.items()):
        settings |= found
        text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
        return {MODEL: content, SETTINGS: text.encode()}
    return {MODEL: content, SETTINGS: inside(folder, SETTINGS).read_bytes()}


class ByteLevelTokenizer(BaseTokenizer):
    """The tokenizer of ``folder``, as this module says."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        """``files``: from `read_folder`.

        Raises:
            ValueError: the package tokenizers is missing, the tokenizer is of another make, or it would lose text.
        """
        try:
            import tokenizers
        except ImportError:
            raise ValueError(
                f"{folder / MODEL}: to read it takes the package tokenizers, which comes with transformers: "
                "pip install 'nsa-train[eval]'"
            ) from None
        self.path, self.files = folder, files
        try:
            tree = _object(json.loads(files[MODEL]), folder / MODEL)
            highest = max(_names(tree), default=-1)
            if tree["model"].get("merges") and (prefix := tree["model"].get("continuing_subword_prefix")):
                raise ValueError(f"model.continuing_subword_prefix is {prefix!r}")  # the library may panic
            if highest >= MOST:
                raise ValueError(f"a token has the id {highest}, at most {MOST} tokens are possible")
            self._fast = tokenizers.Tokenizer.from_str(files[MODEL].decode())
        except Exception as error:  # the library has no other type
            raise ValueError(f"{folder / MODEL}: no tokenizer ({error}); {HINT}") from None
        model, self.settings = json.loads(self._fast.to_str()), json.loads(files[SETTINGS])  # all fields, and valid
        self._check_make(model)
        added = {entry["id"]: entry for entry in model["added_tokens"]}
        vocabulary: dict[str, int] = model["model"]["vocab"]
        ids = vocabulary | {entry["content"]: index for index, entry in added.items()}
        names = {name: token_name(self.settings[name]) for name in ("bos_token", "eos_token", "pad_token")}
        for name, piece in names.items():
            if piece not in ids:
                raise ValueError(f"{folder}: {name} is {piece!r}, and {MODEL} has no such token")
        self.bos_id, self.eos_id, self.pad_id = (ids[str(piece)] for piece in names.values())
        control = {index for index, entry in added.items() if entry["special"]}
        control |= {self.bos_id, self.eos_id, self.pad_id}
        self.vocab_size = max(ids.values()) + 1
        self._bytes = [b""] * self.vocab_size
        for piece, index in vocabulary.items():
            self._bytes[index] = _piece_bytes(piece)
        for index, entry in added.items():
            self._bytes[index] = entry["content"].encode()
        for index in control:
            self._bytes[index] = b""
        self.byte_lengths = np.array([len(b) for b in self._bytes], np.int64)
        self._byte_ids = [-1] * 256
        for character, byte in SPELT.items():
            self._byte_ids[byte] = vocabulary.get(character, -1)
        self._names = {str(piece): ids[str(piece)] for piece in names.values()}
        if -1 in self._byte_ids:
            raise ValueError(f"{folder / MODEL}: no token for byte {self._byte_ids.index(-1)}; {HINT}")
        # Names of special tokens in a text are text. Nothing is cut off or filled up.
        if named := [entry for index, entry in added.items() if index in control and not entry["special"]]:
            for entry in named:
                entry["special"] = True
            self._fast = tokenizers.Tokenizer.from_str(json.dumps(model))
        self._fast.no_truncation()
        self._fast.no_padding()
        self._fast.encode_special_tokens = True
        self._normalizer = self._fast.normalizer
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data.workers says how many processes encode
        forged = [entry for i, entry in added.items() if i in control and i in self.encode(entry["content"])]
        forged += [{"content": p} for p, i in self._names.items() if i not in added and i in self.encode(p)]
        if forged:
            raise ValueError(
                f"{folder / MODEL}: the text {forged[0]['content']!r} would be taken for the special token; {HINT}"
            )
        probe = PROBE.encode()
        if self.decode_bytes(self.encode_bytes(probe)) != self.normal(probe):
            raise ValueError(f"{folder / MODEL}: this tokenizer loses text; {HINT}")

    def _check_make(self, model: dict[str, Any]) -> None:
        """Raise ValueError if it is not of parts that are known to lose no text."""
        where = self.path / MODEL
        bpe = model["model"]
        wrong = []
        if bpe.get("type") != "BPE":
            wrong.append(f"its model is {bpe.get('type')}")
        wrong += [f"model.{name} is {bpe[name]!r}" for name in FORBIDDEN if bpe.get(name)]
        normalizers = [part["type"] for part in _parts(model.get("normalizer"), "normalizers")]
        wrong += [f"normalizer {name}" for name in normalizers if name != "NFC"]
        before = list(_parts(model.get("pre_tokenizer"), "pretokenizers"))
        for part in before:
            if part["type"] not in ("ByteLevel", "Split", "Digits"):
                wrong.append(f"pre-tokenizer {part['type']}")
            if part.get("behavior") == "Removed":
                wrong.append("a pre-tokenizer that removes what it finds")
            if part.get("add_prefix_space"):
                wrong.append("a space is put before every text (add_prefix_space)")
        after = [part["type"] for part in _parts(model.get("decoder"), "decoders")]
        if after != ["ByteLevel"] or [part["type"] for part in before].count("ByteLevel") != 1:
            wrong.append("it does not spell bytes (ByteLevel)")
        if bpe.get("byte_fallback"):
            wrong.append("it was made of a sentencepiece model: name that tokenizer.model, if you have it")
        for entry in model.get("added_tokens", []):
            if not entry["special"] and (entry["lstrip"] or entry["rstrip"]):
                wrong.append(f"the added token {entry['content']!r} takes spaces with it")
        if wrong:
            raise ValueError(f"{where}: {'; '.join(wrong)}: {HINT}")

    @property
    def sha256(self) -> str:
        special = json.dumps([self.bos_id, self.eos_id, self.pad_id]).encode()
        return hashlib.sha256(self.files[MODEL] + special).hexdigest()

    def normal(self, text: bytes) -> bytes:
        if self._normalizer is None or text.isascii():
            return text
        parts = INVALID.split(text.decode("utf-8", "surrogateescape"))
        parts[::2] = [self._normalizer.normalize_str(part) for part in parts[::2]]
        return "".join(parts).encode("utf-8", "surrogateescape")

    def encode_bytes(self, text: bytes) -> list[int]:
        """Ids of any byte string; where it is no UTF-8, of each byte."""
        ids: list[int] = self.encode_all([text])[0].tolist()
        return ids

    def encode_all(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        parts, counts = [np.empty(0, np.int32)], np.zeros(len(texts), np.int64)
        waiting: list[str] = []
        owners: list[int] = []  # of each, the text that it is of
        characters = 0

        def flush() -> None:
            nonlocal characters
            encoded = [e.ids for e in self._fast.encode_batch_fast(waiting, add_special_tokens=False)]
            lengths = list(map(len, encoded))
            np.add.at(counts, owners, lengths)
            parts.append(np.fromiter(chain.from_iterable(encoded), np.int32, sum(lengths)))
            waiting.clear()
            owners.clear()
            characters = 0

        for number, text in enumerate(texts):
            string = self.normal(text).decode("utf-8", "surrogateescape")
            for i, part in enumerate(INVALID.split(string)):
                if i % 2:
                    flush()
                    ids = [self._byte_ids[byte] for byte in part.encode("utf-8", "surrogateescape")]
                    parts.append(np.array(ids, np.int32))
                    counts[number] += len(ids)
                    continue
                for piece in _cut(part):
                    waiting.append(piece)
                    owners.append(number)
                    characters += len(piece)
                    if characters > AT_ONCE:
                        flush()
        flush()
        return np.concatenate(parts), np.cumsum(counts)

    def control_pieces(self) -> dict[str, int]:
        return self._names

    def check_exportable(self) -> None:
        """Every one is: an export has the same tokenizer.json."""


FORBIDDEN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")


def _cut(text: str) -> Iterator[str]:
    """The text in pieces of at most ``MAX_TEXT`` characters, which end after a newline where one is."""
    start = 0
    while len(text) - start > MAX_TEXT:
        end = text.rfind("\n", start, start + MAX_TEXT) + 1 or start + MAX_TEXT
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:] if start else text


def _piece_bytes(piece: str) -> bytes:
    """A piece with another character is made of no text; the library's decoder takes it as it stands."""
    if all(character in SPELT for character in piece):
        return bytes(SPELT[character] for character in piece)
    return piece.encode()


def _parts(given: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, a pre-tokenizer or a decoder, which may be a sequence of others."""
    if given is None:
        return
    if given["type"] != "Sequence":
        yield given
    for part in given.get(inner, []) if given["type"] == "Sequence" else []:
        yield from _parts(part, inner)


def token_name(given: Any) -> str | None:
    """Of a token, as tokenizer_config.json has it."""
    given = given.get("content") if isinstance(given, dict) else given
    return given if isinstance(given, str) else None


def _names(model: dict[str, Any]) -> dict[int, str]:
    """Of the tokens of a tokenizer.json, by their ids."""
    vocabulary = model["model"]["vocab"]
    names = {index: piece for piece, index in vocabulary.items()} if isinstance(vocabulary, dict) else {}
    return names | {entry["id"]: entry["content"] for entry in model.get("added_tokens", [])}


def _optional(folder: Path, name: str) -> dict[str, Any]:
    return _object(read_json(inside(folder, name)), folder / name) if (folder / name).exists() else {}


def _object(content: Any, path: Path) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no object")
    return content
