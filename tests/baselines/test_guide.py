"""The method that docs/extending.md writes is one: it passes what the methods of the tuple must."""

import re
import sys
from types import ModuleType

import pytest
import test_identities as identities

from nsa.baselines import Method
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def kind() -> type[Method]:
    page = (ROOT / "docs/extending.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "(Method)" in block)
    assert len(code.splitlines()) < 60
    module = ModuleType("guide")
    sys.modules["guide"] = module  # dataclasses look their module up
    exec(code, vars(module))  # noqa: S102 - of our own page
    return module.LastOfPage  # type: ignore[no-any-return]


def test_a_method_is_a_short_file() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "nsa/baselines/methods").glob("*.py")}
    assert len(lengths) > 25 and not {name: length for name, length in lengths.items() if length >= 100}


def the_ledger_is_the_count_of_the_masks(kind: type[Method]) -> None:
    identities.test_the_ledger_is_the_count_of_the_masks(kind, [0, 13])


@pytest.mark.parametrize(
    "identity",
    [
        identities.test_a_full_budget_is_dense_attention,
        identities.test_the_future_changes_nothing,
        identities.test_chunks_of_a_prompt_are_the_whole_prompt,
        identities.test_a_padded_row_is_the_row_alone,
        the_ledger_is_the_count_of_the_masks,
        identities.test_a_prompt_is_its_tokens_one_at_a_time,
        identities.test_ties_go_the_same_way_each_time,
    ],
    ids=lambda identity: identity.__name__,
)
def test_the_method_of_the_guide_is_one(kind, identity) -> None:
    identity(kind)
