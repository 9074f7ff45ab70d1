"""One small corpus, prepared once for all tests of the data."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.prepare import prepare
from nsa.data.shards import PreparedData
from tests.data.corpus import write_corpus


@pytest.fixture(scope="session")
def make_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DataConfig]:
    """A configuration of one text source at `path`, and of the synthetic tasks named."""
    cache = tmp_path_factory.mktemp("cache")

    def make(path: Path, *tasks: str, weights: tuple[float, ...] = (), **changes: object) -> DataConfig:
        sources = [SourceConfig(name="text", kind="files", path=str(path))]
        sources += [SourceConfig(name=task, kind="synthetic", task=task) for task in tasks]
        if weights:
            sources = [s.model_copy(update={"weight": w}) for s, w in zip(sources, weights, strict=True)]
        tokenizer = TokenizerConfig(vocab_size=400, train_bytes=100_000)
        settings = {
            "sequence_length": 64,
            "cache_dir": str(cache),
            "workers": 1,
            "tokenizer": tokenizer,
            "validation_fraction": 0.2,
        }
        return DataConfig(sources=sources, **{**settings, **changes})

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="session")
def config(make_config: Callable[..., DataConfig], corpus: Path) -> DataConfig:
    return make_config(corpus, "mqar", "passkey", "copy", weights=(0.55, 0.2, 0.15, 0.1), sequence_length=128)


@pytest.fixture(scope="session")
def prepared(config: DataConfig) -> PreparedData:
    return prepare(config, seed=7, progress=False)
