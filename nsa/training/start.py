"""Beginning a run with the weights of another, or of a Hugging Face folder (``start_from``)."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor

from nsa.config import Config, load_saved
from nsa.data.load_tokenizer import SENTENCEPIECE, tokenizer_files
from nsa.importing import WeightReader, read_sections
from nsa.importing.folder import is_own
from nsa.layers.kind import Kind
from nsa.layers.kinds import BASELINE
from nsa.models import AttentionConfig, ModelConfig
from nsa.stages import STAGE, stages_of
from nsa.training import checkpoint
from nsa.training.checkpoint import CheckpointError
from nsa.training.distributed import Ranks
from nsa.training.sharded_state import WEIGHT, local_shards, scatter

# Of the model: these have no weights, so they may change from run to run (a longer context, for example).
WEIGHTLESS = {"max_position", "rope", "rope_scaling", "init_std", "norm_eps"}
BALANCE = {"bias_rate", "loss_weight"}  # of model.moe: how experts are balanced from now on
COMPUTED = ("rope", "rope_scaling", "norm_eps")  # of these: they change what the weights compute


def start_from(engine: DeepSpeedEngine, config: Config, ranks: Ranks, tokenizer: Path) -> None:
    """Give ``engine`` the weights of ``config.start_from``. Moments and counters remain those of a new run. Collective.

    A layer keeps the weights of a layer of its kind. From a dense layer it takes what its kind can use
    (`nsa.layers.kind.Kind.from_dense`); the rest keeps its initial value. A dense layer takes what a layer has that
    `nsa.layers.kind.Kind.holds_dense`.

    Raises:
        ValueError: there is no such checkpoint, it is of another shape, kind or tokenizer, or lacks a tensor.
    """
    folder = ranks.on_main(lambda: source_of(config, tokenizer))
    _, attention = _sections(folder)
    read = _reader(folder, config.model)
    layers = config.model.num_layers
    kinds = list(zip(attention.kinds(layers), config.attention.kinds(layers), strict=True))
    shards = local_shards(engine, ())

    def value(key: str, name: str) -> Tensor | None:
        assert key == WEIGHT
        shape = shards[name].logical_shape
        parts = name.split(".", 3)
        if parts[0] != "layers" or parts[2] != "attention":
            return read(name, shape)
        there, here = kinds[int(parts[1])]
        if there.name == here.name:
            return None if is_missing(parts[3], there, here) else read(name, shape)
        prefix = ".".join(parts[:3])
        found = here.from_dense(parts[3], shape, config.attention.of(here), lambda inside: read(f"{prefix}.{inside}"))
        if found is not None and found.shape != shape:
            raise CheckpointError(f"{folder}: for {name} it has {tuple(found.shape)}, not {tuple(shape)}")
        return found

    scatter(engine, shards, value)


def check_stage_before(config: Config, file: str, overrides: Sequence[str]) -> None:
    """Whether the stage that this one begins with is there, if it is needed and the run is a stage.

    Args:
        file, overrides: what ``config`` was read from.

    Raises:
        ValueError: it is not; the message has the command that trains what comes first.
    """
    stage = next((o.removeprefix(STAGE) for o in reversed(overrides) if o.startswith(STAGE)), None)
    run = Path(config.output_dir) / config.name
    if stage is None or config.start_from is None or checkpoint.checkpoints(run):
        return
    stages, family = stages_of(file), config.name.removesuffix(f"-{stage}")
    first = None  # that has to be trained
    for before in reversed(stages[: stages.index(stage)]):
        folder = run.with_name(f"{family}-{before}")
        if checkpoint.checkpoints(folder) or (first is None and Path(config.start_from) != folder):
            break
        first = before
    if first is None:
        return
    others = [override for override in overrides if not override.startswith(STAGE)]
    raise ValueError(
        f"stage {stage} begins with the weights of the stage before it, and {config.start_from} holds no checkpoint: "
        f"train stage {first} first, with\n"
        f"  {shlex.join(['python', '-m', 'nsa.train', file, f'{STAGE}{first}', *others])}\n"
        f"or all stages in turn, with\n  {shlex.join(['bash', 'launch.sh', 'train', file, *others])}"
    )


def is_missing(name: str, there: Kind, here: Kind) -> bool:
    """Whether a layer ``there`` lacks parameter ``name`` of one ``here`` of its kind: that of an indexer."""
    return name.startswith(tuple(f"{module}." for module in here.apart if module not in there.apart))


def source_of(config: Config, tokenizer: Path | None, content: bool = True) -> Path:
    """The checkpoint or Hugging Face folder that ``config.start_from`` means.

    Raises ValueError if the run cannot begin with it.

    Args:
        tokenizer: the file of the run's tokenizer, or the folder with its files; None: not known, nor compared.
        content: whether a checkpoint's files are read to verify them; else their sizes alone are.
    """
    assert config.start_from is not None
    given = Path(config.start_from)
    if (given / checkpoint.MANIFEST).exists():
        checkpoint.verify(given, content)
        folder = given
    elif _is_foreign(given):
        folder = given
    else:
        other = "To begin with another model, name its folder in start_from"
        newest = checkpoint.latest_complete(given, content=content, otherwise=other) if given.is_dir() else None
        if newest is None:
            raise ValueError(
                f"start_from: {given} holds no checkpoint; name a run folder, one of its step_* folders, or a Hugging "
                "Face folder with config.json"
            )
        folder = newest
    before, attention = _sections(folder)
    old, new = map(_shape_of, (before, config.model))
    differing = [key for key in new if key not in WEIGHTLESS and old.get(key) != new[key]]
    if differing:
        changes = "\n".join(f"  model.{key}: {old.get(key)} there, {new[key]} here" for key in differing)
        raise ValueError(
            f"start_from: {folder} is a model of another shape:\n{changes}\nSet these keys to the folder's values"
        )
    layers = config.model.num_layers
    for number, (there, here) in enumerate(zip(attention.kinds(layers), config.attention.kinds(layers), strict=True)):
        dense = here.name == BASELINE.name and there.holds_dense
        if there.name != here.name and there is not BASELINE and not dense:
            to = f" or {BASELINE.name}" if there.holds_dense else ""
            raise ValueError(
                f"start_from: layer {number} of {folder} has attention of kind {there.name}, which cannot become "
                f"{here.name}: only {BASELINE.name} attention can become any other kind; set it to {there.name}{to}"
            )
        if there.name == here.name and there.config is not None:
            old, new = (
                sections.of(here).model_dump(exclude=set(here.free)) for sections in (attention, config.attention)
            )
            if differing := [f"{key}: {old[key]} there, {new[key]} here" for key in new if old[key] != new[key]]:
                raise ValueError(
                    f"start_from: {folder} has other layers: attention.{here.name}.{'; '.join(differing)}. Set these "
                    "keys to the folder's values, or begin with a dense model"
                )
    if _is_foreign(folder):
        if is_own(folder) and (folder / SENTENCEPIECE).exists():
            _check_tokenizer(folder, tokenizer)
        else:
            _ask_for_tokenizer(folder, config)
        WeightReader(folder, config.model).check_tie()
        _say_other_values(folder, config, before)
    else:
        _check_tokenizer(folder, tokenizer)
        _say_other_split(folder, config)
    print(f"begins with the weights of {folder}", flush=True)
    return folder


def _shape_of(model: ModelConfig) -> dict[str, Any]:
    """The section without what may always change, and with the width that values have by default."""
    return model.model_dump(exclude={"moe": BALANCE}) | {"v_head_dim": model.attention_shape.v_head_dim}


def _check_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    if tokenizer is not None and tokenizer_files(folder) != tokenizer_files(tokenizer):
        raise ValueError(
            f"start_from: {folder} was trained with another tokenizer than {tokenizer}: set "
            f"data.tokenizer.path={folder}"
        )


def _say_other_split(folder: Path, config: Config) -> None:
    """Prints a note if the run of this checkpoint was trained on text that is held out here."""
    before = load_saved(folder / "config.yaml")
    texts = [{(s.kind, s.path) for s in data.sources if s.kind != "synthetic"} for data in (before.data, config.data)]
    there, here = ((c.data.seed_of(c.seed), c.data.validation_fraction) for c in (before, config))
    if there != here and not texts[0].isdisjoint(texts[1]):
        print(
            f"note: {folder} held out other documents, so it was trained on documents that this run holds out. To "
            f"validate on unseen text, set data.seed={there[0]} and data.validation_fraction={there[1]:g}",
            flush=True,
        )


def _is_foreign(folder: Path) -> bool:
    """Whether it is a Hugging Face folder."""
    return (folder / "config.json").exists()


def _sections(folder: Path) -> tuple[ModelConfig, AttentionConfig]:
    """What the weights of a folder are of."""
    if not _is_foreign(folder):
        config = load_saved(folder / "config.yaml")
        return config.model, config.attention
    return read_sections(folder)


def _reader(folder: Path, model: ModelConfig) -> Callable[..., Tensor]:
    """(name, its shape or None) -> the tensor, fp32."""
    if not _is_foreign(folder):
        return checkpoint.TensorReader(folder, "model")
    weights = WeightReader(folder, model)  # checks the shapes
    return lambda name, shape=None: weights(name).float()


def _ask_for_tokenizer(folder: Path, config: Config) -> None:
    """Of a model whose tokenizer cannot be compared with the run's."""
    if config.data.tokenizer.path is not None:
        return
    raise ValueError(
        f"start_from: the model of {folder} has a tokenizer of its own, and data.tokenizer.path is null: set it to "
        f"that tokenizer, which is {folder} if its files lie there (docs/importing.md)"
    )


def _say_other_values(folder: Path, config: Config, before: ModelConfig) -> None:
    """Says what is computed in another way than in a Hugging Face folder."""
    old, new = before.model_dump(), config.model.model_dump()
    for key in COMPUTED:
        if old[key] != new[key]:
            print(f"note: model.{key} is {new[key]}, {folder} has {old[key]}", flush=True)
