"""Text to tokens in worker processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nsa.data.tokenizer import Tokenizer

PIECE = 1 << 20  # tokens that are decoded at once: a list of all of a long document's would fill the memory
Tokens = tuple[np.ndarray, np.ndarray]
Encode = Callable[[list[bytes]], "Future[Tokens]"]


@contextmanager
def encoders(model: Path, workers: int) -> Iterator[Encode]:
    """`encode_batch` in worker processes or, with one worker, right here."""
    if workers == 1:
        _load_tokenizer(str(model))
        yield _run_here
        return
    # spawn: the caller may hold threads and locks (torch, gloo) that a forked child must not inherit
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=(str(model),))

    def encode(texts: list[bytes]) -> "Future[Tokens]":
        with _no_interrupts():  # the first calls start the workers, which inherit it
            return pool.submit(encode_batch, texts)

    try:
        yield encode
    finally:
        pool.shutdown(cancel_futures=True)


def encode_batch(texts: list[bytes]) -> Tokens:
    """Tokens of all texts, one after another, each `bos text eos`, proven to decode to the very bytes.

    Returns:
        (n,) int32 ids, and (texts,) int64, where each text ends.
    """
    tokenizer = _tokenizer
    assert tokenizer is not None
    begin, end = (np.array([i], np.int32) for i in (tokenizer.bos_id, tokenizer.eos_id))
    parts, ends, total = [], [], 0
    for text in texts:
        ids = tokenizer.encode_array(text)
        pieces = [tokenizer.decode_bytes(ids[at : at + PIECE].tolist()) for at in range(0, len(ids), PIECE)]
        assert b"".join(pieces) == text, "the tokenizer lost text"
        parts += [begin, ids, end]
        total += len(ids) + 2
        ends.append(total)
    return np.concatenate([np.empty(0, np.int32), *parts]), np.array(ends, np.int64)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C waits. It reaches every process of a terminal's job, and who started the workers ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(model: str) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    _load_tokenizer(model)


_tokenizer: Tokenizer | None = None


def _load_tokenizer(model: str) -> None:
    global _tokenizer
    _tokenizer = Tokenizer(model)


def _run_here(texts: list[bytes]) -> "Future[Tokens]":
    future: Future[Tokens] = Future()
    future.set_result(encode_batch(texts))
    return future
