"""A Hugging Face folder of a model: config.json and safetensors, in one file or in shards. Nothing is run from it."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsa.importing.families import FAMILIES
from nsa.importing.family import ONLY, Family
from nsa.importing.own import OWN
from nsa.importing.rope import read_rope
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.models.config import check_projection
from nsa.untrusted import check_safetensors, inside, read_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = ("F32", "BF16", "F16", "F64")
# Buffers that earlier versions of transformers wrote: the frequencies, which the configuration determines.
COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
NAMED = 5  # names in one error


class FolderError(ValueError):
    """A folder cannot be imported. The message says why, and what to do."""


def is_own(folder: Path | str) -> bool:
    """Whether it has an export of this project that carries code of its own, as written or saved again since.

    False if config.json cannot be read here, such as one that is a link.
    """
    try:
        return _config_of(Path(folder)).get("architectures") == [OWN.architecture]
    except FolderError:
        return False


def read_config(folder: Path | str) -> dict[str, Any]:
    """The sections `model` and `attention` of a configuration that computes what the folder's model does.

    Raises:
        FolderError: the folder's model is of no known family, or has something that cannot be honoured.
    """
    folder = Path(folder)
    config = _config_of(folder)
    family = _family_of(folder, config)
    fields = {**family.defaults, **config}
    path = folder / "config.json"

    def size(name: str, default: int | None = None) -> int:
        value = fields.get(name)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise FolderError(f"{path}: {name} must be a positive whole number, got {value!r}")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    size("max_position_embeddings")  # the window and the rotary embedding ask for it
    reasons = [
        f"{name} = {fields[name]!r}: {advice}"
        for name, (values, advice) in {**ONLY, **family.only}.items()
        if name in fields and values is not None and fields[name] not in values
    ]
    rope: dict[str, Any] = {}
    special: dict[str, Any] = {}
    attention: dict[str, Any] = {}
    try:
        if (window := family.window(fields)) is not None and window < fields["max_position_embeddings"]:
            reasons.append(
                f"a sliding window of {window} tokens is in use, dense attention here has none: set sliding_window to "
                "null to train with full attention, which differs beyond that length"
            )
        rope = read_rope(fields)
        reasons += family.problems(fields)
        special, attention = family.model(fields), family.attention(fields)
    except (ValueError, TypeError, ZeroDivisionError, AttributeError) as error:
        reasons.append(str(error))
    if reasons:
        raise FolderError(f"{path} has what cannot be honoured:\n" + "\n".join(f"  {reason}" for reason in reasons))
    model = {
        "vocab_size": size("vocab_size"),
        "hidden_size": hidden,
        "num_layers": size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": size("num_key_value_heads", heads),
        "head_dim": size("head_dim", hidden // heads),
        "intermediate_size": size("intermediate_size"),
        "max_position": size("max_position_embeddings"),
        **rope,
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
        "init_std": fields.get("initializer_range", 0.02),
        **special,
    }
    try:
        check_projection(ModelConfig.model_validate(model), AttentionConfig.model_validate(attention))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise FolderError(f"{path} describes no model that can be trained: {'; '.join(wrong)}") from None
    except ValueError as error:
        raise FolderError(f"{path} describes no model that can be trained: {error}") from None
    return {"model": model, "attention": attention}


def read_sections(folder: Path | str) -> tuple[ModelConfig, AttentionConfig]:
    """As `read_config`, as sections of a configuration."""
    sections = read_config(folder)
    return ModelConfig.model_validate(sections["model"]), AttentionConfig.model_validate(sections["attention"])


class WeightReader:
    """Reads single weights of a folder by their names in a `Decoder` of ``model``, in the dtype they have there.

    Its attention is what `read_config` says. Weights that are multiplied by a factor (the last of experts) are fp32.
    ``model`` is what `read_config` says, or that with another range, rotary embedding or tie of the embeddings.

    Raises:
        FolderError: weights are missing, unknown, of another shape, or not in safetensors. They are named.
    """

    def __init__(self, folder: Path | str, model: ModelConfig) -> None:
        self._folder, self._model = Path(folder), model
        config = _config_of(self._folder)
        family = _family_of(self._folder, config)
        fields = {**family.defaults, **config}
        found = _headers(self._folder)
        if len(found) < model.num_layers:  # before so many are built
            raise FolderError(
                f"{self._folder} has {len(found)} tensors, fewer than the {model.num_layers} layers of config.json"
            )
        with torch.device("meta"):
            decoder = Decoder(model, read_sections(folder)[1])
        wanted = {name: list(tensor.shape) for name, tensor in decoder.state_dict().items()}
        self._theirs = {name: _their_names(family, name, shape) for name, shape in wanted.items()}
        self._factors = family.factors(fields)
        if not found.keys() & set(self._theirs["head.weight"]) and fields.get("tie_word_embeddings", False):
            self._theirs["head.weight"] = self._theirs["embedding.weight"]
        found = {name: entry for name, entry in found.items() if not _predicts_later_tokens(name, config)}
        _check_names(self._folder, family, {name for names in self._theirs.values() for name in names}, found.keys())
        wrong = [
            f"{name} is {found[name][1]['shape']}, the configuration says {shape}"
            for ours, names in self._theirs.items()
            for name, shape in ((n, wanted[ours] if len(names) == 1 else wanted[ours][:0:-1]) for n in names)
            if found[name][1]["shape"] != shape
        ]
        if wrong:
            words = f"weights of another shape: {_some(wrong, '; ')}"
            raise FolderError(f"{self._folder}: {words}; is config.json of this model?")
        if others := sorted({entry["dtype"] for _, entry in found.values()} - set(DTYPES)):
            raise FolderError(
                f"{self._folder}: weights of type {', '.join(others)} cannot be trained: use unquantized weights"
            )
        self._paths = {name: path for name, (path, _) in found.items()}
        self._files: dict[Path, Any] = {}

    def names(self) -> list[str]:
        return list(self._theirs)

    def __call__(self, name: str) -> Tensor:
        """The weight, on the CPU. Raises KeyError if there is none of this name."""
        parts = [self._read(theirs) for theirs in self._theirs[name]]
        tensor = parts[0] if len(parts) == 1 else torch.stack([part.mT for part in parts])
        factor = self._factors.get(_pattern(name)[0])
        return tensor if factor is None else tensor.float() * factor

    def _read(self, theirs: str) -> Tensor:
        path = self._paths[theirs]
        try:
            if path not in self._files:
                self._files[path] = safe_open(path, framework="pt")
            return self._files[path].get_tensor(theirs)
        except (SafetensorError, OSError) as error:
            raise FolderError(f"{path}: {error}") from None

    def check_tie(self) -> None:
        """Raise FolderError if the model ties two weights that differ in the folder."""
        head, embedding = self._theirs["head.weight"], self._theirs["embedding.weight"]
        if not self._model.tie_embeddings or head == embedding:
            return
        if not torch.equal(self("head.weight"), self("embedding.weight")):
            raise FolderError(
                f"{self._folder}: {head[0]} differs from {embedding[0]}, so they cannot be one tensor: set "
                "model.tie_embeddings to false"
            )


def read_weights(folder: Path | str, model: ModelConfig) -> dict[str, Tensor]:
    """The state dict of a `Decoder` of ``model``: all weights of a folder at once. As `WeightReader`.

    Tied weights are one tensor under two names.
    """
    reader = WeightReader(folder, model)
    reader.check_tie()
    weights = {name: reader(name) for name in reader.names()}
    head, embedding = weights["head.weight"], weights["embedding.weight"]
    if model.tie_embeddings:
        weights["head.weight"] = embedding
    elif head.data_ptr() == embedding.data_ptr():  # both are the mapped file
        weights["head.weight"] = embedding.clone()
    return weights


def _config_of(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise FolderError(f"{folder} has no config.json: name the folder of a model in Hugging Face's format")
    try:
        config = read_json(inside(folder, "config.json"))
    except (ValueError, OSError) as error:
        raise FolderError(f"{folder}: {error}") from None
    if not isinstance(config, dict):
        raise FolderError(f"{folder / 'config.json'} is no object")
    return config


def _family_of(folder: Path, config: dict[str, Any]) -> Family:
    names = config.get("architectures")
    for family in FAMILIES:
        if names == [family.architecture]:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise FolderError(f"{folder / 'config.json'}: architectures is {names!r}; those that can be imported are {known}")


def _pattern(name: str) -> tuple[str, str | None]:
    """A name with {} in place of the layer's number, and the number."""
    number = re.search(r"(?<=^layers\.)\d+(?=\.)", name)
    return (name, None) if number is None else (f"layers.{{}}{name[number.end() :]}", number[0])


def _their_names(family: Family, name: str, shape: list[int]) -> list[str]:
    """Of the tensor, or of all experts' if it is of experts."""
    if family.tensors is None:
        return [name]
    pattern, number = _pattern(name)
    if pattern not in family.tensors:
        raise FolderError(
            f"model has {name}, which {family.architecture} lacks: use the model section that read_config gives"
        )
    theirs = family.tensors[pattern]
    experts = range(shape[0] if "{expert}" in theirs else 1)
    return [theirs.format(number, expert=expert) for expert in experts]


def _predicts_later_tokens(name: str, config: dict[str, Any]) -> bool:
    """Whether it is of a layer after the last, as DeepSeek-V3 has one for the token after the next."""
    layers, more = config["num_hidden_layers"], config.get("num_nextn_predict_layers")
    number = re.match(r"model\.layers\.(\d+)\.", name)
    return number is not None and type(more) is int and layers <= int(number[1]) < layers + more


def _headers(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name of each tensor -> its file, and its dtype and shape."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for name in _files(folder):
        try:
            path = inside(folder, name)
            header = check_safetensors(path)
        except FileNotFoundError:
            raise FolderError(f"{folder}: {name}, which {INDEX} names, is not there: download it again") from None
        except (ValueError, OSError) as error:
            raise FolderError(f"{folder}: {error}") from None
        for tensor, entry in header.items():
            if tensor in found:
                raise FolderError(f"{path}: tensor {tensor} is in another file, too")
            if not COMPUTED.fullmatch(tensor):
                found[tensor] = (path, entry)
    return found


def _files(folder: Path) -> list[str]:
    """Names of the files of weights."""
    if (folder / INDEX).exists():
        try:
            index = read_json(inside(folder, INDEX))
            return sorted(set(index["weight_map"].values()))
        except (ValueError, OSError) as error:
            raise FolderError(f"{folder}: {error}") from None
        except (KeyError, TypeError, AttributeError):
            raise FolderError(f"{folder / INDEX} has no weight_map: download it again") from None
    if (folder / WHOLE).exists():
        return [WHOLE]
    if any(next(folder.glob(pattern), None) for pattern in PICKLED):
        raise FolderError(
            f"{folder} has its weights pickled only, and a pickle can run any code. If you trust it, convert it: "
            f"AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT) of transformers writes {WHOLE}"
        )
    raise FolderError(f"{folder} has neither {WHOLE} nor {INDEX}: download the weights")


def _check_names(folder: Path, family: Family, wanted: set[str], found: Iterable[str]) -> None:
    missing, unknown = sorted(wanted - set(found)), sorted(set(found) - wanted)
    if missing or unknown:
        parts = [f"has no {_some(missing)}"] if missing else []
        parts += [f"has {_some(unknown)}, which {family.architecture} of this configuration has not"] if unknown else []
        raise FolderError(f"{folder} {' and '.join(parts)}; is config.json of this model, and the download complete?")


def _some(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more
