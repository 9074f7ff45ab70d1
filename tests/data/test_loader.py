"""Sample i is a pure function of (seed, i), and covers every token once."""

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nsa.data.blend import Blend
from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.loader import Sample, SampleStream, batch
from nsa.data.permutation import permute, round_keys
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData
from tests.data.corpus import write_corpus

FIELDS = ("tokens", "targets", "starts", "num_bytes", "source")


def same(a: Sample, b: Sample) -> bool:
    return all(np.array_equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def test_a_sample_depends_on_seed_and_index_alone(prepared: PreparedData, config: DataConfig) -> None:
    indices = [0, 5, 1, 10**12, 3, 777, 2]
    first = SampleStream(prepared, config, "train", 7)
    there = [first[i] for i in indices]
    second = SampleStream(PreparedData(prepared.folder), config, "train", 7)
    back = [second[i] for i in reversed(indices)][::-1]
    assert all(map(same, there, back))
    other = SampleStream(prepared, config, "train", 8)
    assert sum(same(a, other[i]) for a, i in zip(there, indices, strict=True)) == 0


def test_the_order_is_the_same_on_every_machine() -> None:
    """Pinned numbers: a change of the permutation changes every run's data order, and must be meant."""
    keys = round_keys("1234/text/train", "windows", 0)
    assert permute(np.arange(6), 10, keys).tolist() == [8, 0, 5, 2, 1, 3]


def test_a_batch_is_its_samples(prepared: PreparedData, config: DataConfig) -> None:
    stream = SampleStream(prepared, config, "train", 7)
    whole = batch(stream, range(6))
    parts = [batch(stream, [i]) for i in range(6)]
    assert whole["input_ids"].shape == whole["targets"].shape == (1, 6 * 128)
    assert whole["input_ids"].dtype == whole["targets"].dtype == torch.int64
    for key in ("input_ids", "targets"):
        assert torch.equal(whole[key], torch.cat([p[key] for p in parts], 1))
    assert whole["num_bytes"] == sum(p["num_bytes"] for p in parts)
    assert whole["source_ids"].tolist() == [stream[i].source for i in range(6)]
    borders = whole["cu_seqlens"]
    assert borders.dtype == torch.int32
    assert borders[0] == 0 and borders[-1] == 6 * 128 and (borders.diff() > 0).all()
    spans = [span for i in range(6) for span in stream.locate(i)]
    assert borders.tolist() == np.cumsum([0] + [span.stop - span.start for span in spans]).tolist()
    assert set(range(0, 6 * 128 + 1, 128)) <= set(borders.tolist())


def test_an_epoch_covers_every_token_once_within_its_document(
    make_config: Callable[..., DataConfig], corpus: Path, prepared: PreparedData
) -> None:
    """Read back all windows of one epoch: each (document, position) is an input once, and a target once or never."""
    config = make_config(corpus, sequence_length=17)
    source = prepared.sources["text"]
    byte_lengths = prepared.tokenizer.byte_lengths
    for split in ("train", "validation"):
        stream = SampleStream(prepared, config, split, 7)
        members = source.members(split)
        inputs, targets, num_bytes = Counter(), Counter(), 0
        for i in range(2 * len(stream)):  # windows of the first epoch may be anywhere in the first len(stream)
            sample = stream[i]
            assert sample.starts[0] == 0 and len(sample.tokens) == len(sample.targets) == 17
            spans = stream.locate(i)
            at = 0
            for span, start in zip(spans, sample.starts, strict=True):
                assert start == at
                document = source.read(span.row).astype(np.int64)
                size = span.stop - span.start
                assert np.array_equal(sample.tokens[at : at + size], document[span.start : span.stop])
                follow = document[span.start + 1 : span.stop + 1]
                assert np.array_equal(sample.targets[at : at + len(follow)], follow)
                assert (sample.targets[at + len(follow) : at + size] == -100).all()  # after eos: another document
                inputs.update((span.row, t) for t in range(span.start, span.stop))
                targets.update((span.row, t + 1) for t in range(span.start, span.start + len(follow)))
                at += size
            counted = sample.targets[sample.targets >= 0]
            assert sample.num_bytes == byte_lengths[counted].sum()
            num_bytes += sample.num_bytes
        lengths = {d: len(source.read(int(d))) for d in members}
        assert {d for d, _ in inputs} == set(members)
        repeats = [inputs[d, t] for d, n in lengths.items() for t in range(n)]
        total = sum(lengths.values())
        assert min(repeats) >= 2 and sum(repeats) == 2 * len(stream) * 17 and max(repeats) <= 3
        assert sum(targets[d, t] for d in members for t in range(lengths[d])) == sum(targets.values())
        assert all(targets[d, 0] == 0 for d in members)
        assert abs(num_bytes / 2 / sum(source.documents["num_bytes"][members]) - 1) < 3 * 17 / total + 0.01


def test_neighbouring_samples_are_not_neighbours_in_a_file(prepared: PreparedData, config: DataConfig) -> None:
    text = config.model_copy(update={"sources": config.sources[:1], "sequence_length": 16})
    stream = SampleStream(prepared, text, "train", 7)
    spans = [stream.locate(i) for i in range(100)]
    follows = sum(a[-1].row == b[0].row and a[-1].stop == b[0].start for a, b in pairwise(spans))
    assert follows < 10


def test_epochs_differ_in_order(prepared: PreparedData, config: DataConfig) -> None:
    text = config.model_copy(update={"sources": config.sources[:1]})
    stream = SampleStream(prepared, text, "train", 7)
    n = len(stream)
    assert not all(same(stream[i], stream[n + i]) for i in range(5))


@pytest.mark.parametrize("shares", [(1.0, 1.0), (0.9, 0.1), (0.31, 0.69)])
def test_a_pass_reads_all_of_every_text_source(
    tmp_path: Path, make_config: Callable[..., DataConfig], prepared: PreparedData, shares: tuple[float, float]
) -> None:
    """`len` of a blend: as few samples as hold every token of both sources, of which one is several times longer.

    Notices a pass that ends when the first source is through, and a share that is rounded down.
    """
    folders = [write_corpus(tmp_path / "small", 9), write_corpus(tmp_path / "large", 22)]
    sources = [
        SourceConfig(name=folder.name, kind="files", path=str(folder), weight=share)
        for folder, share in zip(folders, shares, strict=True)
    ]
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(folders[0], tokenizer=tokenizer).model_copy(update={"sources": sources})
    data = prepare(config, 3, progress=False)
    for split in ("train", "validation"):
        stream = SampleStream(data, config, split, 3)
        missing = {
            (name, int(row), token)
            for name, source in data.sources.items()
            for row in source.members(split)
            for token in range(len(source.read(int(row))))
        }
        counts = Counter(stream[i].source for i in range(len(stream)))
        for i in range(2 * len(stream)):  # the windows of a pass may be anywhere in the first two
            missing -= {(s.source, s.row, t) for s in stream.locate(i) for t in range(s.start, s.stop)}
        assert not missing
        needed = [-(-int(s.lengths(s.members(split)).sum()) // 64) for s in data.sources.values()]
        assert all(counts[n] >= least for n, least in enumerate(needed))
        assert any(counts[n] <= least + 1 for n, least in enumerate(needed)), "and no more samples than that"


def test_validation_has_no_synthetic_samples(prepared: PreparedData, config: DataConfig) -> None:
    stream = SampleStream(prepared, config, "validation", 7)
    assert {stream[i].source for i in range(50)} == {0}
    held_out = set(prepared.sources["text"].members("validation"))
    assert {span.row for i in range(50) for span in stream.locate(i)} <= held_out


def test_another_source_does_not_reorder_the_text(prepared: PreparedData, config: DataConfig) -> None:
    alone = SampleStream(prepared, config.model_copy(update={"sources": config.sources[:1]}), "train", 7)
    blend = SampleStream(prepared, config, "train", 7)
    mixed = [s for s in (blend[i] for i in range(100)) if s.source == 0]
    assert all(np.array_equal(s.tokens, alone[i].tokens) for i, s in enumerate(mixed))


def test_there_are_two_splits(prepared: PreparedData, config: DataConfig) -> None:
    with pytest.raises(ValueError, match="split must be train or validation, not 'test'"):
        SampleStream(prepared, config, "test", 0)


def test_a_source_that_was_not_prepared(prepared: PreparedData, config: DataConfig) -> None:
    other = config.sources[0].model_copy(update={"name": "other"})
    with pytest.raises(ValueError, match="'other' is not in"):
        SampleStream(prepared, config.model_copy(update={"sources": [other]}), "train", 7)


def test_no_two_episodes_are_the_same(prepared: PreparedData, config: DataConfig) -> None:
    """Of one sample, of two samples, or of two sources of one task: what differs is drawn, and not the length alone."""
    copy = config.sources[3]
    assert copy.task == "copy"
    sources = [copy, copy.model_copy(update={"name": "again"})]
    stream = SampleStream(prepared, config.model_copy(update={"sources": sources}), "train", 7)
    episodes = []
    for i in range(60):
        borders = [*stream[i].starts.tolist(), 128]
        episodes += [tuple(stream[i].tokens[a:b].tolist()) for a, b in pairwise(borders)]
    equal_lengths = Counter(map(len, episodes))
    assert max(equal_lengths.values()) > 3, "some are of one length"
    assert len(set(episodes)) == len(episodes)


def test_samples_too_short_for_a_task(prepared: PreparedData, config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.sequence_length to be \d+ or more"):
        SampleStream(prepared, config.model_copy(update={"sequence_length": 31}), "train", 7)


def test_a_source_shorter_than_a_window(
    tmp_path: Path, make_config: Callable[..., DataConfig], prepared: PreparedData
) -> None:
    """An epoch of fewer tokens than one window: the window runs through several epochs."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for name, text in {"a": "x", "b": "yy", "c": "z" * 3, "d": "the of and to "}.items():
        (folder / name).write_text(text)
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    config = make_config(folder, sequence_length=4096, tokenizer=tokenizer)
    data = prepare(config, 3, progress=False)
    for split in ("train", "validation"):
        sample = SampleStream(data, config, split, 3)[5]
        assert len(sample.tokens) == 4096 and len(sample.starts) > 1


weights = st.lists(st.integers(1, 1000).map(lambda n: n / 100), min_size=1, max_size=7)


def furthest_off(weights: list[Fraction], off: Fraction = Fraction(0)) -> list[Fraction]:
    """Of each source, where the most even cuts of the list hand on off * share + 1/2."""
    if len(weights) == 1:
        return [off]
    cut = min(range(1, len(weights)), key=lambda i: abs(sum(weights[:i]) - sum(weights[i:])))
    return [
        bound
        for part in (weights[:cut], weights[cut:])
        for bound in furthest_off(part, off * sum(part) / sum(weights) + Fraction(1, 2))
    ]


@settings(max_examples=60, deadline=None)
@given(weights=weights)
@example(weights=[0.41, 0.35, 0.01, 0.02, 0.01, 0.36, 0.01])  # 1.54 samples off at the 70th
def test_quotas_hold_at_every_prefix(weights: list[float]) -> None:
    blend, exact = Blend(weights), [Fraction(str(weight)) for weight in weights]
    bounds = furthest_off(exact)
    counts = [0] * len(weights)
    for i in range(200):
        source, local = blend[i]
        assert local == counts[source], "each source's samples are used in order, none twice, none left out"
        counts[source] += 1
        assert counts == blend.counts(i + 1)
        for count, weight, bound in zip(counts, exact, bounds, strict=True):
            assert abs(count - (i + 1) * weight / sum(exact)) <= bound


def test_quotas_are_exact_far_out() -> None:
    assert Blend([0.7, 0.2, 0.1]).counts(10**15) == [7 * 10**14, 2 * 10**14, 10**14]
    assert sum(Blend([1, 1, 1]).counts(10**20)) == 10**20
    assert max(abs(3 * count - 10**20) for count in Blend([1, 1, 1]).counts(10**20)) < 3


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 100))
def test_a_permutation_is_one(n: int, seed: int) -> None:
    keys = round_keys(seed)
    order = permute(np.arange(n), n, keys)
    assert sorted(order) == list(range(n))
    assert permute(np.int64(n // 2), n, keys) == order[n // 2]
