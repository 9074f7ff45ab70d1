"""The Python standard library's sources on this machine: text that needs no network.

Distributions leave parts of it out: its tests, the graphical parts, what is made when Python is built. These are left
out everywhere, so that installations of one Python version have nearly the same text, 11 MB.
"""

import sysconfig
from pathlib import Path

SUFFIXES = {".py", ".rst", ".txt"}
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}
NOT_EVERYWHERE = {"test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "macholib", "sitecustomize.py"}
MADE = ("_sysconfigdata", "_distutils_system_mod")  # begin the names of modules that are made for a machine


def root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def files() -> list[Path]:
    """Its texts, in the order of their paths. Raises ValueError if there are none."""
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
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())
