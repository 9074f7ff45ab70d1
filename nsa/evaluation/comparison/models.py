"""Models that a comparison opens: exports of ours, and Hugging Face folders."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nsa.baselines import Ledger, Method, Session
from nsa.evaluation.comparison.decoding import DecoderReader, Reader, check, turn_of
from nsa.exporting import load_decoder
from nsa.exporting.folder import CONFIG
from nsa.models import Decoder


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
        """A reader with the method put onto it; None: as it was trained.

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
        self.trained = "+".join(dict.fromkeys(layer.kind.name for layer in self.decoder.layers))  # type: ignore[union-attr, misc]
        self.parameters = sum(p.numel() for p in self.decoder.parameters())
        self.num_layers, self.reaches = config.num_layers, config.max_position
        self.kv_elements = (
            config.num_layers * config.num_kv_heads * (config.head_dim + (config.v_head_dim or config.head_dim))
        )

    def reader(self, method: Method | None, *, dense_layers: list[int], watch: bool, ledger: Ledger) -> Reader:
        if method is None:
            return DecoderReader(self.decoder, None, ledger)
        session = Session(
            method, self.num_layers, turn=turn_of(self.decoder), dense_layers=dense_layers, ledger=ledger, watch=watch
        )
        check(self.decoder, session)
        return DecoderReader(self.decoder, session)


def open_model(name: str, folder: Path) -> Opened:
    """Open an export of ours, or another Hugging Face folder.

    Raises:
        ValueError: the folder is neither.
    """
    if (folder / CONFIG).is_file():
        decoder, config, tokenizer = load_decoder(folder)
        return OpenedDecoder(name, decoder.eval().requires_grad_(False), tokenizer, config.seed)
    raise ValueError(f"{folder} is no export: it has no {CONFIG}; make one with python -m nsa.export RUN")
