"""What results depend on beside their configuration: the code that made them, and the weights of the siblings."""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

import nsa
from nsa.data.byte_level import MODEL
from nsa.data.load_tokenizer import SENTENCEPIECE, tokenizer_files
from nsa.exporting.folder import CONFIG

READERS = "evaluation/comparison/reading/"  # what reads results and makes none: a better report is no other result
CODE = (".py", ".json")  # and the tables that it reads
PREPARED = "data/cache/"  # texts that were prepared, by default: each export says by itself what it was trained on
DIGITS = 12


def code_digest(root: Path | None = None) -> str:
    """A fingerprint of the package's code, whatever of it can change an answer: not of `READERS`.

    Results of two commits are the same if it is. Files that are not committed count as they are.

    Args:
        root: the folder of the package; None: this one.
    """
    root = Path(nsa.__file__).parent if root is None else root
    linked = {f"{path.name}/": path.resolve() for path in root.iterdir() if path.is_symlink()}  # nsa/data, nsa/models
    files = {
        prefix + path.relative_to(folder).as_posix(): path
        for prefix, folder in {"": root.resolve(), **linked}.items()
        for path in folder.rglob("*")
        if path.suffix in CODE and path.is_file()
    }
    return _digest({name: path for name, path in files.items() if not name.startswith((READERS, PREPARED))})


def export_digest(folder: Path) -> str:
    """A fingerprint of the files of an export, by which two trainings under one name are told apart.

    A training that was repeated bit by bit has the same, however many hours it was given.
    """
    files = {path.name: path for path in folder.iterdir() if path.is_file() and path.suffix != ".md"}
    config = files.pop(CONFIG, None)
    given = re.sub(rb"(?m)^ *max_hours:.*\n", b"", config.read_bytes()) if config else b""
    return hashlib.sha256(_digest(files).encode() + given).hexdigest()[:DIGITS]


def tokenizer_digest(folder: Path) -> str:
    """A fingerprint of the tokenizer of an export. One that transformers saved again has the same, whatever pads.

    It is that of the sentencepiece model that tokenizer.json makes, unless the one in the folder has other pieces.
    """
    with suppress(ValueError, KeyError, DecodeError):
        model = ModelProto.FromString(tokenizer_files(folder / MODEL)[SENTENCEPIECE])
        own = folder / SENTENCEPIECE
        if not own.is_file() or _pieces(ModelProto.FromString(own.read_bytes())) == _pieces(model):
            model.trainer_spec.ClearField("pad_piece")
            return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()[:DIGITS]
    return _digest({path.name: path for path in folder.glob("tokenizer.*") if path.is_file()})


def _pieces(model: ModelProto) -> list[str]:
    return [piece.piece for piece in model.pieces]


def _digest(files: dict[str, Path]) -> str:
    whole = hashlib.sha256()
    for name, path in sorted(files.items()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{name}\0{content}\n".encode())
    return whole.hexdigest()[:DIGITS]
