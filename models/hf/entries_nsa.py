"""Compressed Sparse Attention (CSA; DeepSeek-V4, arXiv 2606.19348) of an exported decoder.

Sizes in the comments are those of attention_nsa.py; an entry stands for m tokens, M is the number of entries, I that of
index heads.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .attention_nsa import Masks, RMSNorm, RotaryTables, causal, query_chunks, rotary_tables
from .cache_nsa import NSACache, Span, Step, extend
from .configuration_nsa import NSAConfig
from .indexer_nsa import highest, index_scores, mask_of


def turn(x: Tensor, rotary: RotaryTables, back: bool = False) -> Tensor:
    """Rotate the last dims of x (B, T, heads, D), as many as the tables have; pairs are (2i, 2i + 1)."""
    still, part = x.tensor_split([x.shape[-1] - 2 * rotary.cos.shape[-1]], -1)
    first, second = part.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.cos[:, :, None], rotary.sin[:, :, None] * (-1 if back else 1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)
    return torch.cat((still, turned.to(x.dtype)), -1)


class Compressor(nn.Module):
    """Entry i of a row: a mean of its tokens i m .. (i + 1) m - 1, in each channel with weights of its own, normed and
    rotated to position i m. With ``overlap`` the m tokens before them are in, too, with channels of their own.

    ``width``: D of an entry, of which the last ``turned`` dims are rotated. ``name``: of its entries in the cache.
    """

    def __init__(self, config: NSAConfig, name: str, width: int, turned: int, ratio: int, overlap: bool):
        super().__init__()
        self.config, self.name, self.width, self.turned = config, name, width, turned
        self.ratio, self.before = ratio, ratio if overlap else 0
        channels = 2 * width if overlap else width
        self.value = nn.Linear(config.hidden_size, channels, bias=False)
        self.gate = nn.Linear(config.hidden_size, channels, bias=False)
        self.position = nn.Parameter(torch.zeros(ratio, channels))
        self.norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x: Tensor, step: Step, cache: NSACache | None, number: int) -> Tensor:
        """The entries (B, M, 1, D) of all tokens so far; x (B, T, C) are the new ones, of layer ``number``.

        Entries that were complete in every row stay; the others are made from the tail, which holds their tokens.
        """
        spans, tail_name = None if cache is None else cache.layers[number], f"{self.name} tail"
        done = step.shortest_before // self.ratio
        tail = extend(spans, tail_name, self.value(x).unsqueeze(2), self.gate(x).unsqueeze(2), step)
        new = tail.between(max(0, done * self.ratio - self.before), step.stop)
        entries = self.pool(new, done, step.stop // self.ratio - done)
        if spans is not None:
            if done:
                entries = torch.cat((spans[self.name].keys[:, :done], entries), 1)
            spans[self.name] = Span(0, entries, entries[..., :0])  # a row is key and value
            first = max(0, step.shortest // self.ratio * self.ratio - self.before)
            spans[tail_name] = tail.between(cache.first_kept(first), step.stop)
        return entries

    def pool(self, raw: Span, first: int, count: int) -> Tensor:
        """The entries ``first`` .. ``first + count - 1``. ``raw``: values and gates of their tokens, with an overlap
        also of the m tokens before."""
        dtype, dims = torch.promote_types(raw.keys.dtype, torch.float32), (0, 0, 0, 0, self.before, 0)
        rows = [x if first else pad(x, dims) for x in (raw.keys, raw.values)]  # before the first entry there are none

        def tokens(start: int, channels: slice) -> tuple[Tensor, Tensor]:
            """Values and gates (B, count, m, D)."""
            part = slice(start, start + count * self.ratio)
            value, gate = (x[:, part, 0, channels].unflatten(1, (count, self.ratio)).to(dtype) for x in rows)
            return value, gate + self.position[:, channels].to(dtype)

        with torch.autocast(raw.keys.device.type, enabled=False):
            value, gate = tokens(self.before, slice(-self.width, None))
            if self.before:
                old_value, old_gate = tokens(0, slice(self.width))
                number = torch.arange(first, first + count, device=gate.device)
                old_gate = old_gate.masked_fill((number == 0)[:, None, None], -torch.inf)
                value, gate = torch.cat((old_value, value), 2), torch.cat((old_gate, gate), 2)
            pooled = (gate.softmax(2) * value).sum(2).to(raw.keys.dtype)
        positions = torch.arange(first, first + count, device=pooled.device)[None] * self.ratio
        return turn(self.norm(pooled).unsqueeze(2), rotary_tables(self.config, positions, self.turned, tempered=False))


def all_entries(step: Step, ratio: int) -> Masks:
    """Each query sees all entries that are complete: (B, 1, c, M) of the first M."""

    def masks(rows: slice, count: int) -> Tensor:
        seen = (step.slots[:, rows] + 1) // ratio
        return (torch.arange(count, device=seen.device) < seen[:, :, None]).unsqueeze(1)

    return masks


class EntryIndexer(nn.Module):
    """The ``csa_topk`` entries of each query with the highest index scores: no gradient passes through it."""

    def __init__(self, config: NSAConfig):
        super().__init__()
        c = config
        self.config, self.heads = config, c.csa_index_heads
        self.query = nn.Linear(c.csa_q_lora_rank or c.hidden_size, c.csa_index_heads * c.csa_index_head_dim, bias=False)
        sizes = (c.csa_index_head_dim, c.csa_index_rotary_dims, c.csa_ratio, c.csa_overlap)
        self.compress = Compressor(c, "index entries", *sizes)
        self.head_weight = nn.Linear(c.hidden_size, c.csa_index_heads, bias=False)

    @torch.no_grad()
    def forward(self, x: Tensor, asking: Tensor, step: Step, cache: NSACache | None, number: int) -> Masks:
        """The entries that queries see, by chunks. ``asking``: (B, T, what the queries are made of)."""
        c, visible = self.config, all_entries(step, self.config.csa_ratio)
        if c.csa_phase == "warm-up":  # the attention is still to all entries
            return visible
        rotary = rotary_tables(c, step.slots, c.csa_index_rotary_dims, tempered=False)
        q = turn(self.query(asking).unflatten(-1, (c.csa_index_heads, -1)), rotary)
        keys = self.compress(x, step, cache, number)[:, :, 0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        weights = self.head_weight(x).to(dtype) * (c.csa_index_heads * c.csa_index_head_dim) ** -0.5

        @torch.no_grad()
        def masks(rows: slice, count: int) -> Tensor:
            scores = index_scores(q[:, rows], keys[:, :count], weights[:, rows])
            seen = visible(rows, count)[:, 0]
            return mask_of(highest(scores.masked_fill(~seen, -torch.inf), seen, c.csa_topk), count)

        return masks


class CompressedSparseAttention(nn.Module):
    """Attention to the last tokens and to entries, in one softmax with a learned sink of each head.

    What is read of a token or an entry is the one key and value of all heads. So values are rotated, too, and the
    output is turned back by the query's position. In every second layer entries may be heavily compressed (HCA).
    """

    def __init__(self, config: NSAConfig, number: int):
        super().__init__()
        c, heads = config, config.num_attention_heads
        self.config, self.number, self.rotary_dims = config, number, c.csa_rotary_dims or c.head_dim
        heavy = c.csa_heavy_ratio is not None and c.attention_kinds[:number].count("csa") % 2 == 1
        self.ratio = c.csa_heavy_ratio if heavy else c.csa_ratio
        if c.csa_q_lora_rank is not None:
            self.query_down = nn.Linear(c.hidden_size, c.csa_q_lora_rank, bias=False)
            self.query_norm = RMSNorm(c.csa_q_lora_rank, c.rms_norm_eps)
        self.query = nn.Linear(c.csa_q_lora_rank or c.hidden_size, heads * c.head_dim, bias=False)
        self.key_value = nn.Linear(c.hidden_size, c.head_dim, bias=False)
        self.key_value_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.sink = nn.Parameter(torch.zeros(heads))
        overlap = c.csa_overlap and not heavy
        self.compress = Compressor(c, "entries", c.head_dim, self.rotary_dims, self.ratio, overlap)
        self.indexer = None if heavy or c.csa_topk is None else EntryIndexer(c)
        self.output = nn.Linear(heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: RotaryTables, step: Step, cache: NSACache | None) -> Tensor:
        """``rotary`` is not used: YaRN's temperature, which it has, would scale values, too."""
        spans, c = None if cache is None else cache.layers[self.number], self.config
        rotary = rotary_tables(c, step.slots, self.rotary_dims, tempered=False)
        asking = x if c.csa_q_lora_rank is None else self.query_norm(self.query_down(x))
        q = turn(self.normed(self.query(asking).unflatten(-1, (c.num_attention_heads, -1))), rotary)
        row = turn(self.key_value_norm(self.key_value(x)).unsqueeze(2), rotary)
        window = extend(spans, "window", row, row[..., :0], step)
        entries = self.compress(x, step, cache, self.number)
        if self.indexer is None:
            masks = all_entries(step, self.ratio)
        else:
            masks = self.indexer(x, asking, step, cache, self.number)
        out = []
        for rows, first, stop in query_chunks(max(c.num_attention_heads, c.csa_index_heads), step):
            slots = step.slots[:, rows]
            near = window.between(first - c.csa_window + 1, stop)
            in_window = causal(slots, near) & ~causal(slots - c.csa_window, near)
            far = entries[:, : stop // self.ratio]
            seen = torch.cat((masks(rows, far.shape[1]), in_window), -1)
            out.append(self.attend(q[:, rows], torch.cat((far, near.keys), 1)[:, :, 0], seen))
        if spans is not None:
            spans["window"] = window.between(cache.first_kept(step.shortest - c.csa_window + 1), step.stop)
        return self.output(turn(torch.cat(out, 1), rotary, back=True).flatten(2))

    def normed(self, q: Tensor) -> Tensor:
        """Heads of norm 1, with no weight."""
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        return (wide * (wide.square().mean(-1, keepdim=True) + self.config.rms_norm_eps).rsqrt()).to(q.dtype)

    def attend(self, q: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
        """q (B, c, H, D), rows (B, S, D) which are keys and values, mask (B, 1, c, S) -> (B, c, H, D). The sink takes
        probability and gives nothing."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            rows = rows.to(dtype)
            scores = torch.einsum("bchd,bsd->bhcs", q.to(dtype), rows) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(~mask, -torch.inf)
            sink = self.sink.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
            p = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
            return torch.einsum("bhcs,bsd->bchd", p, rows).to(q.dtype)
