"""Dense attention: the control that everything is compared with."""

from nsa.baselines.method import Axes, Method


class Dense(Method):
    """Attends to all tokens, in every phase."""

    name = "dense"
    title = "dense attention"
    paper = "arXiv 1706.03762"
    axes = Axes("none", "none", "all", "all")
    phases = ()
    formula = "reads all keys and values"
