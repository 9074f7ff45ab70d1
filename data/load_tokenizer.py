"""The tokenizer of a file or a folder, in whichever format it has."""

import json
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.byte_level import MODEL, SETTINGS, ByteLevelTokenizer, read_folder, token_name
from nsa.data.tokenizer import Tokenizer, read_model
from nsa.data.tokenizer_json import sentencepiece_of

SENTENCEPIECE = "tokenizer.model"
FILES = (SENTENCEPIECE, MODEL, SETTINGS)  # that prepared data and checkpoints may have


def load_tokenizer(path: str | Path) -> BaseTokenizer:
    """The tokenizer of ``path``.

    Args:
        path: a sentencepiece model; a folder with one (tokenizer.model) or, if it has none, with a tokenizer.json, also
            of an export that transformers saved again; or that tokenizer.json.

    Raises:
        ValueError: there is none, it is of another make, or it would lose text.
    """
    path = Path(path)
    files = tokenizer_files(path)
    if SENTENCEPIECE in files:
        return Tokenizer(path / SENTENCEPIECE if path.is_dir() else path, files[SENTENCEPIECE])
    return ByteLevelTokenizer(path if path.is_dir() else path.parent, files)


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of the tokenizer of ``path``, name -> content, as they are copied into prepared data and checkpoints.

    The tokenizer.json of an export's sentencepiece model is read as that model (`nsa.data.tokenizer_json`). A model
    that lies in a folder and puts a space before every text, as Llama 2's, is read without that space: all tokens but a
    text's first stay as they were.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        if (path / SENTENCEPIECE).exists():
            return {SENTENCEPIECE: _without_prefix(read_model(path / SENTENCEPIECE))}
        if (path / MODEL).exists():
            return _of_json(path)
        raise ValueError(
            f"{path} has neither {SENTENCEPIECE} nor {MODEL}; set data.tokenizer.path for a run, and else save the "
            "tokenizer there, too (tokenizer.save_pretrained)"
        )
    if path.name == MODEL:
        return _of_json(path.parent)
    return {SENTENCEPIECE: read_model(path)}


def _of_json(folder: Path) -> dict[str, bytes]:
    files = read_folder(folder)
    settings = json.loads(files[SETTINGS])
    names = {name: str(token_name(settings[name])) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        model = sentencepiece_of(files[MODEL], names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return files  # of another make, or unsound: `ByteLevelTokenizer` says which
    return files if model is None else {SENTENCEPIECE: model}


def _without_prefix(content: bytes) -> bytes:
    try:
        model = ModelProto.FromString(content)
    except DecodeError:
        return content
    if not model.normalizer_spec.add_dummy_prefix:
        return content
    model.normalizer_spec.add_dummy_prefix = False
    return bytes(model.SerializeToString())
