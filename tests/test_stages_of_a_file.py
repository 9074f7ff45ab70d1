"""`nsa.stages`: which values a stage has."""

import pytest

from nsa.config import ConfigError, load_config, main

FILE = """
name: small
output_dir: there
model: {vocab_size: 400, hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, head_dim: 16,
        intermediate_size: 48, max_position: 128}
attention: {kind: dsa, dsa: {topk: 16, index_heads: 4, index_head_dim: 16, index_rotary_dims: 8}}
data: {sequence_length: 64, tokenizer: {vocab_size: 400}, sources: [{name: python, kind: builtin}]}
optimizer: {learning_rate: 1.0e-3, warmup_steps: 2}
training: {steps: 100, global_batch_size: 8, micro_batch_size: 4}
stages:
  - {name: dense, attention: {kind: dense}}
  - {name: indexer, train: indexer, training: {steps: 20}, attention: {dsa: {phase: warm-up}}}
  - {name: sparse, optimizer: {learning_rate: 1.0e-4}}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "staged.yaml"
    path.write_text(FILE)
    return path


def test_a_stage_replaces_what_it_names_and_starts_from_the_one_before(file):
    dense, indexer, sparse = (load_config(file, [f"stage={name}"]) for name in ("dense", "indexer", "sparse"))
    assert [c.name for c in (dense, indexer, sparse)] == ["small-dense", "small-indexer", "small-sparse"]
    assert [c.start_from for c in (dense, indexer, sparse)] == [None, "there/small-dense", "there/small-indexer"]
    assert [c.training.steps for c in (dense, indexer, sparse)] == [100, 20, 100]
    assert [c.training.global_batch_size for c in (dense, indexer, sparse)] == [8, 8, 8]
    assert (dense.attention.kind, indexer.attention.kind, indexer.train, sparse.train) == (
        "dense", "dsa", "indexer", "all",
    )  # fmt: skip
    assert (indexer.attention.dsa.phase, sparse.attention.dsa.phase, indexer.attention.dsa.topk) == (
        "warm-up", "sparse", 16,
    )  # fmt: skip
    assert (indexer.optimizer.learning_rate, sparse.optimizer.learning_rate) == (1e-3, 1e-4)


def test_overrides_win_over_stages(file):
    config = load_config(file, ["stage=indexer", "training.steps=7", "name=other", "output_dir=here"])
    assert (config.training.steps, config.name, config.start_from) == (7, "other-indexer", "here/other-dense")
    assert load_config(file, ["stage=sparse", "start_from=elsewhere"]).start_from == "elsewhere"


def test_what_the_file_starts_from_is_for_the_first_stage(file, tmp_path):
    """Else each stage would throw away what the one before it learned."""
    path = tmp_path / "from_a_folder.yaml"
    path.write_text(FILE.replace("stages:", "start_from: folder\nstages:"))
    begins = [load_config(path, [f"stage={name}"]).start_from for name in ("dense", "indexer", "sparse")]
    assert begins == ["folder", "there/small-dense", "there/small-indexer"]
    path.write_text(FILE.replace("{name: sparse,", "{name: sparse, start_from: other,"))
    assert load_config(path, ["stage=sparse"]).start_from == "other"


def test_the_command_lists_stages(file, tmp_path, capsys):
    assert main([str(file), "--stages"]) == 0
    assert capsys.readouterr().out == "dense\nindexer\nsparse\n"
    plain = tmp_path / "plain.yaml"
    plain.write_text(FILE.partition("stages:")[0])
    assert main([str(plain), "--stages"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "stages, overrides, words",
    [
        (None, [], "stages dense, indexer, sparse: add stage=dense"),
        (None, ["stage=last"], "no stage 'last'"),
        ("[]", ["stage=dense"], "a list of mappings"),
        ("[{train: all}]", ["stage=dense"], "needs a name"),
        ("[{name: a}, {name: a}]", ["stage=a"], "two stages 'a'"),
        ("[{name: a, trainings: {steps: 3}}]", ["stage=a"], "training"),
        ("[{name: a, train: indexer}]", ["stage=a"], "needs start_from"),
        ("[{name: a}, {name: b, train: indexer, attention: {kind: dense}}]", ["stage=b"], "attention.kind to dsa"),
        ("[{name: a, attention: {dsa: {topk: 65}}}]", ["stage=a"], "topk \\(65\\) exceeds the sample"),
    ],
)
def test_mistakes_are_named(file, stages, overrides, words):
    if stages is not None:
        file.write_text(FILE.partition("stages:")[0] + f"stages: {stages}\n")
    with pytest.raises(ConfigError, match=words):
        load_config(file, overrides)


def test_a_stage_of_a_file_without(file):
    file.write_text(FILE.partition("stages:")[0])
    with pytest.raises(ConfigError, match="has no stages"):
        load_config(file, ["stage=dense"])
