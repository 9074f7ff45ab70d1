"""Text to token shards: `python -m nsa.data.prepare CONFIG [key=value ...]`.

Three passes over the documents, always in the same order: (1) hash them, which decides what is a duplicate and what is
held out, and finds bad input before anything is written; (2) train the tokenizer on training documents; (3) tokenize,
in parallel. The result depends on the sources, the tokenizer section, validation_fraction and the seed, and on nothing
else: not on the number of workers, the sequence length or the weights of the blend.
"""

import hashlib
import json
import os
import shutil
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from nsa.data import sources
from nsa.data.config import DataConfig, SourceConfig
from nsa.data.progress import Progress
from nsa.data.shards import FORMAT, PreparedData, SourceWriter, write_manifest
from nsa.data.tokenizer import Tokenizer, train

TRAIN, VALIDATION, DUPLICATE, EMPTY = range(4)
Encode = Callable[[list[bytes]], Future]
BATCH_BYTES = 1 << 20  # text that one task of a worker holds
MAX_WAITING = 32  # batches read ahead of the workers
MAX_DOCUMENT = 1 << 30  # bytes; a longer one would not fit a worker's memory
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Prepared data: see https://bford.info/cachedir/\n"


class Scan(NamedTuple):
    """What pass 1 found in a source. fate: TRAIN, VALIDATION, DUPLICATE or EMPTY of each document in turn.

    key: a hash of each document's text and the seed, uniform in 0 .. 2^64-1. size: bytes of each document.
    """

    fate: bytearray
    key: array
    size: array


def prepare(config: DataConfig, seed: int, progress: bool = True) -> PreparedData:
    """The prepared data of `config`, built if they are not there or not intact. Safe from several processes at once.

    Data that are there are verified by their sha256. Raises ValueError on bad input, and then writes nothing.
    """
    texts = [source for source in config.sources if source.kind != "synthetic"]
    if not texts:
        raise ValueError("data.sources: at least one source must be text (builtin, files or hub), not synthetic")
    cache = Path(config.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot make {cache} ({error.strerror}); set it to another folder") from error
    if not os.access(cache, os.W_OK):
        raise ValueError(f"data.cache_dir: {cache} is not writable; set it to a folder that is")
    (cache / sources.CACHE_TAG).write_text(TAG)  # a source's folder may hold the cache, which is none of its text
    made_from = {
        "format": FORMAT,
        "seed": seed,
        "validation_fraction": config.validation_fraction,
        "tokenizer": _describe_tokenizer(config),
        "sources": {source.name: sources.describe(source) for source in texts},
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / key
    with FileLock(cache / f"{key}.lock"):
        if folder.exists():
            try:
                return PreparedData(folder, verify=True)
            except ValueError as error:
                print(f"prepared data are not intact and are built again: {error}", file=sys.stderr)
                shutil.rmtree(folder)
        partial = cache / f"{key}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        try:
            _build(partial, config, texts, seed, made_from, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return PreparedData(folder)


def _describe_tokenizer(config: DataConfig) -> dict[str, Any]:
    if config.tokenizer.path is None:
        return config.tokenizer.model_dump(include={"vocab_size", "train_bytes"})
    tokenizer = Tokenizer(config.tokenizer.path)
    tokenizer.check_exportable()  # now, and not once the model is trained
    return {"sha256": tokenizer.sha256}


def _build(
    folder: Path, config: DataConfig, texts: list[SourceConfig], seed: int, made_from: dict[str, Any], progress: bool
) -> None:
    folder.mkdir()
    for source in texts:
        sources.check(source)
    seen: set[bytes] = set()
    scans = {source.name: _scan(source, seed, config.validation_fraction, seen, progress) for source in texts}
    model = folder / "tokenizer.model"
    if config.tokenizer.path is None:
        selected = _tokenizer_texts(texts, scans, config.tokenizer.train_bytes)
        with Progress("train the tokenizer", enabled=progress) as bar:
            tokenizer = train(_counted(selected, bar), config.tokenizer.vocab_size, model)
    else:
        shutil.copyfile(config.tokenizer.path, model)
        tokenizer = Tokenizer(model)
    entries = {}
    with _encoders(model, config.workers) as encode:
        for source in texts:
            entries[source.name] = _write(source, scans[source.name], folder / source.name, tokenizer, encode, progress)
    about = {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    write_manifest(folder, {"made_from": made_from, "tokenizer": about, "sources": entries})


def _scan(source: SourceConfig, seed: int, fraction: float, seen: set[bytes], progress: bool) -> Scan:
    """Pass 1. The split depends on a document's text and the seed alone: equal texts are never on both sides."""
    fate, key, size = bytearray(), array("Q"), array("Q")
    salt = seed.to_bytes(16, "little")
    with Progress(f"read {source.name}", enabled=progress) as bar:
        for document in sources.documents(source, report=True):
            if len(document.text) > MAX_DOCUMENT:
                raise ValueError(
                    f"data source {source.name!r}: {document.id} has {len(document.text)} bytes, a document may have "
                    f"{MAX_DOCUMENT}; cut it, for instance into a JSONL file with one document per line"
                )
            digest = hashlib.blake2b(document.text, digest_size=16, salt=salt).digest()
            key.append(int.from_bytes(digest[:8], "little"))
            if not document.text:
                fate.append(EMPTY)
            elif digest in seen:
                fate.append(DUPLICATE)
            else:
                seen.add(digest)
                fate.append(VALIDATION if key[-1] < fraction * 2**64 else TRAIN)
            size.append(len(document.text))
            bar.update(len(document.text))
    kept = sorted((k, i) for i, k in enumerate(key) if fate[i] in (TRAIN, VALIDATION))
    if len(kept) < 2:
        raise ValueError(
            f"data source {source.name!r}: {len(kept)} document(s), not counting {fate.count(EMPTY)} empty and "
            f"{fate.count(DUPLICATE)} duplicate ones; the held-out split is by document and needs two or more: "
            "cut the text into several files, or into a JSONL file with one document per line"
        )
    fate[kept[0][1]] = VALIDATION  # a small source has both splits all the same
    fate[kept[-1][1]] = TRAIN
    return Scan(fate, key, size)


def _tokenizer_texts(texts: list[SourceConfig], scans: dict[str, Scan], limit: int) -> Iterator[str]:
    """Training documents, `limit` bytes of them, a random choice (by key) if there are more."""
    candidates = [(name, i) for name, scan in scans.items() for i, fate in enumerate(scan.fate) if fate == TRAIN]
    # By the low half of the key: the high half has decided on the split.
    candidates.sort(key=lambda candidate: scans[candidate[0]].key[candidate[1]] & 0xFFFFFFFF)
    taken: dict[tuple[str, int], int] = {}
    for name, i in candidates:
        if limit <= 0:
            break
        taken[name, i] = min(limit, scans[name].size[i])
        limit -= taken[name, i]
    for source in texts:
        for i, document in enumerate(sources.documents(source)):
            if size := taken.get((source.name, i)):
                yield document.text[:size].decode("utf-8", "replace")


def _counted(texts: Iterator[str], bar: Progress) -> Iterator[str]:
    for text in texts:
        yield text
        bar.update(len(text))


def _write(
    source: SourceConfig,
    scan: Scan,
    folder: Path,
    tokenizer: Tokenizer,
    encode: Encode,
    progress: bool,
) -> dict[str, Any]:
    """Pass 3 of one source."""
    writer = SourceWriter(folder, tokenizer.vocab_size)
    count = total = 0
    with Progress(f"tokenize {source.name}", total=sum(scan.size), enabled=progress) as bar:

        def flush(waiting: deque, leave: int) -> None:
            while len(waiting) > leave:
                batch, future = waiting.popleft()
                for (document, fate), tokens in zip(batch, future.result(), strict=True):
                    ended = np.concatenate([[tokenizer.bos_id], tokens, [tokenizer.eos_id]])
                    writer.add(document.id, ended, len(document.text), fate == VALIDATION)
                    bar.update(len(document.text))

        waiting: deque = deque()
        batch: list[tuple[sources.Document, int]] = []
        batch_bytes = 0
        for document in sources.documents(source):
            fate = scan.fate[count] if count < len(scan.fate) else EMPTY
            count += 1
            total += len(document.text)
            if fate in (DUPLICATE, EMPTY):
                bar.update(len(document.text))
                continue
            batch.append((document, fate))
            batch_bytes += len(document.text)
            if batch_bytes >= BATCH_BYTES:
                waiting.append((batch, encode([d.text for d, _ in batch])))
                batch, batch_bytes = [], 0
                flush(waiting, leave=MAX_WAITING)
        waiting.append((batch, encode([d.text for d, _ in batch])))
        flush(waiting, leave=0)
    if (count, total) != (len(scan.fate), sum(scan.size)):
        raise ValueError(f"data source {source.name!r} changed while it was read: run prepare again")
    return {**writer.close(), "duplicates": scan.fate.count(DUPLICATE), "empty": scan.fate.count(EMPTY)}


@contextmanager
def _encoders(model: Path, workers: int) -> Iterator[Encode]:
    """`encode_batch` in worker processes or, with one worker, right here."""
    if workers == 1:
        _load_tokenizer(str(model))
        yield _run_here
        return
    # spawn: the caller may hold threads and locks (torch, gloo) that a forked child must not inherit
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_load_tokenizer, initargs=(str(model),))
    try:
        yield lambda texts: pool.submit(encode_batch, texts)
    finally:
        pool.shutdown(cancel_futures=True)


_tokenizer: Tokenizer | None = None


def _load_tokenizer(model: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(model)


def _run_here(texts: list[bytes]) -> Future:
    future: Future = Future()
    future.set_result(encode_batch(texts))
    return future


def encode_batch(texts: list[bytes]) -> list[np.ndarray]:
    """int32 ids of each text, proven to decode to the very bytes."""
    assert _tokenizer is not None
    encoded = []
    for text in texts:
        ids = _tokenizer.encode_array(text)
        pieces = np.array_split(ids, len(ids) // BATCH_BYTES + 1)  # a list of all ids would fill the memory
        assert b"".join([_tokenizer.decode_bytes(p.tolist()) for p in pieces]) == text, "the tokenizer lost text"
        encoded.append(ids)
    return encoded


def main(arguments: list[str]) -> None:
    from nsa.config import load_config

    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    config = load_config(arguments[0], arguments[1:])
    data = prepare(config.data, config.seed)
    print(f"{data.folder}: vocabulary {data.vocab_size}, fingerprint {data.fingerprint[:16]}")
    for name, entry in data.manifest["sources"].items():
        for split in ("train", "validation"):
            counts = entry[split]
            print(
                f"  {name} {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
                f"{counts['bytes']:,} bytes"
            )
        print(f"  {name} left out: {entry['duplicates']:,} duplicate and {entry['empty']:,} empty documents")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)  # as everywhere: something that the user can fix (docs/reliability.md)
    except KeyboardInterrupt:
        sys.exit(130)
