"""Python sources on this machine, text that needs no network: the standard library's, and those of packages.

Distributions leave parts of the library out: its tests, the graphical parts, what is made when Python is built. These
are left out everywhere, so that installations of one Python version have nearly the same text, 11 MB.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

SUFFIXES = {".py", ".rst", ".txt"}
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
NOT_EVERYWHERE = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "macholib", "sitecustomize.py"}
MADE = ("_sysconfigdata", "_distutils_system_mod")  # begin the names of modules that are made for a machine
TAKE_OUT = "or take it out of the source's packages"


def root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def files(packages: Iterable[str] = ()) -> list[tuple[str, Path]]:
    """(id, path) of the library's texts and then of the packages' .py files.

    The library's come in the order of their ids, their paths below its folder. So do those of each package, whose ids
    begin with its name.

    Raises ValueError if there are none, or a package is not there.
    """
    folder = root()
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES
        and (SKIPPED | NOT_EVERYWHERE).isdisjoint(path.relative_to(folder).parts)
        and not path.name.startswith(MADE)
        and path.is_file()
    ]
    if not found:
        raise ValueError(f"no Python sources under {folder}: use a source of kind files instead of builtin")
    library = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    return library + [file for package in packages for file in _of_package(package)]


def _of_package(name: str) -> list[tuple[str, Path]]:
    """(id, path) of the .py files of an installed package, which is found without importing it."""
    if name in sys.stdlib_module_names or (root() / name).exists():
        raise ValueError(f"package {name!r} is of the standard library, which is read anyway: take it out of packages")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # one that is imported and does not say from where
        spec = None
    if spec is None:
        raise ValueError(
            f"package {name!r} is not installed for {sys.executable}: install it there, correct its name (the one that "
            f"is imported: sklearn, not scikit-learn), {TAKE_OUT}"
        )
    if spec.origin is None:
        raise ValueError(
            f"package {name!r} is a folder without __init__.py ({', '.join(spec.submodule_search_locations or [])}): "
            f"read it with a source of kind files, {TAKE_OUT}"
        )
    module = Path(spec.origin)
    if spec.submodule_search_locations is None:
        found = [(module.name, module)] if module.suffix == ".py" else []
    else:
        folder = module.parent
        found = sorted(
            (f"{name}/{path.relative_to(folder).as_posix()}", path) for path in folder.rglob("*.py") if path.is_file()
        )
    if not found:
        raise ValueError(f"package {name!r} has no .py files ({module}): {TAKE_OUT.removeprefix('or ')}")
    return found
