"""The narrow recall tasks as episodes: every answer follows from the episode, and from nothing else."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa.data.config import DataConfig
from nsa.data.loader import SampleStream
from nsa.data.shards import PreparedData
from nsa.data.tasks import IGNORED, Bytes, Episode, id_sets, task_named
from nsa.data.tasks.narrow import PASSKEY_TOKENS, Mqar

lengths = st.integers(100, 700)
TASKS = ["mqar", "passkey", "copy"]
PINNED = {"mqar": "65a174c1cf5c", "passkey": "45a8c86ac06c", "copy": "d997980b47c2"}


def pairs(prepared: PreparedData, length: int) -> int:
    task = task_named("mqar")
    assert isinstance(task, Mqar)
    return task.pairs(prepared.tokenizer, length)


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=40, deadline=None)
@given(length=lengths, index=st.integers(0, 10**9))
def test_an_episode_is_a_pure_function_of_its_name(prepared: PreparedData, name: str, length: int, index: int) -> None:
    first, second = (task_named(name).episode(prepared.tokenizer, length, 5, index) for _ in range(2))
    assert np.array_equal(first.tokens, second.tokens) and np.array_equal(first.targets, second.targets)
    assert first.tokens.shape == first.targets.shape == (length,)
    assert first.tokens.dtype == first.targets.dtype == np.int64
    assert first.tokens[0] == prepared.tokenizer.bos_id
    assert first.tokens.min() >= 0 and first.tokens.max() < prepared.vocab_size
    other = task_named(name).episode(prepared.tokenizer, length, 6, index)
    assert not np.array_equal(first.tokens, other.tokens)
    asked = first.targets[:-1] != IGNORED
    assert asked.any() or name == "passkey"
    assert np.array_equal(first.targets[:-1][asked], first.tokens[1:][asked]), "an answer is the token that follows"


@settings(max_examples=40, deadline=None)
@given(length=lengths, index=st.integers(0, 10**9), crowded=st.booleans())
def test_mqar_answers_are_the_values_given(prepared: PreparedData, length: int, index: int, crowded: bool) -> None:
    episode = task_named("mqar").episode(prepared.tokenizer, length, 5, index, crowded=crowded)
    n = int((episode.targets != IGNORED).sum())
    assert n >= pairs(prepared, length) if crowded else n == pairs(prepared, length)
    stored = {}
    asked = set()
    for at in range(1, 2 * n, 2):
        stored[int(episode.tokens[at])] = int(episode.tokens[at + 1])
    assert len(stored) == n
    for at in np.flatnonzero(episode.targets != IGNORED):
        key = int(episode.tokens[at])
        assert at > 2 * n and stored[key] == episode.targets[at]
        asked.add(key)
    assert asked == set(stored)
    assert episode.chance == pytest.approx(1 / n + (1 - 1 / n) / len(id_sets(prepared.tokenizer).values))


def test_mqar_grows_with_length(prepared: PreparedData) -> None:
    counts = [pairs(prepared, length) for length in (32, 64, 128, 512, 1024, 2048)]
    assert counts == sorted(counts) and len(set(counts)) > 3 and max(counts) == len(id_sets(prepared.tokenizer).keys)


def test_the_sets_are_disjoint_and_hold_no_control_token(prepared: PreparedData) -> None:
    sets = id_sets(prepared.tokenizer)
    ids = np.concatenate([sets.keys, sets.values, sets.others])
    assert len(set(ids)) == len(ids) and len(set(sets.wide.reshape(-1))) == sets.wide.size
    ids = sets.wide.reshape(-1)
    assert (prepared.tokenizer.byte_lengths[ids] > 0).all()
    assert b"\n" not in {prepared.tokenizer.decode_bytes([i]) for i in ids.tolist()}


@settings(max_examples=40, deadline=None)
@given(length=lengths, index=st.integers(0, 10**9))
def test_the_passkey_is_in_the_text_before_the_question(prepared: PreparedData, length: int, index: int) -> None:
    tokenizer = prepared.tokenizer
    task = task_named("passkey")
    episode = task.episode(tokenizer, max(length, task.least(tokenizer)), 5, index)
    key = episode.targets[-PASSKEY_TOKENS:]
    assert (episode.targets[:-PASSKEY_TOKENS] == IGNORED).all() and (key != IGNORED).all()
    needle = b"The pass key is " + tokenizer.decode_bytes(key.tolist()) + b". Remember it."
    assert tokenizer.decode_bytes(episode.tokens.tolist()).count(needle) == 1
    question = b"What is the pass key? The pass key is " + tokenizer.decode_bytes(key[:-1].tolist())
    assert tokenizer.decode_bytes(episode.tokens.tolist()).endswith(question)


def test_the_passkey_is_anywhere(prepared: PreparedData) -> None:
    task, tokenizer = task_named("passkey"), prepared.tokenizer
    texts = [tokenizer.decode_bytes(task.episode(tokenizer, 600, 5, i).tokens.tolist()) for i in range(60)]
    depths = [text.index(b"Remember") / len(text) for text in texts]
    assert min(depths) < 0.25 and max(depths) > 0.75


@settings(max_examples=40, deadline=None)
@given(length=lengths, index=st.integers(0, 10**9))
def test_copy_repeats_what_was_shown(prepared: PreparedData, length: int, index: int) -> None:
    episode = task_named("copy").episode(prepared.tokenizer, length, 5, index)
    answer = episode.targets[episode.targets != IGNORED]
    n = (length - 1) // 2
    assert len(answer) == n
    assert np.array_equal(episode.tokens[length - 2 * n : length - n], answer)


@pytest.mark.parametrize("name", TASKS)
def test_too_short(prepared: PreparedData, name: str) -> None:
    task, tokenizer = task_named(name), prepared.tokenizer
    least = task.least(tokenizer)
    assert isinstance(task.episode(tokenizer, least, 1, 1), Episode)
    with pytest.raises(ValueError, match="needs"):
        task.episode(tokenizer, least - 1, 1, 1)


def test_the_bits_are_pinned() -> None:
    """Runs of before are made again: a change of these episodes must be meant."""
    found = {}
    for name in TASKS:
        digest = hashlib.sha256()
        for length, index, crowded in itertools.product((128, 301), (0, (3, 4)), (False, True)):
            episode = task_named(name).episode(Bytes(), length, "s", index, crowded=crowded)
            digest.update(episode.tokens.tobytes() + episode.targets.tobytes())
        found[name] = digest.hexdigest()[:12]
    assert found == PINNED


def test_samples_are_episodes_of_many_lengths(prepared: PreparedData, config: DataConfig) -> None:
    stream = SampleStream(prepared, config, "train", 7)
    seen = set()
    for sample, spans in ((stream[i], stream.locate(i)) for i in range(200)):
        if sample.source == 0:
            continue
        assert sample.num_bytes == 0
        lengths = [span.stop for span in spans]
        assert sum(lengths) == len(sample.tokens)
        assert np.array_equal(sample.starts, np.cumsum([0, *lengths[:-1]]))
        assert (sample.tokens[sample.starts] == prepared.tokenizer.bos_id).all()
        seen |= set(lengths)
    assert min(seen) < 64 and max(seen) == 128
