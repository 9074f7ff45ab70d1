"""Prepared data that a cache folder holds already, found by what they were made from and not by where that lies.

The folder of prepared data is named by a key that is cheap to compute: of local files their names, sizes and times. A
corpus that was moved, copied or touched has another key, and the same content: its data are found by that, and a file
`<key>.same` names their folder from then on. Where a corpus is gone the data that a run was trained on are found by
their fingerprint, and others by the very path of the corpus.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nsa.data.config import DataConfig, SourceConfig
from nsa.data.sources import DETERMINED_BY
from nsa.untrusted import read_json

SETTINGS = ("format", "seed", "validation_fraction")
PATTERNS = ("include", "exclude")
# What data of an earlier version were most likely made with, which do not say it.
USUAL = {name: SourceConfig.model_fields[name].default for name in PATTERNS}
WITHOUT: dict[str, Any] = {"packages": []}  # what a description does not say of a source that has none


def patterns(sources: Iterable[SourceConfig]) -> dict[str, dict[str, list[str]]]:
    """By source of local files, which of them it reads. Where the files are there, their listing tells the same."""
    return {source.name: source.model_dump(include=set(PATTERNS)) for source in sources if source.kind == "files"}


def folder_of(cache: Path, key: str) -> Path:
    """The folder that belongs to a key; it need not exist."""
    try:
        name = (cache / f"{key}.same").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return cache / key
    return cache / (Path(name).name or key)


def remember(cache: Path, key: str, folder: Path) -> None:
    (cache / f"{key}.same").write_text(f"{folder.name}\n")


def forget(cache: Path, key: str) -> None:
    (cache / f"{key}.same").unlink(missing_ok=True)


def same_content(cache: Path, made_from: dict[str, Any], contents: dict[str, str]) -> Path | None:
    """Data made with the same settings from sources of the same content. ``contents``: of sources of local files."""
    for folder, manifest in _manifests(cache):
        other = manifest["made_from"]
        if (
            all(other.get(name) == made_from[name] for name in (*SETTINGS, "tokenizer"))
            and list(other["sources"]) == list(made_from["sources"])  # of equal documents the first source's is kept
            and all(
                _like(other["sources"][name], source) and other.get("contents", {}).get(name) == contents[name]
                if name in contents
                else other["sources"][name] == source
                for name, source in made_from["sources"].items()
            )
        ):
            return folder
    return None


def of_a_lost_corpus(
    config: DataConfig, settings: dict[str, Any], tokenizer: dict[str, Any] | None, fingerprint: str | None
) -> Path | None:
    """Data with ``fingerprint`` or, for None, the newest that were made from sources of these very paths and patterns.

    settings: the values of `SETTINGS`. tokenizer: its description; None: its file is gone, too.
    """
    cache, path = Path(config.cache_dir), config.tokenizer.path
    texts = [source for source in config.sources if source.kind != "synthetic"]
    for folder, manifest in _manifests(cache):
        if fingerprint is not None:
            if manifest.get("fingerprint") == fingerprint:
                return folder
            continue
        other = manifest["made_from"]
        if (
            all(other.get(name) == value for name, value in settings.items())
            and (other.get("tokenizer_path") == path if tokenizer is None else other["tokenizer"] == tokenizer)
            and list(other["sources"]) == [source.name for source in texts]
            and all(
                (found := WITHOUT | other["sources"][source.name])["kind"] == source.kind
                and found.get("path") == (str(Path(source.path or "")) if source.kind == "files" else source.path)
                and all(found.get(name) == getattr(source, name) for name in DETERMINED_BY[source.kind])
                for source in texts
            )
            and all(other.get("patterns", {}).get(name, USUAL) == pattern for name, pattern in patterns(texts).items())
        ):
            return folder
    return None


def _like(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the descriptions of two sources differ at most in where the files lie."""
    where = ("path", "listing")
    return {k: v for k, v in one.items() if k not in where} == {k: v for k, v in other.items() if k not in where}


def _manifests(cache: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(folder, manifest) of all prepared data, the newest first. A manifest that is not sound is passed over."""
    found = sorted(cache.glob("*/manifest.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        try:
            manifest = read_json(path)
            if isinstance(manifest["made_from"]["sources"], dict) and not path.parent.name.endswith(".partial"):
                yield path.parent, manifest
        except (OSError, ValueError, KeyError, TypeError):
            continue
