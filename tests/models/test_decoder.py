"""The decoder: sizes, loss, packing, decoding."""

import itertools

import pytest
import torch
from torch.nn.functional import cross_entropy

from nsa.layers.nsa.config import NsaConfig
from nsa.models import AttentionConfig, Decoder, ModelConfig, RopeConfig, count_parameters, training_flops_per_token
from nsa.models.head import LanguageModelHead

KINDS = ["dense", "nsa", ["dense", "nsa"], "entmax"]


def small(kind, **changes) -> tuple[ModelConfig, AttentionConfig]:
    shape = {
        "vocab_size": 97,
        "hidden_size": 24,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "v_head_dim": 6,
        "intermediate_size": 40,
        "max_position": 128,
        "init_std": 0.2,
    }
    attention = AttentionConfig(
        kind=kind,
        nsa=NsaConfig(compress_length=8, compress_stride=4, block_size=8, num_blocks=4, window=12, compress_hidden=5),
    )
    return ModelConfig(**{**shape, **changes}), attention


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_counted_parameters_equal_the_models(kind, tied: bool) -> None:
    model, attention = small(kind, tie_embeddings=tied)
    with torch.device("meta"):
        decoder = Decoder(model, attention)
    counted = count_parameters(model, attention)
    assert counted["total"] == sum(p.numel() for p in decoder.parameters())
    assert counted["total"] == counted["embedding"] + counted["non_embedding"]


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_whole(kind) -> None:
    torch.manual_seed(0)
    decoder = Decoder(*small(kind)).double()
    ids = torch.randint(0, 97, (2, 40))
    caches, parts = decoder.new_caches(), []
    for start, stop in itertools.pairwise([0, 13, *range(14, 41)]):
        parts.append(decoder(ids[:, start:stop], caches=caches))
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_and_gradients_equal_separate(kind) -> None:
    torch.manual_seed(0)
    decoder = Decoder(*small(kind)).double()
    documents = [1, 30, 5, 22]
    cu = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32)
    ids, targets = torch.randint(0, 97, (1, 58)), torch.randint(0, 97, (1, 58))
    packed = decoder(ids, targets, cu)
    alone = [decoder(ids[:, a:b], targets[:, a:b]) for a, b in itertools.pairwise(cu.tolist())]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))
    parameters = list(decoder.parameters())
    together = torch.autograd.grad(packed.sum(), parameters)
    apart = torch.autograd.grad(torch.cat(alone, dim=1).sum(), parameters)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # norms and rotary are fp32


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    torch.manual_seed(0)
    head = LanguageModelHead(16, 97)
    hidden = torch.randn(2, 50, 16, requires_grad=True)
    targets = torch.randint(0, 97, (2, 50)).index_fill(1, torch.tensor([3, 4]), -100)
    expected = cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="none").view(2, 50)
    losses = head(hidden, targets)
    torch.testing.assert_close(losses, expected)
    assert (losses[:, 3:5] == 0).all()
    inputs = [hidden, head.weight]
    theirs = torch.autograd.grad(expected.sum(), inputs)
    for a, b in zip(torch.autograd.grad(losses.sum(), inputs), theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_initial_loss_is_that_of_guessing() -> None:
    torch.manual_seed(0)
    decoder = Decoder(*small("nsa", init_std=0.02))
    ids = torch.randint(0, 97, (1, 100))
    assert abs(decoder(ids, ids.roll(-1, 1)).mean().item() - torch.tensor(97.0).log().item()) < 0.1


def test_flops_of_dense_match_the_usual_formula() -> None:
    model, attention = small("dense", v_head_dim=None)
    flops = training_flops_per_token(model, attention, 64)
    weights = count_parameters(model, attention)["total"] - model.hidden_size * (2 * model.num_layers + 1)
    scores = 12 * model.num_layers * model.num_heads * model.head_dim * (64 + 1) / 2
    assert flops["sparse"] == flops["dense_equivalent"] == pytest.approx(6 * weights + scores)


def test_flops_of_nsa_are_fewer_on_long_sequences() -> None:
    model, attention = small("nsa")
    flops = training_flops_per_token(model, attention, 4096)
    assert flops["sparse"] < flops["dense_equivalent"] / 2


def test_yarn_changes_only_with_its_factor() -> None:
    torch.manual_seed(0)
    model, attention = small("nsa")
    decoder = Decoder(model, attention)
    extended = Decoder(model.model_copy(update={"rope": RopeConfig(yarn_factor=4.0)}), attention)
    extended.load_state_dict(decoder.state_dict())
    ids = torch.randint(0, 97, (1, 30))
    assert not torch.allclose(decoder(ids), extended(ids))
    torch.testing.assert_close(decoder(ids[:, :1]), extended(ids[:, :1]), rtol=0.2, atol=0.2)
