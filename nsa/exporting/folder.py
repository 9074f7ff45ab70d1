"""The folder of an export: written beside its final name, proven, renamed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nsa.config import Config, load_saved
from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.load_tokenizer import FILES, load_tokenizer
from nsa.exporting.families import FAMILIES, Format, format_of
from nsa.exporting.model_card import model_card
from nsa.exporting.proof import ExportError, LogitsDiffer, Proof, prove
from nsa.exporting.tokenizer import write_tokenizer
from nsa.importing import own, read_sections, read_weights
from nsa.models import AttentionConfig, Decoder, ModelConfig, hf
from nsa.models.hf.configuration_nsa import NSAConfig
from nsa.training import checkpoint
from nsa.untrusted import UntrustedError, check_safetensors, regular_size

CONFIG = "training_config.yaml"
STATE = "training_state.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(source: Path | str, out: Path | str | None = None, dtype: str = "float32") -> tuple[Path, Proof]:
    """Export a checkpoint as a Hugging Face folder and prove that it is the trained model.

    Args:
        source: a run folder (its newest good checkpoint is taken) or a step folder.
        out: the folder to write; None: ``export`` in the run folder. An earlier export there is replaced.
        dtype: of the weights: float32 or bfloat16.

    Returns:
        The folder, and what was compared.

    Raises:
        ExportError: there is no such checkpoint, ``out`` is something else, or the proof fails; ``out`` is then
            as it was before.
    """
    step = _find_checkpoint(Path(source))
    final = Path(out) if out is not None else step.parent / "export"
    if final.exists() and not (final / CONFIG).is_file():
        raise ExportError(f"{final} exists and is no export: name another folder with --out")
    config = load_saved(step / "config.yaml")
    weights = checkpoint.load_weights(step)
    weights = {name: t if ".router." in name else t.to(DTYPES[dtype]) for name, t in weights.items()}
    tokenizer = load_tokenizer(step)
    decoder = fill(config.model, config.attention, weights, config.engine.backend)

    temporary = final.with_name(f"{final.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        proof = _write_and_prove(temporary, config, weights, tokenizer, decoder)
        (temporary / CONFIG).write_bytes((step / "config.yaml").read_bytes())
        (temporary / STATE).write_bytes((step / "state.json").read_bytes())
        state = checkpoint.load_state(step)
        card = model_card(config, state, _last_validation(step.parent, state["step"]), proof, final.resolve().name)
        (temporary / "README.md").write_text(card)
        _replace(temporary, final)
    except OSError as e:
        raise ExportError(f"{final} cannot be written ({e.strerror or e}): name another folder with --out") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return final, proof


def _write_and_prove(
    folder: Path, config: Config, weights: dict[str, Tensor], tokenizer: BaseTokenizer, decoder: Decoder
) -> Proof:
    """In the format of the model's family; where that is not the trained model, with code of its own."""
    form = format_of(config)
    folder.mkdir(parents=True)
    write_folder(folder, config, weights, tokenizer, form)
    try:
        return replace(prove(folder, decoder, tokenizer), form=form)
    except LogitsDiffer as e:
        if form.family is None:
            raise
        form = Format(why=f"{form.family.model_type} computes something else, as where index scores are equal ({e})")
    shutil.rmtree(folder)
    folder.mkdir()
    write_folder(folder, config, weights, tokenizer, form)
    return replace(prove(folder, decoder, tokenizer), form=form)


def write_folder(
    folder: Path, config: Config, weights: dict[str, Tensor], tokenizer: BaseTokenizer, form: Format | None = None
) -> None:
    """Write what `transformers` reads. ``weights``: by the decoder's names. ``form``: None: `format_of` (config).

    A model of a family (`nsa.exporting.families`) gets the family's names and no code. Any other gets the code in
    `nsa.models.hf`, and its weights keep their names.
    """
    form = format_of(config) if form is None else form
    described = hf_config(config, tokenizer) if form.family is None else _family_config(form, config, tokenizer)
    described.dtype = next(iter(weights.values())).dtype
    described.save_pretrained(folder)
    if form.family is None:
        for path in hf.FILES:
            shutil.copyfile(path, folder / path.name)
    else:
        weights = form.family.rename(weights)
    save_torch_state_dict(weights, folder, max_shard_size="5GB", metadata={"format": "pt"})
    for path in folder.glob("*.safetensors"):  # written for their owner alone
        path.chmod((folder / "config.json").stat().st_mode)
    (folder / "generation_config.json").write_text(json.dumps(_special_tokens(tokenizer), indent=2) + "\n")
    write_tokenizer(tokenizer, folder, described.max_position_embeddings)


def _family_config(form: Format, config: Config, tokenizer: BaseTokenizer) -> transformers.PreTrainedConfig:
    """The configuration of an export without code.

    Raises:
        ExportError: the family does not have such models.
    """
    assert form.family is not None
    if (own := format_of(config)).family is not form.family:
        raise ExportError(
            f"this model cannot be written as {form.family.architecture}: {own.why or 'it has other layers'}. Let "
            "the export choose the format: it then carries code of its own"
        )
    fields = {"architectures": [form.family.architecture], **form.family.fields(config), **form.attention}
    return transformers.AutoConfig.for_model(form.family.model_type, **fields, **_special_tokens(tokenizer))


def _special_tokens(tokenizer: BaseTokenizer) -> dict[str, Any]:
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}


def hf_config(config: Config, tokenizer: BaseTokenizer) -> NSAConfig:
    """The configuration of an export with code.

    Raises:
        ExportError: a layer has a kind that it cannot carry.
    """
    if lacking := config.attention.not_exportable(config.model.num_layers):
        raise ExportError(f"an export cannot carry {', '.join(lacking)} yet")
    return NSAConfig(
        architectures=[own.ARCHITECTURE],
        auto_map=own.AUTO_MAP,
        **_special_tokens(tokenizer),
        **own.fields_of(config.model, config.attention),
    )


def is_export(folder: Path) -> bool:
    """Whether it is an export, of any format, as `nsa.export` writes it: with the configuration of the training."""
    return (folder / CONFIG).exists()


def load_decoder(folder: Path | str, yarn_factor: float | None = None) -> tuple[Decoder, Config, BaseTokenizer]:
    """The native decoder (fp32), the configuration of its training and the tokenizer of an export.

    Args:
        yarn_factor: rotary length extension, in place of the configuration's.

    Raises:
        ExportError: the folder is no export.
    """
    folder = Path(folder)
    if not is_export(folder):
        raise ExportError(f"{folder} is no export: it has no {CONFIG}; make one with python -m nsa.export RUN")
    config = load_saved(folder / CONFIG, [] if yarn_factor is None else [f"model.rope.yarn_factor={yarn_factor}"])
    weights: dict[str, Tensor] = {}
    try:
        regular_size(folder / CONFIG)
        _check_files(folder)
        for path in sorted(folder.glob("model*.safetensors")):
            if twice := check_safetensors(path).keys() & weights.keys():
                raise UntrustedError(f"{path}: tensor {min(twice)} is in another file, too")
            weights |= load_file(path)
    except (OSError, UntrustedError, SafetensorError) as e:
        raise ExportError(f"{folder}: {e}") from None
    for family in FAMILIES:  # another release of transformers may have chosen
        weights = family.restore(weights)
    return fill(config.model, config.attention, weights, config.engine.backend), config, load_tokenizer(folder)


def load_imported(folder: Path | str, yarn_factor: float | None = None) -> tuple[Decoder, BaseTokenizer]:
    """The native decoder (fp32) and the tokenizer of any folder that can be imported (`nsa.importing`).

    Such as an export that transformers has saved again, which lacks the configuration of the training.

    Args:
        yarn_factor: rotary length extension, in place of the folder's.

    Raises:
        ValueError: the folder cannot be imported.
    """
    model, attention = read_sections(folder)
    if yarn_factor is not None:
        model = model.model_copy(update={"rope": model.rope.model_copy(update={"yarn_factor": yarn_factor})})
    try:
        _check_files(Path(folder))
    except (OSError, UntrustedError) as e:
        raise ExportError(f"{folder}: {e}") from None
    return fill(model, attention, read_weights(folder, model)), load_tokenizer(folder)


def _check_files(folder: Path) -> None:
    """Raise UntrustedError or OSError if a file of the tokenizer is no regular one."""
    for name in FILES:
        if (folder / name).is_symlink() or (folder / name).exists():
            regular_size(folder / name)


def fill(model: ModelConfig, attention: AttentionConfig, weights: dict[str, Tensor], backend: str = "auto") -> Decoder:
    """A decoder (fp32, not training) with these weights. ``backend``: of its operators.

    Raises:
        ExportError: names or shapes are not those of the configuration.
    """
    layers = {name.split(".")[1] for name in weights if name.startswith("layers.")}
    if len(layers) != model.num_layers:  # before so many are built
        raise ExportError(f"weights of {len(layers)} layers, the configuration has {model.num_layers}")
    with torch.device("meta"):
        decoder = Decoder(model, attention, backend=backend)
    weights = {name: tensor.float() for name, tensor in weights.items()}
    if model.tie_embeddings and "embedding.weight" in weights:
        weights["head.weight"] = weights["embedding.weight"]
    try:
        decoder.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise ExportError(f"the weights do not fit the configuration: {e}") from e
    if model.tie_embeddings:
        decoder.head.weight = decoder.embedding.weight
    return decoder.eval().requires_grad_(False)


def _find_checkpoint(source: Path) -> Path:
    if (source / checkpoint.MANIFEST).is_file():
        checkpoint.verify(source)
        return source
    step = checkpoint.latest_complete(source, otherwise="To export another run, name its folder")
    if step is None:
        raise ExportError(f"{source} holds no complete checkpoint: name a run folder or a step_* folder")
    return step


def _last_validation(run: Path, step: int) -> float | None:
    """Validation bits per byte at ``step``, from the run's metrics if they are there."""
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        return None
    lines = (json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}"))
    found = [
        line["validation/bits_per_byte"]
        for line in lines
        if line.get("step") == step and "validation/bits_per_byte" in line
    ]
    return found[-1] if found else None


def _replace(new: Path, final: Path) -> None:
    """Rename ``new`` to ``final``; an earlier export there goes once the new one has its name."""
    old = final.with_name(f"{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)
