"""Validation and `nsa.evaluation.bits_per_byte` against a plain loop over the held-out samples.

The loop runs every document through the decoder alone, by the operators' definitions, and takes the bytes of its text
from the tokenizer's decoding. The script side (at the end) runs on ranks of its own.
"""

import math
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import on_ranks, tiny_config, write_documents
from torch.nn.functional import cross_entropy

from nsa.data.loader import SampleStream
from nsa.data.prepare import prepare
from nsa.evaluation import bits_per_byte
from nsa.models import Decoder

# Three batches of 2, 2 and 1 samples: two ranks run four, of which one is surplus.
SAMPLES, MICRO = 5, 2
RUN = [
    "data.sources.0.path={folder}/documents/*.txt",
    "data.workers=1",
    "model.init_std=0.3",  # so that targets differ in what they cost: samples and targets are distinguished
    f"training.validation_samples={SAMPLES}",
    f"training.micro_batch_size={MICRO}",
]
ALL = 200  # more than there are: one pass over the held-out text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many short documents, some with letters of several bytes."""
    folder = tmp_path_factory.mktemp("held-out")
    write_documents(folder, 400, 61)
    return folder


def overrides(folder: Path, *more: str) -> list[str]:
    return [override.replace("{folder}", str(folder)) for override in RUN] + list(more)


@pytest.fixture(scope="module")
def held_out(folder: Path) -> tuple[Any, SampleStream, Decoder]:
    """The configuration, the held-out samples and the decoder of the first weights."""
    config = tiny_config(folder, *overrides(folder))
    prepared = prepare(config.data, config.seed, progress=False)
    decoder = Decoder(config.model, config.attention, backend="naive")
    decoder.initialise(config.seed)
    return config, SampleStream(prepared, config.data, "validation", config.seed), decoder


@torch.no_grad()
def read_plainly(decoder: Decoder, stream: SampleStream, samples: int) -> dict[int, tuple[float, int, int]]:
    """Nats, counted targets and bytes of their text, by position in the document."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0, 0])
    for index in range(samples):
        sample = stream[index]
        for start, stop in pairwise([*sample.starts.tolist(), len(sample.tokens)]):
            logits = decoder(torch.from_numpy(sample.tokens[None, start:stop]))[0]
            for position, target in enumerate(sample.targets[start:stop].tolist()):
                if target != -100:
                    at = sums[position]
                    at[0] += cross_entropy(logits[position : position + 1], torch.tensor([target])).item()
                    at[1] += 1
                    at[2] += len(stream.prepared.tokenizer.decode_bytes([target]))
    return {position: tuple(at) for position, at in sums.items()}


def assert_exact(found: dict[str, float], sums: dict[int, tuple[float, int, int]]) -> None:
    nats, targets, size = (sum(at[i] for at in sums.values()) for i in range(3))
    assert found.keys() == {"validation/loss", "validation/bits_per_byte"}
    assert found["validation/loss"] == pytest.approx(nats / targets, rel=1e-6)
    assert found["validation/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def assert_held_out(reports: list[dict[str, Any]], stream: SampleStream, samples: int, surplus: int = 0) -> None:
    """Every rank read held-out documents alone, and all ranks together each sample once, and the surplus."""
    source = stream.prepared.sources["text"]
    training = set(source.members("train").tolist())
    assert training and training.isdisjoint(source.members("validation").tolist())
    for rank in reports:
        for row in rank["rows"]:
            assert row[0] == "text", "no synthetic task"
            assert source.documents["validation"][row[1]] and row[1] not in training, f"document {row} is trained on"
    read = sorted(index for rank in reports for index in rank["read"])
    assert sorted(set(read)) == list(range(samples))
    assert len(read) == samples + surplus
    assert all(rank["training"] for rank in reports), "the engine goes back to training"


def test_validation_of_one_process(folder: Path, held_out: Any) -> None:
    """Five samples, in batches of two, and then all of the held-out text, by the same configuration.

    It would notice: training documents or synthetic samples read, some of the samples left out or read twice, a limit
    beyond the held-out text that reads into its second epoch, targets at a document's end counted, nats for bits, and
    tokens, or bytes of targets that are not counted, for bytes.
    """
    _, stream, decoder = held_out
    checks = {
        "some": ("validate", {"overrides": overrides(folder)}),
        "all": ("validate", {"overrides": overrides(folder, f"training.validation_samples={ALL}")}),
    }
    found = on_ranks(1, folder, checks, script=Path(__file__))
    for name, samples in (("some", SAMPLES), ("all", len(stream))):
        assert_held_out(found[name]["ranks"], stream, samples)
        sums = read_plainly(decoder, stream, samples)
        assert sum(at[1] for at in sums.values()) < samples * stream.sequence_length, "some targets are not counted"
        assert_exact(found[name]["metrics"], sums)
    assert SAMPLES < len(stream) < ALL


SHARED = ("tensor", "context", "pipeline")  # ways in which two ranks share the model, and every sample


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, Any]:
    """Validations of two ranks: each with the whole model, and sharing it."""
    checks = {"some": ("validate", {"overrides": overrides(folder)})}
    checks |= {axis: ("validate", {"overrides": overrides(folder, f"parallel.{axis}=2")}) for axis in SHARED}
    return on_ranks(2, folder, checks, script=Path(__file__))


def test_validation_of_two_ranks(on_two: dict[str, Any], held_out: Any) -> None:
    """The same figures, of three batches: the second rank reads one again, in step with the first.

    It would notice: the surplus batch counted twice, a batch that no rank reads, or figures of one rank's share alone.
    """
    _, stream, decoder = held_out
    found = on_two["some"]
    assert_held_out(found["ranks"], stream, SAMPLES, surplus=1)
    assert [rank["read"][:MICRO] for rank in found["ranks"]] == [[0, 1], [2, 3]]
    assert_exact(found["metrics"], read_plainly(decoder, stream, SAMPLES))


@pytest.mark.parametrize("axis", SHARED)
def test_validation_of_a_model_that_two_ranks_share(on_two: dict[str, Any], held_out: Any, axis: str) -> None:
    """The same figures, whichever way the ranks share it: both read every sample, and it is counted once.

    It would notice: losses, targets or bytes counted by each rank of a sample, or by none.
    """
    _, stream, decoder = held_out
    assert [rank["read"] for rank in on_two[axis]["ranks"]] == [list(range(SAMPLES))] * 2
    assert_exact(on_two[axis]["metrics"], read_plainly(decoder, stream, SAMPLES))


@pytest.mark.parametrize("samples", [1, SAMPLES])
def test_bits_per_byte_of_an_evaluation(held_out: Any, monkeypatch: pytest.MonkeyPatch, samples: int) -> None:
    """`measure` of a decoder, in batches of two samples: over all, and by position in the document.

    It would notice: nats for bits, tokens for bytes, targets that are not counted, samples left out, attention or a
    position that goes on across the border of two documents, training documents read.
    """
    _, stream, decoder = held_out
    monkeypatch.setattr(bits_per_byte, "BATCH_TOKENS", 2 * stream.sequence_length)
    read, rows = [], []
    monkeypatch.setattr(SampleStream, "__getitem__", noted(SampleStream.__getitem__, read, rows))
    curve = bits_per_byte.measure(decoder, stream, samples)
    monkeypatch.undo()
    assert_held_out([{"read": read, "rows": rows, "training": True}], stream, samples)

    sums = read_plainly(decoder, stream, samples)
    nats, _, size = (sum(at[i] for at in sums.values()) for i in range(3))
    assert (curve.length, curve.samples, curve.bytes) == (stream.sequence_length, samples, size)
    assert curve.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    for start, stop, found in zip(curve.starts, [*curve.starts[1:], curve.length], curve.by_position, strict=True):
        inside = [at for position, at in sums.items() if start <= position < stop]
        size = sum(at[2] for at in inside)
        expected = sum(at[0] for at in inside) / math.log(2) / size if size else math.nan
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=f"positions {start} to {stop - 1}")


def noted(getitem: Any, read: list[int], rows: list[list[Any]]) -> Any:
    """``SampleStream.__getitem__`` that writes down which samples are read, and the documents in them."""

    def spied(stream: SampleStream, index: int) -> Any:
        read.append(index)
        rows.extend([span.source, span.row] for span in stream.locate(index))
        return getitem(stream, index)

    return spied


# ------------------------------------------------------------------------------------ on ranks of the test's own


def validate(ranks: Any, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Figures of the first weights' validation, and what every rank read for them."""
    trainer = Trainer(tiny_config(folder, *overrides), ranks)
    read, rows = [], []
    with mock.patch.object(SampleStream, "__getitem__", noted(SampleStream.__getitem__, read, rows)):
        metrics = trainer.validate()
    mine = {"read": read, "rows": rows, "training": trainer.engine.module.training}
    rank_checks.close(trainer)
    return {"metrics": metrics, "ranks": ranks.gather(mine)}


if __name__ == "__main__":
    from unittest import mock

    import rank_checks

    from nsa.training.trainer import Trainer

    rank_checks.main(globals())
