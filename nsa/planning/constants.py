"""The constants of the plan, in a file beside this one: what was fitted, to which measurements, and what is assumed.

`benchmarks/results/plan-constants.json` is a link to it, so that it stands beside the results that it comes from.
`python -m nsa.plan --fit FILE ...` writes it anew.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from nsa.schema import Section

PATH = Path(__file__).with_name("constants.json")


@dataclass(frozen=True)
class Constants:
    """The values alone. Units and meanings are in the file."""

    matrices: float
    matrices_width: float
    dense: float
    dense_width: float
    dense_triton: float
    dense_flash: float
    dense_flash_4: float
    nsa_compressed: float
    nsa_near: float
    nsa_width: float
    lists: float
    logits: float
    elementwise: float
    optimizer: float
    start_dense: float
    start_nsa: float
    gradient: float
    step: float
    launch_dense: float
    launch_nsa: float
    shared: float
    summed: float
    link: float
    room: float
    host_link: float
    host_adam: float


class Constant(Section):
    """One of them.

    ``source``: fit (to whole steps, in ``files``), measured (by itself, in ``files``) or assumed. What is fitted has a
    ``start``, where it stays if no measurement says otherwise, and limits.
    """

    value: float = Field(gt=0)
    unit: str
    meaning: str
    source: Literal["fit", "measured", "assumed"]
    files: list[str]
    start: float | None = Field(None, gt=0)
    lowest: float | None = Field(None, gt=0)
    highest: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> "Constant":
        limits = (self.lowest, self.start, self.highest)
        if self.source != "fit":
            if any(limit is not None for limit in limits):
                raise ValueError("start, lowest and highest are of fitted constants")
        elif self.start is None or self.lowest is None or self.highest is None:
            raise ValueError("a fitted constant needs start, lowest and highest")
        elif not (self.lowest <= self.start <= self.highest and self.lowest <= self.value <= self.highest):
            raise ValueError("start and value must lie between lowest and highest")
        return self


class ConstantsFile(Section):
    """The whole file. ``files``: those of the fit. The errors are of the step time in their ``cases``, relative; left
    out: of each case by a fit to all others."""

    about: str
    files: list[str]
    cases: int
    mean_error: float
    worst_error: float
    mean_error_left_out: float
    worst_error_left_out: float
    constants: dict[str, Constant]

    @model_validator(mode="after")
    def _complete(self) -> "ConstantsFile":
        wanted = {field.name for field in fields(Constants)}
        if problems := wanted ^ self.constants.keys():
            told = [f"{name} is {'missing' if name in wanted else 'unknown'}" for name in sorted(problems)]
            raise ValueError("constants: " + ", ".join(told))
        return self

    def values(self) -> Constants:
        return Constants(**{name: constant.value for name, constant in self.constants.items()})


def read(path: Path | None = None) -> ConstantsFile:
    """Raises ValueError that names the file and every missing, unknown or impossible entry."""
    path = path or PATH
    try:
        return ConstantsFile.model_validate_json(path.read_text())
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors()]
        raise ValueError(f"{path}: " + "; ".join(problems)) from error


def write(content: ConstantsFile, path: Path | None = None) -> None:
    (path or PATH).write_text(json.dumps(content.model_dump(exclude_none=True), indent=1) + "\n")
