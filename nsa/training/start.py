"""Beginning a run with the weights of another (``start_from``)."""

from pathlib import Path

from deepspeed import DeepSpeedEngine
from torch import Tensor

from nsa.config import Config, load_saved
from nsa.layers.kinds import BASELINE
from nsa.training import checkpoint
from nsa.training.checkpoint import CheckpointError
from nsa.training.distributed import Ranks
from nsa.training.sharded_state import WEIGHT, local_shards, scatter

# Of the model: these have no weights, so they may change from run to run (a longer context, for example).
WEIGHTLESS = {"max_position", "rope", "init_std", "norm_eps"}


def start_from(engine: DeepSpeedEngine, config: Config, ranks: Ranks, tokenizer: Path) -> None:
    """Give ``engine`` the weights of ``config.start_from``. Moments and counters remain those of a new run. Collective.

    A layer keeps the weights of a layer of its kind. From a dense layer it takes what its kind can use
    (`nsa.layers.kind.Kind.from_dense`); the rest keeps its initial value.

    Raises:
        ValueError: there is no such checkpoint, it is of another shape, kind or tokenizer, or lacks a tensor.
    """
    folder = ranks.on_main(lambda: source_of(config, tokenizer))
    before = load_saved(folder / "config.yaml")
    read = checkpoint.TensorReader(folder, "model")
    layers = config.model.num_layers
    kinds = list(zip(before.attention.kinds(layers), config.attention.kinds(layers), strict=True))
    shards = local_shards(engine, ())

    def value(key: str, name: str) -> Tensor | None:
        assert key == WEIGHT
        shape = shards[name].logical_shape
        parts = name.split(".", 3)
        if parts[0] != "layers" or parts[2] != "attention":
            return read(name, shape)
        there, here = kinds[int(parts[1])]
        if there is here:
            return read(name, shape)
        prefix = ".".join(parts[:3])
        found = here.from_dense(parts[3], lambda inside: read(f"{prefix}.{inside}"))
        if found is not None and found.shape != shape:
            raise CheckpointError(f"{folder}: for {name} it has {tuple(found.shape)}, not {tuple(shape)}")
        return found

    scatter(engine, shards, value)


def source_of(config: Config, tokenizer: Path) -> Path:
    """The checkpoint folder that ``config.start_from`` means. Raises ValueError if the run cannot begin with it.

    Args:
        tokenizer: the file of the run's tokenizer.
    """
    assert config.start_from is not None
    given = Path(config.start_from)
    if (given / checkpoint.MANIFEST).exists():
        checkpoint.verify(given)
        folder = given
    else:
        newest = checkpoint.latest_complete(given) if given.is_dir() else None
        if newest is None:
            raise ValueError(f"start_from: {given} holds no checkpoint; name a run folder or one of its step_* folders")
        folder = newest
    before = load_saved(folder / "config.yaml")
    old, new = before.model.model_dump(), config.model.model_dump()
    differing = [key for key in new if key not in WEIGHTLESS and old.get(key) != new[key]]
    if differing:
        changes = "\n".join(f"  model.{key}: {old.get(key)} there, {new[key]} here" for key in differing)
        raise ValueError(f"start_from: {folder} is a model of another shape:\n{changes}\nSet these keys to its values")
    layers = config.model.num_layers
    for number, (there, here) in enumerate(
        zip(before.attention.kinds(layers), config.attention.kinds(layers), strict=True)
    ):
        if there is not here and there is not BASELINE:
            raise ValueError(
                f"start_from: layer {number} of {folder} has attention of kind {there.name}, which cannot become "
                f"{here.name}: only {BASELINE.name} attention can become another kind"
            )
        if there is here and there.config is not None:
            old, new = (c.attention.of(here).model_dump(exclude=set(here.free)) for c in (before, config))
            if differing := [f"{key}: {old[key]} there, {new[key]} here" for key in new if old[key] != new[key]]:
                raise ValueError(f"start_from: {folder} has other layers: attention.{here.name}.{'; '.join(differing)}")
    if (folder / "tokenizer.model").read_bytes() != tokenizer.read_bytes():
        raise ValueError(
            f"start_from: {folder} was trained with another tokenizer than {tokenizer}: set "
            f"data.tokenizer.path={folder}/tokenizer.model"
        )
    print(f"begins with the weights of {folder}", flush=True)
    return folder
