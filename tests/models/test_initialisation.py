"""Initial weights are drawn per parameter, so that a rank of any layout draws its part and all layouts agree."""

import pytest
import torch

from nsa.models import Decoder
from nsa.models.initialisation import first_value
from nsa.parallel.decoder import parallelize
from nsa.parallel.partition import materialise, partition_of
from tests.parallel.layouts import MOE
from tests.parallel.test_grid import grid_of
from tests.training.tiny import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path):
    sizes = ["model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=2", "attention.kind=nsa"]
    return tiny_config(tmp_path, *sizes, *MOE, "model.tie_embeddings=true")


def drawn(config, asked: dict[str, torch.Size] | None = None):
    def draw(name: str, shape: torch.Size) -> torch.Tensor:
        if asked is not None:
            asked[name] = shape
        return first_value(name, shape, config.model, 7, CPU)

    return draw


@pytest.mark.parametrize(
    "sizes", [{"tensor": 2}, {"tensor": 4}, {"context": 2}, {"pipeline": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}]
)
def test_ranks_of_every_layout_hold_parts_of_the_same_weights(config, sizes):
    whole = Decoder(config.model, config.attention)
    whole.initialise(seed=7)
    logical = dict(whole.named_parameters())
    ranks = 1
    for size in sizes.values():
        ranks *= size
    held: set[str] = set()
    for rank in range(ranks):
        asked: dict[str, torch.Size] = {}
        with grid_of(rank=rank, world_size=ranks, **sizes) as grid:
            with torch.device("meta"):
                model = Decoder(config.model, config.attention)
            parallelize(
                model, grid, lambda model, asked=asked: materialise(model, drawn(config, asked), torch.bfloat16)
            )
            parts = dict(model.named_parameters())
            assert asked.keys() == parts.keys(), "nothing is drawn that the rank does not hold"
            for name, part in parts.items():
                expected = partition_of(part).cut(logical[name].detach()).bfloat16()
                assert torch.equal(part.detach(), expected) and asked[name] == logical[name].shape, name
            for name, buffer in model.named_buffers():
                assert buffer.dtype == torch.float32 and not buffer.any(), name
        held |= parts.keys()
    assert held == logical.keys()


def test_a_materialised_parameter_keeps_its_partition(config):
    with grid_of(rank=1, world_size=4, tensor=4) as grid:
        with torch.device("meta"):
            model = Decoder(config.model, config.attention)
        parallelize(model, grid)
        marks = {name: dict(vars(p)) for name, p in model.named_parameters()}
        materialise(model, drawn(config), torch.float32)
        assert {name: dict(vars(p)) for name, p in model.named_parameters()} == marks
        assert model.head.weight is model.embedding.weight, "tied"


def test_initial_values(config):
    whole = Decoder(config.model, config.attention)
    whole.initialise(seed=7)
    std, depth = config.model.init_std, (2 * config.model.num_layers) ** 0.5
    values = {name: p.detach() for name, p in whole.named_parameters()}
    assert values["embedding.weight"].std().item() == pytest.approx(std, rel=0.05)
    assert values["layers.1.attention.output.weight"].std().item() == pytest.approx(std / depth, rel=0.1)
    assert values["layers.1.mlp.experts.down"].std().item() == pytest.approx(std / depth, rel=0.1)
    inner = values["layers.0.attention.compress.key.inner.weight"]
    assert inner.std().item() == pytest.approx(inner.shape[1] ** -0.5, rel=0.1)
    assert not values["layers.0.attention.gate.bias"].any() and values["norm.weight"].eq(1).all()
    same_shape = [values[f"layers.{i}.attention.query.weight"] for i in (0, 1)]
    assert not torch.equal(*same_shape), "each has a generator of its own"
    again, other = (first_value("norm.x", torch.Size((3, 3)), config.model, seed, CPU) for seed in (7, 8))
    assert torch.equal(again, first_value("norm.x", torch.Size((3, 3)), config.model, 7, CPU))
    assert not torch.equal(again, other)
