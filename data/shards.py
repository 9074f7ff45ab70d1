"""Token shards on disk: written once, mapped into memory, and never trusted before they are checked.

<folder>/manifest.json              what was made, from what, and the sha256 of every other file; written last
         tokenizer.model            sentencepiece; or tokenizer.json and tokenizer_config.json
         <source>/tokens-00000.bin  token ids, little endian, uint16 or uint32; documents one after another
                  documents.npy     (documents,) DOCUMENT records
                  names.txt         ids of the documents, UTF-8, one after another
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.load_tokenizer import load_tokenizer
from nsa.untrusted import UntrustedError, inside, read_json, regular_size

FORMAT = 1
SHARD_TOKENS = 1 << 27
CHECKED_AT_ONCE = 1 << 18  # documents
# token_end and name_end count from the source's beginning; num_bytes is the length of the document's text.
DOCUMENT = np.dtype([("token_end", "<i8"), ("name_end", "<i8"), ("num_bytes", "<i8"), ("validation", "?")])
REPAIR = "run `python -m nsa.data.prepare CONFIG` to build it again"


class SourceWriter:
    """Writes one source's shards, in constant memory. A document's tokens never straddle two shards."""

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int = SHARD_TOKENS):
        folder.mkdir(parents=True)
        self._folder, self._limit = folder, shard_tokens
        self._vocab_size = vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self.shards: list[dict[str, Any]] = []
        self._counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "validation")}
        self._tokens = self._name_end = 0
        self._file: Any = None
        self._names = (folder / "names.txt").open("wb")
        self._records = (folder / "records").open("w+b")  # of documents.npy, whose header says how many they are

    def add(self, name: str, tokens: np.ndarray, num_bytes: int, validation: bool) -> None:
        """tokens: the whole document, bos and eos included."""
        self.add_all([name], tokens, np.array([len(tokens)]), np.array([num_bytes]), np.array([validation]))

    def add_all(
        self, names: list[str], tokens: np.ndarray, ends: np.ndarray, num_bytes: np.ndarray, validation: np.ndarray
    ) -> None:
        """Several documents. tokens: one after another. ends, num_bytes, validation: (documents,) of each."""
        if not names:
            return
        assert int(tokens.min()) >= 0 and int(tokens.max()) < self._vocab_size, (
            "an id beyond the tokenizer's vocabulary"
        )
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        records = np.empty(len(names), DOCUMENT)
        records["token_end"] = self._tokens + ends
        records["name_end"] = self._name_end + np.cumsum([len(name) for name in encoded])
        records["num_bytes"], records["validation"] = num_bytes, validation
        self._names.write(b"".join(encoded))
        self._records.write(records.tobytes())
        self._tokens, self._name_end = int(records["token_end"][-1]), int(records["name_end"][-1])
        lengths = np.diff(ends, prepend=0)
        for split, mask in (("train", ~records["validation"]), ("validation", records["validation"])):
            counts = self._counts[split]
            counts["documents"] += int(mask.sum())
            counts["tokens"] += int(lengths[mask].sum())
            counts["bytes"] += int(records["num_bytes"][mask].sum())
        self._write_tokens(tokens, ends)

    def _write_tokens(self, tokens: np.ndarray, ends: np.ndarray) -> None:
        begin = 0
        while begin < len(tokens):
            if self._file is None or self.shards[-1]["tokens"] >= self._limit:
                self._close_shard()
                self.shards.append({"file": f"tokens-{len(self.shards):05d}.bin", "tokens": 0, "max_token": 0})
                self._file = (self._folder / self.shards[-1]["file"]).open("wb")
            shard = self.shards[-1]
            # The document that reaches the limit is the shard's last.
            last = min(int(np.searchsorted(ends, begin + self._limit - shard["tokens"])), len(ends) - 1)
            part = tokens[begin : ends[last]]
            self._file.write(part.astype(self.dtype).tobytes())
            shard["tokens"] += len(part)
            shard["max_token"] = max(shard["max_token"], int(part.max()))
            begin = int(ends[last])

    def close(self) -> dict[str, Any]:
        """The source's entry in the manifest."""
        self._close_shard()
        _sync_close(self._names)
        header = {
            "descr": np.lib.format.dtype_to_descr(DOCUMENT),
            "fortran_order": False,
            "shape": (sum(counts["documents"] for counts in self._counts.values()),),
        }
        with (self._folder / "documents.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            self._records.seek(0)
            shutil.copyfileobj(self._records, file)
            file.flush()
            os.fsync(file.fileno())
        self._records.close()
        (self._folder / "records").unlink()
        return {"dtype": self.dtype.str, "shards": self.shards, **self._counts}

    def _close_shard(self) -> None:
        if self._file is not None:
            _sync_close(self._file)
            self._file = None


class TokenSource:
    """One source's documents, memory-mapped."""

    def __init__(self, folder: Path, entry: dict[str, Any], vocab_size: int):
        """Raises ValueError if the files contradict the manifest (what is checked is cheap: no token is read)."""
        self.name, self.folder, self.vocab_size = folder.name, folder, vocab_size
        self._dtype = np.dtype(entry["dtype"])
        self._shards = []
        for shard in entry["shards"]:
            path = inside(folder, shard["file"])
            if shard["max_token"] >= vocab_size:
                raise ValueError(
                    f"{path}: holds token {shard['max_token']}, the tokenizer has {vocab_size} pieces; {REPAIR}"
                )
            _expect_size(path, shard["tokens"] * self._dtype.itemsize)
            self._shards.append(np.memmap(path, self._dtype, mode="r"))
        self._shard_ends = np.cumsum([len(s) for s in self._shards])
        try:
            regular_size(folder / "documents.npy")
            self.documents = np.load(folder / "documents.npy", mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header as Python literals, and lets that parser's errors through
            raise ValueError(f"{folder / 'documents.npy'}: cannot be read ({error}); {REPAIR}") from error
        counted = entry["train"]["documents"] + entry["validation"]["documents"]
        if not (self.documents.dtype == DOCUMENT and self.documents.shape == (counted,) and self._offsets_fit()):
            raise ValueError(f"{folder / 'documents.npy'}: offsets do not fit the shards; {REPAIR}")

    def _offsets_fit(self) -> bool:
        """Read piece by piece: pages of a mapped file would stay in memory."""
        last = 0
        with (self.folder / "documents.npy").open("rb") as file:
            file.seek(self.documents.offset)
            while len(records := np.fromfile(file, DOCUMENT, CHECKED_AT_ONCE)):
                if (np.diff(records["token_end"], prepend=last) < 2).any():
                    return False
                last = int(records["token_end"][-1])
        return last == self._shard_ends[-1]

    def lengths(self, documents: np.ndarray) -> np.ndarray:
        """Tokens of each of the documents, which are ascending: int64 of their shape."""
        return np.diff(self.documents["token_end"], prepend=0)[documents]

    def members(self, split: str) -> np.ndarray:
        """(n,) int64 indices of the documents of "train" or "validation"."""
        return np.flatnonzero(self.documents["validation"] == (split == "validation"))

    def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens start..stop of a document, a view of the shard. Raises ValueError on an id beyond the vocabulary."""
        begin = int(self.documents["token_end"][document - 1]) if document else 0
        end = int(self.documents["token_end"][document])
        shard = int(np.searchsorted(self._shard_ends, begin, side="right"))
        offset = begin - (int(self._shard_ends[shard - 1]) if shard else 0)
        length = end - begin
        tokens = self._shards[shard][offset + start : offset + (length if stop is None else min(stop, length))]
        if len(tokens) and int(tokens.max()) >= self.vocab_size:
            raise ValueError(
                f"{self._shards[shard].filename}: document {self.document_id(document)!r} holds token "
                f"{int(tokens.max())}, the tokenizer has {self.vocab_size} pieces; {REPAIR}"
            )
        return tokens

    def document_id(self, document: int) -> str:
        """Where the document is from."""
        start = int(self.documents["name_end"][document - 1]) if document else 0
        stop = int(self.documents["name_end"][document])
        with (self.folder / "names.txt").open("rb") as file:
            file.seek(start)
            return file.read(stop - start).decode("utf-8", "surrogatepass")


class PreparedData:
    """A prepared folder. `fingerprint` is one hash of all its content: equal fingerprints, equal data."""

    def __init__(self, folder: str | Path, verify: bool = False):
        """verify: hash every file too (about a second per GB). Raises ValueError naming the file that is not right."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        try:
            self.manifest: dict[str, Any] = read_json(path)
            files = {inside(self.folder, name): entry for name, entry in self.manifest["files"].items()}
            intact = self.manifest["fingerprint"] == fingerprint(self.manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: no readable manifest ({error}); {REPAIR}") from error
        if not intact:
            raise ValueError(f"{path}: the manifest was changed; {REPAIR}")
        try:
            for file, entry in files.items():
                _expect_size(file, entry["bytes"])
                if verify and file_sha256(file) != entry["sha256"]:
                    raise ValueError(f"{file}: content does not match its sha256; {REPAIR}")
            self.fingerprint: str = self.manifest["fingerprint"]
            self.vocab_size: int = self.manifest["tokenizer"]["vocab_size"]
            self.sources = {
                name: TokenSource(inside(self.folder, name), entry, self.vocab_size)
                for name, entry in self.manifest["sources"].items()
            }
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: the manifest lacks an entry or has a wrong one ({error!r}); {REPAIR}") from error

    @cached_property
    def tokenizer(self) -> BaseTokenizer:
        return load_tokenizer(self.folder)

    def check_vocabulary(self, size: int) -> None:
        """Raise ValueError if a model of `size` embeddings cannot read these tokens."""
        if self.vocab_size > size:
            raise ValueError(
                f"the tokenizer has {self.vocab_size} pieces and the model {size} embeddings: "
                f"set model.vocab_size to {self.vocab_size} or more"
            )

    def texts(self, split: str) -> Iterator[tuple[str, bytes]]:
        """(id, text) of every document of a split, byte for byte what was prepared, normalised by the tokenizer."""
        for name, source in self.sources.items():
            for document in source.members(split):
                text = self.tokenizer.decode_bytes(source.read(document).tolist())
                yield f"{name}/{source.document_id(document)}", text


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Hash every file below `folder`, and write the manifest, durably. The last thing written."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": file_sha256(folder / n)} for n in names}
    manifest = {"format": FORMAT, **manifest, "files": files}
    manifest["fingerprint"] = fingerprint(manifest)
    with (folder / "manifest.json").open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def fingerprint(manifest: dict[str, Any]) -> str:
    """sha256 of what the data are (not of where they come from)."""
    content = {key: manifest[key] for key in ("format", "tokenizer", "sources", "files")}
    content["sources"] = {
        name: {key: value for key, value in entry.items() if key != "bad_rows"}  # it says nothing about the data
        for name, entry in content["sources"].items()
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _expect_size(path: Path, size: int) -> None:
    try:
        found = regular_size(path)
    except OSError as error:
        raise ValueError(f"{path}: missing ({error.strerror}); {REPAIR}") from error
    except UntrustedError as error:
        raise ValueError(f"{error}; {REPAIR}") from None
    if found != size:
        raise ValueError(f"{path}: {found} bytes, the manifest says {size}; {REPAIR}")


def _sync_close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
