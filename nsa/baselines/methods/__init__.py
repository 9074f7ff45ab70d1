"""The methods of sparse attention: a short file each, and one tuple."""

import difflib

from nsa.baselines.method import Method
from nsa.baselines.methods.dense import Dense
from nsa.baselines.methods.double_p import DoubleP
from nsa.baselines.methods.oracle import OracleTopK, OracleTopP
from nsa.baselines.methods.quest import Quest, QuestEval
from nsa.baselines.methods.random_tokens import RandomTokens
from nsa.baselines.methods.sink_window import SinkWindow
from nsa.baselines.methods.sparq import SparQ
from nsa.baselines.methods.sparq_released import SparQReleased
from nsa.baselines.methods.twilight import Twilight
from nsa.baselines.methods.vattention import VAttention
from nsa.baselines.methods.vattention_released import VAttentionReleased

METHODS: tuple[type[Method], ...] = (
    # controls, which every comparison has
    Dense,
    OracleTopK,
    OracleTopP,
    RandomTokens,
    SinkWindow,
    # load less while decoding
    Quest,
    QuestEval,
    SparQ,
    SparQReleased,
    Twilight,
    DoubleP,
    VAttention,
    VAttentionReleased,
)


def method_named(name: str) -> type[Method]:
    """The method of that name.

    Raises:
        ValueError: there is none; the message has the nearest name.
    """
    by_name = {method.name: method for method in METHODS}
    if name not in by_name:
        near = difflib.get_close_matches(name, by_name, 1)
        hint = f": did you mean {near[0]!r}?" if near else f": one of {', '.join(by_name)}"
        raise ValueError(f"there is no method {name!r}{hint}")
    return by_name[name]
