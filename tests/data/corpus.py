"""A small corpus of text files."""

import random
from pathlib import Path

SYLLABLES = [
    "al",
    "be",
    "con",
    "de",
    "er",
    "fi",
    "gra",
    "ho",
    "in",
    "ka",
    "lo",
    "mo",
    "na",
    "or",
    "pre",
    "qu",
    "se",
    "to",
]
ODD = ["é", "漢字", "▁", "</s>", "0", "42", "\u0000"]


def write_corpus(folder: Path, documents: int = 40) -> Path:
    """Files of very different lengths, with what a tokenizer may trip over; file n is the same whatever `documents`."""
    folder.mkdir(parents=True)
    for number in range(documents):
        rng = random.Random(number)
        text = ""
        for _ in range(20 + int(3 * 1.2**number) % 700):
            word = "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) if rng.random() < 0.9 else rng.choice(ODD)
            text += word + rng.choice([" ", " ", "  ", "\n", "\n    ", "\t"])
        (folder / f"{number:03d}.txt").write_bytes(f"{number} {text}".encode())
    return folder
