"""The training tokenizer as `tokenizer.json`, for `transformers` and everything else that reads that format.

`nsa.data.tokenizer` states the rule that is rebuilt here, `nsa.data.tokenizer_json` the merges. "</s>" in a text is the
special token, as everywhere in `transformers`: chat templates and fine-tuning need it. Called with
`split_special_tokens=True` it is text, as it is in training.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.byte_level import MODEL, SETTINGS, ByteLevelTokenizer
from nsa.data.tokenizer import SPACE, Tokenizer
from nsa.data.tokenizer_json import KINDS, LINES, bpe_of


def write_tokenizer(tokenizer: BaseTokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and, of sentencepiece, the original tokenizer.model.

    A tokenizer.json that was there stays as it is, and so do most settings. Its class is transformers' general one, so
    that what is read is this file; decoded text is what was encoded; padding is on the left.

    Args:
        max_length: tokens that the model takes.

    Raises:
        ValueError: the tokenizer is of a kind that tokenizer.json cannot say exactly.
    """
    tokenizer.check_exportable()
    if isinstance(tokenizer, ByteLevelTokenizer):
        (folder / MODEL).write_bytes(tokenizer.files[MODEL])
        _write_settings(folder, {**tokenizer.settings, **GENERAL, "model_max_length": max_length})
        return
    assert isinstance(tokenizer, Tokenizer)
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    model = ModelProto.FromString(tokenizer.model)
    fast = _fast_tokenizer(model)
    control = {
        "bos_token": model.pieces[tokenizer.bos_id].piece,
        "eos_token": model.pieces[tokenizer.eos_id].piece,
        "pad_token": model.pieces[tokenizer.pad_id].piece,
        "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
    }
    fast.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in dict.fromkeys(control.values())])
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        **GENERAL,
        **control,
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": max_length,
    }
    _write_settings(folder, settings)


GENERAL = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "split_special_tokens": False,
    "clean_up_tokenization_spaces": False,
    "padding_side": "left",
}


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _fast_tokenizer(model: ModelProto) -> FastTokenizer:
    vocabulary, merges = bpe_of(model)
    unknown = model.pieces[model.trainer_spec.unk_id].piece
    fast = FastTokenizer(BPE(vocabulary, merges, byte_fallback=True, unk_token=unknown))
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated") for pattern in (SPACE, Regex(LINES))]
    )
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    # User-defined pieces are cut out before anything is merged; one that is a single character is so anyway.
    user = [entry.piece for entry in model.pieces if entry.type == KINDS.USER_DEFINED and len(entry.piece) > 1]
    fast.add_tokens([AddedToken(piece.replace(SPACE, " "), normalized=False) for piece in user])
    return fast
