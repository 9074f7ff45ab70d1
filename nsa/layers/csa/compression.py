"""Compressed entries: a learned, weighted mean of a few tokens (DeepSeek-V4, arXiv 2606.19348, section 2.3)."""

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.layers.linear import joint_linear
from nsa.layers.norm import RMSNorm
from nsa.layers.rotary import RotaryTables
from nsa.ops.dispatch import accumulation_dtype, without_autocast
from nsa.ops.geometry import Documents, RotaryLayout, block_ends, compression_layout

Rows = tuple[Tensor, ...]


class Compressor(nn.Module):
    """Entry i of a document pools its tokens i m .. (i + 1) m - 1, in each channel with weights of its own.

    The weights are a softmax over the tokens of a learned gate plus a bias of each position and channel, in fp32. The
    entry is then normed, and rotated to the position of its first token, i m.

    With ``overlap`` values and gates have twice the channels. The second half is pooled over the entry's own tokens,
    the first half over the m tokens before them, which the first entry of a document does not have. One softmax goes
    over both.

    Args:
        hidden_size: C. width: D of an entry. ratio: m. rotary: which of its dims are rotated. eps: of the norm.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        ratio: int,
        rotary: RotaryLayout,
        *,
        overlap: bool,
        eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.width, self.ratio, self.overlap, self.rotary, self.backend = width, ratio, overlap, rotary, backend
        channels = width * (2 if overlap else 1)
        self.value = nn.Linear(hidden_size, channels, bias=False)
        self.gate = nn.Linear(hidden_size, channels, bias=False)
        self.position = nn.Parameter(torch.zeros(ratio, channels))
        self.norm = RMSNorm(width, eps)

    def project(self, x: Tensor) -> Rows:
        """x (B, T, C) -> values and gates (B, T, 1, channels) of its tokens."""
        value, gate = joint_linear(x, [self.value.weight, self.gate.weight]).chunk(2, -1)
        return value.unsqueeze(2), gate.unsqueeze(2)

    def tables(self, rotary: RotaryTables) -> Rows:
        """What an entry needs of its last token: cos and sin (T, R/2) of its first one, and whether m are before that.

        ``rotary``: at the tokens' positions.
        """
        cos, sin = rotary.back(self.ratio - 1).untempered(self.rotary.turning(self.width)[0])
        return cos, sin, (rotary.positions >= 2 * self.ratio - 1)[:, None]

    def forward(
        self,
        raw: Rows,
        tables: Rows,
        cu_seqlens: Tensor | None = None,
        earlier: Rows | None = None,
        ahead: int = 0,
    ) -> Rows:
        """Values and gates (B, T, G, channels) -> the entries (B, M, G, D) of whole groups of m tokens.

        M = T // m. With ``cu_seqlens`` the entries of each document, concatenated in order. There may be fewer than M;
        what the remaining rows have means nothing.

        Args:
            tables: see `tables`; of the tokens from index ``ahead`` on. Entries that end before mean nothing.
            cu_seqlens: (N+1,) int32 boundaries of packed documents, with B = 1.
            earlier: ``raw`` at the tokens m before; None: from ``raw``.
        """
        documents = Documents.of(raw[0].shape[1], 0, cu_seqlens, raw[0].device)
        start = compression_layout(documents, self.ratio, self.ratio).start.clamp(min=0)
        token = start[:, None] + torch.arange(self.ratio, device=start.device)  # (M, m)
        last = (block_ends(documents, self.ratio, self.ratio) - ahead).clamp(min=0)
        cos, sin, has_before = (table[last] for table in tables)
        with without_autocast(raw[0].device.type):
            value, gate = self._own(raw, token)
            if self.overlap:
                before = _shifted(raw, self.ratio) if earlier is None else earlier
                old_value, old_gate = self._before(before, token)
                old_gate = old_gate.masked_fill(~has_before[:, :, None, None], -torch.inf)
                value, gate = torch.cat((old_value, value), 2), torch.cat((old_gate, gate), 2)
            pooled = (gate.softmax(2) * value).sum(2).to(raw[0].dtype)
        return (ops.apply_rotary(self.norm(pooled)[1], cos, sin, layout=self.rotary, backend=self.backend),)

    def _own(self, raw: Rows, token: Tensor) -> Rows:
        """Values and gates (B, M, m, G, D) of the entries' own tokens."""
        return self._of(raw, token, slice(self.value.out_features - self.width, None))

    def _before(self, raw: Rows, token: Tensor) -> Rows:
        """The same of the tokens before."""
        return self._of(raw, token, slice(0, self.width))

    def _of(self, raw: Rows, token: Tensor, channels: slice) -> Rows:
        wide = accumulation_dtype(raw[0])
        value, gate = (x[..., channels][:, token].to(wide) for x in raw)
        return value, gate + self.position[:, None, channels].to(wide)


def _shifted(raw: Rows, tokens: int) -> Rows:
    """The rows (B, T, ...) of the tokens ``tokens`` before; 0 where there are none."""
    return tuple(torch.cat((torch.zeros_like(x[:, :tokens]), x), 1)[:, : x.shape[1]] for x in raw)
