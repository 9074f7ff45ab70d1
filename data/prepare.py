"""Text to token shards: `python -m nsa.data.prepare CONFIG [key=value ...]`.

Three passes over the documents, always in the same order: (1) hash them, which decides what is a duplicate and what is
held out, and finds bad input before anything is written; (2) train the tokenizer on training documents; (3) tokenize,
in parallel. The result depends on the sources, the tokenizer section, validation_fraction and the seed, and on nothing
else: not on the number of workers, the sequence length or the weights of the blend.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from filelock import FileLock

from nsa.data import reuse, sources
from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.config import DataConfig, SourceConfig
from nsa.data.encoders import Encode, encoders
from nsa.data.epochs import describe_readings
from nsa.data.load_tokenizer import load_tokenizer, tokenizer_files
from nsa.data.progress import Progress
from nsa.data.scan import DUPLICATE, EMPTY, VALIDATION, Scan, choose, scan
from nsa.data.shards import FORMAT, REPAIR, PreparedData, SourceWriter, write_manifest
from nsa.data.tokenizer import train

BATCH_BYTES = 1 << 20  # text that one task of a worker holds, about
BATCH_DOCUMENTS = 1 << 13
TOLD_BYTES = 1 << 16  # text after which progress is told
WAITING_BYTES = 1 << 24  # text that was read ahead of the workers, about
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Prepared data: see https://bford.info/cachedir/\n"


def refuse_in_import() -> None:
    """Raise RuntimeError in a process of workers that is importing the script that started it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "preparing data starts processes that import your script: put what it runs under "
            '`if __name__ == "__main__":`, or set data.workers=1'
        )


def prepare(config: DataConfig, seed: int, progress: bool = True, fingerprint: str | None = None) -> PreparedData:
    """The prepared data of `config`, built if they are not there or not intact. Safe from several processes at once.

    Data that are there are verified by their sha256. They are found wherever their corpus lies; where it is gone, too.

    Args:
        seed: of the run; the configuration may have one of its own.
        fingerprint: of the data that are wanted, if the corpus is gone; None: those made from a corpus of this path.

    Raises:
        ValueError: bad input; nothing is written then.
        RuntimeError: a script without ``if __name__ == "__main__":``, which the workers would run again.
    """
    texts = _texts(config)
    if not texts:
        raise ValueError("data.sources: at least one source must be text (builtin, files or hub), not synthetic")
    cache, seed = Path(config.cache_dir), config.seed_of(seed)
    settings = _settings(config, seed)
    tokenizer = None
    try:
        tokenizer = _describe_tokenizer(config)
        described = {source.name: sources.describe(source) for source in texts}
    except ValueError as gone:
        found = reuse.of_a_lost_corpus(config, settings, tokenizer, fingerprint)
        if found is None:
            raise
        print(f"{gone}\nthe data that were prepared from it are used: {found}", file=sys.stderr)
        return PreparedData(found, verify=True)
    made_from = {**settings, "tokenizer": tokenizer, "sources": described}
    key = _key(made_from)
    if cache.is_dir() and not os.access(cache, os.W_OK) and reuse.folder_of(cache, key).is_dir():
        return PreparedData(reuse.folder_of(cache, key), verify=True)
    if config.workers > 1 and not reuse.folder_of(cache, key).exists():
        refuse_in_import()  # it would wait for ever for its parent, which waits for it
    _make_cache(cache)
    with FileLock(cache / f"{key}.lock"):
        found = reuse.folder_of(cache, key)
        if found.exists():
            try:
                return PreparedData(found, verify=True)
            except ValueError as error:
                print(f"prepared data are not intact and are built again: {_cause(error)}", file=sys.stderr)
        reuse.forget(cache, key)
        contents = {s.name: digest for s in texts if (digest := sources.content(s, progress)) is not None}
        if (same := reuse.same_content(cache, made_from, contents)) not in (None, found):
            assert same is not None
            try:
                data = PreparedData(same, verify=True)
            except ValueError as error:
                print(f"prepared data of the same content are not intact: {_cause(error)}", file=sys.stderr)
            else:
                print(f"data that were prepared from the same content are used: {same}", file=sys.stderr)
                reuse.remember(cache, key, same)
                return data
        folder, partial = cache / key, cache / f"{key}.partial"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        made_from |= {"contents": contents, "tokenizer_path": config.tokenizer.path}
        made_from["patterns"] = reuse.patterns(texts)
        try:
            _build(partial, config, texts, seed, made_from, progress)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return PreparedData(folder)


def _cause(error: ValueError) -> str:
    """Without the advice to do what is done now."""
    return str(error).removesuffix(f"; {REPAIR}")


def find_prepared(config: DataConfig, seed: int) -> PreparedData | None:
    """What `prepare` would find, if it is there; nothing is built, and files are checked by their sizes alone."""
    cache, seed = Path(config.cache_dir), config.seed_of(seed)
    if not cache.is_dir():
        return None
    try:
        described = {source.name: sources.describe(source) for source in _texts(config)}
        made_from = {**_settings(config, seed), "tokenizer": _describe_tokenizer(config), "sources": described}
        return PreparedData(reuse.folder_of(cache, _key(made_from)))
    except ValueError:
        return None


def _texts(config: DataConfig) -> list[SourceConfig]:
    return [source for source in config.sources if source.kind != "synthetic"]


def _settings(config: DataConfig, seed: int) -> dict[str, Any]:
    return {"format": FORMAT, "seed": seed, "validation_fraction": config.validation_fraction}


def _key(made_from: dict[str, Any]) -> str:
    described = made_from["sources"]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode() + _order(described)).hexdigest()[:16]


def _order(names: Iterable[str]) -> bytes:
    """What the order of the sources adds to a key: of equal documents the first source's is kept.

    Nothing for names in alphabetical order, so that data that were prepared earlier are found.
    """
    names = list(names)
    return b"" if names == sorted(names) else json.dumps(names).encode()


def _make_cache(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"data.cache_dir: cannot make {cache} ({error.strerror}); set it to another folder") from error
    if not os.access(cache, os.W_OK):
        raise ValueError(f"data.cache_dir: {cache} is not writable; set it to a folder that is")
    (cache / sources.CACHE_TAG).write_text(TAG)  # a source's folder may hold the cache, which is none of its text


def _describe_tokenizer(config: DataConfig) -> dict[str, Any]:
    if config.tokenizer.path is None:
        return config.tokenizer.model_dump(include={"vocab_size", "train_bytes"})
    tokenizer = load_tokenizer(config.tokenizer.path)
    tokenizer.check_exportable()  # now, and not once the model is trained
    return {"sha256": tokenizer.sha256}


def _build(
    folder: Path, config: DataConfig, texts: list[SourceConfig], seed: int, made_from: dict[str, Any], progress: bool
) -> None:
    folder.mkdir()
    for source in texts:
        sources.check(source)
    with TemporaryDirectory(prefix="scan-", dir=folder) as temporary:
        scans = scan(texts, seed, config.validation_fraction, Path(temporary), progress)
        tokenizer: BaseTokenizer
        if config.tokenizer.path is None:
            selected = _tokenizer_texts(texts, scans, config.tokenizer.train_bytes)
            with Progress("train the tokenizer", enabled=progress) as bar:
                tokenizer = train(_counted(selected, bar), config.tokenizer.vocab_size, folder / "tokenizer.model")
        else:
            for name, content in tokenizer_files(Path(config.tokenizer.path)).items():
                (folder / name).write_bytes(content)
            tokenizer = load_tokenizer(folder)
        entries = {}
        with encoders(folder, config.workers) as encode:
            for source, found in zip(texts, scans, strict=True):
                writer = SourceWriter(folder / source.name, tokenizer.vocab_size)
                entries[source.name] = _write(source, found, writer, encode, tokenizer.byte_lengths, progress)
    for source in texts:
        if sources.describe(source) != made_from["sources"][source.name]:
            raise _changed(source)
    about = {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}
    write_manifest(folder, {"made_from": made_from, "tokenizer": about, "sources": entries})


def _tokenizer_texts(texts: list[SourceConfig], scans: list[Scan], limit: int) -> Iterator[str]:
    """Training documents, `limit` bytes of them, a random choice if there are more."""
    for source, (chosen, sizes) in zip(texts, choose(scans, limit), strict=True):
        wanted = _rows(chosen, sizes)
        number, size = next(wanted, (-1, 0))
        for i, document in enumerate(sources.documents(source)):
            if i == number:
                yield document.text[:size].decode("utf-8", "replace")
                number, size = next(wanted, (-1, 0))


def _rows(*columns: np.ndarray) -> Iterator[tuple[int, ...]]:
    """The rows of columns as Python's numbers, of which there are never many at once."""
    for start in range(0, len(columns[0]), BATCH_DOCUMENTS):
        yield from zip(*(column[start : start + BATCH_DOCUMENTS].tolist() for column in columns), strict=True)


def _changed(source: SourceConfig) -> ValueError:
    return ValueError(f"data source {source.name!r} changed while it was read: run prepare again")


def _counted(texts: Iterator[str], bar: Progress) -> Iterator[str]:
    count = 0
    for text in texts:
        yield text
        count += len(text)
        if count > TOLD_BYTES:
            bar.update(count)
            count = 0
    bar.update(count)


class _Batch:
    """Documents that a worker encodes together."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.texts: list[bytes] = []
        self.held_out: list[bool] = []
        self.num_bytes = 0

    def add(self, document: sources.Document, held_out: bool) -> None:
        self.ids.append(document.id)
        self.texts.append(document.text)
        self.held_out.append(held_out)
        self.num_bytes += len(document.text)

    @property
    def full(self) -> bool:
        return self.num_bytes >= BATCH_BYTES or len(self.ids) >= BATCH_DOCUMENTS


def _write(
    source: SourceConfig,
    found: Scan,
    writer: SourceWriter,
    encode: Encode,
    byte_lengths: np.ndarray,
    progress: bool,
) -> dict[str, Any]:
    """Pass 3 of one source. ``byte_lengths``: the tokenizer's, which decodes to just what was read."""
    waiting: deque[tuple[_Batch, Future]] = deque()
    with Progress(f"tokenize {source.name}", total=found.num_bytes, enabled=progress) as bar:

        def flush(leave: int) -> None:
            """Write what the workers are done with, in order, until at most ``leave`` bytes of text wait for them."""
            while waiting and sum(batch.num_bytes for batch, _ in waiting) > leave:
                batch, future = waiting.popleft()
                tokens, ends = future.result()
                sizes = np.diff(np.cumsum(byte_lengths[tokens])[ends - 1], prepend=0)
                writer.add_all(batch.ids, tokens, ends, sizes, np.array(batch.held_out))
                bar.update(batch.num_bytes)

        batch, fates = _Batch(), found.fates()
        for document in sources.documents(source):
            fate, size = next(fates, (EMPTY, -1))
            if size != len(document.text):
                raise _changed(source)
            if fate in (DUPLICATE, EMPTY):
                bar.update(size)
                continue
            batch.add(document, fate == VALIDATION)
            if batch.full:
                waiting.append((batch, encode(batch.texts)))
                batch = _Batch()
                flush(leave=WAITING_BYTES)
        if next(fates, None) is not None:
            raise _changed(source)
        waiting.append((batch, encode(batch.texts)))
        flush(leave=0)
    left_out = {"duplicates": found.duplicates, "empty": found.empty, "bad_rows": found.bad_rows}
    return {**writer.close(), **left_out}


def main(arguments: list[str]) -> None:
    from nsa.config import load_config

    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return
    config = load_config(arguments[0], arguments[1:])
    data = prepare(config.data, config.seed)
    print(f"{data.folder}: vocabulary {data.vocab_size}, fingerprint {data.fingerprint[:16]}")
    training = config.training
    lines = describe_readings(data, config.data, training.steps, training.global_batch_size)
    for name, entry in data.manifest["sources"].items():
        for split in ("train", "validation"):
            counts = entry[split]
            print(
                f"  {name} {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
                f"{counts['bytes']:,} bytes"
            )
        print(
            f"  {name} left out: {entry['duplicates']:,} duplicate and {entry['empty']:,} empty documents, "
            f"{entry.get('bad_rows', 0):,} rows that cannot be used"
        )
    print("\n".join([f"in a run of {training.steps:,} steps:", *(f"  {line}" for line in lines)]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)  # as everywhere: something that the user can fix (docs/reliability.md)
    except KeyboardInterrupt:
        print("interrupted: nothing was written; run the same command to prepare the data", file=sys.stderr)
        sys.exit(130)
