"""The baseline that a language model has to beat: a byte trigram, on the same training and held-out documents.

    python -m nsa.data.trigram CONFIG [key=value ...]

Interpolated Witten-Bell smoothing (Witten and Bell 1991; Chen and Goodman 1998, section 2.6), from a uniform
distribution over 256 bytes up to two bytes of context:

    p(c | h) = (count(h c) + kinds(h) * p(c | shorter h)) / (count(h) + kinds(h))

with kinds(h) the number of different bytes seen after h. Each document is scored from its first byte, after the context
of two newlines, and all its bytes are predicted, as the decoder predicts them.
"""

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # the loader brings torch, which counting bytes does not need
    from nsa.data.loader import SampleStream

ORDER = 3
START = b"\n" * (ORDER - 1)


class Trigram:
    """Counts of byte n-grams: `counts[n]` is (256^n,) int64, indexed by the n bytes as one big-endian number."""

    def __init__(self, texts: Iterable[bytes]):
        self.counts = [np.zeros(256**n, np.int64) for n in range(ORDER + 1)]
        for text in texts:
            np.add.at(self.counts[ORDER], _grams(text), 1)
        for n in range(ORDER - 1, -1, -1):
            self.counts[n][:] = self.counts[n + 1].reshape(256, -1).sum(0)
        # By context, for each n: how many bytes follow it, and how many different ones.
        self._totals = [c.reshape(-1, 256).sum(1) for c in self.counts[1:]]
        self._kinds = [(c.reshape(-1, 256) > 0).sum(1) for c in self.counts[1:]]

    def probabilities(self, text: bytes) -> np.ndarray:
        """(len(text),) float64, of each byte given the two before it (two newlines before the first)."""
        grams = _grams(text)
        p = np.full(len(grams), 1 / 256)
        for n in range(1, ORDER + 1):
            seen = grams % 256**n
            context = seen // 256
            total, kinds = self._totals[n - 1][context], self._kinds[n - 1][context]
            # A context that was never seen says nothing: the shorter one decides.
            mixed = (self.counts[n][seen] + kinds * p) / np.maximum(total + kinds, 1)
            p = np.where(total > 0, mixed, p)
        return p

    def bits_per_byte(self, texts: Iterable[bytes]) -> float:
        """Mean over all bytes of all texts. Raises ValueError if there are none."""
        bits = count = 0.0
        for text in texts:
            bits -= float(np.log2(self.probabilities(text)).sum())
            count += len(text)
        if not count:
            raise ValueError("no text to score")
        return bits / count


def _grams(text: bytes) -> np.ndarray:
    """(len(text),) int64: each byte with the two before it, as one number."""
    codes = np.frombuffer(START + text, np.uint8).astype(np.int64)
    return codes[:-2] << 16 | codes[1:-1] << 8 | codes[2:]


def sampled_bits_per_byte(model: Trigram, stream: "SampleStream", samples: int) -> float:
    """On the very bytes that the first `samples` samples of a stream count: comparable with a decoder's validation."""
    lengths = stream.prepared.tokenizer.byte_lengths
    bits, count = 0.0, 0
    for span in (span for i in range(samples) for span in stream.locate(i)):
        source = stream.prepared.sources[span.source]
        tokens = source.read(span.row).astype(np.int64)
        # A position's target is the next token: the window counts tokens start+1 .. stop of the document.
        ends = np.cumsum(lengths[tokens])
        first, last = ends[span.start], ends[min(span.stop, len(tokens) - 1)]
        p = model.probabilities(stream.prepared.tokenizer.decode_bytes(tokens.tolist()))[first:last]
        bits -= float(np.log2(p).sum())
        count += len(p)
    return bits / count


def main(arguments: list[str]) -> None:
    from nsa.config import load_config
    from nsa.data.loader import SampleStream
    from nsa.data.prepare import prepare

    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    config = load_config(arguments[0], arguments[1:])
    data = prepare(config.data, config.seed)
    model = Trigram(text for _, text in data.texts("train"))
    everything = model.bits_per_byte(text for _, text in data.texts("validation"))
    samples = config.training.validation_samples
    some = sampled_bits_per_byte(model, SampleStream(data, config.data, "validation", config.seed), samples)
    print(
        f"byte trigram: {some:.4f} bits per byte on the {samples} validation samples of the run, "
        f"{everything:.4f} on all held-out documents"
    )


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
