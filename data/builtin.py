"""The Python standard library's sources and docs on this machine: text that needs no network."""

import sysconfig
from pathlib import Path

SUFFIXES = {".py", ".rst", ".txt"}
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


def root() -> Path:
    """The folder of the standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def files() -> list[Path]:
    """Its texts, in the order of their paths. Raises ValueError if there are none."""
    folder = root()
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix in SUFFIXES and SKIPPED.isdisjoint(path.relative_to(folder).parts) and path.is_file()
    ]
    if not found:
        raise ValueError(f"no Python sources under {folder}: use a source of kind files instead of builtin")
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())
