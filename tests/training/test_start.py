"""`nsa.training.start`: what a run can begin with, and what is refused."""

import shutil

import pytest
import torch

from nsa.layers.kinds import kind_of
from nsa.training.start import source_of
from tests.small_run import small_config, small_run

INDEX = {"topk": 8, "index_heads": 2, "index_head_dim": 8, "index_rotary_dims": 4}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("dense"), "dense")


def config_from(folder, start_from, kind="dsa", **model):
    config = small_config(folder, kind, **model)
    tree = config.model_dump() | {"start_from": str(start_from), "name": "next"}
    tree["attention"] |= {"dsa": tree["attention"]["dsa"] | INDEX}
    return type(config).model_validate(tree)


def test_a_run_and_one_of_its_checkpoints_mean_the_same(tmp_path, dense):
    tokenizer = dense / "step_00000003/tokenizer.model"
    for given in (dense, dense / "step_00000003"):
        assert source_of(config_from(tmp_path, given), tokenizer) == dense / "step_00000003"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_layers": 3}, "model.num_layers: 2 there, 3 here"),
        ({"qk_norm": True}, "model.qk_norm: False there, True here"),
    ],
)
def test_another_shape_is_refused(tmp_path, dense, changes, words):
    with pytest.raises(ValueError, match=words):
        source_of(config_from(tmp_path, dense, **changes), dense / "step_00000003/tokenizer.model")


def test_other_sources_are_refused(tmp_path, dense):
    tokenizer = dense / "step_00000003/tokenizer.model"
    with pytest.raises(ValueError, match="holds no checkpoint"):
        source_of(config_from(tmp_path, tmp_path / "nothing"), tokenizer)
    with pytest.raises(ValueError, match="of kind nsa, which cannot become dsa"):
        source_of(config_from(tmp_path, small_run(tmp_path / "nsa", "nsa")), tokenizer)
    other = tmp_path / "other.model"
    other.write_bytes(tokenizer.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"another tokenizer.*data.tokenizer.path="):
        source_of(config_from(tmp_path, dense), other)
    broken = shutil.copytree(dense, tmp_path / "broken")
    part = next(broken.glob("step_*/model-*"))
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        source_of(config_from(tmp_path, broken), tokenizer)


def test_an_indexer_of_another_make_is_refused(tmp_path, dense):
    first = config_from(tmp_path, dense)
    run = small_run(tmp_path / "dsa", config=first.model_copy(update={"output_dir": str(tmp_path / "dsa")}))
    tree = config_from(tmp_path, run).model_dump()
    tree["attention"]["dsa"] |= {"index_rotary_pairs": "interleaved", "topk": 4}
    with pytest.raises(ValueError, match=r"attention.dsa.index_rotary_pairs: half-split there, interleaved here$"):
        source_of(type(first).model_validate(tree), run / "step_00000003/tokenizer.model")


def test_sparse_layers_take_the_dense_weights():
    """NSA's branches begin with copies of the dense keys and values; what dense attention lacks is new."""
    there = {name: torch.rand(2) for name in ("query.weight", "key.weight", "value.weight", "output.weight")}
    nsa, dsa = kind_of("nsa").from_dense, kind_of("dsa").from_dense
    for branch in ("cmp", "slc", "win"):
        for part in ("key", "value"):
            assert nsa(f"key_value.{branch}.{part}.weight", there.__getitem__) is there[f"{part}.weight"]
    for take in (nsa, dsa):
        assert take("query.weight", there.__getitem__) is there["query.weight"]
        assert take("output.weight", there.__getitem__) is there["output.weight"]
    assert dsa("indexer.key.weight", there.__getitem__) is None
    assert nsa("gate.bias", there.__getitem__) is nsa("compress.key.inner.weight", there.__getitem__) is None
