"""What a comparison knows of a model: its sizes, its seed, how it was trained, and what a reader of it watches."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nsa.baselines import Budget, Ledger, method_named
from nsa.config import load_saved
from nsa.evaluation.comparison.arms import Arm, Place
from nsa.evaluation.comparison.cells import figures_of
from nsa.evaluation.comparison.config import MethodConfig, SiblingConfig, Training
from nsa.evaluation.comparison.decoding import AttachError
from nsa.evaluation.comparison.models import Candidate, OpenedTransformers, candidate_of, open_model, trained_as
from nsa.exporting.folder import CONFIG
from nsa.models import AttentionConfig
from tests.small_run import small_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_export(tmp_path_factory.mktemp("dense"), "dense")


def llama(folder: Path, **changes: Any) -> Path:
    """A Llama whose heads are wider than its stream divided by them, saved in bf16 with the export's tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": 420, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "max_position_embeddings": 96,
    }  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = llama(tmp_path_factory.mktemp("llama"))
    for path in export.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def saved_again(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As an export without this project's files is."""
    folder = Path(shutil.copytree(export, tmp_path_factory.mktemp("again") / "export"))
    (folder / CONFIG).unlink()
    return folder


def test_sizes_are_those_of_the_cache_and_the_weights(export: Path, theirs: Path) -> None:
    """Two layers with two KV heads of 8 and 6, 512 tokens; three with two of 10 and 10, 96 tokens."""
    mine, other = open_model("a", export), open_model("b", theirs)
    assert (mine.num_layers, mine.kv_elements, mine.reaches) == (2, 2 * 2 * (8 + 6), 512)
    assert (other.num_layers, other.kv_elements, other.reaches) == (3, 3 * 2 * (10 + 10), 96)
    weights = load_file(theirs / "model.safetensors")
    assert other.parameters == sum(weight.numel() for weight in weights.values())
    without = llama(theirs.parent / "without", head_dim=None)
    model = transformers.AutoModelForCausalLM.from_pretrained(without)
    del model.config.head_dim
    assert OpenedTransformers("c", model, None).kv_elements == 3 * 2 * (6 + 6)


def test_a_model_of_transformers_computes_in_fp32_and_learns_nothing(theirs: Path) -> None:
    opened = open_model("b", theirs)
    assert isinstance(opened, OpenedTransformers) and not opened.model.training
    assert {(p.dtype, p.requires_grad) for p in opened.model.parameters()} == {(torch.float32, False)}


@pytest.mark.parametrize("seed", [None, 7])
def test_a_seed_is_the_lists_or_the_trainings_own(
    seed: int | None, export: Path, saved_again: Path, theirs: Path
) -> None:
    own = load_saved(export / CONFIG).seed
    assert own > 7 and open_model("a", export).train_seed == own
    assert open_model("a", saved_again).train_seed == open_model("a", theirs).train_seed == 0
    for folder, unnamed in ((export, own), (saved_again, 0), (theirs, 0)):
        sibling = SiblingConfig(name="a", export=f"{folder}{{seed}}", seeds=[] if seed is None else [seed])
        candidate = candidate_of(Training(sibling, seed, folder))
        assert (candidate.train_seed, candidate.trained) == (unnamed if seed is None else seed, "dense")
        assert candidate.label == ("a" if seed is None else "a#7")


def test_kinds_are_named_in_the_order_of_their_layers(export: Path) -> None:
    model = load_saved(export / CONFIG).model
    assert trained_as(model, AttentionConfig(kind=["nsa", "dense"])) == "nsa+dense"
    assert trained_as(model, AttentionConfig(kind=["dense", "nsa"])) == "dense+nsa"
    assert trained_as(model, AttentionConfig(kind="nsa")) == "nsa"


@pytest.mark.parametrize("watch", [False, True])
def test_decoding_alone_is_watched_and_dense_layers_stay_so(watch: bool, export: Path, theirs: Path) -> None:
    for folder in (export, theirs):
        opened, ledger = open_model("a", folder), Ledger()
        method = method_named("quest")(page=4, budget=Budget(tokens=12))
        reader: Any = opened.reader(method, dense_layers=[1], watch=watch, ledger=ledger)
        ids = torch.randint(1, 400, (1, 40), generator=torch.Generator().manual_seed(0))
        reader.begin()
        reader.read(ids[:, :-1])
        reader.end_prompt()
        reader.take(torch.tensor([0])).read(ids[:, -1:])
        seen = figures_of(reader)
        layers = set(range(opened.num_layers)) if watch else set()
        assert {figure["layer"] for figure in seen} == layers and not any(figure["prompt"] for figure in seen)
        assert {layer for phase, layer in ledger.ran if phase == "decode"} == set(range(opened.num_layers)) - {1}


def test_a_model_without_a_place_for_methods_is_refused_when_it_is_opened(export: Path, tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=420, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    for path in export.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    with pytest.raises(AttachError, match="not onto gpt2"):
        open_model("a", tmp_path)


def test_a_file_may_be_a_link(theirs: Path, tmp_path: Path) -> None:
    """As in the cache of a hub."""
    for path in theirs.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert open_model("b", tmp_path).reaches == 96


def test_arms_are_told_apart_by_what_they_are() -> None:
    """Trainings of one sibling are arms of their own; a budget of all tokens is full, however it is given."""
    one, two = (Candidate("a", seed, Path("a"), "dense", seed) for seed in (1, 2))
    quest, dense = MethodConfig(name="quest"), MethodConfig(name="dense")
    arms = [Arm(model, quest, budget) for model in (one, two) for budget in (0.5, 0.25)]
    assert len({arm.key for arm in arms}) == 2 and len({arm.told(Place("mqar", 64, True)) for arm in arms}) == 4
    assert [Arm(one, choice, None).chooses for choice in (None, dense, quest)] == [False, False, True]
    for budget, full in ((1.0, (True, True)), (64, (True, False)), (0.5, (False, False)), (None, (False, False))):
        assert tuple(Arm(one, quest, budget).is_full(length) for length in (64, 128)) == full
