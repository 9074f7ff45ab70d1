"""The baseline is a probability distribution, learns, and scores the bytes that the decoder is scored on."""

import numpy as np
import pytest

from nsa.data.config import DataConfig
from nsa.data.loader import SampleStream
from nsa.data.shards import PreparedData
from nsa.data.trigram import Trigram, sampled_bits_per_byte


def test_probabilities_sum_to_one() -> None:
    model = Trigram([b"abracadabra", b"banana\n"])
    for context in (b"", b"a", b"ab", b"zz", b"az", b"\xff\x00"):
        p = [model.probabilities(context + bytes([c]))[-1] for c in range(256)]
        assert sum(p) == pytest.approx(1, abs=1e-12)
        assert min(p) > 0


@pytest.mark.parametrize("text", [b"abracadabra", b"abra\n\nabr  abz\n\nz"])
def test_against_the_formula(text: bytes) -> None:
    """A document begins as a line does after an empty one."""
    scored = b"abrz"
    model = Trigram([text])
    padded = b"\n\n" + text
    grams = [padded[i : i + 3] for i in range(len(text))]
    for at, p in enumerate(model.probabilities(scored)):
        context, byte = (b"\n\n" + scored)[at : at + 2], scored[at]
        want = 1 / 256
        for n in range(3):  # no context, one byte, two bytes
            history = context[2 - n :]
            follow = [g[2] for g in grams if g[2 - n : 2] == history]
            if follow:
                want = (follow.count(byte) + len(set(follow)) * want) / (len(follow) + len(set(follow)))
        assert p == pytest.approx(want, rel=1e-12)


def test_it_learns_and_knows_nothing_of_noise() -> None:
    text = b"the same line again and again\n" * 200
    noise = np.random.default_rng(0).bytes(20_000)
    assert Trigram([text]).bits_per_byte([text]) < 0.5
    assert Trigram([]).bits_per_byte([text]) == pytest.approx(8)
    assert Trigram([text]).bits_per_byte([noise]) > 8
    with pytest.raises(ValueError, match="no text"):
        Trigram([text]).bits_per_byte([])


def test_sampled_bytes_are_those_of_the_stream(prepared: PreparedData, config: DataConfig) -> None:
    """A uniform model needs 8 bits for each byte it is asked for, so what is asked for can be counted."""
    stream = SampleStream(prepared, config, "validation", 7)
    model = Trigram([])
    scored = 0
    plain = model.probabilities

    def counting(text: bytes) -> np.ndarray:
        class Counted(np.ndarray):
            def __getitem__(self, item: slice) -> np.ndarray:
                nonlocal scored
                result = np.asarray(self)[item]
                scored += len(result)
                return result

        return plain(text).view(Counted)

    model.probabilities = counting  # type: ignore[method-assign]
    assert sampled_bits_per_byte(model, stream, 20) == pytest.approx(8)
    assert scored == sum(stream[i].num_bytes for i in range(20))
