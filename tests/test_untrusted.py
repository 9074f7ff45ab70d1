"""Folders that somebody made on purpose are refused before anything in them is used."""

import hashlib
import json
import os
import re
import struct

import pytest
import torch
from safetensors.torch import save

from nsa.evaluate import main as evaluate
from nsa.export import main as export
from nsa.training import checkpoint
from nsa.training.checkpoint import CheckpointError
from nsa.untrusted import UntrustedError, check_safetensors, inside, parse_json, read_json
from tests.conftest import ROOT
from tests.small_run import small_export, small_run


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "[" * 100_000, "1" * 10_000, '{"a": 1} x', "", "\xff"],
)
def test_ambiguous_or_endless_json(text):
    with pytest.raises(UntrustedError, match="no valid JSON"):
        parse_json(text.encode("latin1"), "file")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a\0b", "a\\b", "a//b", "a\n", 7, None]
)
def test_names_that_lead_elsewhere(tmp_path, name):
    with pytest.raises(UntrustedError):
        inside(tmp_path, name)


def test_links_and_pipes_and_huge_files(tmp_path):
    assert inside(tmp_path, "a/b.bin") == tmp_path / "a/b.bin"
    (tmp_path / "link").symlink_to("/etc")
    with pytest.raises(UntrustedError, match="is a link"):
        inside(tmp_path, "link/passwd")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UntrustedError, match="no regular file"):
        read_json(tmp_path / "pipe")
    (tmp_path / "long.json").write_text('"' + "x" * 200 + '"')
    with pytest.raises(UntrustedError, match="at most 100"):
        read_json(tmp_path / "long.json", 100)


def with_header(header: str | dict, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text) if length is None else length) + text.encode() + body


TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "huge": (with_header("{}", length=2**62), "header of"),
    "longer than the file": (with_header("{}", length=3), "header of"),
    "cut": (b"\1\0", "header of.*copy it .*again"),
    "duplicate": (with_header(f'{{"a": {json.dumps(TENSOR)}, "a": {json.dumps(TENSOR)}}}', bytes(8)), "duplicate key"),
    "overlap": (with_header({"a": TENSOR, "b": TENSOR}, bytes(8)), "overlap"),
    "gap": (with_header({"a": {**TENSOR, "data_offsets": [4, 12]}}, bytes(12)), "gap"),
    "too much data": (with_header({"a": TENSOR}, bytes(9)), "8 bytes by the header, 9 in the file.*copy it .*again"),
    "too little data": (with_header({"a": TENSOR}, bytes(7)), "8 bytes by the header, 7 in the file.*copy it .*again"),
    "shape": (with_header({"a": {**TENSOR, "shape": [3]}}, bytes(8)), "not sound"),
    "negative": (with_header({"a": {**TENSOR, "shape": [-1, -2]}}, bytes(8)), "not sound"),
    "overflow": (with_header({"a": {**TENSOR, "shape": [2**62, 2**62]}}, bytes(8)), "not sound"),
    "dtype": (with_header({"a": {**TENSOR, "dtype": "PICKLE"}}, bytes(8)), "not sound"),
    "no object": (with_header("[]"), "no object"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_safetensors(tmp_path, case):
    content, message = HEADERS[case]
    (tmp_path / "model-00000-000.safetensors").write_bytes(content)
    with pytest.raises(UntrustedError, match=message):
        check_safetensors(tmp_path / "model-00000-000.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_weights(tmp_path)


def test_a_sound_header(tmp_path):
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.ones(1, dtype=torch.bfloat16)}
    (tmp_path / "x.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    assert set(check_safetensors(tmp_path / "x.safetensors")) == {"a", "b", "c"}


def remake(step, name, content):
    """Replace a file and make the manifest agree: what an attacker would do."""
    (step / name).write_bytes(content)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest))


def test_a_tensor_in_two_files_and_a_wrong_one(tmp_path):
    for i in range(2):
        (tmp_path / f"model-0000{i}-000.safetensors").write_bytes(save({"a": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="in another file, too"):
        checkpoint.load_weights(tmp_path)
    (tmp_path / "model-00001-000.safetensors").unlink()
    read = checkpoint.TensorReader(tmp_path, "model")
    with pytest.raises(CheckpointError, match=r"not fp32 \(3,\)"):
        read("a", torch.Size([3]))
    with pytest.raises(CheckpointError, match="missing"):
        read("b")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small_run(tmp_path_factory.mktemp("run"))


HOSTILE = {
    "an extra file": lambda s: (s / "model-99999-000.safetensors").write_bytes(save({"x": torch.ones(1)})),
    "a link": lambda s: replace_by_link(s / "state.json"),
    "a pipe": lambda s: ((s / "state.json").unlink(), os.mkfifo(s / "state.json")),
    "a configuration that is a pipe": lambda s: as_pipe(s / "config.yaml"),
    "names of other folders": lambda s: rename(s, "../config.yaml"),
    "an absolute name": lambda s: rename(s, "/etc/passwd"),
    "no entry": lambda s: set_manifest(s, lambda m: m["files"].update({"state.json": None})),
    "no files": lambda s: set_manifest(s, lambda m: m.update({"files": ["state.json"]})),
    "duplicate keys": lambda s: (s / "manifest.json").write_text('{"format": 1, "format": 1, "files": {}}'),
    "depth": lambda s: (s / "manifest.json").write_text("[" * 200_000),
    "a huge manifest": lambda s: os.truncate(s / "manifest.json", 2**30),
    "no configuration": lambda s: remake(s, "config.yaml", b"name: [*a, &a x]"),
    "a bomb of aliases": lambda s: remake(s, "config.yaml", b"a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]\n"),
    "a python tag": lambda s: remake(s, "config.yaml", b"name: !!python/object/apply:os.system ['true']"),
    "deep YAML": lambda s: remake(s, "config.yaml", b"[" * 50_000),
    "another tokenizer": lambda s: remake(s, "tokenizer.model", b"\x80\x04\x95"),
    "another model": lambda s: remake(s, "model-00000-000.safetensors", save({"a": torch.ones(1)})),
    "state with counts that are none": lambda s: remake(s, "state.json", b'{"step": 1e999}'),
    "state with duplicate keys": lambda s: remake(s, "state.json", b'{"step": 1, "step": 2}'),
    "more layers than weights": lambda s: remake(
        s, "config.yaml", (s / "config.yaml").read_bytes().replace(b"num_layers: 2", b"num_layers: 900000000")
    ),
}


def set_manifest(step, change):
    manifest = json.loads((step / "manifest.json").read_text())
    change(manifest)
    (step / "manifest.json").write_text(json.dumps(manifest))


def rename(step, name):
    set_manifest(step, lambda m: m["files"].update({name: m["files"].pop("config.yaml")}))


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("harm", HOSTILE)
def test_an_export_of_a_hostile_checkpoint_is_refused(tmp_path, run, harm, capsys):
    step = tmp_path / "run/step_00000003"
    step.mkdir(parents=True)
    for path in (run / "step_00000003").iterdir():
        (step / path.name).write_bytes(path.read_bytes())
    HOSTILE[harm](step)
    assert export([str(step)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "run/export").exists()


EXPORTS = {
    "a link": lambda e: replace_by_link(e / "model.safetensors"),
    "a linked configuration": lambda e: replace_by_link(e / "training_config.yaml"),
    "a huge header": lambda e: (e / "model.safetensors").write_bytes(with_header("{}", length=2**40)),
    "duplicate keys": lambda e: (e / "model.safetensors").write_bytes(HEADERS["duplicate"][0]),
    "two files": lambda e: (e / "model-2.safetensors").write_bytes((e / "model.safetensors").read_bytes()),
    "a configuration that is a pipe": lambda e: as_pipe(e / "training_config.yaml"),
    "a tokenizer that is a pipe": lambda e: as_pipe(e / "tokenizer.model"),
    "a tokenizer that is none": lambda e: (e / "tokenizer.model").write_bytes(b"\x80\x04\x95"),
}


@pytest.mark.parametrize("harm", EXPORTS)
def test_an_evaluation_of_a_hostile_export_is_refused(tmp_path, harm, capsys):
    folder = small_export(tmp_path)
    EXPORTS[harm](folder)
    assert evaluate([str(folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_nothing_names_pickle():
    """No call that unpickles in the library (tests/training/test_no_pickle.py watches a run do without)."""
    banned = (
        "torch.load(",
        "import pickle",
        "pickle.load",
        "allow_pickle=True",
        "weights_only=False",
        "marshal",
        "eval(",
    )
    banned += ("broadcast_object_list", "all_gather_object", "joblib", "dill", " yaml.load(", "yaml.unsafe")
    for folder in ("nsa", "models", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            text = re.sub(r"[.\w]eval\(", "", path.read_text())  # a method, or the end of another name
            text = text.replace("import pickletools", "")  # this one only reads
            found = [word for word in banned if word in text]
            assert not found, f"{path}: {found}"
