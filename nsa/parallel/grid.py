"""The grid of ranks (device mesh): which ranks work together.

Tensor-parallel ranks are neighbours, since they communicate most (keep them in one node). Then come expert, context,
pipeline and data:
rank = (((data * pipeline_size + pipeline) * context_size + context) * expert_size + expert) * tensor_size + tensor.

Ranks along ``expert`` read different samples, as along ``data``, but hold different experts. All other parameters are
replicated on them, and the hooks of `nsa.parallel.partition` sum their gradients. DeepSpeed sees them as
tensor-parallel ranks: it averages gradients, and shards state, over the ranks that hold the same experts.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import product

import torch.distributed as dist

from nsa.parallel.config import ParallelConfig
from nsa.parallel.traffic import Traffic

NAMES = ("data", "pipeline", "context", "expert", "tensor")  # slowest first


@dataclass(frozen=True, eq=False)
class Axis:
    """One dimension of the grid: this process and the ranks that differ from it in this coordinate alone.

    Attributes:
        name: the name that its traffic is counted under.
        rank, size: this process's coordinate, and the number of ranks. ranks: their world ranks, in order.
        group: None if this process is alone.
        traffic: counts the bytes that this process sends along it.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    group: dist.ProcessGroup | None
    traffic: Traffic = field(default_factory=Traffic)


@dataclass(frozen=True, eq=False)
class Grid:
    """All axes of this process.

    Attributes:
        tensor, expert, context, pipeline, data: the five dimensions.
        samples: data x expert: the ranks that read different samples.
        experts: expert x tensor: the ranks that hold different experts of a layer, and different tokens.
        row: context x tensor: the ranks that hold different tokens of the same samples.
        replicas: data x context: the ranks with the same weights, over which DeepSpeed averages gradients and shards
            state. Context-parallel ranks belong to it: they, too, see different tokens with the same weights. So
            every ZeRO stage divides by the same number. With DeepSpeed's sequence-parallel groups it would not.
        model: pipeline x expert x tensor: the ranks that hold different weights of one model.
        sharers: the tensor-parallel ranks with the same KV head as this one.
        ends: the first and the last stage of the pipeline; on other stages this rank alone.
    """

    tensor: Axis
    expert: Axis
    context: Axis
    pipeline: Axis
    data: Axis
    samples: Axis
    experts: Axis
    row: Axis
    replicas: Axis
    model: Axis
    sharers: Axis
    ends: Axis
    traffic: Traffic

    @property
    def counts_samples(self) -> bool:
        """Whether this rank counts the samples that it reads: of the ranks that share a sample, one does."""
        return self.tensor.rank == 0 and self.context.rank == 0 and self.pipeline.rank == 0

    @property
    def counts_losses(self) -> bool:
        """Whether this rank counts the losses of its tokens."""
        return self.tensor.rank == 0 and self.pipeline.rank == self.pipeline.size - 1

    @property
    def spread(self) -> bool:
        """Whether several ranks compute a sample together."""
        return self.tensor.size * self.context.size * self.pipeline.size > 1

    def describe(self) -> str:
        """Such as "2 data x 2 context x 4 tensor"."""
        axes = [axis for axis in (self.data, self.pipeline, self.context, self.expert, self.tensor) if axis.size > 1]
        return " x ".join(f"{axis.size} {axis.name}" for axis in axes) or "one rank"


def build_grid(
    sizes: ParallelConfig, rank: int, world_size: int, *, num_kv_heads: int, timeout: timedelta | None = None
) -> Grid:
    """The grid of ``world_size`` ranks as seen by ``rank``. Collective.

    Args:
        num_kv_heads: of the model; with more tensor-parallel ranks than that, several share a KV head.
        timeout: of a collective; None: the default process group's.

    Raises:
        ValueError: ``world_size`` is no multiple of the ranks of a replica.
    """
    shape = _shape(sizes, world_size)
    places = list(product(*(range(n) for n in shape)))  # in the order of ranks
    traffic = Traffic()

    def teams(*along: str) -> list[list[int]]:
        """The ranks grouped by equal coordinates in all dimensions but ``along``."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, place in enumerate(places):
            fixed = tuple(at for name, at in zip(NAMES, place, strict=True) if name not in along)
            groups.setdefault(fixed, []).append(number)
        return list(groups.values())

    def axis(name: str, all_teams: list[list[int]], alone_too: bool = False) -> Axis:
        """Every rank creates every group in the same order, since torch numbers the groups as they are created."""
        mine, group = [rank], None
        for team in all_teams:
            if len(team) > 1 or alone_too:
                made = dist.new_group(team, timeout=timeout)
                if rank in team:
                    mine, group = team, made
        return Axis(name, mine.index(rank), len(mine), tuple(mine), group, traffic)

    tensor, pipeline = teams("tensor"), teams("pipeline")
    copies = max(1, sizes.tensor // num_kv_heads)
    return Grid(
        tensor=axis("tensor", tensor),
        expert=axis("expert", teams("expert")),
        context=axis("context", teams("context")),
        pipeline=axis("pipeline", pipeline),
        data=axis("data", teams("data")),
        samples=axis("samples", teams("data", "expert")),
        experts=axis("experts", teams("expert", "tensor")),
        row=axis("row", teams("context", "tensor")),
        # DeepSpeed needs a group, even of one rank.
        replicas=axis("replicas", teams("data", "context"), alone_too=True),
        model=axis("model", teams("pipeline", "expert", "tensor"), alone_too=True),
        sharers=axis("tensor", [team[i : i + copies] for team in tensor for i in range(0, len(team), copies)]),
        ends=axis("pipeline", [[team[0], team[-1]] for team in pipeline if len(team) > 1]),
        traffic=traffic,
    )


def data_parallel_size(sizes: ParallelConfig, world_size: int) -> int:
    """Number of samples that ``world_size`` ranks compute at a time.

    Raises:
        ValueError: ``world_size`` is no multiple of the ranks of a replica.
    """
    replica = sizes.replica_ranks
    if world_size % replica:
        named = " x ".join(f"parallel.{name} ({getattr(sizes, name)})" for name in sizes.model_dump())
        raise ValueError(
            f"{named} = {replica} ranks hold one replica of the model, and {world_size} ranks are no "
            f"multiple of it: start a multiple of {replica} ranks or lower one of them"
        )
    return world_size // sizes.model_ranks


def _shape(sizes: ParallelConfig, world_size: int) -> tuple[int, ...]:
    data = data_parallel_size(sizes, world_size) // sizes.expert
    return data, sizes.pipeline, sizes.context, sizes.expert, sizes.tensor


class ModelParallelUnit:
    """The interface that DeepSpeed 0.19 expects of its ``mpu``.

    Its data-parallel ranks are `Grid.replicas`. There are no get_sequence_* methods: with them DeepSpeed would divide
    gradients by another number in each ZeRO stage. Nor does it see the pipeline: it takes all ranks of `Grid.model` as
    tensor-parallel. `nsa.parallel.partition.mark` says which parameters each counts in the gradient norm.
    """

    def __init__(self, grid: Grid) -> None:
        self._data, self._model = grid.replicas, grid.model

    def get_model_parallel_rank(self) -> int:
        return self._model.rank

    def get_model_parallel_world_size(self) -> int:
        return self._model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._model.group

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._model.ranks[0]

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_group(self) -> None:
        return None

    def get_data_parallel_rank(self) -> int:
        return self._data.rank

    def get_data_parallel_world_size(self) -> int:
        return self._data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._data.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._data.ranks)
