"""A plan of a run that trains a part of the model counts what the trainer allocates, sends and computes: no more."""

import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from nsa.config import load_config
from nsa.models import count_parameters, training_flops_per_token
from nsa.parallel.grid import build_grid
from nsa.plan import main
from nsa.planning.dry_run import dry_run
from nsa.planning.memory import memory_at_least, memory_of
from nsa.planning.search import search
from nsa.planning.speed import GPUS, predict_speed
from nsa.planning.traffic import bytes_sent, data_bytes
from nsa.planning.work import work_of
from nsa.training.deepspeed_config import deepspeed_config
from nsa.training.distributed import initialize
from nsa.training.engine import build_engine, client_optimizer
from nsa.training.sharded_state import local_shards
from nsa.training.state import state_bytes
from tests.conftest import ROOT
from tests.parallel.conftest import CSA, DSA, LATENT, POOLED
from tests.training.tiny import tiny_config

BASE = ["model.num_heads=4", "model.num_kv_heads=2", "model.num_layers=4"]
PART = ["train=indexer", "start_from=somewhere"]
NSA = ["attention.kind=nsa", "attention.nsa.phase=warm-up", "attention.nsa.num_local=1", *PART]
DSA_AND_DENSE = [*DSA, "attention.kind=[dsa, dense]", *PART]
SHARED = [*DSA, "attention.kind=dsa", "attention.dsa.share_layers=2", *PART]
KINDS = {"nsa": NSA, "pooled": [*NSA, POOLED], "dsa": DSA_AND_DENSE, "mla": [*LATENT, *PART], "csa": [*CSA, *PART]}
LAYOUTS = [  # tensor, context, pipeline, rank
    (2, 2, 1, 0),
    (4, 1, 1, 0),
    (1, 4, 1, 1),
    (2, 1, 2, 1),
    (1, 2, 2, 3),
    (1, 1, 1, 0),
]


def in_layout(tmp_path, tensor, context, pipeline, *more):
    sizes = {"tensor": tensor, "context": context, "pipeline": pipeline}
    return tiny_config(tmp_path, *BASE, *(f"parallel.{name}={size}" for name, size in sizes.items()), *more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tensor", "context", "pipeline", "rank"), LAYOUTS)
@pytest.mark.parametrize("zero", [1, 3])
def test_planned_traffic_equals_a_dry_runs(tmp_path, kind, tensor, context, pipeline, rank, zero):
    """ZeRO 3 needs a backward pass through the whole model. The recomputation that is configured has no effect."""
    if zero == 3 and pipeline > 1:
        pytest.skip("a pipeline has no ZeRO 3")
    more = [*KINDS[kind], f"engine.zero_stage={zero}", "engine.activation_checkpointing=full"]
    config, ranks = in_layout(tmp_path, tensor, context, pipeline, *more), 2 * tensor * context * pipeline
    assert bytes_sent(config, ranks, rank) == dry_run(config, ranks, rank).sent


@pytest.mark.parametrize("kind", ["dsa", "csa"])
@pytest.mark.parametrize("zero", [1, 3])
@pytest.mark.parametrize("tensor", [1, 4])
def test_planned_products_equal_a_dry_runs(tmp_path, kind, zero, tensor):
    """No head; of a frozen weight no gradient; without ZeRO 3 no gradient of its input either."""
    config = in_layout(tmp_path, tensor, 1, 1, *KINDS[kind], f"engine.zero_stage={zero}")
    assert work_of(config, tensor).flops == pytest.approx(dry_run(config, tensor).flops)
    whole = config.model_copy(update={"train": "all"})
    assert dry_run(config, tensor).flops < (0.75 if zero == 3 else 0.4) * dry_run(whole, tensor).flops


def test_a_layer_that_learns_nothing_is_not_priced_as_if(tmp_path):
    """NSA whose selection has a loss, beside layers with indexers: as NSA without the loss."""
    mixed = [*DSA, "attention.kind=[dsa, nsa]", "attention.nsa.num_local=1", *PART]
    losses = [f"attention.nsa.kl_weight={weight}" for weight in (0, 1)]
    plain, taught = (in_layout(tmp_path, 1, 1, 1, *mixed, loss) for loss in losses)
    assert work_of(plain, 1).attention == work_of(taught, 1).attention
    flops = [training_flops_per_token(c.model, c.attention, 64, apart=True) for c in (plain, taught)]
    assert flops[0] == flops[1]
    taught = taught.model_copy(update={"train": "all", "start_from": None})
    assert work_of(plain, 1).attention["causal"] < work_of(taught, 1).attention["causal"]


@pytest.mark.parametrize(("tensor", "context", "kv_heads"), [(1, 1, 2), (4, 1, 2), (2, 2, 1), (4, 1, 1), (1, 4, 2)])
def test_a_loss_of_some_queries_is_planned_as_so_much(tmp_path, tensor, context, kv_heads):
    """What it computes, sends and keeps: 64 tokens, of which 7 neighbours are no whole part."""
    taught = ["attention.kind=nsa", "attention.nsa.num_local=1", f"model.num_kv_heads={kv_heads}"]
    taught += ["training.micro_batch_size=2", "engine.activation_checkpointing=full"]
    of_loss, sent = [], []
    for loss in ([], ["attention.nsa.kl_weight=1"], ["attention.nsa.kl_weight=1", "attention.nsa.kl_stride=7"]):
        config, ranks = in_layout(tmp_path, tensor, context, 1, *taught, *loss), tensor * context
        of_loss.append(work_of(config, ranks).attention.get("causal", 0.0))
        for rank in range(ranks):
            found = dry_run(config, ranks, rank).sent
            assert found == bytes_sent(config, ranks, rank), (loss, rank)
        sent.append(found)
    without, whole, some = of_loss
    assert 7 * (some - without) == pytest.approx(whole - without) and whole > without
    shared = tensor > kv_heads
    assert [("tensor/noise" in each) for each in sent] == [False, False, shared]
    if shared:
        queries = [each["tensor/queries"] for each in sent]
        assert queries[0] < queries[2] < queries[0] + 0.25 * (queries[1] - queries[0])


def test_a_loss_of_some_queries_keeps_less(tmp_path):
    """Selective recomputation keeps what dense attention returns, of the queries that the loss looks at."""
    more = ["attention.kind=nsa", "attention.nsa.num_local=1", "engine.activation_checkpointing=selective"]
    losses = [[], ["attention.nsa.kl_weight=1"], ["attention.nsa.kl_weight=1", "attention.nsa.kl_stride=8"]]
    without, whole, some = (
        memory_of(in_layout(tmp_path, 1, 1, 1, *more, *loss), 1).device["activations"] for loss in losses
    )
    assert without < some < without + 0.2 * (whole - without)


ALLOCATED = [
    (kind, precision, zero)
    for kind in ("nsa", "pooled", "dsa", "csa", "shared", "all")
    for precision, zero in (("fp32", 0), ("fp32", 1), ("bf16", 1))
]


@pytest.fixture(scope="module")
def allocated(tmp_path_factory):
    """Case -> the configuration, its plan, and bytes that the trainer's engine has. All at once, in one process group;
    a plan has a group of its own."""
    folder, found = tmp_path_factory.mktemp("engines"), {}
    for kind, precision, zero in ALLOCATED:
        overrides = {**KINDS, "shared": SHARED, "all": DSA}[kind]
        engine = [f"engine.precision={precision}", f"engine.zero_stage={zero}", "engine.cuda_graphs=false"]
        config = in_layout(folder, 1, 1, 1, *overrides, *engine)
        found[kind, precision, zero] = config, memory_of(config, 1)
    with mock.patch.dict(os.environ):
        ranks = initialize()
        for case, (config, memory) in found.items():
            grid = build_grid(config.parallel, 0, 1, num_kv_heads=2)
            engine = build_engine(config, ranks, grid, deepspeed_config(config, 1))
            parameters, states = list(engine.module.parameters()), client_optimizer(engine).state.values()
            moments = sum(t.nbytes for state in states for t in state.values() if t.ndim)
            masters = engine.optimizer.fp32_groups_flat_partition if case[1] == "bf16" else []
            local_shards(engine, ())  # as for a checkpoint
            found[case] = (
                config,
                memory,
                {
                    "trained": sum(p.numel() for p in parameters if p.requires_grad),
                    "weights": sum(p.nbytes for p in parameters),
                    "optimizer": moments + sum(p.nbytes for p in masters),
                    "host": sum(p.whole.nbytes for p in parameters if hasattr(p, "whole")),
                },
            )
        dist.destroy_process_group()
    return found


@pytest.mark.parametrize("case", ALLOCATED)
def test_planned_state_is_what_the_trainer_allocates(allocated, case):
    """But for what ZeRO pads."""
    (config, memory, has), (kind, precision, zero) = allocated[case], case
    counts, trained = count_parameters(config.model, config.attention), has["trained"]
    assert trained == counts["total" if kind == "all" else "apart"] > 0
    assert memory.device["weights"] == has["weights"]
    assert memory.device["optimizer"] == pytest.approx(has["optimizer"], rel=0.01)
    assert memory.device["optimizer"] == trained * (12 if precision == "bf16" else 8)
    assert memory.device["gradients"] == trained * {("fp32", 0): 4, ("fp32", 1): 8, ("bf16", 1): 6}[precision, zero]
    assert sum(memory.host.values()) == has["host"] == 4 * (counts["total"] - trained)
    assert state_bytes(config) == 4 * (counts["total"] + 2 * trained)


def test_memory_and_time_of_a_large_model(capsys):
    """What the plan says of 1b, whose layers get indexers: neither gradients nor moments of the rest, a third of the
    time or less, and nothing about an upper bound."""
    dsa = ["attention.kind=dsa", "attention.dsa.phase=warm-up"]
    whole = load_config(ROOT / "configs/1b.yaml", dsa)
    part = load_config(ROOT / "configs/1b.yaml", [*dsa, *PART])
    counts = count_parameters(part.model, part.attention)
    apart = counts["apart"]
    memory = memory_of(part, 8)
    assert memory.device["gradients"] == 6 * apart and memory.device["optimizer"] == pytest.approx(12 * apart / 8)
    assert memory.peak < 0.5 * memory_of(whole, 8).peak
    assert data_bytes(part, 8) == pytest.approx(data_bytes(whole, 8) * apart / counts["total"])
    h200 = GPUS["H200"]
    assert predict_speed(part, 8, h200).step_seconds < 0.6 * predict_speed(whole, 8, h200).step_seconds
    assert main([str(ROOT / "configs/1b.yaml"), "--gpus", "8", *dsa, *PART]) == 0
    out = capsys.readouterr().out
    assert f"{apart:,} trained" in out and "upper bound" not in out


def test_the_search_has_no_recomputation_where_there_is_none():
    """One candidate for each layout; the bound that sorts layouts out is below the plan."""
    dsa = ["attention.kind=dsa", "engine.activation_checkpointing=full", *PART]
    config = load_config(ROOT / "configs/1b.yaml", dsa)
    found = search(config, 8, GPUS["H200"])
    assert {one.config.engine.activation_checkpointing for one in found} == {"none"}
    assert len({one.config.parallel for one in found}) == len(found) > 3
    for one in found:
        assert memory_at_least(one.config, 8) <= sum(one.memory.device.values())


def test_gradients_of_frozen_weights_are_not_computed():
    """Of joint and of parallel projections, whose input has a gradient."""
    from nsa.layers.linear import joint_linear, parallel_linear

    x, first, second = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.randn(5, 4)
    for trained in ((), (first,), (first, second)):
        for weight in (first, second):
            weight.requires_grad_(any(weight is one for one in trained))
        for out in (joint_linear(x, [first, second]), torch.cat(parallel_linear(x, first, second), -1)):
            for tensor in (x, first, second):
                tensor.grad = None
            out.square().sum().backward()
            y = x @ torch.cat((first, second)).T
            torch.testing.assert_close(x.grad, 2 * y @ torch.cat((first, second)))
            for weight, there in ((first, y[:, :5]), (second, y[:, 5:])):
                if weight.requires_grad:
                    torch.testing.assert_close(weight.grad, 2 * there.T @ x)
                else:
                    assert weight.grad is None
