"""A decoder with sparse or dense attention, for `transformers`: with the files beside it, it travels with the weights,
and needs torch and transformers only.

Sizes in the comments: B rows, T new tokens, C hidden, D the width of a key head. Parameter names are the trainer's own.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)

from .attention_nsa import (
    BlockCompression,
    DenseAttention,
    NativeSparseAttention,
    RMSNorm,
    RotaryTables,
    rotary_tables,
)
from .cache_nsa import ChosenTokens, NSACache, Step
from .configuration_nsa import NSAConfig
from .entmax_nsa import EntmaxAttention
from .entries_nsa import CompressedSparseAttention, Compressor
from .indexer_nsa import indexer_of
from .latent_nsa import LatentAttention

try:  # parts that LoRA adapts if none are named, as for other models: queries and values (of CSA queries alone: its
    # key_value has the name of a dictionary of NSA's)
    from peft.utils import constants
except ImportError:
    pass
else:
    values = ["attention.value", "compressed.value", "selected.value", "window.value", "query_up", "key_value_up"]
    constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault("nsa", ["attention.query", *values])

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__annotations__ else "past_key_values"  # from 5.24 on, before

# ---- Decoder ----


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """The experts of each token (N, K) and their gates (DeepSeek-V3, arXiv 2412.19437, Eq. 13 to 16).

    The bias, which balanced the load in training, enters the choice alone. Computed in fp32.
    """

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.top_k = config.num_experts_per_token
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("bias", torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            affinities = (x.to(dtype) @ self.weight.to(dtype).T).sigmoid()
        chosen = (affinities + self.bias).sort(dim=-1, descending=True, stable=True).indices[:, : self.top_k]
        gates = affinities.gather(-1, chosen)
        return chosen, gates / (gates.sum(-1, keepdim=True) + 1e-20)


class Experts(nn.Module):
    """The weights of all routed experts, each a SwiGLU."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_size))
        self.up = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_size))
        self.down = nn.Parameter(torch.empty(config.num_experts, config.expert_size, config.hidden_size))

    def forward(self, x: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """The sum of what the experts ``chosen`` (N, K) make of the tokens x (N, C), times ``gates`` (N, K)."""
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            token, rank = (chosen == number).nonzero(as_tuple=True)
            hidden = silu(x[token] @ self.gate[number]) * (x[token] @ self.up[number])
            routed = hidden @ self.down[number] * gates[token, rank, None]
            out = out.index_add(0, token, routed.to(x.dtype))  # the gates are fp32, and autocast has a dtype of its own
        return out


class MixtureOfExperts(nn.Module):
    """The shared experts, and the routed ones that each token chose, times their gates (arXiv 2401.06066)."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.num_shared_experts * config.expert_size
        self.shared = MLP(config.hidden_size, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        out = self.experts(rows, *self.router(rows))
        if self.shared is not None:
            out = out + self.shared(rows)
        return out.view_as(x)


class NSADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: NSAConfig, kind: str, number: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        projected = DenseAttention if config.projection == "gqa" else LatentAttention
        self.attention = {
            "dense": lambda: projected(config, number),
            "dsa": lambda: projected(config, number, indexer_of(config, number)),
            "nsa": lambda: NativeSparseAttention(config, number),
            "csa": lambda: CompressedSparseAttention(config, number),
            "entmax": lambda: EntmaxAttention(config, number),
        }[kind]()
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        routed = config.num_experts and number >= config.first_dense
        self.mlp = MixtureOfExperts(config) if routed else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, cache: NSACache | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, step, cache=cache)
        return x + self.mlp(self.mlp_norm(x))


# ---- Models ----


def rows_of_documents(positions: Tensor, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Row and slot (N,) of each real token, where every document of a row gets a row of its own.

    Args:
        positions: (B, T), of each token in its document: they go up by one, and back where the next one begins.
        slots, real: (B, T), the number of each token in its row, and False where it is padded.

    Raises:
        ValueError: positions leave some out.
    """
    row, column = real.nonzero(as_tuple=True)
    position, slot = positions[row, column], slots[row, column]
    first = slot == 0
    gap = position.diff(prepend=position[:1])
    if (~first & (gap > 1)).any():
        raise ValueError("position_ids must go up by one from token to token, or back where a document begins")
    begins = first | (gap < 1)
    starts = begins.nonzero()[:, 0]
    document = begins.cumsum(0) - 1
    return document, torch.arange(len(row), device=row.device) - starts[document]


class NSAPreTrainedModel(PreTrainedModel):
    config_class = NSAConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["NSADecoderLayer"]  # noqa: RUF012 - as transformers declares it
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 - rounded, it would choose other experts
    _keys_to_ignore_on_load_unexpected = [r"^head\."]  # noqa: RUF012 - of an untied head, which NSAModel lacks

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockCompression | Compressor):
            nn.init.zeros_(module.position)
        elif isinstance(module, CompressedSparseAttention):
            nn.init.zeros_(module.sink)
        elif isinstance(module, Router | Experts):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range)


class NSAModel(NSAPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NSADecoderLayer(config, kind, i) for i, kind in enumerate(config.attention_kinds))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if type(self) is NSAModel:
            self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    @property
    def base_model(self) -> "NSAModel":
        """This decoder without its head: a view that shares its parts, as trl asks for the states before the head."""
        if type(self) is NSAModel:
            return self
        view = NSAModel.__new__(NSAModel)
        view.__dict__ = {key: value for key, value in self.__dict__.items() if key not in ("forward", "_old_forward")}
        view._modules = {name: module for name, module in self._modules.items() if name not in ("head", "score")}
        return view

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NSACache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: NSACache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states (B, T, C) after the last norm; zeros where padded.

        Args:
            input_ids: (B, T) int64; or inputs_embeds: (B, T, C).
            attention_mask: (B, columns so far) or (B, T), 0 where padded; None: no padding.
            position_ids: (B or 1, T). Where they go back, another document begins, which sees nothing before it; None:
                a row is one document.
            past_key_values: the cache that an earlier call returned; the T tokens are added to it.
            output_hidden_states: also those before every layer, with the result as the last.
            cache: the same as past_key_values, by the name that `transformers` gives it from 5.24 on.

        Raises:
            ValueError: attention weights are asked for, or an argument is not as above.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise ValueError("output_attentions: a sparse layer has no matrix of attention weights to return")
        keep_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        x, cache, step, restore = self._arrange(
            input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache
        )
        rotary, states = rotary_tables(self.config, step.slots), []
        for layer in self.layers:
            states += [restore(x)] if keep_all else []
            x = layer(x, rotary, step, cache=cache)
        x = restore(self.norm(x))
        output = BaseModelOutputWithPast(
            x, cache, (*states, x) if keep_all else None
        )  # its name depends on the release
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _arrange(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: NSACache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
    ) -> tuple[Tensor, NSACache | None, Step, Callable[[Tensor], Tensor]]:
        """Embeddings with the tokens of a row moved together, the cache, their slots, and the way back."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if cache is not None and not isinstance(cache, NSACache):
            raise ValueError(f"the cache must be an NSACache, or None, not {type(cache).__name__}")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (rows, columns), not {tuple(attention_mask.shape)}")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        rows, tokens = x.shape[:2]
        if self.layers[0].gradient_checkpointing and self.training and torch.is_grad_enabled():
            cache, use_cache = None, False  # a layer that runs twice would write twice
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = NSACache(self.config.num_hidden_layers)

        seen = None if cache is None else cache.seen
        real = torch.ones(rows, tokens, dtype=torch.bool, device=x.device)
        if attention_mask is not None:
            past = 0 if seen is None else seen.shape[1]
            if attention_mask.shape[0] not in (1, rows) or attention_mask.shape[1] not in (tokens, past + tokens):
                raise ValueError(
                    f"attention_mask has the shape {tuple(attention_mask.shape)}: it needs {rows} rows (or one for "
                    f"all) and {past + tokens} columns, one for each token so far"
                )
            real = attention_mask[:, -tokens:].to(x.device).bool().expand(rows, tokens)
        before = torch.zeros(rows, dtype=torch.long, device=x.device) if seen is None else seen.sum(1)
        after = before + real.sum(1)
        row, column = real.nonzero(as_tuple=True)
        order = real.cumsum(1) - 1  # of a token among those that are not padding
        to_row, to_slot, shape = row, order[row, column], (rows, tokens)
        if position_ids is not None:
            positions = position_ids.to(x.device).expand(rows, tokens)
            if seen is not None and (positions != order + before[:, None])[row, column].any():
                raise ValueError("position_ids must continue where the cache ends")
            document, place = rows_of_documents(positions, order, real)
            if seen is None and (counts := document.bincount()).numel() > int((after > 0).sum()):
                cache = None  # a row of several documents is nothing to go on from
                to_row, to_slot, shape = document, place, (counts.numel(), int(counts.max()))
                before, after = torch.zeros_like(counts), counts
        if cache is not None:
            cache.seen = real if seen is None else torch.cat((seen, real), 1)
        slots = before[:, None] + torch.arange(shape[1], device=x.device)
        step = Step(slots, int(slots.max()) + 1, int(before.min()), int(after.min()), ChosenTokens())
        if shape == (rows, tokens) and bool(real.all()):
            return x, cache, step, lambda y: y

        def restore(y: Tensor) -> Tensor:
            return y.new_zeros(rows, tokens, y.shape[2]).index_put((row, column), y[to_row, to_slot])

        return x.new_zeros(*shape, x.shape[2]).index_put((to_row, to_slot), x[row, column]), cache, step, restore


class NSAForCausalLM(NSAModel, GenerationMixin):
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the cache is our own

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Assisted generation asks for a cache before the first call of `forward`, and takes tokens back."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = NSACache(self.config.num_hidden_layers)
            drafts = getattr(generation_config, "is_assistant", False)
            if drafts or generation_mode == GenerationMode.ASSISTED_GENERATION:
                model_kwargs[CACHE].activate_past_recording()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NSACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        cache: NSACache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, V), or of the columns ``logits_to_keep`` (their number from the end, or their indices).

        The loss is that of `transformers` if ``labels`` (B, T; -100: not counted) are given, then of all columns:
        `num_items_in_batch`, in place of the number of labels, comes from the Trainer. The other arguments are those of
        `NSAModel.forward`.
        """
        decoded = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache=cache,
        )
        x, cache, loss = decoded.last_hidden_state, decoded.get(CACHE), None
        if labels is None:
            x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.head(x)
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(loss, logits, cache, decoded.hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class NSAForSequenceClassification(NSAModel):
    """The decoder with a linear head on the last token of each row; ``config.num_labels`` is its width."""

    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: NSACache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: NSACache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Logits (B, num_labels) of the last token of each row that is not ``pad_token_id`` (with ``inputs_embeds``: of
        the last one), and the loss that `transformers` has for ``labels`` (B,): classes, or numbers for one label.

        Raises:
            ValueError: several rows, and the configuration has no ``pad_token_id``.
        """
        decoded = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache=cache,
        )
        x, pad = decoded.last_hidden_state, self.config.pad_token_id
        if pad is None and len(x) > 1:
            raise ValueError(
                "rows of different lengths need padding: set config.pad_token_id, or give one row at a time"
            )
        last = torch.full((len(x),), x.shape[1] - 1, device=x.device)
        if pad is not None and input_ids is not None:
            last = (torch.arange(x.shape[1], device=x.device) * input_ids.to(x.device).ne(pad)).argmax(-1)
        logits, loss = self.score(x[torch.arange(len(x), device=x.device), last]), None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutputWithPast(loss, logits, decoded.get(CACHE), decoded.hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()
