"""Bits per byte and recall of models with known results."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from small_run import TEXT, small_config
from torch import nn

from nsa.data import tokenizer as tokenizers
from nsa.data.loader import SampleStream, batch
from nsa.data.prepare import prepare
from nsa.data.tasks import id_sets, task_named
from nsa.evaluation import bits_per_byte, recall
from nsa.evaluation.recall import Recall
from nsa.evaluation.report import plot_recall
from nsa.evaluation.runner import _tasks
from nsa.models import Decoder


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> SampleStream:
    config = small_config(tmp_path_factory.mktemp("data"))
    return SampleStream(prepare(config.data, 0, progress=False), config.data, "validation", 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    return tokenizers.train(TEXT, 400, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


class Known(nn.Module):
    """A model whose loss is position + 1 bits per token, with the position in the document."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1, 1)

    def forward(self, ids, targets, cu_seqlens):
        positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff().tolist()])
        return torch.where(targets >= 0, (positions + 1.0) * math.log(2), 0.0)


@pytest.mark.parametrize("samples", [1, 7])
def test_bits_per_byte_of_a_known_model(stream: SampleStream, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bits_per_byte, "BATCH_TOKENS", 3 * 64)
    curve = bits_per_byte.measure(Known(), stream, samples)
    assert curve.starts == [0, 8, 12, 16, 24, 32, 48]
    bits, size = np.zeros(7), np.zeros(7)
    for index in range(samples):
        sample = stream[index]
        for t, target in enumerate(sample.targets):
            position = t - max(s for s in sample.starts if s <= t)
            bucket = max(i for i, start in enumerate(curve.starts) if start <= position)
            if target >= 0:
                bits[bucket] += position + 1
                size[bucket] += stream.prepared.tokenizer.byte_lengths[target]
    with np.errstate(invalid="ignore", divide="ignore"):
        np.testing.assert_allclose(curve.by_position, np.where(size > 0, bits / size, np.nan))
    assert curve.bytes == batch(stream, range(samples))["num_bytes"] == size.sum()
    assert curve.bits_per_byte == pytest.approx(bits.sum() / size.sum())


def test_buckets_are_two_per_octave() -> None:
    assert bits_per_byte.bucket_starts(8) == [0]
    assert bits_per_byte.bucket_starts(64) == [0, 8, 12, 16, 24, 32, 48]
    assert bits_per_byte.bucket_starts(97) == [0, 8, 12, 16, 24, 32, 48, 64, 96]


def test_there_are_no_bits_per_byte_where_targets_have_no_bytes(
    stream: SampleStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of special tokens: their loss is divided by nothing."""
    lengths = stream.prepared.tokenizer.byte_lengths
    monkeypatch.setattr(stream.prepared.tokenizer, "byte_lengths", np.zeros_like(lengths))
    curve = bits_per_byte.measure(Known(), stream, 2)
    assert curve.bytes == 0 and np.isnan(curve.by_position).all()


def lookup(tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Solves mqar: predicts what followed this key the first time."""
    predictions = []
    for row, where in zip(tokens.tolist(), asked, strict=True):
        predictions += [row[row.index(row[t]) + 1] for t in where.nonzero()[:, 0].tolist()]
    return torch.tensor(predictions)


def echo(tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Solves copy: predicts the token as many places back as there are answers."""
    return torch.cat([row[where.nonzero()[:, 0] - int(where.sum())] for row, where in zip(tokens, asked, strict=True)])


@pytest.mark.parametrize(("name", "solve"), [("mqar", lookup), ("copy", echo)])
def test_an_oracle_scores_one(tokenizer, name: str, solve) -> None:
    result = recall.measure(solve, task_named(name), tokenizer, 128, 100)
    assert (result.accuracy, result.episodes) == (1.0, 100)
    assert result.high == pytest.approx(1.0)
    assert 0.9 < result.low < 1


def test_every_episode_is_another_and_counts_as_one(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches of three of ten: no episode is read twice, and they are those of the evaluation alone. A model that
    has all of an episode right or all of it wrong: the interval is that of ten, not of all answers."""
    monkeypatch.setattr(recall, "BATCH_TOKENS", 3 * 128)
    task, read = task_named("copy"), []

    def every_second(tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        read.extend(tuple(row.tolist()) for row in tokens)
        wrong = torch.tensor([int(row[5]) % 2 for row in tokens]).repeat_interleave(asked.sum(1))
        return echo(tokens, asked) + wrong

    result = recall.measure(every_second, task, tokenizer, 128, 10)
    right = [int(row[5]) % 2 == 0 for row in read]
    assert len(set(read)) == len(read) == 10 and 0 < sum(right) < 10
    assert result.accuracy == pytest.approx(sum(right) / 10) and result.answers > 500
    assert (result.low, result.high) == pytest.approx(recall.interval(np.array(right)[:, None]), abs=1e-3)
    trained_on = {
        tuple(task.episode(tokenizer, 128, seed, i).tokens) for seed in (1234, "1234/copy") for i in range(10)
    }
    assert trained_on.isdisjoint(read)


@pytest.mark.parametrize("name", ["mqar", "copy", "passkey"])
def test_a_guess_scores_chance(tokenizer, name: str) -> None:
    """In mqar a guess is one of the values of the episode, in other tasks one of the task's values."""
    values = id_sets(tokenizer).values
    rng = np.random.default_rng(0)

    def guess(tokens: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        pairs = 8  # of 256 tokens
        known = [row[2 : 2 * pairs + 1 : 2] if name == "mqar" else values for row in tokens.numpy()]
        return torch.tensor(np.concatenate([rng.choice(k, int(n)) for k, n in zip(known, asked.sum(1), strict=True)]))

    result = recall.measure(guess, task_named(name), tokenizer, 256, 400)
    assert result.low < result.chance < result.high
    assert result.high - result.low < 0.05


def test_predictions_are_the_most_likely_tokens(tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = small_config(tmp_path)
    decoder = Decoder(config.model, config.attention)
    tokens = torch.randint(0, 400, (3, 40))
    asked = torch.rand(3, 40) < 0.3
    predict = recall.predictor(decoder)
    expected = decoder(tokens).argmax(-1)[asked]
    assert torch.equal(predict(tokens, asked), expected)
    assert torch.equal(predict(tokens, asked), expected)
    assert decoder(tokens).shape == (3, 40, 420)  # the hook was removed


def test_interval_counts_episodes_if_answers_are_correlated() -> None:
    rng = np.random.default_rng(0)
    independent = rng.random((200, 50)) < 0.5
    low, high = recall.interval(independent)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(10_000), rel=0.2)
    together = np.repeat(rng.random((200, 1)) < 0.5, 50, axis=1)
    low, high = recall.interval(together)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(200), rel=0.1)
    assert recall.interval(np.ones((10, 50), bool)) == pytest.approx((1 / (1 + 1.96**2 / 10), 1.0))
    assert recall.interval(np.zeros((1, 4), bool))[0] == 0.0


def test_interval_divides_by_the_design_effect() -> None:
    """Of four episodes with 1, 2, 3 and 4 of 4 right the variance is 5 / 48, that of single answers 15 / 256; of two
    with the same mean the answers are independent."""
    rows = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]], bool)
    for correct, p, effect in ((rows, 10 / 16, (5 / 48) / (15 / 256)), (rows[[1, 1]], 0.5, 1.0)):
        n, z = correct.size / effect, 1.96
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / 4 / n**2)
        expected = ((middle - half) / (1 + z**2 / n), (middle + half) / (1 + z**2 / n))
        assert recall.interval(correct) == pytest.approx(expected)


def test_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        difficulty = rng.beta(2, 6, size=(60, 1))  # some episodes are easier: the mean is 1/4
        low, high = recall.interval(rng.random((60, 20)) < difficulty)
        covered += low <= 0.25 <= high
    assert 0.90 < covered / 400 < 0.985


def test_the_bars_of_the_chart_are_the_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list = []
    errorbar = Axes.errorbar

    def spy(axes: Axes, *arguments: object, **options: object) -> object:
        drawn.append(arguments)
        return errorbar(axes, *arguments, **options)

    monkeypatch.setattr(Axes, "errorbar", spy)
    results = [Recall("needle", n, 8, 8, 0.5, 0.25, 0.875, 0.1) for n in (64, 128)]
    plot_recall(results, 64, tmp_path / "recall.png")
    [(lengths, accuracies, (below, above))] = drawn
    assert (lengths, accuracies) == ([64, 128], [0.5, 0.5])
    assert (below, above) == ([0.25, 0.25], [0.375, 0.375]) and (tmp_path / "recall.png").exists()


def test_recall_is_of_the_usual_tasks_and_of_those_trained_on(tmp_path: Path) -> None:
    """Of those over token ids."""
    config = small_config(tmp_path)
    text = config.data.sources[0]
    learned = [text.model_copy(update={"kind": "task", "task": name}) for name in ("vt_1", "niah_single_1")]
    data = config.data.model_copy(update={"sources": [text, *learned]})
    assert [task.name for task in _tasks(config.model_copy(update={"data": data}))] == [*recall.TASKS, "vt_1"]
