"""Multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434) of an exported decoder.

Sizes in the comments are those of attention_nsa.py; L is the width of the latent, R that of the rotated part of a head,
P that of its other part: D = P + R.
"""

import math

import torch
from torch import Tensor, nn

from .attention_nsa import RMSNorm, RotaryTables, all_before, attend, query_chunks, yarn_temperature
from .cache_nsa import NSACache, Span, Step, extend
from .configuration_nsa import NSAConfig


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are made of one latent per token, and of a rotated key for all heads.

    ``indexer``: as of `DenseAttention`.
    """

    def __init__(self, config: NSAConfig, number: int, indexer: nn.Module | None = None):
        super().__init__()
        self.config, self.number, self.indexer = config, number, indexer
        c, heads = config, config.num_attention_heads
        if c.q_lora_rank is None:
            self.query = nn.Linear(c.hidden_size, heads * c.head_dim, bias=False)
        else:
            self.query_down = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.query_norm = RMSNorm(c.q_lora_rank, c.rms_norm_eps)
            self.query_up = nn.Linear(c.q_lora_rank, heads * c.head_dim, bias=False)
        self.key_value_down = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.key_value_norm = RMSNorm(c.kv_lora_rank, c.rms_norm_eps)
        self.key_value_up = nn.Linear(c.kv_lora_rank, heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.output = nn.Linear(heads * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, cache: NSACache | None) -> Tensor:
        spans, c = None if cache is None else cache.layers[self.number], self.config
        asking = x if c.q_lora_rank is None else self.query_norm(self.query_down(x))
        q = self.query(x) if c.q_lora_rank is None else self.query_up(asking)
        nope, rope = q.unflatten(-1, (-1, c.head_dim)).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        # The tables have YaRN's temperature for the rotated part of queries and keys.
        q = torch.cat((nope * yarn_temperature(c) ** 2, self.rotate(rope, rotary)), -1).unsqueeze(3)  # (B, T, H, 1, D)
        scaling = c.rotary_scaling or {}
        if scaling.get("mscale_all_dim"):  # as in DeepSeek-V3
            q = q * (0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1) ** 2
        latent, key = self.key_value_down(x).unsqueeze(2).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        full = extend(spans, "full", self.rotate(key, rotary), self.key_value_norm(latent), step)
        if spans is not None:
            spans["full"] = full  # keys (B, n, 1, R), values (B, n, 1, L)
        masks = all_before(step) if self.indexer is None else self.indexer(x, asking, step, cache)
        full, out = self.expanded(full), []
        for rows, _, stop in query_chunks(max(c.num_attention_heads, self.indexer.heads if self.indexer else 0), step):
            out.append(attend(q[:, rows], full.between(0, stop), masks(rows, stop))[0])
        return self.output(torch.cat(out, 1).flatten(2))

    def expanded(self, span: Span) -> Span:
        """Keys (B, n, H, D) and values (B, n, H, V) of each head."""
        c = self.config
        made = self.key_value_up(span.values.squeeze(2)).unflatten(-1, (c.num_attention_heads, -1))
        nope, values = made.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        rope = span.keys.to(nope.dtype).expand(-1, -1, c.num_attention_heads, -1)
        return Span(span.start, torch.cat((nope, rope), -1), values)

    def rotate(self, x: Tensor, rotary: RotaryTables) -> Tensor:
        """Rotate x (B, T, heads, R). Pairs (2i, 2i + 1) are put at (i, i + R/2), in queries and keys alike."""
        if self.config.rope_interleave:
            x = torch.cat((x[..., 0::2], x[..., 1::2]), -1)
        return rotary.rotate(x)
