"""The projections of multi-head latent attention (MLA; DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.layers.kind import Pair, Parts, Product, Shape
from nsa.layers.linear import joint_linear
from nsa.layers.norm import RMSNorm
from nsa.layers.projections.base import Projected, Projection, Rows
from nsa.layers.projections.config import MlaConfig
from nsa.layers.projections.record import ProjectionRecord
from nsa.layers.rotary import RotaryTables
from nsa.ops.geometry import RotaryLayout


class Latent(Projection):
    """Keys and values of all heads are made of one latent per token, and of one rotated key that the heads share.

    A head's query and key have dims without position ("nope") and then rotated ones ("rope"). Of a token, its latent
    and its rotated key are kept: kv_lora_rank + qk_rope_head_dim numbers.

    *Expanded*, a head's key is [nope part made of the latent | rotated key]. *Absorbed*, the map from the latent to the
    nope part acts on the query instead. Then a query has kv_lora_rank + qk_rope_head_dim dims, the latent and the
    rotated key are the one key, the latent is the value, and `values` maps the result to the heads' values.

    Args:
        hidden_size: C. num_heads: H. sizes: the widths.
        norm_eps: epsilon of the RMSNorms of both latents.
        backend: implementation of the operators: auto, triton, torch or naive.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, sizes: MlaConfig, *, norm_eps: float = 1e-6, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.sizes, self.backend = sizes, backend
        self.scale, self.latent_size = sizes.qk_head_dim**-0.5, sizes.q_lora_rank
        pairs: Literal["half-split", "interleaved"] = "interleaved" if sizes.rope_interleave else "half-split"
        self.query_rotary = RotaryLayout(sizes.qk_rope_head_dim, "last", pairs)
        self.key_rotary = RotaryLayout(None, "first", pairs)
        self.query_down = None
        if sizes.q_lora_rank is None:
            self.query = nn.Linear(hidden_size, num_heads * sizes.qk_head_dim, bias=False)
        else:
            self.query_down = nn.Linear(hidden_size, sizes.q_lora_rank, bias=False)
            self.query_norm = RMSNorm(sizes.q_lora_rank, norm_eps)
            self.query_up = nn.Linear(sizes.q_lora_rank, num_heads * sizes.qk_head_dim, bias=False)
        self.key_value_down = nn.Linear(hidden_size, sizes.row_width, bias=False)
        self.key_value_norm = RMSNorm(sizes.kv_lora_rank, norm_eps)
        self.key_value_up = nn.Linear(
            sizes.kv_lora_rank, num_heads * (sizes.qk_nope_head_dim + sizes.v_head_dim), bias=False
        )

    def forward(self, x: Tensor, rotary: RotaryTables) -> Projected:
        sizes, tables = self.sizes, rotary.of(self.sizes.qk_rope_head_dim)
        first = self.query if self.query_down is None else self.query_down
        joint = joint_linear(x, [first.weight, self.key_value_down.weight])
        columns, latent, turning = joint.split([first.out_features, sizes.kv_lora_rank, sizes.qk_rope_head_dim], -1)
        query_latent = None
        if self.query_down is not None:
            query_latent = self.query_norm(columns)[1]
            columns = self.query_up(query_latent)
        heads = ops.Heads(columns.shape[-1] // sizes.qk_head_dim, sizes.qk_head_dim, "rotate", self.query_rotary)
        (q,) = ops.split_heads(columns, [heads], *tables, backend=self.backend)
        shared = ops.Heads(1, sizes.qk_rope_head_dim, "rotate", self.key_rotary)
        (key,) = ops.split_heads(turning, [shared], *tables, backend=self.backend)
        temperature, scaling = rotary.rotary.temperature, rotary.rotary.scaling
        sharpness = 1.0 if scaling is None else scaling.sharpness
        if (temperature, sharpness) != (1.0, 1.0):  # the tables have the temperature, for the rotated dims alone
            nope, rope = q.split([sizes.qk_nope_head_dim, sizes.qk_rope_head_dim], -1)
            q = torch.cat((nope * (temperature**2 * sharpness), rope * sharpness), -1)
        row = torch.cat((self.key_value_norm(latent)[1].unsqueeze(2), key), -1)
        return Projected(q, (row,), query_latent)

    def form(
        self, q: Tensor, rows: Rows | Callable[..., Rows], absorbed: bool
    ) -> tuple[Tensor, Pair | Callable[..., Pair]]:
        make = self._shared if absorbed else self._expanded
        if absorbed:
            nope, rope = q.split([self.sizes.qk_nope_head_dim, self.sizes.qk_rope_head_dim], -1)
            q = torch.cat((torch.einsum("bthn,hnl->bthl", nope, self._up()[0]), rope), -1)
        if callable(rows):
            wait = rows
            return q, lambda *stop: make(*wait(*stop))
        return q, make(*rows)

    def values(self, out: Tensor, absorbed: bool) -> Tensor:
        return torch.einsum("bthl,hvl->bthv", out, self._up()[1]) if absorbed else out

    def _up(self) -> tuple[Tensor, Tensor]:
        """The maps from the latent to each head's key (H, nope, kv_lora_rank) and value (H, Dv, kv_lora_rank)."""
        widths = [self.sizes.qk_nope_head_dim, self.sizes.v_head_dim]
        key, value = self.key_value_up.weight.unflatten(0, (-1, sum(widths))).split(widths, 1)
        return key, value

    def _shared(self, row: Tensor) -> Pair:
        """Key (B, S, 1, kv_lora_rank + rope) and value (B, S, 1, kv_lora_rank), a view of it."""
        return row, row[..., : self.sizes.kv_lora_rank]

    def _expanded(self, row: Tensor) -> Pair:
        """Keys (B, S, H, nope + rope) and values (B, S, H, Dv)."""
        sizes = self.sizes
        latent, key = row.split([sizes.kv_lora_rank, sizes.qk_rope_head_dim], -1)
        widths = [sizes.qk_nope_head_dim, sizes.v_head_dim]
        nope, v = self.key_value_up(latent).unflatten(-1, (-1, sum(widths))).squeeze(2).split(widths, -1)
        return torch.cat((nope, key.expand(-1, -1, nope.shape[2], -1)), -1), v.contiguous()


def build(shape: Shape, backend: str) -> Latent:
    return Latent(shape.hidden_size, shape.num_heads, _sizes(shape), norm_eps=shape.norm_eps, backend=backend)


def _sizes(shape: Shape) -> MlaConfig:
    assert shape.mla is not None
    return shape.mla


def products(shape: Shape) -> list[Product]:
    sizes, heads = _sizes(shape), shape.num_heads
    up = [Product(1, sizes.kv_lora_rank, heads * (sizes.qk_nope_head_dim + sizes.v_head_dim))]
    down = queries = heads * sizes.qk_head_dim
    if sizes.q_lora_rank is not None:
        down = sizes.q_lora_rank
        up.append(Product(1, down, queries))
    output = Product(1, heads * sizes.v_head_dim, shape.hidden_size)
    return [Product(1, shape.hidden_size, down + sizes.row_width), *up, output]


def parts(shape: Shape) -> Parts:
    low_rank = _sizes(shape).q_lora_rank is not None
    return Parts(
        columns=("query_up" if low_rank else "query", "key_value_up"),
        kv_heads=(),
        rows=("output",),
        heads=(),
        whole=(*(("query_down", "query_norm") if low_rank else ()), "key_value_down", "key_value_norm"),
        one_kv_head=False,
        gathered={},
        gathered_bytes=lambda shape, width: 0,
        thinned={},
        drawn={},
        averaged={},
    )


def widths(shape: Shape, absorbed: bool) -> tuple[int, int]:
    sizes = _sizes(shape)
    return (sizes.row_width, sizes.kv_lora_rank) if absorbed else (sizes.qk_head_dim, sizes.v_head_dim)


MLA = ProjectionRecord(
    build=build, parts=parts, products=products, row_width=lambda shape: _sizes(shape).row_width, widths=widths
)
