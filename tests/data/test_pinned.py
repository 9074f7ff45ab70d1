"""What decides the order of a run's data, as literals: a change reorders every run, and must be meant."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from nsa.data import prepare as module
from nsa.data.blend import Blend
from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.loader import Sample, SampleStream, batch
from nsa.data.permutation import permute, round_keys
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData, SourceWriter, write_manifest

Make = Callable[..., DataConfig]
# Tokens of each document, and whether it is held out.
LETTERS = {"a": (5, False), "b": (9, False), "c": (4, True), "d": (7, False), "e": (3, False), "f": (6, True)}
DIGITS = {"0": (12, False), "1": (8, False), "2": (5, True), "3": (10, False)}


@pytest.fixture
def write(prepared: PreparedData, tmp_path: Path) -> Callable[..., PreparedData]:
    """Prepared data of documents of the lengths given: no tokenizer decides where samples are cut."""

    def make(**sources: dict[str, tuple[int, bool]]) -> PreparedData:
        entries = {}
        for name, documents in sources.items():
            writer = SourceWriter(tmp_path / name, prepared.vocab_size)
            for document, (tokens, held_out) in documents.items():
                writer.add(document, np.arange(tokens), tokens, held_out)
            entries[name] = writer.close()
        shutil.copyfile(prepared.folder / "tokenizer.model", tmp_path / "tokenizer.model")
        about = {"vocab_size": prepared.vocab_size, "sha256": prepared.tokenizer.sha256}
        write_manifest(tmp_path, {"made_from": {}, "tokenizer": about, "sources": entries})
        return PreparedData(tmp_path)

    return make


def settings(sequence_length: int, **weights: float) -> DataConfig:
    sources = [SourceConfig(name=name, kind="files", path="unread", weight=w) for name, w in weights.items()]
    return DataConfig(sources=sources, sequence_length=sequence_length)


def shown(stream: SampleStream, samples: Iterable[int]) -> list[str]:
    """The documents and tokens of each sample, e.g. "a[0:5] b[0:3]"."""
    return [" ".join(f"{s.document}[{s.start}:{s.stop}]" for s in stream.locate(i)) for i in samples]


TRAIN = [
    "b[3:9] e[0:2]",
    "e[2:3] d[0:7]",
    "3[4:10] 1[0:2]",
    "a[0:5] b[0:3]",
    "e[0:3] b[0:5]",
    "a[4:5] d[0:7]",
    "0[0:8]",
    "b[5:9] a[0:4]",
    "b[5:9] a[0:4]",
    "e[0:3] b[0:5]",
    "1[2:8] 0[0:2]",
    "a[4:5] d[0:7]",
]
VALIDATION = [
    "f[4:6] f[0:6]",
    "c[0:4] f[0:4]",
    "2[0:5] 2[0:3]",
    "c[0:4] f[0:4]",
    "f[4:6] c[0:4] f[0:2]",
    "f[2:6] c[0:4]",
]


def test_the_first_samples_of_a_stream(write: Callable[..., PreparedData]) -> None:
    """Notices any change of the order of samples: of keys, permutations, cuts, or the blend."""
    data, config = write(letters=LETTERS, digits=DIGITS), settings(8, letters=3, digits=1)
    assert shown(SampleStream(data, config, "train", 7), range(12)) == TRAIN
    assert shown(SampleStream(data, config, "validation", 7), range(6)) == VALIDATION


def test_documents_come_in_another_order_in_each_epoch(write: Callable[..., PreparedData]) -> None:
    """Notices an order of documents that does not depend on the epoch: here an epoch is one sample."""
    train = sum(tokens for tokens, held_out in LETTERS.values() if not held_out)
    stream = SampleStream(write(letters=LETTERS), settings(train, letters=1), "train", 7)
    orders = ["".join(span.document for span in stream.locate(epoch)) for epoch in range(6)]
    assert {"".join(sorted(order)) for order in orders} == {"abde"}
    assert len(set(orders)) > 3


def test_windows_come_in_another_order_in_each_epoch(write: Callable[..., PreparedData]) -> None:
    """Notices an order of windows that does not depend on the epoch: here an epoch is one document."""
    data = write(letters={"a": (80, False), "b": (2, True)})
    stream = SampleStream(data, settings(8, letters=1), "train", 7)
    orders = [[stream.locate(i)[0].start for i in range(10 * epoch, 10 * epoch + 10)] for epoch in range(3)]
    assert [sorted(order) for order in orders] == [list(range(0, 80, 8))] * 3
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("task", [None, "mqar"])
def test_a_source_put_in_front_changes_no_other_order(write: Callable[..., PreparedData], task: str | None) -> None:
    """Notices seeds of sources that hang on their place in the list: of texts and of synthetic tasks."""
    data, both = write(letters=LETTERS, digits=DIGITS), settings(32, letters=1, digits=1)
    mqar, copy = (SourceConfig(name=name, kind="synthetic", task=name) for name in ("mqar", "copy"))
    first, *others = [both.sources[0] if task is None else mqar, both.sources[1], copy]
    alone, more = (
        SampleStream(data, both.model_copy(update={"sources": sources}), "train", 7)
        for sources in (others, [first, *others])
    )
    for number in range(len(others)):
        before = [tuple(s.tokens) for s in (alone[i] for i in range(20)) if s.source == number]
        after = [tuple(s.tokens) for s in (more[i] for i in range(60)) if s.source == number + 1]
        assert len(before) == 10 and after[:10] == before


def test_held_out_documents_hang_on_the_seed(make_config: Make, prepared: PreparedData, tmp_path: Path) -> None:
    """Notices a split that is the same for every seed, and any change of which documents a seed holds out."""
    for i in range(30):
        (tmp_path / f"{i:02d}").write_text(f"document {i}")
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(tmp_path, tokenizer=tokenizer)
    held_out = {}
    for seed in (1, 2):
        source = prepare(config, seed, progress=False).sources["text"]
        held_out[seed] = [source.document_id(int(i)) for i in source.members("validation")]
    assert held_out == {
        1: ["01", "02", "04", "14", "17", "19", "27"],
        2: ["05", "06", "14", "15", "22", "24", "26"],
    }


def test_with_a_seed_of_the_data_runs_of_all_seeds_hold_out_the_same(
    make_config: Make, corpus: Path, tmp_path: Path
) -> None:
    """The same documents and tokenizer, so a run that starts from another is not tested on what that one was trained
    on. The order of the training samples stays the run's own, that of the held-out ones does not."""
    config = make_config(corpus, seed=5)
    one, other = (prepare(config, seed, progress=False) for seed in (1, 2))
    assert one.folder == other.folder != prepare(make_config(corpus), 1, progress=False).folder
    assert one.folder == prepare(make_config(corpus), 5, progress=False).folder
    held_out = [[tuple(s.tokens) for s in first(one, config, "validation", seed)] for seed in (1, 2)]
    assert held_out[0] == held_out[1]
    ours, theirs = ([tuple(s.tokens) for s in first(one, config, "train", seed)] for seed in (1, 2))
    assert ours != theirs


def first(data: PreparedData, config: DataConfig, split: str, seed: int) -> list[Sample]:
    stream = SampleStream(data, config, split, seed)
    return [stream[i] for i in range(4)]


@pytest.mark.parametrize("limit", [100_000, 10_000])
def test_the_tokenizer_never_sees_held_out_documents(
    make_config: Make, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Notices held-out text among what the tokenizer is trained on, whether all documents fit its limit or not."""
    fed: list[str] = []
    train = module.train

    def spy(texts: Iterable[str], *rest: object) -> object:
        fed.extend(texts)
        return train(fed, *rest)

    monkeypatch.setattr(module, "train", spy)
    tokenizer = TokenizerConfig(vocab_size=400, train_bytes=limit)
    data = prepare(make_config(corpus, tokenizer=tokenizer, cache_dir=str(tmp_path)), 7, progress=False)
    training, held_out = ({text.decode() for _, text in data.texts(split)} for split in ("train", "validation"))
    assert held_out and fed
    if limit == 100_000:
        assert sorted(fed) == sorted(training)
        return
    assert sum(len(text.encode()) for text in fed) == pytest.approx(limit, abs=4)  # a character may be cut
    assert all(any(whole.startswith(text.rstrip("\ufffd")) for whole in training) for text in fed)
    assert not any(text.startswith(some.rstrip("\ufffd")) for text in held_out for some in fed)


@pytest.mark.time_limit(10)
@pytest.mark.parametrize("index", [-1, 10, [3, -2], [0, 10]])
def test_an_index_outside_of_a_permutation_is_refused(index: int | list[int]) -> None:
    """Notices a permutation that walks for ever, or gives two indices one place."""
    with pytest.raises(ValueError, match="give indices from 0 to 9"):
        permute(np.array(index), 10, round_keys(1))


def test_a_sample_before_the_first_is_refused(write: Callable[..., PreparedData]) -> None:
    """Notices samples that count from the end, which an endless stream does not have."""
    stream = SampleStream(write(letters=LETTERS, digits=DIGITS), settings(8, letters=3, digits=1), "train", 7)
    for ask in (lambda: stream[-1], lambda: stream.locate(-1), lambda: batch(stream, [0, -1]), lambda: Blend([1])[-1]):
        with pytest.raises(IndexError, match="samples count from 0, not -1"):
            ask()


def test_a_permutation_of_nothing() -> None:
    assert permute(np.arange(0), 0, round_keys(1)).shape == (0,)
