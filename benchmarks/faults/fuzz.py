"""Inputs that nobody would write: every one is used, or refused in words by the documented error; nothing else."""

import json
import logging
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.lives import CONFIG, Life, Stage
from nsa.config import load_config
from nsa.data import sources
from nsa.data.config import SourceConfig
from nsa.data.shards import PreparedData
from nsa.data.tokenizer import Tokenizer
from nsa.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
YAML_PARTS = (
    ": ", "- ", "[", "]", "{", "}", "&a ", "*a", "!!python/object/apply:os.system ", "!!binary ", "|\n", ">\n",
    "'", '"', "#", "%YAML 1.1\n", "---\n", "...\n", "? ", "<<: ", "\t", "\0", "\x85", "\u2028", "\ufeff", "\ud800",
    "1e999", "-1e-999", ".nan", ".inf", "0x1F", "1_000", "9" * 5000, "~", "null", "yes", "true", "2026-11-24", "1:30",
    "[" * 3000, "{a: " * 400, "\U0001f600", "=", "name: x\n", "  ", "\r\n", "\\", "%s",
)  # fmt: skip
JSONL_PARTS = (
    b'{"text": "a"}\n', b"\n", b"\0", b"\xff\xfe", b"\xc3", b'"', b"{", b"}", b"[", b"]", b"null\n", b"1\n", b'"x"\n',
    b'{"text": 1}\n', b'{"text": null}\n', b'{"txt": "a"}\n', b'{"text": ["a"]}\n', b'{"text": {"a": 1}}\n', b"\\u0000",
    b"\\ud800", b"9" * 400, b"[" * 2000, b'{"text": "' + b"x" * 30_000 + b'"}\n', b"\r\n", b",",
    b'{"text": "a", "text": "b"}\n', b"NaN\n", b"\xef\xbb\xbf",
)  # fmt: skip
JSON_PARTS = (
    b"{", b"}", b"[", b'"', b"null", b"-1", b"1e999", b"[" * 2000, b'"a": 1, "a": 2', b"\0", b"\xff", b",", b"true",
)  # fmt: skip


def mutate(content: bytes, parts: tuple[bytes, ...], chance: random.Random) -> bytes:
    """One to four changes: bytes flipped, parts put in, lines and spans removed, doubled or moved."""
    data = bytearray(content)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(data) + 1)
        span = slice(at, at + chance.choice((1, 3, 10, 60)))
        match chance.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << chance.randrange(8)
            case 1:
                data[at:at] = chance.choice(parts)
            case 2:
                del data[span]
            case 3:
                data[at:at] = data[span]
            case 4:
                lines = data.split(b"\n")
                i, j = chance.randrange(len(lines)), chance.randrange(len(lines))
                lines[i], lines[j] = lines[j], lines[i]
                data = bytearray(b"\n".join(lines))
            case 5:
                lines = data.split(b"\n")
                lines.insert(chance.randrange(len(lines)), lines[chance.randrange(len(lines))])
                data = bytearray(b"\n".join(lines))
            case _:
                data[span] = chance.choice(parts)
    return bytes(data)


def campaign(stage: Stage, yaml: int, jsonl: int, files: int, seed: int) -> list[dict[str, object]]:
    """Fuzz configurations and overrides, JSONL, and the files of checkpoints and prepared data."""
    chance = random.Random(seed)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it tells each error, which we do anyway
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        folder = Path(name)
        rows = [_yaml(folder, yaml, chance), _overrides(folder, yaml // 5, chance), _jsonl(folder, jsonl, chance)]
        rows += _checkpoints(stage, folder, files, chance)
        rows.append(_prepared(stage, folder, files, chance))
        rows.append(_tokenizer(stage, folder, files, chance))
        rows.append(_commands(stage, folder, chance))
    return rows


def row(fault: str, times: int, good: int, outcome: str) -> dict[str, object]:
    return {"fault": fault, "times": times, "as documented": good, "outcome": outcome, "ok": good == times}


class Tally:
    """Counts outcomes; keeps the first of the inputs that were answered by anything but ``allowed``."""

    def __init__(self, what: str, allowed: type[Exception]) -> None:
        self.what, self.allowed, self.seen = what, allowed, Counter[str]()
        self.first: list[str] = []

    def __call__(self, use: Callable[[], Any], content: object) -> None:
        try:
            use()
            self.seen["used"] += 1
        except self.allowed as e:
            self.seen["refused" if str(e) else "refused without a word"] += 1
        except Exception as e:
            self.seen["other"] += 1
            self.first.append(f"{type(e).__name__}: {e} on {content!r:.300}")

    def row(self) -> dict[str, object]:
        inputs = self.seen.total()
        good = self.seen["used"] + self.seen["refused"]
        print(f"{self.what}: {inputs} inputs, {dict(self.seen)}", *self.first[:3], sep="\n  ", flush=True)
        outcome = f"{self.seen['used']:,} accepted, {self.seen['refused']:,} rejected with an error message"
        return row(f"fuzz, {self.what}", inputs, good, outcome)


def _yaml(folder: Path, count: int, chance: random.Random) -> dict[str, object]:
    texts = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.yaml"))] + [CONFIG.encode()]
    parts = tuple(part.encode("utf-8", "surrogatepass") for part in YAML_PARTS)
    tally, path = Tally("YAML", ValueError), folder / "x.yaml"
    for _ in range(count):
        content = mutate(chance.choice(texts), parts, chance)
        path.write_bytes(content)
        tally(lambda: load_config(path), content)
    return tally.row()


def _overrides(folder: Path, count: int, chance: random.Random) -> dict[str, object]:
    tally, path = Tally("key=value overrides", ValueError), ROOT / "configs/demo.yaml"
    keys = ["seed", "name", "data.sources", "data.sources.0.weight", "model", "training.steps", "a.b.c", ""]
    parts = tuple(part.encode("utf-8", "surrogatepass") for part in YAML_PARTS)
    for _ in range(count):
        text = f"{chance.choice(keys)}={chance.choice(['1', 'x', '[1]', '{a: 1}', ''])}"
        text = mutate(text.encode(), parts, chance).decode(errors="replace")
        tally(lambda text=text: load_config(path, [text]), text)
    return tally.row()


def _jsonl(folder: Path, count: int, chance: random.Random) -> dict[str, object]:
    lines = [json.dumps({"text": f"line {i} \u00e9 \U0001f600 \n\t" * i, "id": i}) for i in range(6)]
    tally, path = Tally("JSONL", ValueError), folder / "x.jsonl"
    source = SourceConfig(name="x", kind="files", path=str(path))

    def read() -> None:
        sources.check(source)
        for _ in sources.documents(source):
            pass

    for _ in range(count):
        content = mutate("\n".join(lines).encode() + b"\n", JSONL_PARTS, chance)
        path.write_bytes(content)
        tally(read, content)
    return tally.row()


def _checkpoints(stage: Stage, folder: Path, count: int, chance: random.Random) -> list[dict[str, object]]:
    stage.reference()
    good = checkpoint.checkpoints(stage.folder / "reference-1/run")[0]
    step = folder / good.name
    shutil.copytree(good, step)
    rows = []
    weights = good / "model-00000-000.safetensors"
    readers: dict[str, Callable[[], object]] = {
        "manifest.json": lambda: checkpoint.verify(step),
        "state.json": lambda: checkpoint.load_state(step),
        weights.name: lambda: checkpoint.load_weights(step),
    }
    for name, read in readers.items():
        tally, content = Tally(f"checkpoint {name}", checkpoint.CheckpointError), (good / name).read_bytes()
        head = 8 + int.from_bytes(content[:8], "little") if name == weights.name else len(content)
        for _ in range(count):
            changed = mutate(content[:head], JSON_PARTS, chance)
            (step / name).write_bytes(changed + content[head:])
            tally(read, changed[-300:])
        (step / name).write_bytes(content)
        rows.append(tally.row())
    return rows


def _prepared(stage: Stage, folder: Path, count: int, chance: random.Random) -> dict[str, object]:
    (good,) = (p for p in (stage.folder / "cache").iterdir() if p.is_dir())
    tally, copy = Tally("prepared data, manifest.json and documents.npy", ValueError), folder / "prepared"
    shutil.copytree(good, copy)
    for i in range(count):
        name = ("manifest.json", "text/documents.npy")[i % 2]
        changed = mutate((good / name).read_bytes(), JSON_PARTS, chance)
        (copy / name).write_bytes(changed)
        tally(lambda: PreparedData(copy), changed[:300])
        (copy / name).write_bytes((good / name).read_bytes())
    return tally.row()


def _tokenizer(stage: Stage, folder: Path, count: int, chance: random.Random) -> dict[str, object]:
    """In a process of its own: sentencepiece is C++, and a crash would be one of the answers."""
    (good,) = (p for p in (stage.folder / "cache").iterdir() if p.is_dir())
    content, path, answer = (good / "tokenizer.model").read_bytes(), folder / "x.model", folder / "answer"
    pid = os.fork()
    if pid == 0:
        tally = Tally("tokenizer.model", ValueError)
        try:
            for _ in range(count):
                changed = mutate(content, JSON_PARTS, chance)
                path.write_bytes(changed)
                tally(lambda: Tokenizer(path), changed[:100])
            answer.write_text(json.dumps(tally.row()))
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    if answer.exists():
        return json.loads(answer.read_text())
    outcome = f"the reader ended with {os.waitstatus_to_exitcode(status)}"
    return row("fuzz, tokenizer.model", count, 0, outcome)


def _commands(stage: Stage, folder: Path, chance: random.Random) -> dict[str, object]:
    """The command itself on a few: exit code 2, one message, no traceback."""
    parts, good, times = tuple(part.encode("utf-8", "surrogatepass") for part in YAML_PARTS), 0, 0
    path = folder / "command.yaml"
    while times < 20:
        path.write_bytes(mutate((stage.folder / "tiny.yaml").read_bytes(), parts, chance))
        try:
            load_config(path, stage.arguments[1:])
            continue  # it would train
        except ValueError:
            times += 1
        life = Life([str(path), *stage.arguments[1:]], folder / "log")
        good += life.end() == 2 and "Traceback" not in life.output and life.output.startswith("error: ")
    return row("the command on bad YAML", times, good, "exit code 2, error message")
