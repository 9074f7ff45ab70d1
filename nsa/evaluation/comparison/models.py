"""Models that a comparison opens: exports of ours, and Hugging Face folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa.baselines import Ledger, Method, Session
from nsa.baselines.methods.dense import Dense
from nsa.config import load_config, load_saved
from nsa.data.load_tokenizer import tokenizer_files
from nsa.evaluation.comparison.config import Training
from nsa.evaluation.comparison.decoding import DecoderReader, Reader, check, turn_of
from nsa.evaluation.comparison.hugging_face import TransformersReader, session_of
from nsa.exporting import load_decoder, load_imported
from nsa.exporting.folder import CONFIG, is_export
from nsa.importing import read_sections
from nsa.importing.folder import is_own
from nsa.models import AttentionConfig, Decoder, ModelConfig
from nsa.untrusted import regular_size


class Opened(Protocol):
    """A model with what a comparison must know of it.

    trained: the kind of attention that it was trained with. parameters: how many. train_seed: of its training.
    num_layers: of attention. kv_elements: elements of keys and values per token, all layers together.
    reaches: the longest sequence it was made for, in tokens.
    """

    name: str
    trained: str
    parameters: int
    train_seed: int
    tokenizer: Any
    num_layers: int
    kv_elements: int
    reaches: int

    def reader(self, method: Method | None, *, dense_layers: list[int], watch: bool, ledger: Ledger) -> Reader:
        """A reader with the method put onto it; None: as it was trained. ``watch``: measure what decoding attends to.

        Raises:
            AttachError: the method cannot be put onto this model.
        """


@dataclass
class OpenedDecoder:
    """A decoder of ours: see `Opened`."""

    name: str
    decoder: Decoder
    tokenizer: Any
    train_seed: int

    def __post_init__(self) -> None:
        config = self.decoder.config
        self.trained = trained_as(config, self.decoder.attention)
        self.parameters = sum(p.numel() for p in self.decoder.parameters())
        self.num_layers, self.reaches = config.num_layers, config.max_position
        width = config.head_dim + config.attention_shape.v_head_dim
        self.kv_elements = config.num_layers * config.num_kv_heads * width

    def reader(self, method: Method | None, *, dense_layers: list[int], watch: bool, ledger: Ledger) -> Reader:
        if method is None:
            return DecoderReader(self.decoder, None, ledger)
        session = Session(
            method,
            self.num_layers,
            turn=turn_of(self.decoder),
            dense_layers=dense_layers,
            ledger=ledger,
            watch=("decode",) if watch else (),
        )
        check(self.decoder, session)
        return DecoderReader(self.decoder, session)


@dataclass
class OpenedTransformers:
    """A model of transformers, which is dense: see `Opened`."""

    trained, train_seed = "dense", 0

    name: str
    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        config = self.model.config
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.num_layers, self.reaches = config.num_hidden_layers, config.max_position_embeddings
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_elements = 2 * config.num_hidden_layers * config.num_key_value_heads * width

    def reader(self, method: Method | None, *, dense_layers: list[int], watch: bool, ledger: Ledger) -> Reader:
        watched = ("decode",) if watch else ()
        session = session_of(self.model, method or Dense(), dense_layers=dense_layers, ledger=ledger, watch=watched)
        return TransformersReader(self.model, session)


@dataclass(frozen=True)
class Candidate:
    """A training of a sibling, before it is opened.

    seed: of the configuration's list; None: there is none. folder: its export. trained, train_seed: as in `Opened`.
    """

    name: str
    seed: int | None
    folder: Path
    trained: str
    train_seed: int

    @property
    def label(self) -> str:
        """In messages."""
        return self.name if self.seed is None else f"{self.name}#{self.seed}"


def candidate_of(training: Training) -> Candidate:
    """A training, whether it is done or not.

    Raises:
        ValueError: it is not done here, and there is no export and no Hugging Face folder.
    """
    name, seed, folder = training.sibling.name, training.seed, training.export
    if is_export(folder):
        config = load_saved(folder / CONFIG)
    elif training.arguments is not None:
        config = load_config(training.arguments[0], training.arguments[1:])
    elif is_own(folder):
        model, attention = read_sections(folder)
        tokenizer_files(folder)  # says what is missing
        return Candidate(name, seed, folder, trained_as(model, attention), seed or 0)
    elif (folder / "config.json").is_file():
        return Candidate(name, seed, folder, OpenedTransformers.trained, seed or 0)
    else:
        raise ValueError(_neither(folder))
    trained = trained_as(config.model, config.attention)
    return Candidate(name, seed, folder, trained, config.seed if seed is None else seed)


def _neither(folder: Path) -> str:
    return f"{folder} is no export and no Hugging Face folder: it has no config.json"


def trained_as(model: ModelConfig, attention: AttentionConfig) -> str:
    """The kinds of attention of a model, in the order of its layers."""
    return "+".join(dict.fromkeys(kind.name for kind in attention.pattern(model.num_layers)))


def open_model(name: str, folder: Path, device: torch.device | str = "cpu") -> Opened:
    """Open an export of ours, or another Hugging Face folder, for answers that are computed on ``device``.

    An export that transformers saved again is one of ours, whose seed is not known: 0.

    Raises:
        ValueError: the folder is neither.
        AttachError: methods cannot be put onto this model.
    """
    if is_export(folder):
        decoder, config, tokenizer = load_decoder(folder)
        return OpenedDecoder(name, decoder.to(device), tokenizer, config.seed)
    if is_own(folder):
        decoder, tokenizer = load_imported(folder)
        return OpenedDecoder(name, decoder.to(device), tokenizer, 0)
    if not (folder / "config.json").is_file():
        raise ValueError(_neither(folder))
    try:
        for path in folder.iterdir():
            if not path.is_dir():
                regular_size(path, follow=True)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: {error}") from error
    session_of(model, Dense())  # refuses what methods cannot be put onto
    return OpenedTransformers(name, model.eval().requires_grad_(False).to(device), theirs)
