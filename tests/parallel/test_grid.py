"""The grid of ranks: its axes, invalid layouts, and the interface for DeepSpeed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from nsa.config import ConfigError
from nsa.parallel import Grid, ParallelConfig
from nsa.parallel.config import stage_layers
from nsa.parallel.grid import ModelParallelUnit, build_grid, data_parallel_size
from nsa.parallel.partition import add_up_in_backward, sum_over
from nsa.parallel.traffic import Traffic
from tests.parallel.layouts import MOE
from tests.training.tiny import tiny_config


@contextmanager
def grid_of(rank: int, world_size: int, **sizes: int) -> Iterator[Grid]:
    """The grid of one rank in a fake process group."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield build_grid(ParallelConfig(**sizes), rank, world_size, num_kv_heads=2)
    finally:
        dist.destroy_process_group()


def test_tensor_ranks_are_neighbours_then_context_then_data():
    with grid_of(rank=13, world_size=16, tensor=2, context=4) as grid:
        assert grid.tensor.ranks == (12, 13) and grid.tensor.rank == 1
        assert grid.context.ranks == (9, 11, 13, 15) and grid.context.rank == 2
        assert grid.data.ranks == (5, 13) and grid.data.rank == 1
        assert grid.replicas.ranks == (1, 3, 5, 7, 9, 11, 13, 15) and grid.replicas.rank == 6
        assert grid.model.ranks == (12, 13)
        assert grid.describe() == "2 data x 4 context x 2 tensor"


@pytest.mark.parametrize(
    "sizes",
    [{}, {"tensor": 4}, {"pipeline": 2}, {"tensor": 2, "context": 2}, {"expert": 4}, {"expert": 2, "tensor": 2}],
)
def test_the_axes_of_all_ranks_are_consistent(sizes):
    world_size, counted_samples, counted_losses = 8, 0, 0
    for rank in range(world_size):
        with grid_of(rank, world_size, **sizes) as grid:
            for axis in (grid.tensor, grid.expert, grid.context, grid.data, grid.samples, grid.replicas, grid.model):
                assert axis.ranks[axis.rank] == rank and axis.size == len(axis.ranks)
            assert {*grid.replicas.ranks} & {*grid.model.ranks} == {rank}
            assert grid.replicas.size * grid.model.size == world_size
            assert {*grid.data.ranks} | {*grid.context.ranks} <= {*grid.replicas.ranks}
            counted_samples += grid.counts_samples
            counted_losses += grid.counts_losses
    parallel = ParallelConfig(**sizes)
    assert counted_samples == data_parallel_size(parallel, world_size), "each sample once"
    assert counted_losses == world_size // (parallel.tensor * parallel.pipeline), "each token once"


def test_pipeline_comes_between_context_and_data():
    with grid_of(rank=13, world_size=16, tensor=2, context=2, pipeline=2) as grid:
        assert grid.pipeline.ranks == (9, 13) and grid.context.ranks == (13, 15) and grid.data.ranks == (5, 13)
        assert grid.model.ranks == (8, 9, 12, 13) and grid.model.rank == 3
        assert grid.replicas.ranks == (5, 7, 13, 15)
        assert grid.ends.ranks == (9, 13) and grid.ends.rank == 1


def test_experts_lie_between_tensor_and_context():
    with grid_of(rank=13, world_size=16, tensor=2, expert=2, context=2) as grid:
        assert grid.expert.ranks == (13, 15) and grid.context.ranks == (9, 13) and grid.data.ranks == (5, 13)
        assert grid.experts.ranks == (12, 13, 14, 15) and grid.experts.rank == 1, "they hold different experts"
        assert grid.samples.ranks == (5, 7, 13, 15) and grid.samples.rank == 2, "they read different samples"
        assert grid.row.ranks == (8, 9, 12, 13), "they hold tokens of the same sample"
        assert grid.replicas.ranks == (1, 5, 9, 13) and grid.model.ranks == (12, 13, 14, 15)
        assert grid.describe() == "2 data x 2 context x 2 expert x 2 tensor"


def test_sharers_of_a_kv_head_and_of_a_tied_embedding():
    with grid_of(rank=6, world_size=8, tensor=8) as grid:
        assert grid.sharers.ranks == (4, 5, 6, 7) and grid.sharers.rank == 2
    with grid_of(rank=2, world_size=8, pipeline=4) as grid:
        assert grid.ends.size == 1 and grid.sharers.size == 1
    with grid_of(rank=7, world_size=8, pipeline=4) as grid:
        assert grid.ends.ranks == (4, 7) and grid.ends.rank == 1


def test_stages_share_the_layers():
    for layers in range(1, 12):
        for stages in range(1, layers + 1):
            parts = [stage_layers(layers, stages, stage) for stage in range(stages)]
            assert [number for part in parts for number in part] == list(range(layers))
            sizes = [len(part) for part in parts]
            assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1 and sizes[-1] == min(sizes)


def test_ranks_must_be_a_multiple_of_a_replica():
    with pytest.raises(ValueError, match=r"parallel.tensor \(2\) x parallel.context \(4\).* 8 ranks .* 12 ranks"):
        data_parallel_size(ParallelConfig(tensor=2, context=4), 12)
    with pytest.raises(ValueError, match=r"parallel.expert \(4\).* 4 ranks .* 6 ranks"):
        data_parallel_size(ParallelConfig(expert=4), 6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["parallel.tensor=3"], r"must divide model.num_heads \(4\)"),
        (["parallel.tensor=4", "model.intermediate_size=50"], r"model.intermediate_size \(50\).* to 52"),
        (["parallel.tensor=4", "model.vocab_size=401"], r"model.vocab_size \(401\).* to 404"),
        (["parallel.tensor=4", "model.num_heads=12", "model.num_kv_heads=6"], r"model.num_kv_heads \(6\)"),
        (["parallel.context=3"], r"data.sequence_length \(64\) must be a multiple of 2 x parallel.context \(6\)"),
        (["parallel.tensor=4", "data.sequence_length=62"], r"\(62\) must be a multiple of parallel.tensor \(4\)"),
        # Two that are multiples by halves: of the ranks, and of the whole sample.
        (["parallel.context=2", "data.sequence_length=34"], r"\(34\) must be a multiple of 2 x parallel.context \(4\)"),
        (
            ["parallel.context=2", "parallel.tensor=4", "data.sequence_length=36"],
            r"parallel.context \(18\) must be a multiple of parallel.tensor \(4\)",
        ),
        (["parallel.context=0"], "parallel.context"),
        (["parallel.pipeline=3"], r"parallel.pipeline \(3\) exceeds model.num_layers \(2\)"),
        (["parallel.pipeline=2", "engine.zero_stage=3"], r"use engine.zero_stage 1"),
        (["parallel.expert=2"], r"parallel.expert \(2\) splits the experts of model.moe, and this model has none"),
        ([*MOE, "parallel.expert=3"], r"\(3\) must divide model.moe.num_experts \(8\)"),
        ([*MOE, "parallel.expert=4", "parallel.tensor=4"], r"\(16\) must divide model.moe.num_experts \(8\)"),
        ([*MOE, "model.moe.expert_size=5", "parallel.tensor=2"], r"model.moe.num_shared x model.moe.expert_size \(5\)"),
    ],
)
def test_invalid_layouts_are_rejected(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, "model.num_heads=4", *overrides)


def test_the_mpu_has_all_methods_that_deepspeed_calls():
    """Fails for a release that calls more methods of its ``mpu``. Those for sequence parallelism must not exist."""
    called = set()
    for path in Path(deepspeed.__file__).parent.rglob("*.py"):
        called |= set(re.findall(r"\bmpu\.(\w+)\(", path.read_text(errors="ignore")))
    optional = {  # called after hasattr, or on DeepSpeed's own objects
        name
        for name in called
        if "sequence" in name or "slice" in name or "pipe_parallel" in name or not name.startswith("get_")
    }
    with grid_of(rank=3, world_size=8, tensor=2, context=2) as grid:
        unit = ModelParallelUnit(grid)
        answered = {name for name in dir(unit) if name.startswith("get_")}
        assert called - optional <= answered, called - optional - answered
        assert not any("sequence" in name for name in dir(unit))
        assert (unit.get_data_parallel_rank(), unit.get_data_parallel_world_size()) == (1, 4)
        assert unit.get_data_parallel_group_ranks() == [1, 3, 5, 7]
        assert (unit.get_model_parallel_rank(), unit.get_tensor_model_parallel_src_rank()) == (1, 2)


class NoGradient(torch.autograd.Function):
    """Like a CUDA graph, returns a gradient or None for every parameter."""

    @staticmethod
    def forward(ctx, x, *parameters):
        return x.clone()

    @staticmethod
    def backward(ctx, d_out):
        return d_out, torch.ones(3, dtype=d_out.dtype), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_replicated_parameters_are_summed_and_may_be_missing(dtype):
    """In fp32, whatever the parameters are in."""
    with grid_of(rank=0, world_size=2, tensor=2) as grid:
        there, missing = (torch.nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2))
        for parameter in (there, missing):
            sum_over(parameter, grid.tensor)
        add_up_in_backward([there, missing])
        NoGradient.apply(torch.zeros(3, dtype=dtype, requires_grad=True), there, missing).sum().backward()
        assert there.grad is not None and there.grad.dtype == dtype and missing.grad is None
        assert grid.traffic.take() == {"tensor/gradients": 12}, "one all-reduce of three fp32 between two ranks"


def test_traffic_is_counted_once():
    traffic = Traffic()
    traffic.add("b", 2)
    traffic.add("a", 1)
    traffic.add("b", 3)
    assert traffic.take() == {"a": 1, "b": 5}
    assert traffic.take() == {}


def test_traffic_of_a_cuda_graph_counts_when_it_is_replayed():
    traffic = Traffic()
    traffic.add("a", 1)
    with traffic.apart() as recorded:
        traffic.add("a", 2)
    assert traffic.take() == {"a": 1}
    traffic.add_all(recorded)
    traffic.add_all(recorded)
    assert traffic.take() == {"a": 4}
