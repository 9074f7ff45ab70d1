"""A decoder with Native Sparse Attention (NSA, arXiv 2502.11089), for `transformers`: one file that travels with the
weights and needs torch and transformers only.

It is written to be read beside the paper. Every branch is a masked softmax over its keys, computed a chunk of queries
at a time: memory is linear in the prompt, time is that of dense attention. Parameter names are the trainer's own.

Sizes in the comments: B rows, T new tokens, S keys, C hidden, H query heads, G KV heads, h = H / G, D and V the widths
of key and value heads, M selection blocks. Softmax is fp32 (or more) whatever the dtype of the weights.

Padding may be anywhere: the tokens of a row are first moved together, so that slot j of a row is its j-th real token.
Positions and blocks count slots; padded tokens take part in nothing, and their logits mean nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot, pad, silu
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

CHUNK_SCORES = 2**25  # attention scores that exist at a time: 128 MiB in fp32


class NSAConfig(PreTrainedConfig):
    """Shape of the decoder. Lengths are in tokens.

    Args:
        vocab_size, hidden_size, intermediate_size: widths of the embedding, the residual stream and the SwiGLU.
        num_hidden_layers, num_attention_heads, num_key_value_heads: the last divides the one before it.
        head_dim: of queries and keys. v_head_dim: of values; None: head_dim.
        attention_kinds: "dense" or "nsa" for each layer.
        compress_length, compress_stride: tokens in a compression block (l) and between two of them (d).
        compress_hidden: hidden width of the compression MLP; None: the head's.
        block_size, num_blocks: tokens in a selection block (l'), blocks that a query selects (n).
        num_initial, num_local: blocks that are always among them: the first, the most recent (the query's own too).
        window: tokens that the sliding window sees, the query's own included (w).
        num_experts, num_experts_per_token: routed experts of a layer, and how many of them compute a token; 0: none.
        num_shared_experts, expert_size: experts that compute every token, and the width of an expert.
        first_dense: layers at the start that have a SwiGLU of intermediate_size instead.
        max_position_embeddings: rotary range, extension included. original_max_position: range of the training.
        rotary_base, yarn_factor, yarn_beta_fast, yarn_beta_slow: rotary embedding and its YaRN length extension.
    """

    model_type = "nsa"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - as transformers declares it

    def __init__(
        self,
        vocab_size: int = 4096,
        hidden_size: int = 256,
        intermediate_size: int = 768,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        num_key_value_heads: int = 1,
        head_dim: int = 64,
        v_head_dim: int | None = None,
        attention_kinds: list[str] | None = None,
        compress_length: int = 32,
        compress_stride: int = 16,
        compress_hidden: int | None = None,
        block_size: int = 64,
        num_blocks: int = 16,
        num_initial: int = 1,
        num_local: int = 2,
        window: int = 512,
        num_experts: int = 0,
        num_experts_per_token: int = 0,
        num_shared_experts: int = 0,
        expert_size: int = 0,
        first_dense: int = 0,
        max_position_embeddings: int = 4096,
        original_max_position: int | None = None,
        rotary_base: float = 10000.0,
        yarn_factor: float = 1.0,
        yarn_beta_fast: float = 32.0,
        yarn_beta_slow: float = 1.0,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.v_head_dim = v_head_dim or head_dim
        self.attention_kinds = attention_kinds or ["nsa"] * num_hidden_layers
        self.compress_length = compress_length
        self.compress_stride = compress_stride
        self.compress_hidden = compress_hidden
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_initial = num_initial
        self.num_local = num_local
        self.window = window
        self.num_experts = num_experts
        self.num_experts_per_token = num_experts_per_token
        self.num_shared_experts = num_shared_experts
        self.expert_size = expert_size
        self.first_dense = first_dense
        self.max_position_embeddings = max_position_embeddings
        self.original_max_position = original_max_position or max_position_embeddings
        self.rotary_base = rotary_base
        self.yarn_factor = yarn_factor
        self.yarn_beta_fast = yarn_beta_fast
        self.yarn_beta_slow = yarn_beta_slow
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        super().__init__(**kwargs)


# ---- Cache ----


@dataclass
class Step:
    """Where the T tokens of one forward pass go.

    slots: (B, T) int64, the slot of each token in its row. stop: slots of the longest row, these tokens included.
    shortest_before, shortest: real tokens of the shortest row without and with these.
    """

    slots: Tensor
    stop: int
    shortest_before: int
    shortest: int


@dataclass
class Span:
    """Keys (B, n, G, D) and values (B, n, G, V) of the slots ``start`` .. ``start + n - 1`` of every row."""

    start: int
    keys: Tensor
    values: Tensor

    def write(self, keys: Tensor, values: Tensor, step: Step) -> "Span":
        """With those of a step's tokens at their slots."""

        def put(old: Tensor, new: Tensor) -> Tensor:
            room = pad(old, (0, 0, 0, 0, 0, max(0, step.stop - self.start - old.shape[1])))
            return room.scatter(1, (step.slots - self.start)[..., None, None].expand_as(new), new)

        return Span(self.start, put(self.keys, keys), put(self.values, values))

    def between(self, first: int, stop: int) -> "Span":
        """The part in the slots ``first`` .. ``stop - 1``."""
        first = max(first, self.start)
        part = slice(first - self.start, max(stop, first) - self.start)
        return Span(first, self.keys[:, part], self.values[:, part])


class NSACache:
    """What decoding keeps: of a dense layer all keys and values; of an NSA layer its compressed blocks, the tail of
    tokens whose blocks are not complete, all tokens for selection, and the last window (section 3.3.3: each branch has
    keys and values of its own). Rows may hold different numbers of tokens.

    lengths: (B,) real tokens of each row. columns: input columns seen, padding included.
    """

    is_compileable = is_croppable = False  # asked for by `generate`
    is_linear = (False,)  # that is: no layer's state has a fixed size

    def __init__(self, num_layers: int):
        self.lengths: Tensor | None = None
        self.columns = 0
        self.layers: list[dict[str, Span]] = [{} for _ in range(num_layers)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``: beam search."""
        self.lengths = self.lengths[beam_idx]
        for spans in self.layers:
            for name, span in spans.items():
                spans[name] = Span(span.start, span.keys[beam_idx], span.values[beam_idx])


def extend(spans: dict[str, Span] | None, name: str, keys: Tensor, values: Tensor, step: Step) -> Span:
    """The span ``name`` of a layer's cache with the new tokens; the new tokens alone if there is none."""
    if spans is None or name not in spans:
        return Span(0, keys, values)  # without a past, token t of a row is in slot t
    return spans[name].write(keys, values, step)


# ---- Attention ----


def attend(q: Tensor, span: Span, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) | mask) v for q (B, c, G, h, D) and mask (B, 1 or G, c, S).

    Returns (B, c, G, h, V) and the probabilities (B, G, h, c, S). A query that sees nothing gets 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bcghd,bsgd->bghcs", q.to(dtype), span.keys.to(dtype)) * q.shape[-1] ** -0.5
    mask = mask[:, :, None]
    p = scores.masked_fill(~mask, torch.finfo(dtype).min).softmax(-1) * mask
    return torch.einsum("bghcs,bsge->bcghe", p, span.values.to(dtype)).to(q.dtype), p


def query_chunks(heads: int, step: Step) -> Iterator[tuple[slice, int, int]]:
    """Slices of the T queries that keep the scores within bounds, each with its first slot and its last one + 1."""
    rows, tokens = step.slots.shape
    size = max(1, CHUNK_SCORES // (rows * heads * step.stop))
    for start in range(0, tokens, size):
        slots = step.slots[:, start : start + size]
        yield slice(start, start + size), int(slots.min()), int(slots.max()) + 1


def causal(slots: Tensor, span: Span) -> Tensor:
    """(B, 1, c, S): keys at or before the query."""
    keys = torch.arange(span.start, span.start + span.keys.shape[1], device=slots.device)
    return keys <= slots[:, None, :, None]


class RotaryTables:
    """cos and sin (B, T, D/2) of the rotary angles at integer ``positions`` (B, T), with YaRN (arXiv 2309.00071)."""

    def __init__(self, config: NSAConfig, positions: Tensor):
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
        frequencies = config.rotary_base**-exponents
        if config.yarn_factor != 1:
            turns = config.original_max_position * frequencies / (2 * math.pi)
            keep = (turns - config.yarn_beta_slow) / (config.yarn_beta_fast - config.yarn_beta_slow)
            keep = keep.clamp(0, 1)
            frequencies = frequencies * (keep + (1 - keep) / config.yarn_factor)
        angles = positions[..., None].float() * frequencies
        temperature = 0.1 * math.log(config.yarn_factor) + 1.0
        self.cos, self.sin = angles.cos() * temperature, angles.sin() * temperature

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate x (B, T, heads, D): pairs are (i, i + D/2)."""
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class DenseAttention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.config = config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.query = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.key = nn.Linear(config.hidden_size, groups * config.head_dim, bias=False)
        self.value = nn.Linear(config.hidden_size, groups * config.v_head_dim, bias=False)
        self.output = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, spans: dict[str, Span] | None) -> Tensor:
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        q = rotary(self.query(x).unflatten(-1, (heads, -1))).unflatten(2, (groups, -1))
        k = rotary(self.key(x).unflatten(-1, (groups, -1)))
        full = extend(spans, "full", k, self.value(x).unflatten(-1, (groups, -1)), step)
        if spans is not None:
            spans["full"] = full
        out = []
        for rows, _, stop in query_chunks(heads, step):
            seen = full.between(0, stop)
            out.append(attend(q[:, rows], seen, causal(step.slots[:, rows], seen))[0])
        return self.output(torch.cat(out, 1).flatten(2))


class KeyValue(nn.Module):
    """The key and value projections of one branch."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.groups = config.num_key_value_heads
        self.key = nn.Linear(config.hidden_size, self.groups * config.head_dim, bias=False)
        self.value = nn.Linear(config.hidden_size, self.groups * config.v_head_dim, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(x).unflatten(-1, (self.groups, -1)), self.value(x).unflatten(-1, (self.groups, -1))


class BlockCompression(nn.Module):
    """phi of Eq. 7: each block of l tokens at stride d to one vector, shared by the KV heads.

    phi(block) = outer(silu(inner(flatten(block + position)))): (B, S, G, width) -> (B, (S - l) // d + 1, G, width).
    """

    def __init__(self, config: NSAConfig, width: int):
        super().__init__()
        self.length, self.stride = config.compress_length, config.compress_stride
        hidden = config.compress_hidden or width
        self.position = nn.Parameter(torch.zeros(self.length, width))
        self.inner = nn.Linear(self.length * width, hidden, bias=False)
        self.outer = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < self.length:
            return x[:, :0]
        blocks = x.unfold(1, self.length, self.stride).transpose(-1, -2)  # (B, blocks, G, l, width)
        return self.outer(silu(self.inner((blocks + self.position).flatten(-2))))


class NativeSparseAttention(nn.Module):
    """Eq. 5: the sum of the compressed, selected and window branches, each times its gate."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        self.config = config
        heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.key_value = nn.ModuleDict({branch: KeyValue(config) for branch in ("compressed", "selected", "window")})
        self.compress = nn.ModuleDict(
            {"key": BlockCompression(config, config.head_dim), "value": BlockCompression(config, config.v_head_dim)}
        )
        self.gate = nn.Linear(config.hidden_size, 3 * heads)
        self.output = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, spans: dict[str, Span] | None) -> Tensor:
        c = self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        q = rotary(self.query(x).unflatten(-1, (heads, -1))).unflatten(2, (groups, -1))
        gates = self.gate(x).sigmoid().unflatten(-1, (groups, -1, 3))
        compressed = self.compressed_blocks(*self.key_value["compressed"](x), step, spans)
        (k_slc, v_slc), (k_win, v_win) = self.key_value["selected"](x), self.key_value["window"](x)
        selected = extend(spans, "selected", rotary(k_slc), v_slc, step)
        window = extend(spans, "window", rotary(k_win), v_win, step)

        out = []
        for rows, first, stop in query_chunks(heads, step):
            slots = step.slots[:, rows]
            # Compressed: block i is seen once its last token is (Eq. 7).
            seen = compressed.between(0, max(0, stop - c.compress_length) // c.compress_stride + 1)
            ends = torch.arange(seen.keys.shape[1], device=x.device) * c.compress_stride + c.compress_length - 1
            o_cmp, p_cmp = attend(q[:, rows], seen, ends <= slots[:, None, :, None])
            # Selected: all tokens, up to the query's own, of the blocks that matter most.
            seen = selected.between(0, stop)
            tokens = self.select_blocks(p_cmp.detach().sum(2), slots, stop).repeat_interleave(c.block_size, -1)
            o_slc, _ = attend(q[:, rows], seen, causal(slots, seen) & tokens[..., :stop])
            # Window: the last w tokens.
            seen = window.between(first - c.window + 1, stop)
            near = causal(slots, seen) & ~causal(slots - c.window, seen)
            o_win, _ = attend(q[:, rows], seen, near)
            branches = torch.stack((o_cmp, o_slc, o_win), dim=-1)
            out.append((branches * gates[:, rows, :, :, None]).sum(-1))

        if spans is not None:  # keep what a later query can see
            spans["selected"] = selected
            spans["window"] = window.between(step.shortest - c.window + 1, step.stop)
        return self.output(torch.cat(out, 1).flatten(2))

    def compressed_blocks(self, k: Tensor, v: Tensor, step: Step, spans: dict[str, Span] | None) -> Span:
        """The compressed blocks of all tokens, from the keys (before rotation) and values (B, T, G, ...) of the new.

        Blocks that were complete in every row stay; the others are made from the tail, which holds their tokens.
        """
        c = self.config

        def complete(tokens: int) -> int:
            return (tokens - c.compress_length) // c.compress_stride + 1 if tokens >= c.compress_length else 0

        tail = extend(spans, "tail", k, v, step)
        keys, values = self.compress["key"](tail.keys), self.compress["value"](tail.values)
        done = complete(step.shortest_before)
        ends = torch.arange(done, done + keys.shape[1], device=k.device) * c.compress_stride + c.compress_length - 1
        keys = RotaryTables(c, ends[None])(keys)
        if spans is not None and "compressed" in spans:
            old = spans["compressed"].between(0, done)
            keys, values = torch.cat((old.keys, keys), 1), torch.cat((old.values, values), 1)
        compressed = Span(0, keys, values)
        if spans is not None:
            spans["compressed"] = compressed
            spans["tail"] = tail.between(complete(step.shortest) * c.compress_stride, step.stop)
        return compressed

    def select_blocks(self, p_cmp: Tensor, slots: Tensor, stop: int) -> Tensor:
        """(B, G, c, M) bool, the blocks that each query selects; p_cmp (B, G, c, S) is summed over the heads (Eq. 10).

        Importance of block j: the sum of p_cmp times the stride units of each compressed block that lie in j (Eq. 9
        counted from 0: for 32/16/64 the weights are 1, 2, 2, 2, 1 on the compressed blocks 4j-1 .. 4j+3).
        """
        c = self.config
        count = (stop + c.block_size - 1) // c.block_size
        units = torch.arange(p_cmp.shape[-1], device=slots.device)[:, None]
        units = units + torch.arange(c.compress_length // c.compress_stride, device=slots.device)
        overlap = one_hot(units * c.compress_stride // c.block_size, count).sum(1)  # (S, M)
        importance = p_cmp @ overlap.to(p_cmp.dtype)
        block, own = torch.arange(count, device=slots.device), (slots // c.block_size)[:, None, :, None]
        forced = (block < c.num_initial) | (block > own - c.num_local)
        importance = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
        order = importance.sort(dim=-1, descending=True, stable=True).indices[..., : c.num_blocks]  # Eq. 11, ties low
        return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, order, True) & (block <= own)


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
