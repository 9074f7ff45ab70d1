"""Saving and restoring the whole state of a run: weights, optimizer, generators, counters."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import Tensor

from nsa.config import Config, dump_config
from nsa.data.load_tokenizer import tokenizer_files
from nsa.models import count_parameters
from nsa.training import checkpoint
from nsa.training.checkpoint import CheckpointError
from nsa.training.checkpoint_writer import Snapshot
from nsa.training.distributed import Ranks
from nsa.training.optimizer import STATE_KEYS
from nsa.training.rng import rng_state, seed_all, set_rng_state
from nsa.training.run_folder import check_same, record_changes
from nsa.training.sharded_state import WEIGHT, create_optimizer_state, gather, local_shards, scatter
from nsa.training.spikes import SpikeState
from nsa.training.start import source_of, start_from


@dataclass
class Progress:
    """Counters of a run. The position in the data and in the schedule follow from ``step`` alone.

    Attributes:
        step: steps done, skipped ones included. updates: steps that changed the weights.
        skipped_in_a_row: non-finite steps since the last update. spikes: what the spike detector remembers, and
            which batches are left out.
    """

    step: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0
    spikes: SpikeState = field(default_factory=SpikeState)


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to, besides the configuration.

    Attributes:
        data: fingerprint of the prepared data. tokenizer: the tokenizer's file, or the folder with its files.
    """

    data: str
    tokenizer: Path


def state_bytes(config: Config) -> int:
    """Bytes of a checkpoint's tensors."""
    counts = count_parameters(config.model, config.attention)
    trained = counts["total" if config.train == "all" else "apart"]
    return 4 * (counts["total"] + trained * len(STATE_KEYS[config.optimizer.kind]))


def snapshot(engine: DeepSpeedEngine, config: Config, ranks: Ranks, progress: Progress, identity: Identity) -> Snapshot:
    """A copy of the whole state, for a `CheckpointWriter` to write. Collective."""
    keys = STATE_KEYS[config.optimizer.kind]
    tensors = gather(local_shards(engine, keys), (WEIGHT, *keys))
    # Where what is gathered may be the engine's own memory.
    on_cpu = ranks.device.type == "cpu" or config.engine.offload_optimizer
    state = asdict(progress) | {
        "samples": progress.step * config.training.global_batch_size,
        "tokens": progress.step * config.training.global_batch_size * config.data.sequence_length,
        "data": identity.data,
        "world_size": ranks.world_size,
        "zero_stage": config.engine.zero_stage,
        "parallel": config.parallel.model_dump(),
    }
    files = {"config.yaml": dump_config(config).encode()}
    if ranks.is_main:
        files |= tokenizer_files(identity.tokenizer)
    return Snapshot(
        step=progress.step,
        tensors=[(key, name, t.clone() if on_cpu else t) for key, name, t in tensors],
        rng=rng_state(),
        state=state,
        files=files,
        num_bytes=state_bytes(config),
    )


def trained_on(run: Path) -> str | None:
    """Fingerprint of the data of the newest checkpoint of ``run``, unverified; None if there is none."""
    for folder in checkpoint.checkpoints(run):
        try:
            return str(checkpoint.load_state(folder)["data"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def restore(engine: DeepSpeedEngine, config: Config, ranks: Ranks, run: Path, identity: Identity) -> Progress:
    """Load the newest complete checkpoint of ``run``, or else begin. Collective. Raises as `load_newest`."""
    progress = load_newest(engine, config, ranks, run, identity)
    if progress is None:
        seed_all(config.seed + 1 + ranks.rank)
        if config.start_from is not None:
            start_from(engine, config, ranks, identity.tokenizer)
        return Progress()
    return progress


def check_beginning(config: Config, quiet: bool = False) -> None:
    """Whether a run can go on from its newest checkpoint or else begin with ``start_from``. Nothing is changed.

    Of checkpoints the sizes of the files are checked, of weights the shapes in their headers. The tokenizer is compared
    if ``data.tokenizer.path`` is there: another one comes with the prepared data.

    Args:
        quiet: checkpoints that are passed over are not reported, since `load_newest` will do so.

    Raises:
        ValueError: it cannot, as the run itself would say.
    """
    run, path = Path(config.output_dir) / config.name, config.data.tokenizer.path
    if (newest := checkpoint.latest_complete(run, content=False, quiet=quiet)) is not None:
        check_same(newest / "config.yaml", config, newest)
    elif config.start_from is not None:
        source_of(config, Path(path) if path and Path(path).exists() else None, content=False)


def load_newest(
    engine: DeepSpeedEngine,
    config: Config,
    ranks: Ranks,
    run: Path,
    identity: Identity,
    before: int | None = None,
) -> Progress | None:
    """Load the newest complete checkpoint of ``run`` (of fewer than ``before`` steps); None if there is none.

    Checkpoints that are newer get other names, so that their steps can be saved anew. Collective.

    Raises:
        ValueError: it belongs to another configuration or other data.
    """

    def find() -> Path | None:
        newest = checkpoint.latest_complete(run, before)
        if newest is not None or before is None:
            checkpoint.set_aside(run, newest, "broken" if before is None else "rolled-back")
        if newest is not None:
            changes = check_same(newest / "config.yaml", config, newest)
            if checkpoint.load_state(newest).get("data") != identity.data:
                raise ValueError(
                    f"{newest} was trained on other data: the prepared data or its tokenizer changed since "
                    "(same configuration, other files). Restore them, or start a new run under another name (name=...)"
                )
            record_changes(run, newest, changes)
        return newest

    folder = ranks.on_main(find)
    if folder is None:
        return None

    state = checkpoint.load_state(folder)
    try:
        progress = Progress(**{name: state[name] for name in ("step", "updates", "skipped_in_a_row")})
        progress.spikes = SpikeState.read(state.get("spikes", {}))
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{folder}/state.json is not sound: {e}") from None
    keys = STATE_KEYS[config.optimizer.kind]
    weights, moments = (checkpoint.TensorReader(folder, kind) for kind in ("model", "optimizer"))

    def read(key: str, name: str) -> Tensor:
        shape = shards[name].logical_shape
        return weights(name, shape) if key == WEIGHT else moments(f"{key}.{name}", shape)

    create_optimizer_state(engine, keys, progress.updates)
    shards = local_shards(engine, keys)
    scatter(engine, shards, read)
    generators = folder / f"rng-{ranks.rank:05d}.json"
    if state.get("world_size") == ranks.world_size:
        try:
            set_rng_state(checkpoint.load_json(generators))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as e:
            raise CheckpointError(f"{generators} is not sound: {e}") from None
    else:
        seed_all(config.seed + 1 + ranks.rank + ranks.world_size * progress.step)
    return progress
