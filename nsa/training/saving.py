"""Saving and restoring the whole state of a run: weights, optimizer, generators, counters."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import Tensor

from nsa.config import Config, dump_config
from nsa.models import count_parameters
from nsa.training import checkpoint
from nsa.training.checkpoint import CheckpointError
from nsa.training.distributed import Ranks, ReportedError
from nsa.training.optimizer import STATE_KEYS
from nsa.training.rng import rng_state, seed_all, set_rng_state
from nsa.training.run_folder import check_same
from nsa.training.sharded_state import WEIGHT, create_optimizer_state, gather, local_shards, scatter


@dataclass
class Progress:
    """Counters of a run. The position in the data and in the schedule follow from ``step`` alone.

    Attributes:
        step: steps done, skipped ones included. updates: steps that changed the weights.
        skipped_in_a_row: non-finite steps since the last update.
    """

    step: int = 0
    updates: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to, besides the configuration.

    Attributes:
        data: fingerprint of the prepared data. tokenizer: the tokenizer's file.
    """

    data: str
    tokenizer: Path


def state_bytes(config: Config) -> int:
    """Bytes of a checkpoint's tensors."""
    elements = count_parameters(config.model, config.attention)["total"]
    return 4 * elements * (1 + len(STATE_KEYS[config.optimizer.kind]))


def save(
    engine: DeepSpeedEngine, config: Config, ranks: Ranks, run: Path, progress: Progress, identity: Identity
) -> Path:
    """Write a checkpoint, verify it, and only then remove those beyond ``checkpoint.keep_last``. Collective.

    Raises:
        CheckpointError: it could not be written (disk full, for one); earlier checkpoints are as they were.
    """
    final = run / checkpoint.folder_name(progress.step)
    temporary = final.with_name(f"{final.name}.tmp")

    def prepare() -> None:
        checkpoint.check_space(run, state_bytes(config))
        temporary.mkdir()

    def write() -> dict[str, dict[str, object]]:
        keys = STATE_KEYS[config.optimizer.kind]
        tensors = gather(local_shards(engine, keys), (WEIGHT, *keys))
        entries = checkpoint.write_tensors(temporary, ranks.rank, tensors)
        rng = f"rng-{ranks.rank:05d}.json"
        entries[rng] = checkpoint.write_json(temporary / rng, rng_state())
        return entries

    def finish() -> None:
        entries = {name: entry for _, files in written for name, entry in files.items()}
        state = asdict(progress) | {
            "samples": progress.step * config.training.global_batch_size,
            "tokens": progress.step * config.training.global_batch_size * config.data.sequence_length,
            "data": identity.data,
            "world_size": ranks.world_size,
            "zero_stage": config.engine.zero_stage,
            "parallel": config.parallel.model_dump(),
        }
        entries["state.json"] = checkpoint.write_json(temporary / "state.json", state)
        entries["config.yaml"] = checkpoint.write_file(temporary / "config.yaml", dump_config(config).encode())
        entries["tokenizer.model"] = checkpoint.write_file(
            temporary / "tokenizer.model", identity.tokenizer.read_bytes()
        )
        checkpoint.commit(temporary, final, entries)
        checkpoint.verify(final)
        checkpoint.prune(run, config.checkpoint.keep_last)

    try:
        ranks.on_main(prepare)
        error, entries = "", {}
        try:
            entries = write()
        except OSError as e:
            error = f"rank {ranks.rank}: {e.strerror or e} ({e.filename or temporary})"
        written = ranks.gather((error, entries))
        if errors := [error for error, _ in written if error]:
            raise CheckpointError("; ".join(errors))
        ranks.on_main(finish)
    except (OSError, CheckpointError) as e:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            raise ReportedError("no checkpoint") from e
        newest = next(iter(checkpoint.checkpoints(run)), None)
        raise CheckpointError(
            f"the checkpoint of step {progress.step} was not written: {e}. Checkpoints saved before are untouched "
            f"({newest.name if newest else 'there is none'}); make room and run the same command again"
        ) from e
    return final


def restore(engine: DeepSpeedEngine, config: Config, ranks: Ranks, run: Path, identity: Identity) -> Progress:
    """Load the newest complete checkpoint of ``run``, if there is one. Collective.

    Raises:
        ValueError: it belongs to another configuration or other data.
    """

    def find() -> Path | None:
        newest = checkpoint.latest_complete(run)
        checkpoint.set_aside(run, newest)
        if newest is not None:
            check_same((newest / "config.yaml").read_text(), config, newest)
            if checkpoint.load_state(newest)["data"] != identity.data:
                raise ValueError(
                    f"{newest} was trained on other data: the prepared data or its tokenizer changed since "
                    "(same configuration, other files). Restore them, or start a new run under another name (name=...)"
                )
        return newest

    folder = ranks.on_main(find)
    if folder is None:
        seed_all(config.seed + 1 + ranks.rank)
        return Progress()

    state = checkpoint.load_state(folder)
    progress = Progress(**{name: state[name] for name in asdict(Progress())})
    keys = STATE_KEYS[config.optimizer.kind]
    weights, moments = (checkpoint.TensorReader(folder, kind) for kind in ("model", "optimizer"))

    def read(key: str, name: str) -> Tensor:
        return weights(name) if key == WEIGHT else moments(f"{key}.{name}")

    create_optimizer_state(engine, keys, progress.updates)
    scatter(engine, local_shards(engine, keys), read)
    generators = folder / f"rng-{ranks.rank:05d}.json"
    if state["world_size"] == ranks.world_size:
        set_rng_state(json.loads(generators.read_text()))
    else:
        seed_all(config.seed + 1 + ranks.rank + ranks.world_size * progress.step)
    return progress
