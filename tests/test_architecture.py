"""What may import what, and where kinds of attention are known by name: read from the source, nothing is run."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nsa.layers.kinds import KINDS

ROOT = Path(__file__).parents[1]
# From the bottom to the top: a layer imports those before it, and itself. A name in no layer may be imported by all.
LAYERS = (
    ("ops",),
    ("cache",),
    ("layers", "baselines"),
    ("models",),
    ("parallel",),
    ("config",),
    ("importing",),
    ("training",),
    ("exporting", "planning"),
    ("evaluation",),
    ("train", "export", "evaluate", "compare", "plan", "summary"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
FREE = {"schema", "strict_yaml", "config_history", "stages", "untrusted"}  # they import each other at most
DATA = {"data"}  # knows no model; two of its files are commands, too, which read a configuration
COMMANDS_OF_DATA = ("nsa.data.prepare", "nsa.data.trigram")


def modules() -> dict[str, Path]:
    """All of nsa, by name. nsa/models and nsa/data are links to folders beside nsa."""
    found = {}
    for start, prefix in (("nsa", ("nsa",)), ("models", ("nsa", "models")), ("data", ("nsa", "data"))):
        for path in sorted((ROOT / start).rglob("*.py")):
            parts = (*prefix, *path.relative_to(ROOT / start).with_suffix("").parts)
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(path: Path) -> Iterator[str]:
    """Modules of nsa that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "nsa":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "nsa")


IMPORTS = {name: set(imported(path)) & MODULES.keys() for name, path in MODULES.items()}


def part(module: str) -> str:
    """``ops`` of nsa.ops.dense."""
    return module.split(".")[1] if "." in module else ""


def test_all_parts_have_a_place() -> None:
    assert {part(name) for name in MODULES} - {""} == set(LEVEL) | FREE | DATA


def test_no_arrow_points_up() -> None:
    wrong = []
    for name, others in IMPORTS.items():
        for other in others:
            here, there = part(name), part(other)
            if there in FREE or here == there or (name in COMMANDS_OF_DATA and other == "nsa.config"):
                continue
            low = here in FREE or (here in DATA and there in LEVEL)
            if low or (there in LEVEL and LEVEL[there] >= LEVEL.get(here, len(LAYERS))):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_a_kernel_imports_no_operator() -> None:
    """What they share lies in nsa/ops/geometry.py and the like: files, not the folders of operators."""
    for name, others in IMPORTS.items():
        if name.startswith("nsa.ops.kernels"):
            faces = {other for other in others if MODULES[other].name == "__init__.py"} - {name}
            assert {other for other in faces if not other.startswith("nsa.ops.kernels")} == set(), name


def test_geometry_imports_nothing_of_ours() -> None:
    assert IMPORTS["nsa.ops.geometry"] == set()


def test_no_imports_go_round() -> None:
    """Also those inside of functions."""
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in IMPORTS[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


# Files that name a kind for a reason: kinds.py lists them, an export is one file that carries its own layers,
# nsa/planning/constants.py has the fitted constants of two.
NAMED = ("nsa/layers/kinds.py", "models/hf/")


def sources() -> list[Path]:
    return [path for path in MODULES.values() if not str(path.relative_to(ROOT)).startswith(NAMED)]


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_no_kind_is_asked_for_by_name_outside_its_folder(kind: str) -> None:
    """Neither compared with, nor looked up or counted by its name; and no layer is asked for its class."""
    name = rf"""["']{kind}["']"""
    before = r"[=!]= ?|\bcase |\bin (?:[(\[{][^)\]}]*)?|\bcount\(|\w(?<!sys\.modules)\["
    asked = re.compile(rf"({before}){name}|{name} (?:in|==|!=) ")
    own = ROOT / "nsa/layers" / kind
    wrong = []
    for path in sources():
        if own in path.parents:
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if asked.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong


def test_no_layer_of_attention_is_imported_but_by_its_record() -> None:
    folders = tuple(f"nsa.layers.{kind.name}" for kind in KINDS)
    for name, others in IMPORTS.items():
        if name.startswith(folders) or name in ("nsa.layers", "nsa.layers.kinds"):
            continue
        assert not {other for other in others if other.startswith(folders) or other == "nsa.layers"}, name


@pytest.mark.parametrize("path", sorted(MODULES.values()), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    limit = 800 if "kernels" in path.parts else 500
    assert len(path.read_text().splitlines()) <= limit


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest and the tests import by the name without the folder: the second file of a name is never run."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert [name for name, files in names.items() if files > 1] == []
