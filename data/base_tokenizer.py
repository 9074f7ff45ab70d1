"""What a tokenizer is to the data, the evaluation and the export, whatever its format."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np


class BaseTokenizer(ABC):
    """Text to token ids and back.

    Control pieces are never made from text: `bos_id`, `eos_id` (ends a document), `pad_id`, and others of the format.

    Attributes:
        path: of the file, or of the folder with the files.
        files: of which it is made, name -> content, as they are copied into prepared data and checkpoints.
        vocab_size: the highest id + 1.
        byte_lengths: (vocab_size,) int64, the bytes of text a token stands for; 0 for control pieces.
    """

    path: Path
    files: Mapping[str, bytes]
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    byte_lengths: np.ndarray
    _bytes: list[bytes]

    @property
    def sha256(self) -> str:
        """Hex digest of what determines the tokens."""
        (content,) = self.files.values()
        return hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of any str, lone surrogates included; no bos, no eos."""
        return self.encode_bytes(text.encode("utf-8", "surrogatepass"))

    @abstractmethod
    def encode_bytes(self, text: bytes) -> list[int]:
        """Ids of any byte string."""

    @abstractmethod
    def encode_all(self, texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Texts, one after another: in few calls, for texts that are many and short.

        Returns:
            (n,) int32 ids, and (texts,) int64, where each text ends.
        """

    def normal(self, text: bytes) -> bytes:
        """The bytes that the tokens of ``text`` decode to: itself, unless the tokenizer normalises."""
        return text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes; control pieces stand for none. Raises IndexError for an id beyond the vocabulary."""
        pieces = self._bytes
        return b"".join([pieces[i] for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """The text; bytes that are no text (a model may write any) become U+FFFD."""
        text = self.decode_bytes(ids)
        try:
            return text.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return text.decode("utf-8", "replace")

    @abstractmethod
    def control_pieces(self) -> dict[str, int]:
        """Name and id of the begin, the end and the padding of a document: "</s>" and the like."""

    @abstractmethod
    def check_exportable(self) -> None:
        """Raise ValueError if an export cannot have exactly this tokenizer."""

    def ordinary_ids(self) -> np.ndarray:
        """(n,) int64, ascending: ids that stand for text other than a newline. What synthetic tasks draw from."""
        newline = np.array([b == b"\n" for b in self._bytes])
        return np.flatnonzero((self.byte_lengths > 0) & ~newline)
