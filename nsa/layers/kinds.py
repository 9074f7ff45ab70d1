"""The list of all kinds of attention. A new kind is added here, and nowhere else outside its folder."""

from nsa.layers.csa.kind import CSA
from nsa.layers.dense.kind import DENSE
from nsa.layers.dms.kind import DMS
from nsa.layers.dsa.kind import DSA
from nsa.layers.entmax.kind import ENTMAX
from nsa.layers.kind import Kind
from nsa.layers.nsa.kind import NSA

KINDS: tuple[Kind, ...] = (DENSE, NSA, DSA, CSA, ENTMAX, DMS)
BASELINE = DENSE  # the kind that others are compared with
DEFAULT = NSA

_by_name = {kind.name: kind for kind in KINDS}


def kind_of(name: str) -> Kind:
    """The record of the kind ``name``. Raises KeyError if there is none."""
    return _by_name[name]
