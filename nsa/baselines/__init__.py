"""Methods of sparse attention that are put onto a trained model, and what they cost."""

from nsa.baselines.attention import attend
from nsa.baselines.budget import Budget, BudgetError
from nsa.baselines.ledger import Ledger
from nsa.baselines.method import Axes, Method, State
from nsa.baselines.methods import METHODS, method_named
from nsa.baselines.plan import Estimate, Part, Plan, Terms, Turn, View
from nsa.baselines.session import Session

__all__ = [
    "METHODS",
    "Axes",
    "Budget",
    "BudgetError",
    "Estimate",
    "Ledger",
    "Method",
    "Part",
    "Plan",
    "Session",
    "State",
    "Terms",
    "Turn",
    "View",
    "attend",
    "method_named",
]
