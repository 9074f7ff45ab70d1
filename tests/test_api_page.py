"""docs/api.md: every public name is there, with the signature and options that it has."""

import importlib
import inspect
import re
from typing import Any

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs/api.md").read_text()
SIGNATURES = dict(re.findall(r"```text\n(nsa[\w.]+)(\(.*?\))\n```", PAGE, re.DOTALL))
COMMANDS = dict(re.findall(r"^\| `python -m (nsa[\w.]+)[^`]*` \|([^|]*)\|", PAGE, re.MULTILINE))
INTERNAL = {"nsa.exporting.load_alone"}  # started by the proof of an export, not by users


def named(path: str) -> Any:
    """The object of a dotted path."""
    first, *rest = path.split(".")
    found: Any = importlib.import_module(first)
    for depth, part in enumerate(rest, start=1):
        # A name in a package before a module of that name: nsa.ops.swiglu is both.
        if not hasattr(found, part):
            importlib.import_module(".".join([first, *rest[:depth]]))
        found = getattr(found, part)
    return found


def source(module: str) -> str:
    return (ROOT / (module.replace(".", "/") + ".py")).read_text()


def test_no_block_of_the_page_is_overlooked():
    assert len(SIGNATURES) == PAGE.count("```text")


@pytest.mark.parametrize("path", SIGNATURES)
def test_the_listed_signature_is_the_real_one(path):
    signature = inspect.signature(named(path))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    real = str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))
    assert " ".join(SIGNATURES[path].split()) == real


@pytest.mark.parametrize("module", ["nsa.ops", "nsa.layers", "nsa.models"])
def test_every_public_name_is_listed(module):
    assert {f"{module}.{name}" for name in importlib.import_module(module).__all__} <= SIGNATURES.keys()


def test_every_command_is_listed():
    files = [path for folder in ("nsa", "models", "data") for path in (ROOT / folder).rglob("*.py")]
    commands = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in files
        if '__name__ == "__main__"' in path.read_text()
    }
    # models/ and data/ are reached as nsa.models and nsa.data.
    commands = {name if name.startswith("nsa.") else f"nsa.{name}" for name in commands}
    assert COMMANDS.keys() == commands - INTERNAL


@pytest.mark.parametrize("module", COMMANDS)
def test_the_listed_options_are_the_real_ones(module):
    lines = [line for line in source(module).splitlines() if "argparse.SUPPRESS" not in line]
    real = re.findall(r'add_argument\("(--[\w-]+)"', "\n".join(lines))
    assert re.findall(r"`(--[\w-]+)`", COMMANDS[module]) == real
