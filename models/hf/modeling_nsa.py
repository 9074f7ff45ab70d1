"""A decoder with sparse or dense attention, for `transformers`: with the two files beside it, it travels with the
weights, and needs torch and transformers only.

Sizes in the comments: B rows, T new tokens, C hidden, D the width of a key head. Parameter names are the trainer's own.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention_nsa import BlockCompression, DenseAttention, NativeSparseAttention, NSACache, RotaryTables, Span, Step
from .configuration_nsa import NSAConfig

# ---- Decoder ----


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)


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


class MixtureOfExperts(nn.Module):
    """The shared experts, and the routed ones that each token chose, times their gates (arXiv 2401.06066)."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        width = config.num_shared_experts * config.expert_size
        self.shared = MLP(config.hidden_size, width) if width else None

    def forward(self, x: Tensor) -> Tensor:
        rows, experts = x.flatten(0, 1), self.experts
        chosen, gates = self.router(rows)
        out = torch.zeros_like(rows) if self.shared is None else self.shared(rows)
        for number in chosen.unique().tolist():
            token, rank = (chosen == number).nonzero(as_tuple=True)
            hidden = silu(rows[token] @ experts.gate[number]) * (rows[token] @ experts.up[number])
            out = out.index_add(0, token, hidden @ experts.down[number] * gates[token, rank, None].to(x.dtype))
        return out.view_as(x)


class NSADecoderLayer(nn.Module):
    def __init__(self, config: NSAConfig, kind: str, number: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = {"dense": DenseAttention, "nsa": NativeSparseAttention}[kind](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        routed = config.num_experts and number >= config.first_dense
        self.mlp = MixtureOfExperts(config) if routed else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, spans: dict[str, Span] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, step, spans)
        return x + self.mlp(self.mlp_norm(x))


class NSAForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NSAConfig
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012 - as transformers declares it
    _no_split_modules = ["NSADecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["router"]  # noqa: RUF012 - rounded, it would choose other experts
    _is_stateful = True  # the cache cannot forget tokens, so `generate` refuses assisted decoding

    def __init__(self, config: NSAConfig):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NSADecoderLayer(config, kind, i) for i, kind in enumerate(config.attention_kinds))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` then leaves the cache to `forward`

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockCompression):
            nn.init.zeros_(module.position)
        elif isinstance(module, Router | Experts):
            for weight in module.parameters(recurse=False):
                nn.init.normal_(weight, std=self.config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: NSACache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        cache: NSACache | None = None,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits (B, T, V), or of the last ``logits_to_keep`` columns; loss if ``labels`` (B, T; -100: not counted).

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, columns so far) or (B, T), 0 where padded; None: no padding. Positions follow from it.
            past_key_values: the cache that an earlier call returned; the T tokens are added to it.
            cache: the same, by the name that `transformers` gives it from 5.24 on.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument: give one of them")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, NSACache):
            raise ValueError(f"the cache must be an NSACache, or None, not {type(cache).__name__}")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (rows, columns), not {tuple(attention_mask.shape)}")
        rows, tokens = input_ids.shape
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = NSACache(self.config.num_hidden_layers)

        order = None
        counts = torch.full((rows,), tokens, device=input_ids.device)
        if attention_mask is not None and not (real := attention_mask[:, -tokens:].bool()).all():
            counts = real.sum(1)
            order = (~real).to(torch.uint8).argsort(dim=1, stable=True)  # real tokens first, as they come
            input_ids = input_ids.gather(1, order)
        before = torch.zeros_like(counts) if cache is None or cache.lengths is None else cache.lengths
        slots = before[:, None] + torch.arange(tokens, device=input_ids.device)
        step = Step(slots, int(slots.max()) + 1, int(before.min()), int((before + counts).min()))

        x, rotary = self.embedding(input_ids), RotaryTables(self.config, slots)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotary, step, None if cache is None else cache.layers[i])
        if cache is not None:
            cache.lengths, cache.columns = before + counts, cache.columns + tokens
        if order is not None:  # back to the columns they came from
            x = torch.zeros_like(x).scatter(1, order[..., None].expand_as(x), x)
        logits = self.head(self.norm(x if labels is not None else x[:, -logits_to_keep:]))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss, logits, cache)  # by position: its name depends on the release
        return output if return_dict else output.to_tuple()
