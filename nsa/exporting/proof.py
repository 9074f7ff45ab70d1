"""The proof that an export is the model and the tokenizer that were trained."""

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.tokenizer import PROBE
from nsa.exporting.families import Format
from nsa.models import Decoder, hf

TOLERANCE = 1e-4  # of a logit, relative to the largest of its sequence
NEW_TOKENS = 24


class ExportError(ValueError):
    """The export cannot be made, or is not the model that was trained."""


@dataclass(frozen=True)
class Proof:
    """What was compared: tokens whose logits were, texts whose tokens were, and the largest difference of a logit
    relative to the largest logit of its sequence, in the arithmetic of ``dtype``. ``form``: of the folder."""

    tokens: int
    texts: int
    difference: float
    dtype: str
    form: Format = field(default_factory=Format)


def prove(folder: Path, decoder: Decoder, tokenizer: BaseTokenizer) -> Proof:
    """Load ``folder`` in a process that has only torch and transformers, and compare with the originals.

    Compared are the tokens of a hostile corpus; logits on random and on text tokens; the logits of each step of
    cached, left-padded, batched generation with those of each sequence alone without cache.

    Two correct programs may differ in fp32: where two blocks are equally important to within rounding, either may be
    selected. Should fp32 logits differ, they are compared again in float64, and must agree there.

    Raises:
        ExportError: saying what differs.
    """
    question: dict[str, Any] = {"texts": hostile_texts(), "new_tokens": NEW_TOKENS}
    question |= _sequences(decoder, tokenizer)
    try:
        difference, dtype = _compare(folder, decoder.float(), tokenizer, {**question, "dtype": "float32"}), "float32"
    except LogitsDiffer:
        difference, dtype = _compare(folder, decoder.double(), tokenizer, {**question, "dtype": "float64"}), "float64"
        decoder.float()
    tokens = sum(map(len, question["inputs"])) + NEW_TOKENS * len(question["prompts"])
    return Proof(tokens, len(question["texts"]), difference, dtype)


class LogitsDiffer(ExportError):
    """Tokens agree, logits do not."""


def _compare(folder: Path, decoder: Decoder, tokenizer: BaseTokenizer, question: dict) -> float:
    marks = tokenizer.control_pieces()
    question = {**question, "marked": [f"a {mark} b" for mark in marks]}
    answer, tensors = _ask(folder, question)
    for (mark, number), ids in zip(marks.items(), answer["marked"], strict=True):
        if ids != (expected := [*tokenizer.encode("a "), number, *tokenizer.encode(" b")]):
            raise ExportError(f"the tokenizer does not take {mark} for a special token: {ids}, not {expected}")
    rows = zip(question["texts"], answer["ids"], answer["decoded"], answer["default"], strict=True)
    for text, ids, decoded, default in rows:
        if default is not None and default != ids:
            raise ExportError(f"the tokenizer takes a part of {_short(text)} for a special token: {_short(default)}")
        if ids != (expected := tokenizer.encode(text)):
            raise ExportError(f"the tokenizer differs on {_short(text)}: {_short(ids)}, not {_short(expected)}")
        if decoded.encode() != tokenizer.normal(text.encode()):
            raise ExportError(f"the tokenizer decodes {_short(text)} to {_short(decoded)}")

    worst = 0.0
    for i, ids in enumerate(question["inputs"]):
        with torch.no_grad():
            expected = decoder(torch.tensor([ids]))[0]
        worst = max(worst, _difference(f"logits of sequence {i}", tensors[f"logits.{i}"], expected))
    for i in range(len(question["prompts"])):
        name = f"logits of generation {i} with cache and without"
        worst = max(worst, _difference(name, tensors[f"steps.{i}"], tensors[f"again.{i}"]))
    return worst


def _ask(folder: Path, question: dict) -> tuple[dict, dict[str, Tensor]]:
    """The answer of `load_alone`."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work)
        (path / "question.json").write_text(json.dumps(question))
        # transformers copies the modeling file to its module cache: give it one that goes away.
        environment = {**os.environ, "HF_HOME": work, "HF_MODULES_CACHE": f"{work}/modules", "HF_HUB_OFFLINE": "1"}
        script = Path(__file__).with_name("load_alone.py")
        command = [sys.executable, "-I", str(script), str(folder.resolve()), str(path / "question.json"), work]
        done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True)
        if done.returncode:
            raise ExportError(f"transformers cannot use the export:\n{done.stderr.strip()[-2000:]}")
        return json.loads((path / "answer.json").read_text()), load_file(path / "answer.safetensors")


def _difference(name: str, found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ExportError(f"{name}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not expected.isfinite().all():
        raise ExportError(f"{name}: the model itself gives values that are not finite; export another checkpoint")
    scale = expected.abs().amax()
    apart = (found - expected).abs().amax(-1) / scale
    if not apart.amax() <= TOLERANCE:  # NaN is a difference
        at = int(apart.nan_to_num(torch.inf).argmax())
        raise LogitsDiffer(
            f"{name} differ: {apart[at]:.2g} of the largest at token {at}, {TOLERANCE:g} is allowed "
            f"({str(found.dtype).removeprefix('torch.')})"
        )
    return float(apart.amax())


def _sequences(decoder: Decoder, tokenizer: BaseTokenizer) -> dict:
    """Inputs long enough that most blocks are not selected, and of awkward lengths; prompts of unequal lengths."""
    config = decoder.config
    kinds = decoder.attention.kinds(config.num_layers)
    reach = max(kind.reach(decoder.attention.of(kind)) for kind in kinds)
    longest = min(config.max_position, max(131, 3 * reach // 2 + 3))
    source = tokenizer.encode(hf.FILES[0].read_text())
    text = (source * (longest // len(source) + 1))[:longest]
    chance = random.Random(0)
    lengths = [n for n in (1, 2, 17, 63, 129) if n < longest] + [longest]
    inputs = [[chance.randrange(config.vocab_size) for _ in range(n)] for n in lengths]
    short = max(1, longest // 7)
    return {"inputs": [*inputs, text], "prompts": [text[:short], text[5:6], text[: max(2, longest - NEW_TOKENS)]]}


def hostile_texts() -> list[str]:
    """Texts on which tokenizers differ: all bytes, scripts, runs of white space, control characters, special tokens.

    Lone surrogates are left out: no tokenizer in the fast format takes them.
    """
    chance = random.Random(0)
    texts = ["", PROBE, hf.FILES[0].read_text()]
    texts += [chr(i) for i in range(256)]
    texts += [f"a{c}{c} b" for c in "\u00a0\u2003\u200b\u3000\ufeff\u0301\u2581\ufffd\u0085\u2028"]
    texts += [mark * n for mark in " \t\n\r=-#_*a\u2581" for n in (2, 3, 5, 8, 17, 64, 251)]
    texts += ["<s>", "</s>", "<unk>", "<pad>", "x<s>y</s>", "<0x0A>", "<|endoftext|>", "[INST] [/INST]", "<mask>"]
    texts += ["\u6f22\u5b57\u304b\u306a", "\u0639\u0631\u0628\u064a", "\u0928\u092e\u0938\u094d\u0924\u0947"]
    texts += ["\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301\u00e9\ufb01\uff21", "\U0010ffff"]
    texts += ["y" * 70_000, "ab " * 30_000]
    alphabet = [*" \t\n=-#_*.'\"()0123abcxyzAB", "<s>", "</s>", "<0x41>", "\u2581", "\u00e9", "\u6f22", "\U0001f600"]
    texts += ["".join(chance.choices(alphabet, k=chance.randrange(40))) for _ in range(3000)]
    texts += ["".join(chr(chance.randrange(0x20, 0xD800)) for _ in range(20)) for _ in range(200)]
    return texts


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
