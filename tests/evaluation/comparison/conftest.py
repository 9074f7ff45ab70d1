"""What tests of comparisons share."""

from pathlib import Path

import pytest

from tests.small_run import small_export


@pytest.fixture(scope="session")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of two small models. No test changes them."""
    return {kind: small_export(tmp_path_factory.mktemp(kind), kind) for kind in ("dense", "nsa")}
