"""Methods on models of transformers: Llama, Qwen2, Qwen3, Mistral. Nothing is patched; what is set is set back."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer

from nsa.baselines import Ledger, Method, Session, Turn
from nsa.evaluation.comparison.decoding import AttachError

NAME = "method_of_nsa"  # among the attention functions of transformers
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_sessions: "WeakKeyDictionary[nn.Module, Session]" = WeakKeyDictionary()  # by layer of attention


class SessionCache(Cache):
    """The cache of a model whose keys and values a session keeps: layers hand over what is new."""

    def __init__(self, session: Session) -> None:
        self.session = session
        super().__init__(layers=[_Layer(session, number) for number in range(session.num_layers)])


class _Layer(DynamicLayer):
    def __init__(self, session: Session, number: int) -> None:
        super().__init__()
        self.session, self.number = session, number

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.session.lengths[self.number]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.session.lengths[self.number] + int(query_length), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise AttachError("beam search reorders what a method keeps: use num_beams=1")

    def crop(self, max_length: int) -> None:
        raise AttachError("a method cannot remove tokens that it has read: do not use assisted generation")


@contextmanager
def attached(model: Any, method: Method | Session, *, dense_layers: Iterable[int] = ()) -> Iterator[Session]:
    """Within: the model attends by the method, in `generate` as in single calls; afterwards it is as it was.

        with attached(model, Quest(budget=Budget(share=1 / 8))) as session:
            model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"))
        print(session.ledger.shares())

    A call without a cache, or with one from elsewhere, begins a batch: its tokens are the prompt. Batches may be padded
    on the left, with an ``attention_mask``. One token more is decoded.

    Args:
        model: a Llama, Mistral, Qwen2 or Qwen3 of transformers, with or without its head.
        method: or a session, which goes on. dense_layers: layers that stay dense.

    Raises:
        AttachError: the model has layers with a sliding window, is of another family, or generates by beams.
    """
    layers = _attention_layers(model)
    session = method if isinstance(method, Session) else session_of(model, method, dense_layers=dense_layers)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _no_mask)
    before = model.config._attn_implementation
    handle = model.register_forward_pre_hook(_Begin(session, model), with_kwargs=True)
    try:
        for layer in layers:
            _sessions[layer] = session
        model.set_attn_implementation(NAME)
        yield session
    finally:
        handle.remove()
        model.set_attn_implementation(before)
        for layer in layers:
            _sessions.pop(layer, None)


def session_of(
    model: Any,
    method: Method,
    *,
    dense_layers: Iterable[int] = (),
    ledger: Ledger | None = None,
    watch: Iterable[str] = (),
) -> Session:
    """A session for `attached`. Raises AttachError as there."""
    return Session(
        method,
        len(_attention_layers(model)),
        turn=Turn(model.base_model.rotary_emb.inv_freq.float()),
        dense_layers=dense_layers,
        ledger=ledger,
        watch=watch,
    )


class TransformersReader:
    """A causal language model of transformers as a `nsa.evaluation.comparison.decoding.Reader`."""

    def __init__(self, model: Any, session: Session) -> None:
        self.model, self.session, self.ledger = model, session, session.ledger

    def begin(self) -> None:
        self.session.begin()

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        cache = SessionCache(self.session) if self.session.length else None
        with attached(self.model, self.session):
            out = self.model(ids.to(self.model.device), **{_cache_name(self.model): cache}, logits_to_keep=1)
        return out.logits[:, -1].float().cpu()

    def end_prompt(self) -> None:
        self.session.end_prompt()

    def follow(self, other: "TransformersReader") -> None:
        self.session.follow(other.session)

    def take(self, sequences: Tensor) -> "TransformersReader":
        return TransformersReader(self.model, self.session.take(sequences))


class _Begin:
    """Before each pass of the model: begins a batch, or goes on with one, in the session's cache."""

    def __init__(self, session: Session, model: Any) -> None:
        self.session, self.name = session, _cache_name(model)

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = args[0] if args else kwargs.get("input_ids")
        tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        old = [kwargs.pop(name, None) for name in ("cache", "past_key_values")]
        cache = next((c for c in old if isinstance(c, SessionCache) and c.session is self.session), None)
        if cache is None or self.session.length == 0:
            self.session.begin(_padding(kwargs.get("attention_mask")))
            cache = SessionCache(self.session)
        elif tokens == 1:
            self.session.end_prompt()
        elif not self.session.prompt:
            raise AttachError("after the prompt tokens come one at a time")
        return args, kwargs | {self.name: cache, "use_cache": True}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `AttentionInterface` calls it: heads before tokens in, tokens before heads out."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = q.shape[3] ** -0.5 if scaling is None else scaling
    return _sessions[module].attend(module.layer_idx, q, k, v, scale), None  # type: ignore[arg-type]


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The session knows what is padding."""


def _padding(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dim() != 2:
        return None
    padding = (mask == 0).sum(1)
    if bool((mask.cumsum(1).gt(0).sum(1) + padding != mask.shape[1]).any()):
        raise AttachError("batches must be padded on the left: set tokenizer.padding_side = 'left'")
    return padding


def _cache_name(model: Any) -> str:
    """Of the argument: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def _attention_layers(model: Any) -> list[nn.Module]:
    config = model.config
    if config.model_type not in FAMILIES:
        raise AttachError(f"methods are put onto {', '.join(FAMILIES)}, not onto {config.model_type}")
    types = getattr(config, "layer_types", None) or []
    if "sliding_attention" in types or (config.model_type == "mistral" and config.sliding_window is not None):
        raise AttachError("this model has layers with a sliding window: a method would widen them")
    return [layer.self_attn for layer in model.base_model.layers]
