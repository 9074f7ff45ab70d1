"""Checkpoint folders: written so that a kill at any moment leaves the last good one, verified before they are used.

    step_00000100/
        model-RRRRR-PPP.safetensors        fp32 weights, whole tensors under the parameters' names (rank R, part P)
        optimizer-RRRRR-PPP.safetensors    `exp_avg.<name>`, `exp_avg_sq.<name>`
        rng-RRRRR.json                     random generators of rank R
        state.json config.yaml tokenizer.model (or tokenizer.json and tokenizer_config.json)
        manifest.json                      size and sha256 of every other file; written last

All is written into `step_00000100.tmp`, every file and the folder are fsynced, and a rename makes it a checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsa.data.load_tokenizer import FILES
from nsa.untrusted import UntrustedError, check_safetensors, read_json, regular_size

MANIFEST = "manifest.json"
FORMAT = 1
COUNTERS = ("step", "updates", "skipped_in_a_row", "samples", "tokens", "world_size")  # of state.json
PART_BYTES = 2**30  # a file's tensors are held in memory twice while it is written
_NAME = re.compile(r"step_(\d{8,18})")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
# Names that are read as parts of a checkpoint. Other files that lie in its folder are nobody's business.
_PART = re.compile(
    rf"(model|optimizer)-.*\.safetensors|rng-.*\.json|state\.json|config\.yaml|{'|'.join(map(re.escape, FILES))}"
)


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or is not what its manifest says."""


class FormatError(CheckpointError):
    """A checkpoint is of another version of this program: it is not damaged, and cannot be read."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(path.name.removeprefix("step_"))


def write_file(path: Path, content: bytes) -> dict[str, Any]:
    """Write and fsync; the file's entry of the manifest, computed from what was to be written."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def fsync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(folder: Path, rank: int, tensors: Iterable[tuple[str, str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Write (key, name, tensor) as safetensors files of at most about 1 GiB; their entries of the manifest.

    ``tensors`` is exhausted whatever happens: other ranks take part in producing it.

    Raises:
        OSError: a file could not be written.
    """
    entries: dict[str, dict[str, Any]] = {}
    pending: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    error: OSError | None = None

    def flush(kind: str) -> None:
        part = sum(name.startswith(kind) for name in entries)
        name = f"{kind}-{rank:05d}-{part:03d}.safetensors"
        entries[name] = write_file(folder / name, safetensors.torch.save(pending[kind]))
        pending[kind] = {}

    for key, name, tensor in tensors:
        if error is not None:
            continue
        kind = "model" if key == "weight" else "optimizer"
        pending[kind][name if key == "weight" else f"{key}.{name}"] = tensor.contiguous()
        try:
            if sum(t.nbytes for t in pending[kind].values()) >= PART_BYTES:
                flush(kind)
        except OSError as e:
            error = e
    for kind in pending:
        if pending[kind] and error is None:
            flush(kind)
    if error is not None:
        raise error
    return entries


def commit(temporary: Path, final: Path, entries: dict[str, dict[str, Any]]) -> None:
    """Write the manifest into ``temporary`` and rename it to ``final``, which must not exist.

    Raises:
        CheckpointError: what was written of the manifest is not what is read back.
    """
    manifest = _json({"format": FORMAT, "files": dict(sorted(entries.items()))})
    write_file(temporary / MANIFEST, manifest)
    if (temporary / MANIFEST).read_bytes() != manifest:
        raise CheckpointError(f"{temporary / MANIFEST}: it was not read back as it was written")
    fsync_folder(temporary)
    temporary.rename(final)
    fsync_folder(final.parent)


def verify(folder: Path, content: bool = True) -> None:
    """Check a checkpoint against its manifest: every file, and that no other would be read as a part of it.

    Not ``content``: the sizes of its files alone.

    A folder that somebody made on purpose is refused, too: names that lead out of it, links, pipes, duplicate keys.
    Files that are no part of a checkpoint (such as .DS_Store) are left alone.

    Raises:
        FormatError: another version of this program wrote it.
        CheckpointError: saying what is wrong.
    """
    try:
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link; copy what it points to (cp -RL)")
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        if manifest["format"] != FORMAT:
            raise FormatError(
                f"{folder}: format {str(manifest['format'])[:80]}, this version reads {FORMAT}; "
                "use the version that wrote it"
            )
        present = {path.name for path in folder.iterdir() if _PART.fullmatch(path.name)}
        if not isinstance(files, dict):
            raise TypeError("its files are no mapping")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: there is no {MANIFEST}; it was not written to its end") from None
    except (OSError, UntrustedError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: {MANIFEST} cannot be read ({e})") from None
    verify_files(folder, files, content)
    if extra := sorted(present - files.keys()):
        raise CheckpointError(f"{folder}: {extra[0]!r} is not in the {MANIFEST}; take it out of the folder")


def verify_files(folder: Path, files: dict[str, Any], content: bool = True) -> None:
    """Check files against their entries of the manifest; not ``content``: their sizes alone. Raises as `verify`."""
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise CheckpointError(f"{folder}: {MANIFEST} names {name!r}, which is no file of this folder")
        path = folder / name
        try:
            size = regular_size(path)
            if size != entry["bytes"]:
                raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry['bytes']}; it is cut short")
            if not content:
                continue
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                raise CheckpointError(f"{path}: its sha256 is not the manifest's; its content was changed")
        except OSError as e:
            raise CheckpointError(f"{path}: {e.strerror}") from None
        except UntrustedError as e:
            raise CheckpointError(str(e)) from None
        except (KeyError, TypeError):
            raise CheckpointError(f"{folder}: {MANIFEST} does not say size and sha256 of {name}") from None


# What else a run that goes on can do than mend its checkpoints.
START_OVER = "To start over from step 0 instead, move the step_* folders away or set another name (name=...)"


def checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, verified or not."""
    if not run_folder.is_dir():
        return []
    found = [(int(m[1]), path) for path in run_folder.iterdir() if (m := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest_complete(
    run_folder: Path | str,
    before: int | None = None,
    content: bool = True,
    otherwise: str = START_OVER,
    quiet: bool = False,
) -> Path | None:
    """The newest checkpoint (of fewer than ``before`` steps) that is what its manifest says; broken ones are reported
    and passed over.

    Args:
        content: whether files are read to verify them; else their sizes alone are.
        otherwise: what else can be done than to mend a broken one, as a sentence: it depends on what it is for.
        quiet: broken ones are not reported.

    Returns:
        None if there is no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and none can be used; or a newer one is of another version.
    """
    reasons = []
    for path in checkpoints(Path(run_folder)):
        if before is not None and step_of(path) >= before:
            continue
        try:
            verify(path, content)
        except FormatError:
            raise
        except CheckpointError as e:
            reasons.append(str(e))
        else:
            for reason in () if quiet else reasons:
                print(f"checkpoint passed over: {reason}", flush=True)
            return path
    if reasons:
        causes = "\n".join(f"  {reason}" for reason in reasons)
        raise CheckpointError(
            f"{run_folder}: none of its checkpoints can be used:\n{causes}\nMend one of them. {otherwise}"
        )
    return None


def set_aside(run_folder: Path, newest: Path | None, why: str = "broken") -> None:
    """Rename the checkpoints that are newer than ``newest`` to ``*.<why>`` (``*.<why>-2`` if that exists), so that
    their steps can be saved anew, and remove what a killed save left."""
    for path in run_folder.glob("step_*.tmp"):
        shutil.rmtree(path)
    for path in checkpoints(run_folder):
        if path == newest:
            break
        target, number = path.with_name(f"{path.name}.{why}"), 2
        while os.path.lexists(target):
            target, number = path.with_name(f"{path.name}.{why}-{number}"), number + 1
        path.rename(target)
        print(f"  {path.name} is kept as {target.name}; remove it when you have looked at it", flush=True)


def prune(run_folder: Path, keep_last: int, protect: int | None = None) -> None:
    """Remove all but the ``keep_last`` newest checkpoints. A folder loses its name before its files.

    Call it when the newest one was verified: only that makes older ones superfluous. ``protect``: the newest
    checkpoint of fewer steps than this stays, too.
    """
    found = checkpoints(run_folder)
    doomed = found[keep_last:]
    if protect is not None:
        spared = next((path for path in found if step_of(path) < protect), None)
        doomed = [path for path in doomed if path != spared]
    for path in doomed:
        unnamed = path.with_name(f"{path.name}.tmp")
        path.rename(unnamed)
        shutil.rmtree(unnamed)


def check_space(run_folder: Path, needed: int) -> None:
    """Raises:
    CheckpointError: ``needed`` bytes (and some room) are not free."""
    free, wanted = shutil.disk_usage(run_folder).free, int(needed * 1.02) + 2**20
    if free < wanted:
        raise CheckpointError(
            f"{run_folder}: a checkpoint takes {_size(wanted)}, {_size(free)} are free, {_size(wanted - free)} are "
            "missing"
        )


def _size(num_bytes: int) -> str:
    """As "1.5 GiB": in the largest unit that it has one of."""
    power = min(4, max(0, num_bytes.bit_length() - 1) // 10)
    return f"{num_bytes / 2 ** (10 * power):.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


class TensorReader:
    """Reads single tensors of a checkpoint by the name they have on disk.

    Raises:
        CheckpointError: a file of them is not sound.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            try:
                names = check_safetensors(path)
                file = safe_open(path, framework="pt")
            except (SafetensorError, UntrustedError, OSError) as e:
                raise CheckpointError(f"{path}: {e}") from None
            if twice := names.keys() & self._files.keys():
                raise CheckpointError(f"{path}: tensor {min(twice)} is in another file, too")
            self._files |= dict.fromkeys(names, file)

    def names(self) -> list[str]:
        return sorted(self._files)

    def __call__(self, name: str, shape: torch.Size | None = None) -> Tensor:
        """The tensor, fp32 and of ``shape`` if that is given. Raises CheckpointError if it is not, or absent."""
        if name not in self._files:
            raise CheckpointError(f"{self._folder}: tensor {name} is missing")
        tensor = self._files[name].get_tensor(name)
        if shape is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise CheckpointError(
                f"{self._folder}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, not fp32 {tuple(shape)}"
            )
        return tensor


def load_weights(folder: Path | str) -> dict[str, Tensor]:
    """The fp32 weights of a checkpoint: whole tensors under the names of the decoder's state dict.

    Raises:
        CheckpointError: there are none, or a file is not sound.
    """
    read = TensorReader(Path(folder), "model")
    if not read.names():
        raise CheckpointError(f"{folder} holds no model-*.safetensors; name a step_* folder of a run")
    return {name: read(name) for name in read.names()}


def load_json(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises CheckpointError if it is none."""
    try:
        value = read_json(path)
    except (OSError, UntrustedError) as e:
        raise CheckpointError(f"{path}: {e}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a mapping")
    return value


def load_state(folder: Path | str) -> dict[str, Any]:
    """state.json of a checkpoint. Raises CheckpointError if it is not sound."""
    state = load_json(Path(folder) / "state.json")
    for name in COUNTERS:
        if name in state and (type(state[name]) is not int or not 0 <= state[name] < 2**62):
            raise CheckpointError(f"{folder}/state.json: {name} is {str(state[name])[:80]!r}, no count")
    return state


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """As `write_file`, of ``value`` as JSON."""
    return write_file(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
