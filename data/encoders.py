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

from nsa.data.base_tokenizer import BaseTokenizer
from nsa.data.load_tokenizer import load_tokenizer

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
    """Tokens of all texts, one after another, each `bos text eos`, proven to decode to the very bytes
    (of the normalised text, if the tokenizer normalises).

    Returns:
        (n,) int32 ids, and (texts,) int64, where each text ends.
    """
    tokenizer = _tokenizer
    assert tokenizer is not None
    texts = [tokenizer.normal(text) for text in texts]
    ids, ends = tokenizer.encode_all(texts)
    decoded, done = [], 0
    byte_ends = np.zeros(len(texts), np.int64)  # of what each text decodes to
    for at in range(0, len(ids), PIECE):
        some = ids[at : at + PIECE]
        decoded.append(tokenizer.decode_bytes(some.tolist()))
        here = (ends > at) & (ends <= at + PIECE)
        byte_ends[here] = done + np.cumsum(tokenizer.byte_lengths[some])[ends[here] - at - 1]
        done += len(decoded[-1])
    np.maximum.accumulate(byte_ends, out=byte_ends)  # of an empty text: those before end where it does
    sizes = np.cumsum([len(text) for text in texts])
    assert (byte_ends == sizes).all() and b"".join(decoded) == b"".join(texts), "the tokenizer lost text"
    starts = np.concatenate([[0], ends])[:-1]
    control = np.tile(np.array([tokenizer.bos_id, tokenizer.eos_id], np.int32), len(texts))
    tokens = np.insert(ids, np.stack([starts, ends], 1).ravel(), control)
    return tokens, ends + 2 * np.arange(1, len(texts) + 1)


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


_tokenizer: BaseTokenizer | None = None


def _load_tokenizer(model: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(model)


def _run_here(texts: list[bytes]) -> "Future[Tokens]":
    future: Future[Tokens] = Future()
    future.set_result(encode_batch(texts))
    return future
