"""launch.sh, the wheel and the documents: what is promised is there."""

import os
import re
import shutil
import signal
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
WITH_PYTHON.remove(ROOT / "docs" / "fine-tuning.md")  # needs an export: tests/export/test_fine_tuning.py runs it
WITH_PYTHON.remove(ROOT / "docs" / "importing.md")  # needs a folder: tests/importing/test_folder.py runs it


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
    assert result.returncode == 2
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
    assert refused.returncode == 2
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
    assert result.returncode == 2
    assert "needs Python >= 3.11" in result.stderr


# A launcher and a rank of it, who tells what it hears; what "python -m nsa.config" prints; and no GPU.
DEEPSPEED = """
rank() {
    hears() { echo "rank heard $1"; echo "$2" >"$NSA_EXIT_FILE"; sleep 0.5; echo saved; exit "$2"; }
    for signal in TERM HUP USR1 USR2; do trap "hears $signal 75" $signal; done
    for signal in INT QUIT; do trap "hears $signal 130" $signal; done
    echo "$BASHPID" >>"$NSA_EXIT_FILE.ranks"
    echo "launcher $1"
    for ((i = 0; i < 100; i++)); do sleep 0.1; kill -0 "$1" || { echo 75 >"$NSA_EXIT_FILE"; echo saved; exit 75; }; done
}
if [[ -n ${NO_CODE:-} ]]; then echo "launcher $$"; exit 0; fi
if [[ -n ${NO_RANKS:-} ]]; then echo "launcher $$"; exec sleep 20; fi
rank $$ &
wait
exit 1
"""


def start_train(clone, **environment):
    """`launch.sh train` of a clone that is set up, with `DEEPSPEED`, in a folder of its own; once it runs."""
    root, tools = clone
    (root / ".venv/bin").mkdir(parents=True)
    stand_in(tools, "nvidia-smi", "exit 1")
    for name in ("cat", "grep", "mktemp", "rm", "sleep"):
        (tools / name).symlink_to(shutil.which(name))
    checksum = subprocess.run(["cksum"], stdin=(ROOT / "pyproject.toml").open(), capture_output=True, text=True).stdout
    (root / ".venv/setup-stamp").write_text(f"{root} cpu {checksum}")
    stand_in(root / ".venv/bin", "python", 'if [[ $* == *-m* ]]; then echo "python in $PWD: $*" >&2; else echo 1; fi')
    stand_in(root / ".venv/bin", "deepspeed", DEEPSPEED)
    (root.parent / "exp").mkdir()
    process = subprocess.Popen(
        ["bash", str(root / "launch.sh"), "train", "mine.yaml"],
        cwd=root.parent / "exp",
        env={**os.environ, "PATH": str(tools), "TMPDIR": str(root.parent), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("launcher "):
            return process, int(line.split()[1])
    raise AssertionError(f"it did not start: {process.wait()}")


SIGNALS = [("TERM", 75), ("HUP", 75), ("USR1", 75), ("USR2", 75), ("INT", 130), ("QUIT", 130)]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_to_launch_sh_is_passed_on_to_the_ranks_and_waited_for(clone, number, code):
    process, _ = start_train(clone)
    process.send_signal(getattr(signal, f"SIG{number}"))
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    assert f"rank heard {number}" in output and "saved" in output
    assert not [path for path in clone[0].parent.iterdir() if path.name.startswith("tmp.")]


@pytest.mark.parametrize(("number", "code"), [("TERM", 75), ("INT", 130)])
def test_a_signal_before_there_are_ranks_ends_their_launcher(clone, number, code):
    process, launcher = start_train(clone, NO_RANKS="1")
    process.send_signal(getattr(signal, f"SIG{number}"))
    process.communicate(timeout=15)
    assert process.returncode == code
    with pytest.raises(ProcessLookupError):
        os.kill(launcher, 0)


def test_a_launcher_that_is_killed_is_no_end_of_its_ranks(clone):
    process, launcher = start_train(clone)
    os.kill(launcher, signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 75 and "saved" in output
    root, tools = clone
    shutil.rmtree(root.parent / "exp")
    shutil.rmtree(root / ".venv")
    for name in ("cat", "grep", "mktemp", "rm", "sleep"):
        (tools / name).unlink()
    process, launcher = start_train(clone, NO_RANKS="1")
    os.kill(launcher, signal.SIGKILL)
    assert "a process was killed: run the same command again" in process.communicate(timeout=15)[0]
    assert process.returncode == 85


def test_a_launcher_that_is_content_without_a_code_of_the_run_lost_its_ranks(clone):
    """DeepSpeed's own ends with 0 where its child was killed."""
    process, _ = start_train(clone, NO_CODE="1")
    assert "a process was killed" in process.communicate(timeout=15)[0] and process.returncode == 85


def test_a_command_runs_where_it_is_given_and_options_are_the_trainers(clone):
    process, _ = start_train(clone)
    process.kill()
    process.communicate()
    root, tools = clone
    (root / "configs").mkdir()
    (root / "configs/demo.yaml").touch()
    here = root.parent / "exp"
    (here / "mine.yaml").touch()

    def run(*arguments):
        command = ["bash", str(root / "launch.sh"), *arguments]
        environment = {**os.environ, "PATH": str(tools), "TMPDIR": str(root.parent)}
        return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=30)

    for given, found in (("mine.yaml", "mine.yaml"), ("configs/demo.yaml", f"{root}/configs/demo.yaml")):
        done = run("train", given, "--dry-run", "training.steps=3")
        assert f"python in {here}: -m nsa.train {found} --dry-run training.steps=3" in done.stderr
        assert done.returncode == 0
    for command, module in (("prepare", "nsa.data.prepare"), ("export", "nsa.export"), ("evaluate", "nsa.evaluate")):
        assert f"python in {here}: -m {module} mine.yaml" in run(command, "mine.yaml").stderr

    stand_in(root / ".venv/bin", "python", 'echo "unknown key" >&2; exit 2')
    mistaken = run("train", "mine.yaml")
    assert (mistaken.returncode, mistaken.stdout, mistaken.stderr) == (2, "", "unknown key\n"), "no launcher is started"


def test_stages_follow_one_another_and_one_that_stops_ends_them(clone):
    process, _ = start_train(clone)
    process.kill()
    process.communicate()
    root, tools = clone
    lists = "if [[ $* == *--stages* ]]; then printf 'one\\ntwo\\nthree\\n'; elif [[ $* != *-m* ]]; then echo 1; fi"
    stand_in(root / ".venv/bin", "python", lists)
    ends = (
        'echo "trains ${*: -2}"; code=0; [[ $* == *stage=two* ]] && code=$CODE; echo $code >$NSA_EXIT_FILE; exit $code'
    )
    stand_in(root / ".venv/bin", "deepspeed", ends)

    def trained(code, *arguments):
        command = ["bash", str(root / "launch.sh"), "train", "mine.yaml", *arguments]
        environment = {**os.environ, "PATH": str(tools), "TMPDIR": str(root.parent), "CODE": code}
        done = subprocess.run(command, cwd=root.parent / "exp", env=environment, capture_output=True, text=True)
        return done.returncode, [line.removeprefix("trains ") for line in done.stdout.splitlines()]

    every = [f"mine.yaml stage={stage}" for stage in ("one", "two", "three")]
    assert trained("0") == (0, every)
    assert trained("75") == (75, every[:2])
    assert trained("0", "stage=three") == (0, every[2:])


def test_a_comparison_is_what_python_makes_of_it(clone):
    process, _ = start_train(clone)
    process.kill()
    process.communicate()
    root, tools = clone
    stand_in(root / ".venv/bin", "python", 'echo "$HF_HUB_OFFLINE $*"; exit "${CODE:-0}"')

    def compared(*arguments, code="0"):
        command = ["bash", str(root / "launch.sh"), "compare", *arguments]
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        environment |= {"PATH": str(tools), "TMPDIR": str(root.parent), "CODE": code}
        done = subprocess.run(command, cwd=root.parent / "exp", env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.strip()

    begun = f"-m nsa.compare --launch {root}/launch.sh"
    demo = f"1 {begun} {root}/configs/compare/demo.yaml"
    assert compared() == (0, demo)
    assert compared("--minutes", "6", "--workers", "2", code="75") == (75, f"{demo} --minutes 6 --workers 2")
    assert compared("mine.yaml", "samples=2", code="85") == (85, f"{begun} mine.yaml samples=2")
    assert compared("--minutes", "6", "mine.yaml", "--workers=2") == (0, f"{begun} --minutes 6 mine.yaml --workers=2")
    assert compared("--report", "results", "--pack", "few") == (0, "-m nsa.compare report results --pack few")
    assert compared("--report=results") == (0, "-m nsa.compare report results")


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
