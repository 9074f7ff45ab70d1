"""launch.sh, the wheel and the documents: what is promised is there."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

LAUNCH = ROOT / "launch.sh"
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_PYTHON = [guide for guide in GUIDES if "```python\n" in guide.read_text()]


def launch(*arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(root / "launch.sh"), *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)


def commands_of_launch() -> set[str]:
    cases = re.findall(r"^        ([a-z]+)\) ", LAUNCH.read_text(), re.MULTILINE)
    return set(cases)


def test_help_names_every_command():
    result = launch("--help")
    assert result.returncode == 0
    for command in commands_of_launch():
        assert re.search(rf"^  (\(none\), )?{command}\b", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize(("argument", "words"), [("tain", "--help shows"), ("a.yaml", "launch.sh train a.yaml ?")])
def test_unknown_command_says_what_to_do(argument, words):
    result = launch(argument)
    assert result.returncode == 1
    assert words in result.stderr


@pytest.fixture
def clone(tmp_path):
    """A folder with launch.sh and pyproject.toml, and a PATH with stand-ins for the tools it calls."""
    root, tools = tmp_path / "clone", tmp_path / "tools"
    root.mkdir()
    tools.mkdir()
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    for name in ("bash", "chmod", "cksum", "dirname", "flock", "mkdir", "sed", "uname"):
        if path := shutil.which(name):
            (tools / name).symlink_to(path)
    return root, tools


def stand_in(tools: Path, name: str, script: str) -> None:
    path = tools / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


# A Python that answers "yes" to the version check and makes a venv whose pip writes down what it is asked for.
PYTHON = """
case "$*" in
    *"-m venv"*) mkdir -p .venv/bin; printf '#!/bin/bash\\necho "$*" >>.venv/pip.log\\n%s\\n' "$PIP" >.venv/bin/pip
                 chmod +x .venv/bin/pip ;;
    *"import torch"*) exit 1 ;;
    --version) echo Python 3.11 ;;
esac
"""


@pytest.mark.skipif(sys.platform != "linux", reason="where torch has CUDA builds")
def test_without_a_gpu_only_the_cpu_build_of_torch_is_asked_for(clone):
    root, tools = clone
    stand_in(tools, "python3.11", PYTHON)
    stand_in(tools, "python", PYTHON)
    refused = launch("setup", root=root, PATH=str(tools), PIP='[[ "$*" != *+cpu* ]]', PYTHON="")
    assert refused.returncode == 1
    assert "pip finds no CPU build of torch==" in refused.stderr
    requests = (root / ".venv/pip.log").read_text().splitlines()
    assert len(requests) == 1
    assert re.search(r" torch==[0-9.]+\+cpu$", requests[0])

    stand_in(root / ".venv/bin", "pip", 'echo "$*" >>.venv/pip.log')  # now the build can be found
    for _ in range(2):
        done = launch("setup", root=root, PATH=str(tools), PYTHON="")
        assert done.returncode == 0, done.stderr
    requests = (root / ".venv/pip.log").read_text().splitlines()
    assert sum("--editable" in request for request in requests) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="where torch has CUDA builds")
def test_with_a_gpu_the_pin_decides(clone):
    root, tools = clone
    stand_in(tools, "nvidia-smi", "echo 'GPU 0: a device'")
    stand_in(tools, "grep", "read -r line; [[ $line == GPU* ]]")
    stand_in(tools, "python3.11", PYTHON)
    done = launch("setup", root=root, PATH=str(tools), PIP="true", PYTHON="")
    assert done.returncode == 0, done.stderr
    assert "+cpu" not in (root / ".venv/pip.log").read_text()


def test_a_failing_installation_stops_the_set_up(clone):
    root, tools = clone
    stand_in(tools, "nvidia-smi", "echo 'GPU 0: a device'")
    stand_in(tools, "grep", "read -r line; [[ $line == GPU* ]]")
    stand_in(tools, "python3.11", PYTHON)
    result = launch("train", "configs/demo.yaml", root=root, PATH=str(tools), PIP="exit 3", PYTHON="")
    assert result.returncode == 3
    assert "set-up done" not in result.stderr
    assert not (root / ".venv/setup-stamp").exists()


def test_no_usable_python_is_said(clone):
    root, tools = clone
    result = launch("setup", root=root, PATH=str(tools), PYTHON="")
    assert result.returncode == 1
    assert "needs Python >= 3.11" in result.stderr


def test_torch_is_pinned_and_no_part_of_the_build():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^    "torch==[0-9.]+",', text, re.MULTILINE)  # read by launch.sh, too
    assert "torch" not in text.partition("[project]")[0]


def test_wheel_holds_nsa_alone_and_all_of_it(tmp_path):
    """Built from a copy, so that no build folder is left in the clone."""
    source = tmp_path / "source"
    for folder in ("nsa", "models", "data"):
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("*.bin", "*.pyc"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True, text=True, timeout=60)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"nsa"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("nsa", "nsa/models", "nsa/data")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert wanted <= names
    assert "nsa/py.typed" in names

    code = "import nsa.models, nsa.data.config, sys; print(nsa.models.__file__); assert 'models' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.startswith(str(tmp_path / "site/nsa/models")), result.stderr


def test_no_module_of_nsa_shadows_the_standard_library():
    """`deepspeed nsa/train.py` puts nsa/ first on sys.path."""
    names = {path.stem for path in (ROOT / "nsa").iterdir()}
    assert not names & sys.stdlib_module_names


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_and_files_in_the_guides_exist(guide):
    text = guide.read_text()
    code = "\n".join(re.findall(r"```.*?```|`[^`\n]+`", text, re.DOTALL))
    for command in re.findall(r"launch\.sh ([a-z]+)", code):
        assert command in commands_of_launch(), command
    for module in re.findall(r"python -m (nsa[\w.]*)", code):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for path in re.findall(r"\b((?:configs|nsa|models|data|docs|tests)/[\w./-]+\.(?:yaml|py|md|json|png))", code):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (guide.parent / link).exists(), link


@pytest.mark.parametrize("guide", WITH_PYTHON, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_in_the_guides_runs(run_python, guide):
    """The blocks of a page, one after the other in one process: later ones use what earlier ones made."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL))
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_picture_of_a_query_is_drawn(run_python, tmp_path):
    """docs/draw_query.py takes what the page's blocks made."""
    result = run_python("docs/draw_query.py", str(tmp_path / "query.png"), PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "query.png").stat().st_size > 50_000


def test_tests_that_share_ranks_share_a_worker(request):
    """`--dist loadgroup` goes by what pytest-xdist appends to the names; not every pair of releases lets it."""
    if not os.environ.get("PYTEST_XDIST_WORKER"):
        pytest.skip("one process: nothing to share")
    assert request.node.nodeid.endswith("@test_launch.py")


def test_the_block_of_the_readme_runs_and_compiles():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    made: dict = {}
    exec(code, made)  # noqa: S102 - our own
    block, x = made["block"], torch.randn(1, 300, 256)
    compiled = torch.compile(block, backend="eager")
    results = []
    for called in (block, compiled):
        block.zero_grad()
        out = called(x)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in block.parameters())])
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


def test_the_glossary_is_in_alphabetical_order():
    terms = re.findall(r"^\*\*(.+?)\*\*", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)
    keys = [re.sub(r"[^a-z0-9 ]", "", term.lower()) for term in terms]
    assert len(keys) > 50 and keys == sorted(keys)


def test_every_document_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"({page.name})" in index or page.name == "README.md", page.name
    log = (ROOT / "docs/log/README.md").read_text()
    for page in (ROOT / "docs/log").glob("????-??.md"):
        assert f"({page.name})" in log, page.name
        titles = re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE)
        assert titles
        for title in titles:
            assert re.fullmatch(rf"{page.stem}-\d\d: .+ \((kept|negative|mixed|measured)\)", title), title
