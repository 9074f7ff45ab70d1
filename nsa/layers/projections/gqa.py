"""The projections of grouped-query attention (arXiv 2305.13245)."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from nsa import ops
from nsa.layers.kind import Pair, Parts, Product, Shape
from nsa.layers.linear import joint_linear
from nsa.layers.norm import RMSNorm
from nsa.layers.projections.base import Projected, Projection, Rows
from nsa.layers.projections.record import ProjectionRecord
from nsa.layers.rotary import RotaryTables


class GroupedQuery(Projection):
    """Queries of H heads, keys and values of G heads.

    Args:
        hidden_size: C. num_heads: H query heads. num_kv_heads: G, divides H.
        head_dim: D of queries and keys, even. v_head_dim: Dv of values; None: D.
        bias: whether the three projections have one (as in Qwen2, arXiv 2407.10671).
        norm_eps: epsilon of an RMSNorm over D of queries and keys, before they are rotated (as in Qwen3, arXiv
            2505.09388); None: there is no norm.
        rotate: whether queries and keys are rotated; else the layer does it, or none.
        backend: implementation of the operators: auto, triton, torch or naive.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        bias: bool = False,
        norm_eps: float | None = None,
        rotate: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        v_head_dim = v_head_dim or head_dim
        self.head_dim, self.v_head_dim, self.rotate, self.backend = head_dim, v_head_dim, rotate, backend
        # Modules give names and initialisation to the weights; one joint product uses them.
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(hidden_size, num_kv_heads * v_head_dim, bias=bias)
        self.query_norm = self.key_norm = None
        if norm_eps is not None:
            self.query_norm, self.key_norm = RMSNorm(head_dim, norm_eps), RMSNorm(head_dim, norm_eps)

    def forward(self, x: Tensor, rotary: RotaryTables) -> Projected:
        linears = (self.query, self.key, self.value)
        bias = None if self.query.bias is None else torch.cat([linear.bias for linear in linears])
        joint = joint_linear(x, [linear.weight for linear in linears], bias)
        tables, later = rotary.of(self.head_dim), self.query_norm is not None or not self.rotate
        parts = [
            ops.Heads(self.query.out_features // self.head_dim, self.head_dim, "copy" if later else "rotate"),
            ops.Heads(self.key.out_features // self.head_dim, self.head_dim, "copy" if later else "rotate"),
            ops.Heads(self.value.out_features // self.v_head_dim, self.v_head_dim),
        ]
        q, k, v = ops.split_heads(joint, parts, *tables, backend=self.backend)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q)[1], self.key_norm(k)[1]
            if self.rotate:
                q, k = (ops.apply_rotary(heads, *tables, backend=self.backend) for heads in (q, k))
        return Projected(q, (k, v))

    def form(
        self, q: Tensor, rows: Rows | Callable[..., Rows], absorbed: bool
    ) -> tuple[Tensor, Pair | Callable[..., Pair]]:
        return q, cast(Pair | Callable[..., Pair], rows)

    def values(self, out: Tensor, absorbed: bool) -> Tensor:
        return out


def build(shape: Shape, backend: str, rotate: bool = True) -> GroupedQuery:
    return GroupedQuery(
        shape.hidden_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.v_head_dim,
        bias=shape.qkv_bias,
        norm_eps=shape.norm_eps if shape.qk_norm else None,
        rotate=rotate,
        backend=backend,
    )


def row_width(shape: Shape) -> int:
    return shape.num_kv_heads * (shape.head_dim + shape.v_head_dim)


def products(shape: Shape) -> list[Product]:
    return [
        Product(1, shape.hidden_size, shape.num_heads * shape.head_dim + row_width(shape)),
        Product(1, shape.num_heads * shape.v_head_dim, shape.hidden_size),
    ]


def parts(shape: Shape) -> Parts:
    return Parts(
        columns=("query",),
        kv_heads=("key", "value"),
        rows=("output",),
        heads=(),
        whole=("query_norm", "key_norm") if shape.qk_norm else (),
        one_kv_head=False,
        gathered={},
        gathered_bytes=lambda shape, width: 0,
        thinned={},
        drawn={},
        averaged={},
    )


GQA = ProjectionRecord(
    build=build,
    parts=parts,
    products=products,
    row_width=row_width,
    widths=lambda shape, absorbed: (shape.head_dim, shape.v_head_dim),
)
