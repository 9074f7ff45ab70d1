"""The lightning indexer of DeepSeek Sparse Attention (DSA; DeepSeek-V3.2, arXiv 2512.02556) of an exported decoder.

It says which tokens each query attends to. Sizes in the comments are those of attention_nsa.py; I is the number of
index heads, E their width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .attention_nsa import Masks, RotaryTables, all_before, causal, rotary_tables
from .cache_nsa import NSACache, Span, Step, extend
from .configuration_nsa import NSAConfig


class LightningIndexer(nn.Module):
    """The ``index_topk`` tokens of each query with the highest index scores (Eq. 1): no gradient passes through it.

    ``query_size``: width of what the index queries are made of, the hidden state or the latent of the queries.
    """

    def __init__(self, config: NSAConfig, number: int):
        super().__init__()
        self.config, self.number, self.heads = config, number, config.index_heads
        later = range(number + 1, config.num_hidden_layers)
        self.serves = any(config.attention_kinds[i] == "dsa" and config.indexer_layer(i) == number for i in later)
        c, latent = config, config.q_lora_rank if config.projection == "mla" else None
        self.query = nn.Linear(latent or c.hidden_size, c.index_heads * c.index_head_dim, bias=False)
        self.key = nn.Linear(c.hidden_size, c.index_head_dim, bias=False)
        self.key_norm = nn.LayerNorm(c.index_head_dim, eps=1e-6)
        self.head_weight = nn.Linear(c.hidden_size, c.index_heads, bias=False)

    @torch.no_grad()
    def forward(self, x: Tensor, asking: Tensor, step: Step, cache: NSACache | None) -> Masks:
        """The tokens that queries see, by chunks. ``asking`` (B, T, query_size): what the index queries are made of.

        The whole cache comes in, and not the layer's part: accelerate copies dictionaries.
        """
        c = self.config
        if c.index_phase == "warm-up":  # the attention is still dense
            return all_before(step)
        rotary = rotary_tables(c, step.slots, c.index_rotary_dims)
        q = self.rotate(self.query(asking).unflatten(-1, (c.index_heads, -1)), rotary)
        k = self.rotate(self.key_norm(self.key(x)).unsqueeze(2), rotary)
        if c.index_fp8:
            q, k = rounded_to_fp8(q), rounded_to_fp8(k)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = self.head_weight(x).to(dtype) * (c.index_heads * c.index_head_dim) ** -0.5
        spans = None if cache is None else cache.layers[self.number]
        keys = extend(spans, "index", k, k[..., :0], step)  # (B, n, 1, E), without values
        if spans is not None:
            spans["index"] = keys
        handed = step.chosen.of_layer[self.number] = []  # anew, where a layer is recomputed

        def masks(rows: slice, stop: int) -> Tensor:
            chosen = self.choose(q[:, rows], keys.between(0, stop), weights[:, rows], step.slots[:, rows])
            if self.serves:
                handed.append(pad(chosen, (0, min(c.index_topk, step.stop) - chosen.shape[-1]), value=-1))
            return mask_of(chosen, stop)

        return masks

    @torch.no_grad()
    def choose(self, q: Tensor, keys: Span, weights: Tensor, slots: Tensor) -> Tensor:
        """(B, c, K): the tokens of queries q (B, c, I, E) with head weights (B, c, I), -1 where there are fewer; of
        equal scores the first."""
        c, scores = self.config, index_scores(q, keys.keys[:, :, 0], weights)
        visible, own = causal(slots, keys)[:, 0], slots[:, :, None]
        token = torch.arange(scores.shape[-1], device=q.device)
        forced = (token < c.index_num_initial) | (token > own - c.index_num_local)
        return highest(scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf), visible, c.index_topk)

    def rotate(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """Rotate the first or last dims of x (B, T, heads, E). Pairs (2i, 2i + 1) are put at (i, i + half), as in
        queries so in keys."""
        c = self.config
        start = 0 if c.index_rotary_place == "first" else c.index_head_dim - c.index_rotary_dims
        before, part, after = x.tensor_split([start, start + c.index_rotary_dims], -1)
        if c.index_rotary_pairs == "interleaved":
            part = torch.cat((part[..., 0::2], part[..., 1::2]), -1)
        return torch.cat((before, rotary.rotate(part), after), -1)


def index_scores(q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
    """(B, c, S): of queries q (B, c, I, E), keys (B, S, E) and head weights (B, c, I)."""
    with torch.autocast(q.device.type, enabled=False):  # rounded, others would be chosen
        products = torch.einsum("bcie,bse->bcis", q.to(weights.dtype), keys.to(weights.dtype))
        return torch.einsum("bci,bcis->bcs", weights, products.relu())


def rounded_to_fp8(x: Tensor) -> Tensor:
    """x (.., E) as fp8 (e4m3) keeps it, whose largest value is 448, with a scale for each row: a power of two."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mantissa, exponent = torch.frexp(wide.abs().amax(-1, keepdim=True).clamp_min(1e-4) / 448)
    scale = torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).to(exponent.dtype))
    return ((wide / scale).to(torch.float8_e4m3fn).to(wide.dtype) * scale).to(x.dtype)


def highest(scores: Tensor, visible: Tensor, number: int) -> Tensor:
    """The indices (B, c, K) of the highest ``scores`` (B, c, S), K at most ``number``, -1 for those not ``visible``; of
    equal scores the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices[..., :number]
    return order.masked_fill(~visible.gather(-1, order), -1)


class SharedTokens(nn.Module):
    """In the place of an indexer: the tokens that the indexer of layer ``source`` chose in this pass."""

    heads = 0

    def __init__(self, config: NSAConfig, source: int):
        super().__init__()
        self.config, self.source = config, source

    @torch.no_grad()
    def forward(self, x: Tensor, asking: Tensor, step: Step, cache: NSACache | None) -> Masks:
        """As that of `LightningIndexer`."""
        if self.config.index_phase == "warm-up":
            return all_before(step)
        chosen = torch.cat(step.chosen.of_layer[self.source], 1).to(x.device)
        return lambda rows, stop: mask_of(chosen[:, rows], stop)


def mask_of(chosen: Tensor, stop: int) -> Tensor:
    """Of the first ``stop`` tokens, whether they are chosen (B, c, K): (B, 1, c, stop)."""
    mask = chosen.new_zeros(*chosen.shape[:2], stop + 1, dtype=torch.bool)
    return mask.scatter(-1, chosen.masked_fill(chosen < 0, stop), True)[..., :stop].unsqueeze(1)


def indexer_of(config: NSAConfig, number: int) -> nn.Module:
    """What chooses the tokens of the DSA layer ``number``."""
    source = config.indexer_layer(number)
    return LightningIndexer(config, number) if source == number else SharedTokens(config, source)
