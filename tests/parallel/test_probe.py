"""The probe's figures of a sample that two ranks compute are those of one process."""

import pytest

from tests.parallel.conftest import CSA, DSA, GOING_ON
from tests.parallel.layouts import BASE, SCRIPT
from tests.training.tiny import on_ranks

# NSA whose selection is taught, with one KV head, too: then two tensor-parallel ranks share it.
TAUGHT = [*GOING_ON, "attention.nsa.kl_weight=1"]
KINDS = {
    "nsa": TAUGHT,
    "one KV head": [*TAUGHT, "model.num_kv_heads=1"],
    "dsa": [*DSA, "attention.kind=dsa", "model.init_std=0.3"],
    "csa": [*CSA, "model.init_std=0.3"],
    "entmax": ["attention.kind=entmax", "model.init_std=0.3"],
}
LAYOUTS = ["parallel.context=2", "parallel.tensor=2"]
# Two queries in different chunks are no neighbours.
NEIGHBOURS = ("block_overlap", "token_overlap")


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Kind -> layout -> the figures of each layer."""
    alone, together = {}, {}
    for kind, overrides in KINDS.items():
        alone[kind] = ("probed", {"cases": [[*BASE, *overrides]]})
        together[kind] = ("probed", {"cases": [[*BASE, *overrides, layout] for layout in LAYOUTS]})
    one = on_ranks(1, tmp_path_factory.mktemp("one"), alone, SCRIPT, gpus=2)
    two = on_ranks(2, tmp_path_factory.mktemp("two"), together, SCRIPT, gpus=2)
    return {kind: {None: one[kind][0], **dict(zip(LAYOUTS, two[kind], strict=True))} for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_of_two_ranks_equal_one_process(probed, kind, layout):
    expected, found = probed[kind][None], probed[kind][layout]
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        figure = name.split("/")[1]
        if figure in NEIGHBOURS and "context" in layout:
            assert found[name] == pytest.approx(value, abs=0.05), name
        else:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_recall_is_no_mean_over_chunks(probed):
    """In the first chunk of a sample there is nothing to choose, and a mean with its recall of 1 would be higher."""
    recalls = [value for name, value in probed["nsa"][None].items() if "/recall/" in name]
    assert recalls and all(value < 0.9 for value in recalls)
