"""The lightning indexer of DeepSeek Sparse Attention (DSA; DeepSeek-V3.2, arXiv 2512.02556) of an exported decoder.

It says which tokens each query attends to. Sizes in the comments are those of attention_nsa.py; I is the number of
index heads, E their width.
"""

import torch
from torch import Tensor, nn

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
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = self.head_weight(x).to(dtype) * (c.index_heads * c.index_head_dim) ** -0.5
        spans = None if cache is None else cache.layers[self.number]
        keys = extend(spans, "index", k, k[..., :0], step)  # (B, n, 1, E), without values
        if spans is not None:
            spans["index"] = keys
        return lambda rows, seen: self.choose(q[:, rows], keys.between(0, seen), weights[:, rows], step.slots[:, rows])

    @torch.no_grad()
    def choose(self, q: Tensor, keys: Span, weights: Tensor, slots: Tensor) -> Tensor:
        """(B, 1, c, S): the tokens of queries q (B, c, I, E) with head weights (B, c, I); equal scores: the first."""
        c = self.config
        with torch.autocast(q.device.type, enabled=False):  # rounded, other tokens would be chosen
            products = torch.einsum("bcie,bse->bcis", q.to(weights.dtype), keys.keys[:, :, 0].to(weights.dtype))
            scores = torch.einsum("bci,bcis->bcs", weights, products.relu())
        visible, own = causal(slots, keys)[:, 0], slots[:, :, None]
        token = torch.arange(scores.shape[-1], device=q.device)
        forced = (token < c.index_num_initial) | (token > own - c.index_num_local)
        scores = scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf)
        order = scores.sort(dim=-1, descending=True, stable=True).indices[..., : c.index_topk]
        return (torch.zeros_like(visible).scatter(-1, order, True) & visible).unsqueeze(1)

    def rotate(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """Rotate the first or last dims of x (B, T, heads, E). Pairs (2i, 2i + 1) are put at (i, i + half), as in
        queries so in keys."""
        c = self.config
        start = 0 if c.index_rotary_place == "first" else c.index_head_dim - c.index_rotary_dims
        before, part, after = x.tensor_split([start, start + c.index_rotary_dims], -1)
        if c.index_rotary_pairs == "interleaved":
            part = torch.cat((part[..., 0::2], part[..., 1::2]), -1)
        return torch.cat((before, rotary.rotate(part), after), -1)
