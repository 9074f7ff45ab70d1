"""What a projection is to a layer of attention: queries, keys and values from the hidden state."""

from typing import NamedTuple

from torch import Tensor, nn

from nsa.layers.rotary import RotaryTables

Rows = tuple[Tensor, ...]


class Projected(NamedTuple):
    """What a projection makes of x (B, T, C).

    Attributes:
        q: (B, T, H, D) rotated queries.
        rows: what other tokens need of these: keys and values. Caches keep it, context-parallel ranks send it.
    """

    q: Tensor
    rows: Rows


class Projection(nn.Module):
    """The projections of a layer but the last, which is the layer's own. It has no parameters but its submodules'.

    Attributes:
        num_heads: H of the whole layer; a tensor-parallel rank has a part. v_head_dim: Dv.
    """

    num_heads: int
    v_head_dim: int

    def forward(self, x: Tensor, rotary: RotaryTables) -> Projected:
        """x (B, T, C); ``rotary``: tables at the tokens' positions."""
        raise NotImplementedError


class ProjectedLayer(nn.Module):
    """A layer of attention with a projection.

    The projection's submodules are the layer's own: a checkpoint has ``attention.query`` and the like.
    """

    projection: Projection

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        for name, module in projection.named_children():
            self.add_module(name, module)
        object.__setattr__(self, "projection", projection)  # not a submodule, which would give all a second name
