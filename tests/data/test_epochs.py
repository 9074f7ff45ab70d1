"""How often a run reads its texts: as counted in the samples, and told to the user."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from nsa.data import prepare as module
from nsa.data.config import DataConfig, SourceConfig
from nsa.data.epochs import Reading, describe_readings, readings
from nsa.data.loader import SampleStream
from nsa.data.prepare import find_prepared, prepare
from nsa.data.shards import PreparedData
from tests.data.corpus import write_corpus

Make = Callable[..., DataConfig]


@pytest.fixture(scope="module")
def mixture(make_config: Make, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """A long text, a task and a short text."""
    other = write_corpus(tmp_path_factory.mktemp("other") / "text", 60)
    for path in [*other.iterdir()][:40]:
        path.unlink()
    for path in other.iterdir():
        path.write_bytes(b"other " + path.read_bytes())
    config = make_config(corpus, "mqar")
    first, mqar = config.sources
    sources = [
        first.model_copy(update={"weight": 3.0}),
        mqar.model_copy(update={"weight": 2.5}),
        SourceConfig(name="other", kind="files", path=str(other), weight=0.7),
    ]
    return config.model_copy(update={"sources": sources})


@pytest.fixture(scope="module")
def data(mixture: DataConfig) -> PreparedData:
    return prepare(mixture, 7, progress=False)


@pytest.mark.parametrize("samples", [1, 97, 700])
def test_it_is_what_the_samples_hold(mixture: DataConfig, data: PreparedData, samples: int) -> None:
    """Against a count of the tokens in each sample. Planted: weights of the texts alone; held-out tokens counted, too;
    shares of documents or of tokens instead of samples."""
    stream = SampleStream(data, mixture, "train", 7)
    read: Counter[str] = Counter()
    for i in range(samples):
        for span in stream.locate(i):
            read[span.source] += span.stop - span.start
    expected = []
    for name, source in data.sources.items():
        tokens = sum(len(source.read(int(document))) for document in source.members("train"))
        expected.append(Reading(name, tokens, read[name] / tokens))
    assert readings(data, mixture, samples) == expected


def of_tokens(**tokens: int) -> PreparedData:
    """Data of sources with so many tokens each."""
    sources = {name: {"train": {"tokens": count}, "validation": {"tokens": 17}} for name, count in tokens.items()}
    return SimpleNamespace(manifest={"sources": sources})  # type: ignore[return-value]


def settings(**weights: float) -> DataConfig:
    sources = [SourceConfig(name=name, kind="builtin", weight=weight) for name, weight in weights.items()]
    sources.append(SourceConfig(name="copy", kind="synthetic", task="copy", weight=0.32))
    return DataConfig(sources=sources, sequence_length=4096)


def test_the_run_that_nobody_was_told_of() -> None:
    """2,600 steps of 8 samples of 4,096 tokens, 68 % of them text."""
    lines = describe_readings(of_tokens(python=3_330_000), settings(python=0.68), 2600, 8)
    assert lines[0] == "python: 3.3 M tokens, read 17.4 times"
    (warning,) = lines[1:]
    for words in ("warning: this run reads python 17.4 times", "arXiv 2305.16264", "add text", "fewer steps (597 read"):
        assert words in warning
    assert not any("copy" in line for line in lines)


def test_the_advice_is_right() -> None:
    """With the steps, or with the weight, that the warning names the text is read just 4 times, and nothing warns."""
    python, other = 3_330_000, 10**9
    data, config = of_tokens(python=python, other=other), settings(python=0.68, other=0.2)
    *_, warning = describe_readings(data, config, 2600, 8)
    steps = int(warning.partition("fewer steps (")[2].partition(" ")[0].replace(",", ""))
    weight = float(warning.partition("lower its weight (")[2].partition(" ")[0])
    less = config.model_copy(
        update={"sources": [config.sources[0].model_copy(update={"weight": weight}), *config.sources[1:]]}
    )
    for samples, changed in ((steps * 8, config), (2600 * 8, less)):
        assert readings(data, changed, samples)[0].times == pytest.approx(4, rel=0.02)
    assert len(describe_readings(data, config, steps, 8)) == 2


def test_a_warning_begins_above_four_readings() -> None:
    """Notices another limit, and a warning for the wrong source."""
    config = DataConfig(sources=[SourceConfig(name="text", kind="files", path="unread")], sequence_length=100)
    assert describe_readings(of_tokens(text=1000), config, 40, 1) == ["text: 1,000 tokens, read 4 times"]
    lines = describe_readings(of_tokens(text=1000), config, 41, 1)
    assert lines[0] == "text: 1,000 tokens, read 4.1 times" and "reads text 4.1 times" in lines[1]
    assert "weight" not in lines[1], "there is no other source"
    assert "packages" not in lines[1], "only a builtin source has them"
    assert describe_readings(of_tokens(text=10**9), config, 41, 1) == [
        "text: 1,000.0 M tokens, read less than 0.01 times"
    ]


def test_prepared_data_are_found_and_never_made(
    mixture: DataConfig, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: found by the run's seed although the data have one of their own."""
    monkeypatch.setattr(module, "_build", lambda *_: pytest.fail("built"))
    found = find_prepared(mixture, 7)
    assert found is not None and found.folder == data.folder
    assert find_prepared(mixture.model_copy(update={"seed": 7}), 8) is not None
    assert find_prepared(mixture, 8) is None
    gone = mixture.sources[0].model_copy(update={"path": str(tmp_path / "gone")})
    assert find_prepared(mixture.model_copy(update={"sources": [gone]}), 7) is None
    nowhere = tmp_path / "cache"
    assert find_prepared(mixture.model_copy(update={"cache_dir": str(nowhere)}), 7) is None and not nowhere.exists()
