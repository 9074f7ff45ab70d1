"""Installed packages as text of the builtin source: found without being imported, prepared once, missed in words."""

import hashlib
import json
import os
import shutil
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nsa.data import builtin, prepare, sources
from nsa.data.config import DataConfig, SourceConfig, TokenizerConfig
from nsa.data.shards import PreparedData
from tests.data.corpus import write_corpus

LIBRARY = ["abc.py", "json/decoder.py", "zipfile.py"]
PACKAGES = {
    "site_a": ["__init__.py", "core.py", "deep/tests/test_core.py", "json/decoder.py", "notes.txt", "native.so"],
    "site_b": ["__init__.py", "core.py"],
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of three files, two packages and a module that do not like to be imported, and a bare folder."""
    texts = sorted(write_corpus(tmp_path / "texts", 20).iterdir())
    paths = [tmp_path / "library" / name for name in LIBRARY]
    paths += [tmp_path / "site" / package / name for package, names in PACKAGES.items() for name in names]
    paths += [
        tmp_path / "site" / name for name in ("site_module.py", "bare/core.py", f"compiled{EXTENSION_SUFFIXES[0]}")
    ]
    for path, text in zip(paths, texts, strict=False):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"raise RuntimeError('imported')\n# " + text.read_bytes())
    (tmp_path / "site/site_b/latin.py").write_bytes(b"# caf\xe9")
    monkeypatch.setattr(builtin, "root", lambda: tmp_path / "library")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
    return tmp_path / "site"


def python(*packages: str, **more: Any) -> SourceConfig:
    return SourceConfig(name="python", kind="builtin", packages=list(packages), **more)


def test_packages_stand_beside_the_library(site: Path) -> None:
    """Their .py files that are UTF-8, byte for byte, under names of their own, in one order. Planted: a package that
    is imported; ids without the package's name; other files than .py; the order of the disk."""
    found = list(sources.documents(python("site_b", "site_module", "site_a")))
    assert [id for id, _ in found] == [
        *LIBRARY,
        "site_a/__init__.py", "site_a/core.py", "site_a/deep/tests/test_core.py", "site_a/json/decoder.py",
        "site_b/__init__.py", "site_b/core.py",
        "site_module.py",
    ]  # fmt: skip
    for id, text in found:
        assert ((site.parent / "library" if id in LIBRARY else site) / id).read_bytes() == text
    assert not {"site_a", "site_b", "site_module"} & sys.modules.keys()


def test_packages_of_this_project_are_text() -> None:
    """They come with its dependencies; torch is imported here, the other may be."""
    found = list(sources.documents(python("torch", "sympy")))
    sizes = {name: sum(len(d.text) for d in found if d.id.startswith(f"{name}/")) for name in ("torch", "sympy")}
    assert min(sizes.values()) > 10_000_000
    ids = [d.id for d in found]
    assert len(set(ids)) == len(ids)


def test_without_packages_nothing_changes(site: Path) -> None:
    """The description that names the prepared data, as it was. Planted: a key for packages that are not there."""
    listing = [(name, (site.parent / "library" / name).stat().st_size) for name in LIBRARY]
    digest = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    version = ".".join(map(str, sys.version_info[:3]))
    assert sources.describe(python()) == {"kind": "builtin", "python": version, "listing": digest}
    assert sources.content(python()) is None


@pytest.mark.parametrize("change", ["name", "size", "time", "packages"])
def test_what_determines_the_text_is_described(site: Path, change: str) -> None:
    """Planted: a description of the library alone, of names and sizes alone, and without the packages."""
    before, path = sources.describe(python("site_a")), site / "site_a/core.py"
    assert sources.describe(python("site_a")) == before
    if change == "name":
        path.rename(path.with_name("other.py"))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"\n")
    elif change == "time":
        os.utime(path, (1, 1))
    else:
        shutil.rmtree(site / "site_b")
        (site / "site_b").symlink_to(site / "site_a")
    assert sources.describe(python("site_b" if change == "packages" else "site_a")) != before


@pytest.mark.parametrize(
    ("package", "words"),
    [
        ("site_c", r"'python': package 'site_c' is not installed for .*: install it there, correct its name"),
        ("json", "package 'json' is of the standard library, which is read anyway: take it out of packages"),
        ("zipfile", "of the standard library"),
        ("bare", "package 'bare' is a folder without __init__.py .*site/bare.*: read it with a source of kind files"),
        ("compiled", "package 'compiled' has no .py files .*: take it out of the source's packages"),
        ("made_up", "package 'made_up' is not installed"),
    ],
)
def test_a_package_that_cannot_be_read_is_named(site: Path, package: str, words: str) -> None:
    """Notices an error of Python instead, and a package that has no text and is passed over."""
    for ask in (sources.describe, lambda source: list(sources.documents(source))):
        with pytest.raises(ValueError, match=words):
            ask(python("site_a", package))


@pytest.mark.parametrize(
    ("packages", "more", "words"),
    [
        (["site.a"], {}, "write the one that is imported, without dots"),
        (["scikit-learn"], {}, r"'scikit-learn' is no name of a package: .*\(sklearn, not scikit-learn\)"),
        (["a", "a"], {}, "the packages must differ"),
        (["a"], {"kind": "files", "path": "x"}, "packages go with kind builtin only"),
    ],
)
def test_what_is_no_list_of_packages(packages: list[str], more: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SourceConfig(**{"name": "python", "kind": "builtin", "packages": packages, **more})


def test_packages_are_prepared_once(
    site: Path, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever their order in the file, installed anew, and gone; not where the text or the packages are others.
    Planted: content of packages that is not compared; data for other packages, once these are gone."""
    tokenizer = TokenizerConfig(path=str(prepared.folder / "tokenizer.model"))
    build, builds = prepare._build, []
    monkeypatch.setattr(prepare, "_build", lambda *given: builds.append(given[0].name) or build(*given))

    def data(*packages: str, **more: Any) -> PreparedData:
        config = DataConfig(
            sources=[python(*packages)],
            tokenizer=tokenizer,
            sequence_length=64,
            cache_dir=str(tmp_path / "cache"),
            workers=1,
        )
        return prepare.prepare(config, 1, progress=False, **more)

    alone, both = data(), data("site_a", "site_b")
    assert len(builds) == 2 and alone.fingerprint != both.fingerprint
    assert data("site_b", "site_a").folder == both.folder
    assert data().folder == alone.folder
    for path in site.rglob("*.py"):
        os.utime(path, (1, 1))
    assert data("site_a", "site_b").folder == both.folder and len(builds) == 2
    (site / "site_b/core.py").write_bytes((site / "site_b/core.py").read_bytes()[::-1])
    changed = data("site_a", "site_b")
    assert changed.fingerprint != both.fingerprint and len(builds) == 3
    shutil.rmtree(site / "site_b")
    assert data("site_a", "site_b").folder == changed.folder
    assert data("site_a", "site_b", fingerprint=both.fingerprint).folder == both.folder
    with pytest.raises(ValueError, match="package 'site_b' is not installed"):
        data("site_b")
    assert len(builds) == 3
