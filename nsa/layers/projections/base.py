"""What a projection is to a layer of attention: queries, keys and values from the hidden state."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from nsa.layers.kind import Pair
from nsa.layers.rotary import RotaryTables

Rows = tuple[Tensor, ...]


class Projected(NamedTuple):
    """What a projection makes of x (B, T, C).

    Attributes:
        q: (B, T, H, D) rotated queries.
        rows: what other tokens need of these, (B, T, ...) each: caches keep it, context-parallel ranks send it.
        query_latent: (B, T, L) what the queries are made of; None: the hidden state.
    """

    q: Tensor
    rows: Rows
    query_latent: Tensor | None = None


class Projection(nn.Module):
    """The projections of a layer but the last, which is the layer's own. It has no parameters but its submodules'.

    Keys and values have one or two forms. *Expanded*: each KV head has its own. *Absorbed* (MLA only): the latent
    is key and value of all query heads. Results are the same.

    Attributes:
        scale: factor of the scores in both forms; None: D ** -0.5.
        latent_size: L of `Projected.query_latent`; None: there is none.
    """

    scale: float | None = None
    latent_size: int | None = None

    def forward(self, x: Tensor, rotary: RotaryTables) -> Projected:
        """x (B, T, C); ``rotary``: tables at the tokens' positions."""
        raise NotImplementedError

    def form(
        self, q: Tensor, rows: Rows | Callable[..., Rows], absorbed: bool
    ) -> tuple[Tensor, Pair | Callable[..., Pair]]:
        """Queries with keys and values, as an operator takes them.

        Args:
            rows: of all tokens that the queries may see, or a function that waits for them.
            absorbed: the form.

        Returns:
            The second is a function if ``rows`` is one.
        """
        raise NotImplementedError

    def values(self, out: Tensor, absorbed: bool) -> Tensor:
        """The operator's output in this form -> (B, T, H, Dv)."""
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
