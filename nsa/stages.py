"""Stages: runs that follow one another, in one configuration file.

    name: sparse
    training: {steps: 1000, ...}
    stages:
      - {name: dense, attention: {kind: dense}}
      - {name: indexer, train: indexer, training: {steps: 100}, attention: {dsa: {phase: warm-up}}}
      - {name: sparse}

Each stage is a run of its own, in the folder ``<output_dir>/<name>-<stage>``. Its keys replace those of the file; what
it does not name is as in the file. It starts from the stage before it, unless it has ``start_from``. The first stage
starts from that of the file.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa.strict_yaml import ConfigError, read_tree

STAGE = "stage="


def stages_of(path: str | Path) -> list[str]:
    """The names of the stages in a configuration file, in order; empty if it has none.

    Raises:
        ConfigError: it is no YAML file, or its stages are not a list of mappings with names.
    """
    tree = read_tree(Path(path))
    return [stage["name"] for stage in _checked(path, tree)] if isinstance(tree, dict) and "stages" in tree else []


class Stages:
    """Makes the values of one stage from those of a file.

    Args:
        path: of the file. wanted: the name of the stage; None: the file must have none.
    """

    def __init__(self, path: str | Path, wanted: str | None) -> None:
        self.path, self.wanted = path, wanted
        self._before: str | None = None  # the stage before

    def choose(self, tree: Any) -> Any:
        """The values of the stage, before overrides. Raises ConfigError if there is no such stage."""
        if "stages" not in tree:
            if self.wanted is not None:
                raise ConfigError(f"{self.path} has no stages: leave stage={self.wanted} out")
            return tree
        stages = _checked(self.path, tree)
        names = [stage["name"] for stage in stages]
        if self.wanted not in names:
            there = f"the file has the stages {', '.join(names)}"
            if self.wanted is None:
                raise ConfigError(
                    f"{self.path}: {there}: add stage={names[0]}, or run `bash launch.sh train {self.path}`, which "
                    "trains all of them"
                )
            raise ConfigError(f"{self.path}: there is no stage {self.wanted!r}; {there}")
        number = names.index(self.wanted)
        self._before = names[number - 1] if number else None
        of_others = {"stages", "start_from"} if number else {"stages"}
        common = {key: value for key, value in tree.items() if key not in of_others}
        return _merged(common, {key: value for key, value in stages[number].items() if key != "name"})

    def finish(self, tree: Any) -> None:
        """Give the stage its name and what it starts from, after overrides."""
        if self.wanted is None:
            return
        name = tree.get("name")
        tree["name"] = f"{name}-{self.wanted}"
        if self._before is not None and tree.get("start_from") is None:
            tree["start_from"] = f"{tree.get('output_dir', 'checkpoints')}/{name}-{self._before}"


def _checked(path: str | Path, tree: Any) -> Sequence[dict[str, Any]]:
    stages = tree["stages"]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ConfigError(f"{path}: stages must be a list of mappings, each with a name and the keys that it replaces")
    names = [stage.get("name") for stage in stages]
    for number, name in enumerate(names):
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ConfigError(f"{path}: stages.{number}.name is {name!r}; a stage needs a name of letters and digits")
        if name in names[:number]:
            raise ConfigError(f"{path}: there are two stages {name!r}")
    return stages


def _merged(tree: Any, over: Any) -> Any:
    """``over`` written over ``tree``: mappings key by key, anything else as a whole."""
    if not isinstance(tree, dict) or not isinstance(over, dict):
        return over
    return {**tree, **{key: _merged(tree.get(key), value) for key, value in over.items()}}
