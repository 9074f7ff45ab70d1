"""Attention of an exported decoder: Native Sparse Attention (NSA, arXiv 2502.11089), dense, and of chosen tokens.

It is written to be read beside the paper. Every branch is a masked softmax over its keys, computed a chunk of queries
at a time: memory is linear in the prompt, time is that of dense attention. Parameter names are the trainer's own.

Sizes in the comments: B rows, T new tokens, S keys, C hidden, H query heads, G KV heads, h = H / G, D and V the widths
of key and value heads, M selection blocks. Softmax is fp32 (or more) whatever the dtype of the weights.

Slot j of a row is its j-th real token: the model moves the tokens of a row together first. Positions and blocks count
slots; padded tokens take part in nothing.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, silu

from .cache_nsa import NSACache, Span, Step, extend
from .configuration_nsa import NSAConfig

CHUNK_SCORES = 2**25  # attention scores that exist at a time: 128 MiB in fp32


def attend(q: Tensor, span: Span, mask: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D) | mask) v for q (B, c, G, h, D) and mask (B, 1 or G, c, S).

    Returns (B, c, G, h, V) and the probabilities (B, G, h, c, S). A query that sees nothing gets 0.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
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


Masks = Callable[[slice, int], Tensor]  # a chunk of the T queries, and the last of their slots + 1 = S -> (B, 1, c, S)


def all_before(step: Step) -> Masks:
    """Each query sees all tokens before it."""
    return lambda rows, stop: torch.arange(stop, device=step.slots.device) <= step.slots[:, None, rows, None]


class RotaryTables(NamedTuple):
    """cos and sin (B, T, D/2) of the rotary angles; a tuple, so that accelerate moves it to the device of a layer."""

    cos: Tensor
    sin: Tensor

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate x (B, T, heads, D): pairs are (i, i + D/2)."""
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = self.cos[:, :, None], self.sin[:, :, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rotary_tables(
    config: NSAConfig, positions: Tensor, width: int | None = None, tempered: bool = True
) -> RotaryTables:
    """Of integer ``positions`` (B, T), with YaRN (arXiv 2309.00071). ``width``: rotated dims; None: those of a head.
    ``tempered``: with the temperatures; without, it is a rotation alone."""
    width = width or (config.head_dim if config.projection == "gqa" else config.qk_rope_head_dim)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    frequencies = config.rotary_base**-exponents
    temperature = 1.0
    if config.rotary_scaling is not None:
        frequencies, temperature = scaled_frequencies(config.rotary_scaling, frequencies, config.rotary_base)
    if config.yarn_factor != 1:
        turns = config.original_max_position * frequencies / (2 * math.pi)
        keep = (turns - config.yarn_beta_slow) / (config.yarn_beta_fast - config.yarn_beta_slow)
        keep = keep.clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / config.yarn_factor)
    angles = positions[..., None].float() * frequencies
    temperature = temperature * yarn_temperature(config) if tempered else 1.0
    return RotaryTables(angles.cos() * temperature, angles.sin() * temperature)


def scaled_frequencies(scaling: dict, plain: Tensor, base: float) -> tuple[Tensor, float]:
    """Frequencies (D/2,) and the factor of cos and sin, as `transformers` has them for types llama3 and yarn."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = (length * plain / (2 * math.pi) - low) / (high - low)
        temperature = 1.0
    else:
        pair, growth = len(plain) / math.log(base), 0.1 * math.log(factor)
        first = max(math.floor(pair * math.log(length / (2 * math.pi * (scaling["beta_fast"] or 32)))), 0)
        last = math.ceil(pair * math.log(length / (2 * math.pi * (scaling["beta_slow"] or 1))))
        last = min(last, 2 * len(plain) - 1)
        pairs = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
        keep = 1 - (pairs - first) / (last - first or 0.001)
        one, other = scaling["mscale"], scaling["mscale_all_dim"]
        temperature = (one * growth + 1) / (other * growth + 1) if one and other else growth + 1
        if scaling["attention_factor"] is not None:
            temperature = scaling["attention_factor"]
    keep = keep.clamp(0, 1)
    return plain * (keep + (1 - keep) / factor), temperature


def yarn_temperature(config: NSAConfig) -> float:
    return 0.1 * math.log(config.yarn_factor) + 1.0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight).to(x.dtype)


class DenseAttention(nn.Module):
    """Causal grouped-query attention; with ``qk_norm`` queries and keys are normed before they are rotated.

    ``indexer``: chooses the tokens that each query attends to (indexer_nsa.py); None: it attends to all.
    """

    def __init__(self, config: NSAConfig, number: int, indexer: nn.Module | None = None):
        super().__init__()
        self.config, self.number, self.indexer = config, number, indexer
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.query = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden_size, groups * config.head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden_size, groups * config.v_head_dim, bias=config.qkv_bias)
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.output = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, cache: NSACache | None) -> Tensor:
        spans = None if cache is None else cache.layers[self.number]
        heads, groups = self.config.num_attention_heads, self.config.num_key_value_heads
        q = rotary.rotate(self.query_norm(self.query(x).unflatten(-1, (heads, -1)))).unflatten(2, (groups, -1))
        k = rotary.rotate(self.key_norm(self.key(x).unflatten(-1, (groups, -1))))
        full = extend(spans, "full", k, self.value(x).unflatten(-1, (groups, -1)), step)
        if spans is not None:
            spans["full"] = full
        masks = all_before(step) if self.indexer is None else self.indexer(x, x, step, cache)
        out = []
        for rows, _, stop in query_chunks(max(heads, self.indexer.heads if self.indexer else 0), step):
            out.append(attend(q[:, rows], full.between(0, stop), masks(rows, stop))[0])
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
        return self.outer(silu(self.inner((blocks_of(x, self.length, self.stride) + self.position).flatten(-2))))


class PooledCompression(nn.Module):
    """The same by a mean of a block with weights of its own in each channel, through a matrix.

    outer(sum_i softmax_i(gate(x_i) + position_i) x_i), as DeepSeek-V4 pools (arXiv 2606.19348, section 2.3).
    """

    def __init__(self, config: NSAConfig, width: int):
        super().__init__()
        self.length, self.stride = config.compress_length, config.compress_stride
        self.position = nn.Parameter(torch.zeros(self.length, width))
        self.gate = nn.Linear(width, width, bias=False)
        self.outer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        gates, x = (blocks_of(y, self.length, self.stride) for y in (self.gate(x), x))
        with torch.autocast(x.device.type, enabled=False):
            weights = (gates.to(dtype) + self.position.to(dtype)).softmax(-2)
            pooled = (weights * x.to(dtype)).sum(-2).to(x.dtype)
        return self.outer(pooled)


def blocks_of(x: Tensor, length: int, stride: int) -> Tensor:
    """(B, S, G, width) -> (B, (S - l) // d + 1, G, l, width)."""
    if x.shape[1] < length:
        return x[:, :0, :, None].expand(-1, -1, -1, length, -1)
    return x.unfold(1, length, stride).transpose(-1, -2)


class NativeSparseAttention(nn.Module):
    """Eq. 5: the sum of the compressed, selected and window branches, each times its gate."""

    def __init__(self, config: NSAConfig, number: int):
        super().__init__()
        self.config, self.number = config, number
        heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, heads * config.head_dim, bias=False)
        self.key_value = nn.ModuleDict({branch: KeyValue(config) for branch in ("compressed", "selected", "window")})
        key = PooledCompression if config.key_compression == "pooled" else BlockCompression
        self.compress = nn.ModuleDict(
            {"key": key(config, config.head_dim), "value": BlockCompression(config, config.v_head_dim)}
        )
        self.gate = nn.Linear(config.hidden_size, 3 * heads)
        self.output = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, cache: NSACache | None) -> Tensor:
        spans = None if cache is None else cache.layers[self.number]
        c = self.config
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        q = rotary.rotate(self.query(x).unflatten(-1, (heads, -1))).unflatten(2, (groups, -1))
        gates = self.gate(x).sigmoid().unflatten(-1, (groups, -1, 3))
        compressed = self.compressed_blocks(*self.key_value["compressed"](x), step, cache)
        (k_slc, v_slc), (k_win, v_win) = self.key_value["selected"](x), self.key_value["window"](x)
        selected = extend(spans, "selected", rotary.rotate(k_slc), v_slc, step)
        window = extend(spans, "window", rotary.rotate(k_win), v_win, step)

        out = []
        for rows, first, stop in query_chunks(heads, step):
            slots = step.slots[:, rows]
            if c.nsa_phase == "warm-up":  # the attention is still dense
                seen = selected.between(0, stop)
                out.append(attend(q[:, rows], seen, causal(slots, seen))[0])
                continue
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
            spans["window"] = window.between(cache.first_kept(step.shortest - c.window + 1), step.stop)
        return self.output(torch.cat(out, 1).flatten(2))

    def compressed_blocks(self, k: Tensor, v: Tensor, step: Step, cache: NSACache | None) -> Span:
        """The compressed blocks of all tokens, from the keys (before rotation) and values (B, T, G, ...) of the new.

        Blocks that were complete in every row stay; the others are made from the tail, which holds their tokens.
        """
        c = self.config

        def complete(tokens: int) -> int:
            return (tokens - c.compress_length) // c.compress_stride + 1 if tokens >= c.compress_length else 0

        spans = None if cache is None else cache.layers[self.number]
        done = complete(step.shortest_before)
        tail = extend(spans, "tail", k, v, step)
        new = tail.between(done * c.compress_stride, step.stop)
        keys, values = self.compress["key"](new.keys), self.compress["value"](new.values)
        ends = torch.arange(done, done + keys.shape[1], device=k.device) * c.compress_stride + c.compress_length - 1
        keys = rotary_tables(c, ends[None]).rotate(keys)
        if spans is not None and "compressed" in spans:
            old = spans["compressed"].between(0, done)
            keys, values = torch.cat((old.keys, keys), 1), torch.cat((old.values, values), 1)
        compressed = Span(0, keys, values)
        if spans is not None:
            spans["compressed"] = compressed
            first = complete(step.shortest) * c.compress_stride
            spans["tail"] = tail.between(cache.first_kept(first), step.stop)
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
        with torch.autocast(p_cmp.device.type, enabled=False):  # rounded, other blocks would be chosen
            importance = p_cmp @ overlap.to(p_cmp.dtype)
        block, own = torch.arange(count, device=slots.device), (slots // c.block_size)[:, None, :, None]
        forced = (block < c.num_initial) | (block > own - c.num_local)
        importance = importance.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
        order = importance.sort(dim=-1, descending=True, stable=True).indices[..., : c.num_blocks]  # Eq. 11, ties low
        return torch.zeros_like(importance, dtype=torch.bool).scatter(-1, order, True) & (block <= own)
