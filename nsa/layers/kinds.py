"""The kinds of attention that there are. A new one is added here, and nowhere else outside its folder."""

from nsa.layers.dense.kind import DENSE
from nsa.layers.kind import Kind
from nsa.layers.nsa.kind import NSA

KINDS: tuple[Kind, ...] = (DENSE, NSA)
BASELINE = DENSE  # what others are compared with: every query sees every token before it
DEFAULT = NSA

_by_name = {kind.name: kind for kind in KINDS}


def kind_of(name: str) -> Kind:
    """The record of the kind ``name``. Raises KeyError if there is none."""
    return _by_name[name]
