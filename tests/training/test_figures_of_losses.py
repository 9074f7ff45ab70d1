"""Figures of a step: only of what is computed in it."""

from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_config

from nsa.models import Decoder
from nsa.training.attention_losses import AttentionLosses
from nsa.training.balance import Balance
from nsa.training.freezing import freeze_others

DSA = "attention.dsa={topk: 16, index_heads: 2, index_head_dim: 16, index_rotary_dims: 8, share_layers: %d}"
TAUGHT = "attention.nsa={compress_length: 8, compress_stride: 4, block_size: 8, num_blocks: 4, num_local: 1, window: 16"
PART = ["train=indexer", "start_from=somewhere"]
EXPERTS = "model.moe={num_experts: 4, top_k: 2, num_shared: 0, expert_size: 16, first_dense: 1, loss_weight: 0.01}"
RANKS = SimpleNamespace(device=torch.device("cpu"), sum=lambda x: x)
GRID = SimpleNamespace(replicas=SimpleNamespace(size=1))


def figures_of_a_step(config) -> dict[str, float]:
    torch.manual_seed(0)
    model = Decoder(config.model, config.attention, backend="torch")
    if config.train != "all":
        freeze_others(model, config)
    losses, balance = AttentionLosses(model, config, RANKS, GRID), Balance(model, config, RANKS, GRID)  # type: ignore[arg-type]
    ids = torch.randint(400, (1, 64))
    loss = model(ids, targets=ids).sum()
    (loss if config.train == "all" else losses.take()).backward()
    return balance.end_step(update=True) | losses.end_step()


@pytest.mark.parametrize(
    ("overrides", "shown"),
    [
        (["attention.kind=[dsa, nsa]", f"{TAUGHT}, kl_weight: 1}}"], ["indexer_kl/layer_00"]),
        (["attention.kind=[nsa, dsa]", f"{TAUGHT}, kl_weight: 1}}"], ["indexer_kl/layer_01"]),
        (
            ["attention.kind=[dsa, nsa]", f"{TAUGHT}, phase: warm-up}}"],
            ["indexer_kl/layer_00", "selection_kl/layer_01"],
        ),
        (["attention.kind=dsa", DSA % 2], ["indexer_kl/layer_00", "indexer_kl/layer_01"]),  # one learns from both
        (["attention.kind=[dsa, dense]", EXPERTS], ["indexer_kl/layer_00"]),
    ],
)
def test_a_layer_that_learns_nothing_has_no_figure(tmp_path, overrides, shown):
    config = tiny_config(tmp_path, DSA % 1, *overrides, *PART)
    figures = figures_of_a_step(config)
    assert list(figures) == [f"attention/{name}" for name in shown]
    assert all(value > 0 for value in figures.values())


def test_a_loss_is_a_mean_over_the_tokens_of_the_global_batch(tmp_path):
    """Of three replicas, over which gradients are averaged; each step has its own."""
    overrides = ["attention.kind=dsa", "training.global_batch_size=6", "training.micro_batch_size=2", *PART]
    config = tiny_config(tmp_path, DSA % 1, *overrides)
    torch.manual_seed(0)
    model = Decoder(config.model, config.attention, backend="torch")
    freeze_others(model, config)
    grid, tokens = SimpleNamespace(replicas=SimpleNamespace(size=3)), 6 * config.data.sequence_length
    losses, sums = AttentionLosses(model, config, RANKS, grid), []  # type: ignore[arg-type]
    for loss in losses.here.values():
        assert loss.scale == 3 / tokens
    for _ in range(2):
        ids = torch.randint(400, (1, 64))
        model(ids, targets=ids)
        whole = losses.take()
        whole.backward()
        sums.append(sum(float(loss.tally[0]) for loss in losses.here.values()))
        assert float(whole.detach()) == pytest.approx(sums[-1] * 3 / tokens, rel=1e-4)
        assert sum(losses.end_step().values()) == pytest.approx(sums[-1] / tokens)
    assert sums[0] != sums[1] and min(sums) > 0 and not any(losses.means().values())


def test_without_a_loss_there_are_no_figures(tmp_path):
    assert not [name for name in figures_of_a_step(tiny_config(tmp_path)) if name.startswith("attention/")]


def test_layers_of_another_stage_have_none_here(tmp_path):
    """All are named, since all ranks sum alike; those that are here are asked."""
    config = tiny_config(tmp_path, DSA % 1, "attention.kind=dsa", *PART)
    model = Decoder(config.model, config.attention, backend="torch")
    model.layers[0] = torch.nn.Identity()
    others = SimpleNamespace(device=torch.device("cpu"), sum=lambda seen: seen.add_(torch.tensor([3.0, 5.0])))
    losses = AttentionLosses(model, config, others, GRID)  # type: ignore[arg-type]
    assert list(losses.here) == [1]
    found = {f"attention/indexer_kl/layer_0{layer}": part / losses.tokens for layer, part in enumerate((3.0, 5.0))}
    assert losses.means() == found


def test_all_that_is_trained_has_figures(tmp_path):
    overrides = [DSA % 1, "attention.kind=[dsa, nsa]", f"{TAUGHT}, kl_weight: 1}}", EXPERTS]
    figures = figures_of_a_step(tiny_config(tmp_path, *overrides))
    assert {name.partition("/layer")[0] for name in figures} >= {
        "attention/indexer_kl", "attention/selection_kl", "moe/max_violation", "moe/balance_loss"
    }  # fmt: skip
    assert figures["attention/selection_kl/layer_01"] > 0 and figures["moe/balance_loss/layer_01"] > 0
