"""What a method of sparse attention is: where it stands on the four axes, and four functions of what a layer sees."""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from nsa.baselines.budget import Budget
from nsa.baselines.plan import Plan, View


class Axes(NamedTuple):
    """The four axes of The Sparse Frontier (arXiv 2504.17768, section 3), in words.

    unit: what is kept or left out (token, page of 16, block of 64, column and diagonal).
    importance: how units are ranked. allocation: how the budget is divided over queries, heads and layers.
    cache: "all": it keeps all and reads less; "evicts": what it leaves out is forgotten.
    """

    unit: str
    importance: str
    allocation: str
    cache: str


@dataclass
class State:
    """What a method remembers of one layer, for one batch.

    Attributes:
        rest: tensors of batch first (B, ...), or lists, tuples and dictionaries of such.
        slots: tensors (B, S, G, ...), one value per slot of the cache: a new token has 0, and they go with their slot.
        shared: one dictionary for all layers of this batch, in the order of the layers; its tensors are (B, ...), too.
    """

    rest: dict[str, Any] = field(default_factory=dict)
    slots: dict[str, Tensor] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of sparse attention. Its fields are its settings; a method is a short file in nsa/baselines/methods.

    A method has no memory of its own: what it remembers is in ``state``. It looks at one layer at a time, at all
    sequences of the batch at once; it never mixes sequences. Ties go to the earlier key (`nsa.ops.choose`).

    Attributes:
        budget: see `Budget`.
        name: in commands and files. title, paper: of the method. axes: see `Axes`.
        phases: where it chooses: "prefill", "decode" or both. In the other phase attention is dense.
        causal: whether what a query of the prompt attends to depends on no later token.
        chunkable: whether a prompt that comes in chunks gives the same as a whole one.
        stepwise: whether a query of a prompt attends to what it would, were it decoded, with a budget in tokens.
        alone: whether a layer's choice follows from this layer alone. If not, what its queries look at may be missed.
        differs: where the authors' release does something else, "differs from the release because ..."; "": it does
            not.
        licence: of the release. formula: what its ledger counts, in words.
        knob: (field, low, high): the setting that its budget follows from, from the sparsest to full; None: the budget
            is the setting.
        small: settings for sequences of about 100 tokens, such as those of the tests: smaller pages and windows.
    """

    budget: Budget = Budget(share=1.0)  # noqa: RUF009 - frozen

    name: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    axes: ClassVar[Axes]
    phases: ClassVar[tuple[str, ...]]
    causal: ClassVar[bool] = True
    chunkable: ClassVar[bool] = True
    stepwise: ClassVar[bool] = False
    alone: ClassVar[bool] = True
    differs: ClassVar[str] = ""
    licence: ClassVar[str] = "none: a control of ours"
    formula: ClassVar[str]
    knob: ClassVar[tuple[str, float, float] | None] = None
    small: ClassVar[dict[str, Any]] = {}

    def prefill_select(self, view: View, state: State) -> Plan | None:
        """What queries of the prompt attend to; None: to all they see."""
        return None

    def decode_select(self, view: View, state: State) -> Plan | None:
        """What one new query (T = 1) attends to; None: to all it sees."""
        return None

    def observe(self, view: View, plan: Plan | None, state: State) -> None:
        """Look at a call of attention after it was planned: update the state."""

    def evict(self, view: View, state: State) -> Tensor | None:
        """Which slots stay after this call, (B, S, G) bool; None: all."""
        return None

    def settings(self) -> dict[str, Any]:
        """Its fields without the budget; a method within it is its name and its settings."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "budget"}
        return {n: {"name": v.name, **v.settings()} if isinstance(v, Method) else v for n, v in values.items()}
