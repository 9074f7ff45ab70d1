"""Fits the plan's constants by least squares: minimises the squared relative errors of the step times.

A regularisation term pulls each constant towards its start, so that those that the measurements do not determine stay
there. There are a few dozen cases and a dozen constants. The method is Levenberg-Marquardt on the logarithms of the
constants, with finite differences.
"""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from nsa.planning.constants import Constant, Constants, ConstantsFile
from nsa.planning.measured import Case

PULL = 0.05  # moving a constant by a factor of e counts like an error of 5 % in one case
NOTICED = 0.01  # relative change of a step per factor of e in a constant, above which its file is listed


def fit(cases: Sequence[Case], before: ConstantsFile) -> ConstantsFile:
    """``before`` with its fitted constants fitted to ``cases``, and the errors. Their old values are not used.

    Raises:
        ValueError: there are fewer than two cases.
    """
    if len(cases) < 2:
        raise ValueError("at least two measured steps are needed to fit the plan")
    content, left_out = _fitted(cases, before), []
    for number, case in enumerate(cases):
        others = [other for place, other in enumerate(cases) if place != number]
        left_out.append(abs(case.error(_fitted(others, before).values())))
    errors = [abs(case.error(content.values())) for case in cases]
    summary: dict[str, float] = {"mean_error": fmean(errors), "worst_error": max(errors)}
    summary |= {"mean_error_left_out": fmean(left_out), "worst_error_left_out": max(left_out)}
    rounded = {name: round(error, 4) for name, error in summary.items()}
    return content.model_copy(update={"cases": len(cases), **rounded})


def _fitted(cases: Sequence[Case], before: ConstantsFile) -> ConstantsFile:
    fitted = {name: constant for name, constant in before.constants.items() if constant.source == "fit"}
    limits = np.log(np.array([[c.lowest, c.highest] for c in fitted.values()], dtype=float)).T
    start = np.log(np.array([c.start for c in fitted.values()], dtype=float))

    def constants(logs: np.ndarray) -> Constants:
        return replace(before.values(), **dict(zip(fitted, np.exp(logs).tolist(), strict=True)))

    def errors(logs: np.ndarray) -> np.ndarray:
        return np.array([case.error(constants(logs)) for case in cases])

    def loss(logs: np.ndarray) -> float:
        return float((errors(logs) ** 2).sum() + PULL**2 * ((logs - start) ** 2).sum())

    def slopes(logs: np.ndarray) -> np.ndarray:
        step = 1e-4
        return np.stack([(errors(logs + d) - errors(logs - d)) / (2 * step) for d in step * np.eye(len(logs))], axis=1)

    logs, caution, now = start, 1e-3, loss(start)
    for _ in range(200):
        jacobian = slopes(logs)
        gradient = jacobian.T @ errors(logs) + PULL**2 * (logs - start)
        # A constant at a limit stays fixed if its gradient points beyond it.
        free = ~((logs <= limits[0]) & (gradient > 0) | (logs >= limits[1]) & (gradient < 0))
        curvature = jacobian.T @ jacobian + (PULL**2 + caution) * np.eye(len(logs))
        move = np.zeros_like(logs)
        move[free] = np.linalg.solve(curvature[np.ix_(free, free)], -gradient[free])
        tried = np.clip(logs + move, *limits)
        if (then := loss(tried)) < now:
            gained, logs, caution, now = now - then, tried, caution / 3, then
            if gained < 1e-9:
                break
        elif caution > 1e6:
            break
        else:
            caution *= 4

    seen = np.abs(slopes(logs)) > NOTICED
    updated: dict[str, Constant] = dict(before.constants)
    for number, (name, constant) in enumerate(fitted.items()):
        files = sorted({case.file for case, noticed in zip(cases, seen[:, number], strict=True) if noticed})
        value = float(f"{np.exp(logs[number]):.4g}")
        updated[name] = constant.model_copy(update={"value": value, "files": files})
    return before.model_copy(update={"constants": updated, "files": sorted({case.file for case in cases})})
