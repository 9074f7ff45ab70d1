"""A sentencepiece model of `nsa.data.tokenizer` as the BPE of a tokenizer.json, and back.

An export has both (`nsa.exporting.tokenizer`). transformers saves only tokenizer.json again, also with added tokens.
The model that is made of it gives the same tokens; its file is another one than the run's.
"""

import json
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec  # type: ignore[attr-defined]

from nsa.data.tokenizer import MAX_LINE, SPACE

LINES = rf"[^\n]{{0,{MAX_LINE - 1}}}\n|[^\n]{{1,{MAX_LINE}}}"
KINDS = ModelProto.SentencePiece
OTHER = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")  # of a BPE: give other tokens
MOST_CUTS = 2**30  # characters in all cuts of all pieces, which take a second; 256,000 pieces of 8 have 2**24
# What tokenizer.json has around the BPE.
AROUND: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
            for pattern in ({"String": SPACE}, {"Regex": LINES})
        ],
    },
    "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
}


def bpe_of(model: ModelProto) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges.

    sentencepiece merges the pair whose result has the best score, leftmost first; `tokenizers` ranks pairs. A piece
    that several pairs make is given all of them, the longest left part first, which keeps its leftmost merge first.
    """
    vocabulary: dict[str, int] = {}
    cost: dict[str, float] = {}  # of the pieces that merges make
    for i, entry in enumerate(model.pieces):
        text = entry.type in (KINDS.NORMAL, KINDS.USER_DEFINED)
        piece = entry.piece.replace(SPACE, " ") if text else entry.piece
        vocabulary[piece] = i
        if entry.type == KINDS.NORMAL:
            cost[piece] = -entry.score
    merges = []
    for piece in sorted(cost, key=cost.__getitem__):
        cuts = range(len(piece) - 1, 0, -1)
        merges += [(piece[:k], piece[k:]) for k in cuts if piece[:k] in cost and piece[k:] in cost]
    return vocabulary, merges


def sentencepiece_of(content: bytes, names: dict[str, str]) -> bytes | None:
    """The sentencepiece model that tokenizer.json was made of, with the tokens that were added since.

    Args:
        content: of tokenizer.json, which is sound. names: of bos_token, eos_token and pad_token.

    Returns:
        None: it was made of none, or not by this project.
    """
    tree = json.loads(content)
    bpe, added = tree["model"], {entry["id"]: entry for entry in tree.get("added_tokens", [])}
    if not bpe.get("byte_fallback") or any(tree.get(part) != value for part, value in AROUND.items()):
        return None
    if bpe.get("type", "BPE") != "BPE" or any(map(bpe.get, OTHER)) or any(map(_is_cut, added.values())):
        return None
    given = bpe["vocab"] | {entry["content"]: number for number, entry in added.items()}
    pieces = {number: piece for piece, number in given.items()}
    if sorted(pieces) != list(range(len(given))):
        return None
    if sum(len(piece) ** 2 for piece in bpe["vocab"]) > MOST_CUTS:
        return None
    merges = [tuple(pair) for pair in bpe["merges"]]
    ranks = {"".join(pair): rank for rank, pair in reversed(list(enumerate(merges)))}
    model = ModelProto()
    for number in range(len(pieces)):
        piece, entry = pieces[number], added.get(number)
        kind = KINDS.NORMAL
        if piece == bpe.get("unk_token"):
            kind = KINDS.UNKNOWN
        elif entry is not None or piece in names.values():
            kind = KINDS.USER_DEFINED if entry is not None and not entry["special"] else KINDS.CONTROL
        elif piece in BYTES:
            kind = KINDS.BYTE
        text = kind in (KINDS.NORMAL, KINDS.USER_DEFINED)
        spelt = piece.replace(" ", SPACE) if text else piece
        model.pieces.add(piece=spelt, type=kind, score=-float(ranks.get(piece, len(merges))))
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    trained = model.trainer_spec
    trained.model_type, trained.byte_fallback, trained.unk_piece = TrainerSpec.BPE, True, bpe.get("unk_token") or ""
    trained.bos_piece, trained.eos_piece, trained.pad_piece = (names[f"{name}_token"] for name in ("bos", "eos", "pad"))
    return bytes(model.SerializeToString()) if bpe_of(model) == (given, merges) else None


def _is_cut(entry: dict[str, Any]) -> bool:
    """Whether sentencepiece would not find an added token where `tokenizers` does: it takes spaces with it, is no part
    of a word, or goes on after a newline, where lines are cut."""
    around = entry["lstrip"] or entry["rstrip"] or entry["single_word"]
    return not entry["special"] and (around or "\n" in entry["content"][:-1])


BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
