"""nsa.config and nsa.strict_yaml: what is refused, in which words; what survives a round trip."""

import json
import random
import re
import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa.config import Config, ConfigError, dump_config, json_schema, load_config, reference
from nsa.config import main as config_command
from nsa.strict_yaml import is_section, walk
from tests.conftest import ROOT

KINDS = "dense, nsa, dsa, csa, entmax, dms"
SMALL = """\
name: small
model:
  vocab_size: 512
  hidden_size: 64
  num_layers: 2
  num_heads: 4
  num_kv_heads: 2
  head_dim: 16
  intermediate_size: 128
  max_position: 256
data:
  sequence_length: 128
  tokenizer: {vocab_size: 512}
  sources:
    - {name: python, kind: builtin}
    - {name: recall, kind: synthetic, task: mqar, weight: 0.25}
optimizer: {learning_rate: 3e-4}
training: {steps: 10, global_batch_size: 4, micro_batch_size: 2}
"""

MLA = "model.mla={kv_lora_rank: 24, qk_nope_head_dim: 8, qk_rope_head_dim: 4, v_head_dim: 6}"
OVER_MLA = ["model.projection=mla", "model.num_kv_heads=4", "model.head_dim=12", "model.v_head_dim=6"]


@pytest.fixture
def small(tmp_path):
    """The path of a small valid configuration."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def refusal(path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    for jargon in ("pydantic", "Input should", "validation error", "type=", "Literal", "NoneType", "extra_forbidden"):
        assert jargon not in text
    return text


def test_scalars_follow_yaml_1_2(small):
    config = load_config(small, ["training.steps=1_000", "data.sources.0.name=no", "optimizer.eps=1e-6"])
    assert config.optimizer.learning_rate == 3e-4  # a string to a YAML 1.1 loader
    assert config.training.steps == 1000
    assert config.data.sources[0].name == "no"  # false to a YAML 1.1 loader
    assert config.optimizer.eps == 1e-6


def test_duplicate_key_names_file_line_and_key(small):
    small.write_text(SMALL.replace("  num_heads: 4\n", "  num_heads: 4\n  hidden_size: 32\n"))
    text = refusal(small)
    assert text == f"{small}, line 7: duplicate key model.hidden_size (first on line 4)"


def test_duplicate_key_inside_a_list_item_and_at_the_top(small):
    small.write_text(SMALL.replace("{name: python, kind", "{name: python, name: x, kind"))
    assert "line 15: duplicate key data.sources.0.name" in refusal(small)
    small.write_text(SMALL + "name: again\n")
    assert "duplicate key name (first on line 1)" in refusal(small)


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("attention.nsa.widnow=64", "attention.nsa.window"),
        ("model.rope.tetha=1", "model.rope.theta"),
        ("data.sources.1.wieght=1", "data.sources.1.weight"),
        ("learning_rate=1", "optimizer.learning_rate"),
        ("optimiser.learning_rate=1", "optimizer"),
        ("training.zero_stage=1", "engine.zero_stage"),
    ],
)
def test_unknown_key_names_the_nearest_valid_one(small, override, nearest):
    text = refusal(small, override)
    assert text.startswith(f"{small}: override {override!r}: unknown key ")
    assert text.endswith(f"the nearest valid one is {nearest}")


def test_unknown_key_in_the_file_names_its_line(small):
    small.write_text(SMALL.replace("  head_dim: 16", "  head_dims: 16"))
    text = refusal(small)
    assert "line 8: unknown key model.head_dims; the nearest valid one is model.head_dim" in text
    assert "model.head_dim is missing (query and key width of a head; even)" in text


def test_a_problem_within_an_override_is_not_placed_in_the_file(small):
    """Though the file has the section that the override replaces."""
    whole = "model={vocab_size: 8, hidden_size: 8, num_layer: 1}"
    text = refusal(small, "training.log_every=2", whole)
    assert f"override {whole!r}: unknown key model.num_layer; the nearest valid one is model.num_layers" in text
    assert "line " not in text


def test_yes_and_no_of_recomputation_mean_all_and_nothing(small):
    modes = {word: load_config(small, [f"engine.activation_checkpointing={word}"]).engine for word in ("true", "false")}
    assert {word: engine.activation_checkpointing for word, engine in modes.items()} == {
        "true": "full",
        "false": "none",
    }


def test_unknown_key_like_nothing_lists_what_is_valid(small):
    assert "valid in checkpoint: every, keep_last" in refusal(small, "checkpoint.zzzzzz=1")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.vocab_size=many", "model.vocab_size: expected a whole number, got 'many'"),
        ("model.vocab_size=2.5", "model.vocab_size: expected a whole number, got 2.5"),
        ("model.vocab_size=true", "model.vocab_size: expected a whole number, got true"),
        ("model.vocab_size='512'", "model.vocab_size: expected a whole number, got '512'"),
        ("model.rope=3", "model.rope: expected a mapping of keys, got 3"),
        ("model.rope.theta=null", "model.rope.theta: expected a number, got null"),
        ("engine.zero_stage=4", "engine.zero_stage: expected one of 0, 1, 2, 3, got 4"),
        ("engine.offload_optimizer=yes", "expected true or false, got 'yes'"),
        ("engine.activation_checkpointing=yes", "expected one of none, selective, full, got 'yes'"),
        ("attention.kind=sparse", f"expected one of {KINDS} or a list of: one of {KINDS}, got 'sparse'"),
        (
            "attention.kind=[nsa, x]",
            f"expected one of {KINDS} or a list of: one of {KINDS}, got ['nsa', 'x']",
        ),
        ("data.sources=[]", "data.sources: needs at least 1 item(s), got 0"),
        ("data.sources.1.weight=-1", "data.sources.1.weight: must be greater than 0, got -1"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: must be a finite number, got inf"),
        ("name=../up", "name: '../up' may only have letters, digits and _ . -"),
        ("data.sources.7.weight=1", "data.sources is a list of 2; name an item by 0..1"),
        ("name.x=1", "name is a single value and has no 'x' in it"),
        ("attention.nsa.window", "write key=value with a dotted key"),
        ("attention..window=1", "write key=value with a dotted key"),
        ("attention.kind=[nsa", "expected ',' or ']'"),
    ],
)
def test_wrong_values_in_plain_words(small, override, words):
    text = refusal(small, override)
    assert words in text
    assert f"override {override!r}" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.num_heads=5"], "model.num_heads (5) must be a multiple of model.num_kv_heads (2)"),
        (["model.head_dim=15"], "model.head_dim (15) must be even"),
        (["attention.nsa.compress_length=40"], "must be a multiple of attention.nsa.compress_stride (16)"),
        (["attention.nsa.block_size=40"], "attention.nsa.block_size (40) must be a multiple of"),
        (["attention.nsa.block_size=16"], "must not be below attention.nsa.compress_length (32)"),
        (["attention.nsa.num_blocks=2"], "exceed attention.nsa.num_blocks (2)"),
        (["attention.kind=[]"], "the pattern is empty"),
        (["data.sequence_length=512"], "exceeds the rotary range model.max_position (256)"),
        (["data.tokenizer.vocab_size=600"], "exceeds model.vocab_size (512)"),
        (["data.sources.1.name=python"], "the names must differ"),
        (["data.sources.0.kind=hub"], "kind hub needs a path"),
        (["data.sources.0.task=copy"], "a task goes with kind synthetic only"),
        (["training.micro_batch_size=3"], "must be a multiple of training.micro_batch_size (3)"),
        (["optimizer.min_learning_rate=1"], "exceeds optimizer.learning_rate (0.0003)"),
        (["optimizer.decay_steps=3"], "goes with optimizer.schedule wsd only"),
        (["optimizer.warmup_steps=11"], "exceed training.steps (10)"),
        (["optimizer.schedule=wsd", "optimizer.decay_steps=8", "optimizer.warmup_steps=3"], "exceed training.steps"),
        (["model.rope.yarn_beta_slow=40"], "must be below model.rope.yarn_beta_fast (32.0)"),
        (["model.qk_norm=true"], "model.qk_norm does not go with attention.kind nsa: only dense, dsa, entmax, dms"),
        (["model.projection=mla"], "model.mla go together: give the widths"),
        ([MLA], "model.mla go together: set model.projection to mla"),
        ([MLA, "model.projection=mla"], "model.num_kv_heads (2) must be 4 with model.projection mla"),
        ([MLA, *OVER_MLA, "model.head_dim=16"], "model.head_dim (16) must be 12 with model.projection mla"),
        ([MLA, *OVER_MLA, "model.v_head_dim=null"], "model.v_head_dim (None) must be 6 with model.projection mla"),
        ([MLA, *OVER_MLA, "model.qkv_bias=true"], "model.qkv_bias goes with model.projection gqa"),
        ([MLA, *OVER_MLA], "model.mla does not go with attention.kind nsa: only dense, dsa has it"),
        ([MLA, *OVER_MLA, "model.mla.qk_rope_head_dim=3"], "model.mla.qk_rope_head_dim (3) must be even"),
        (["name=.."], "is no name for a folder"),
    ],
)
def test_contradictions_are_refused(small, overrides, words):
    assert words in refusal(small, *overrides)


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["model.head_dim=15"], "override 'model.head_dim=15'"),
        (["training.log_every=2", "model.num_heads=5", "data.workers=1"], "override 'model.num_heads=5'"),
        (["attention.kind=[]"], "override 'attention.kind=[]'"),
        (["attention.nsa.block_size=40", "seed=3"], "override 'attention.nsa.block_size=40'"),
        (["data.sources.0.weight=2", "data.sources.0.task=copy"], "override 'data.sources.0.task=copy'"),
        (["training.steps=1", "optimizer.warmup_steps=2"], "'training.steps=1' and 'optimizer.warmup_steps=2'"),
    ],
)
def test_a_contradiction_is_placed_at_the_override_that_it_names(small, overrides, place):
    """Not at a line of the file, whose value is another one."""
    text = refusal(small, *overrides)
    assert f"{place}: " in text and "line " not in text


def test_a_contradiction_within_the_file_stays_there(small):
    small.write_text(SMALL.replace("  head_dim: 16", "  head_dim: 15"))
    text = refusal(small, "model.num_layers=3", "training.steps=20", "name=head_dim")
    assert ", line " not in text and "line " in text and "override" not in text


def test_every_problem_is_reported_at_once(small):
    text = refusal(small, "attention.nsa.widnow=64", "model.num_heads=5", "training.steps=0")
    assert text.startswith(f"{small}: 3 problems\n")
    assert all(words in text for words in ("attention.nsa.window", "model.num_kv_heads (2)", "training.steps"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected a mapping of keys"),
        (b"- a\n- b\n", "expected a mapping of keys"),
        (b"name: \xff\xfe", "not UTF-8 text (byte 6)"),
        (b"name: [", "line"),
        (b"a: &x [*x]", "aliases (*name) are not supported"),
        (b"{a: {b: c}}: 1", "a key must be a word"),
        (
            b"name: !!python/object/apply:os.system [true]",
            "apply:os.system) are not supported",
        ),
        (b"name: !!python/name:os.system", "line 1: could not determine a constructor"),
        (b"name: a\n---\nname: b", "expected a single document"),
        (b"name: \x00", "not a YAML text"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, words):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = refusal(path)
    assert str(path) in text
    assert words in text


def test_missing_file(tmp_path):
    assert "cannot be read (No such file or directory)" in refusal(tmp_path / "none.yaml")


def test_overrides_apply_in_order_and_reach_new_sections_and_list_items(small):
    overrides = ["attention.kind=nsa", "attention.kind=[dense, nsa]", "data.sources.1.weight=2", "model.rope.theta=5e5"]
    config = load_config(small, overrides)
    assert config.attention.kind == ["dense", "nsa"]
    assert config.data.sources[1].weight == 2
    assert config.model.rope.theta == 5e5


@pytest.mark.parametrize("name", ["1E0", "0E0", "1e5", "007", "1_0", "yes", "null", "-", "0x1f", "1_0.5e3"])
def test_a_name_that_looks_like_a_number_stays_text(tmp_path, small, name):
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_config(load_config(small).model_copy(update={"name": name})))
    assert load_config(copy).name == name


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_dump_reads_back_to_an_equal_configuration(tmp_path_factory, data):
    text = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)
    path = text.filter(lambda drawn: "$" not in drawn and not drawn.startswith("~"))  # are expanded, or refused
    folder = tmp_path_factory.getbasetemp()
    (folder / "small.yaml").write_text(SMALL)
    number = st.floats(1e-12, 1e6)
    config = load_config(folder / "small.yaml")
    source = config.data.sources[0].model_copy(update={"path": data.draw(path), "weight": data.draw(number)})
    config = config.model_copy(
        update={
            "name": data.draw(st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True)),  # also 1e5, 007, yes, -
            "data": config.data.model_copy(update={"sources": [source], "cache_dir": data.draw(path)}),
            "optimizer": config.optimizer.model_copy(update={"learning_rate": data.draw(number)}),
        }
    )
    copy = folder / "copy.yaml"
    copy.write_text(dump_config(config), encoding="utf-8")
    assert load_config(copy) == config


def test_random_damage_is_read_or_refused_in_plain_words(tmp_path):
    """A character dropped, doubled or replaced anywhere: either a valid configuration or a ConfigError."""
    rng = random.Random(0)
    path = tmp_path / "damaged.yaml"
    for _ in range(300):
        at = rng.randrange(len(SMALL))
        path.write_text(SMALL[:at] + rng.choice(["", SMALL[at] * 2, rng.choice(string.printable)]) + SMALL[at + 1 :])
        try:
            load_config(path)
        except ConfigError as error:
            assert str(path) in str(error)


def test_print_config_round_trips_and_reports_errors(small, tmp_path, capsys):
    assert config_command([str(small), "attention.kind=dense"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert load_config(tmp_path / "printed.yaml") == load_config(small, ["attention.kind=dense"])
    assert set(yaml.safe_load(printed)) == set(Config.model_fields)  # defaults are written out
    assert config_command([str(small), "model.x=1"]) == 2
    assert "unknown key model.x" in capsys.readouterr().err


def test_every_key_says_what_it_is():
    for key, field in walk(Config):
        assert field.description, f"{key} has no description"
        assert not is_section(field.annotation)


def test_committed_schema_and_reference_are_current():
    schema, page = ROOT / "configs/schema.json", ROOT / "docs/configuration.md"
    assert schema.read_text() == json_schema(), "run: python -m nsa.config --schema > configs/schema.json"
    assert page.read_text() == reference(), "run: python -m nsa.config --reference > docs/configuration.md"
    assert json.loads(schema.read_text())["additionalProperties"] is False


TAUGHT = ["attention.kind=nsa", "attention.nsa={phase: warm-up, block_size: 32, window: 95}"]
INDEXER = ["train=indexer", "start_from=runs/dense"]
GOING_ON = ["attention.kind=nsa", "attention.nsa={kl_weight: 0.5, block_size: 32, num_local: 1, window: 95}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (TAUGHT, "attention.nsa.phase: warm-up goes with train: indexer; set it to sparse to train all"),
        ([*TAUGHT, "attention.kind=[dense, nsa]"], "attention.nsa.phase: warm-up goes with train: indexer"),
        ([*INDEXER, "attention.kind=nsa"], "or to nsa with attention.nsa.phase warm-up"),
        ([*INDEXER, *TAUGHT, "attention.kind=dense"], "or to nsa with attention.nsa.phase warm-up"),
        ([*TAUGHT, "train=indexer"], "train: indexer needs start_from"),
        (
            [*TAUGHT, *INDEXER, "attention.nsa.num_local=3"],  # with one initial block: all of the 128 tokens
            "attention.nsa.phase warm-up: a sample (128 tokens) has no block beside the initial and local ones (128",
        ),
        (
            [*TAUGHT, *INDEXER, "attention.nsa.window=96"],  # with the initial block: all of the 128 tokens
            "attention.nsa.phase warm-up: the window (96 tokens) reaches all of a sample (128 tokens) but the initial "
            "blocks (32 tokens), so there is nothing to teach: train on longer samples",
        ),
        (
            [*TAUGHT, "attention.nsa.window=512"],
            "attention.nsa.phase: warm-up goes with train: indexer; set it to sparse",
        ),
        ([*TAUGHT, *INDEXER, "attention.nsa.phase=warm"], "attention.nsa.phase"),
        (["attention.nsa.key_compression=mean"], "attention.nsa.key_compression"),
        (
            [*GOING_ON, "attention.nsa.window=96"],
            "attention.nsa.kl_weight 0.5: the window (96 tokens) reaches all of a sample (128 tokens) but the initial",
        ),
        ([*GOING_ON, "attention.nsa.kl_weight=-1"], "attention.nsa.kl_weight"),
        ([*GOING_ON, "attention.nsa.kl_stride=0"], "attention.nsa.kl_stride"),
        (
            [*GOING_ON, "attention.nsa.kl_weight=0", "attention.nsa.kl_stride=4"],
            "attention.nsa.kl_stride (4) thins out the queries of a loss that has no weight: set attention.nsa.kl_wei",
        ),
        (
            [*GOING_ON, "attention.nsa.kl_stride=129"],
            "attention.nsa.kl_stride (129) exceeds a sample (128 tokens)",
        ),
    ],
)
def test_a_selection_that_cannot_be_taught_is_refused(small, overrides, words):
    assert words in refusal(small, *overrides)


@pytest.mark.parametrize("more", [[], ["attention.kind=[dense, nsa]"], ["attention.nsa.num_local=2"]])
def test_a_selection_can_be_taught(small, more):
    config = load_config(small, [*TAUGHT, *INDEXER, *more])
    assert {kind.apart for kind in config.attention.kinds(2)} <= {(), ("compress.key",)}
    load_config(small, [*TAUGHT, *INDEXER, *more, "attention.nsa.kl_stride=8"])  # for a later stage of the file
    sparse = load_config(small, [*TAUGHT, "attention.nsa.phase=sparse", "attention.nsa.num_local=3"])
    assert all(kind.apart == () for kind in sparse.attention.kinds(2))


def test_a_number_that_fp32_cannot_use_is_refused(small):
    """1e300 is finite, but training stopped with it as with a fault of the program."""
    numbers = {key for key, field in walk(Config) if field.annotation in (float, float | None) and "*" not in key}
    assert {
        "optimizer.learning_rate",
        "attention.nsa.kl_weight",
        "model.moe.loss_weight",
        "model.rope.theta",
    } <= numbers
    for key in sorted(numbers):
        refused = re.escape(key) + r": must be (at most 1e\+30 in size|less than .*), got 1e\+300"
        with pytest.raises(ConfigError, match=refused):
            load_config(small, [f"{key}=1e300"])
    for key in ("optimizer.learning_rate", "optimizer.weight_decay", "attention.dsa.kl_weight"):
        load_config(small, [f"{key}=1e30"])
