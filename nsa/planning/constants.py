"""The constants of the plan (constants.json): which were fitted, to which measurements, and which are assumed.

`benchmarks/results/plan-constants.json` is a link to that file, beside the results that it was fitted to.
`python -m nsa.plan --fit FILE ...` rewrites it.
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
    """The values alone. constants.json has their units and meanings."""

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
    """One constant.

    ``source``: fit (to times of whole steps, in ``files``), measured (directly, in ``files``) or assumed. A fitted
    constant has limits and a ``start``, which it keeps if the measurements do not depend on it.
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
                raise ValueError("start, lowest and highest go with source: fit only")
        elif self.start is None or self.lowest is None or self.highest is None:
            raise ValueError("a fitted constant needs start, lowest and highest")
        elif not (self.lowest <= self.start <= self.highest and self.lowest <= self.value <= self.highest):
            raise ValueError("start and value must lie between lowest and highest")
        return self


class ConstantsFile(Section):
    """The whole file.

    ``files`` are those of the fit, with ``cases`` measured steps. Errors are relative errors of the step time. For the
    errors "left out" each case is predicted by a fit to all others.
    """

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
        expected = {field.name for field in fields(Constants)}
        if names := expected ^ self.constants.keys():
            problems = [f"{name} is {'missing' if name in expected else 'unknown'}" for name in sorted(names)]
            raise ValueError("constants: " + ", ".join(problems))
        return self

    def values(self) -> Constants:
        return Constants(**{name: constant.value for name, constant in self.constants.items()})


def read(path: Path | None = None) -> ConstantsFile:
    """Read and check the file. Raises ValueError that names it and every missing, unknown or invalid entry."""
    path = path or PATH
    try:
        return ConstantsFile.model_validate_json(path.read_text())
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, one['loc'])) or 'the file'}: {one['msg']}" for one in error.errors()]
        raise ValueError(f"{path}: " + "; ".join(problems)) from error


def write(content: ConstantsFile, path: Path | None = None) -> None:
    (path or PATH).write_text(json.dumps(content.model_dump(exclude_none=True), indent=1) + "\n")
