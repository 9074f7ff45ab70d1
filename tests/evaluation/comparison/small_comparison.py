"""A comparison of two small siblings, and all that its folder says."""

import json
from pathlib import Path
from typing import Any

CONFIG = """
name: small
output_dir: {out}
siblings:
  - {{name: dense, export: {dense}}}
  - {{name: nsa, export: {nsa}}}
methods: [{{name: quest, page: 4}}, twilight]
budgets: [1.0, 8]  # 8 tokens are too few for twilight
tasks: [mqar]
lengths: [48, 64]
samples: 2
queries: 1
calibration_samples: 1
"""


def configured(out: Path, siblings: dict[str, Path]) -> Path:
    path = out / "small.yaml"
    path.write_text(CONFIG.format(out=out, **siblings))
    return path


def told(folder: Path) -> dict[str, Any]:
    """All that a folder says, by file, but for when it was made."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".json", ".jsonl", ".yaml")
    }
    manifest = json.loads(found.pop("manifest.json"))
    return {**found, "planned": manifest["planned"]}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and [name for name in one if one[name] != other[name]] == []
