"""Tokenise documents on all cores, in the order of the corpus.

Documents go to the workers in batches and come back in order, so the result is the same with one worker and with
sixty-four. A small corpus is tokenised by threads (tiktoken releases the GIL), since starting processes would take
longer than the work; a large one by processes, which do not wait while the next documents are read.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from hashlib import blake2b
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import numpy as np

from fastgpt.common import UserError
from fastgpt.data.corpora import Reading
from fastgpt.data.tokenizer import Tokenizer, get_tokenizer

BATCH_CHARS = 1 << 20
"""Text that one worker takes at a time: about 30 ms of work, so that the cost of handing it over does not matter."""
SMALL = 64 << 20
"""Bytes of a corpus up to which threads are used."""


class Encoded(NamedTuple):
    """A batch of documents, tokenised."""

    ids: np.ndarray
    """uint16; each document is preceded by end-of-text."""
    lengths: np.ndarray
    """Tokens per document, end-of-text included; int64."""
    hashes: np.ndarray
    """A hash of each document's text, uint64."""


class BatchPlace(NamedTuple):
    """The sides of a batch's documents, and where the reading of the corpus is after it."""

    sides: list[str | None]
    position: dict[str, Any]
    done: float | None


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_corpus(
    reading: Reading, tok: Tokenizer, seed: int, workers: int, processes: bool
) -> Generator[tuple[Encoded, BatchPlace], None, None]:
    """The rest of ``reading``, batch by batch, tokenised a few batches ahead of the caller."""
    pool: Executor
    encode: Callable[[list[str], int], Encoded]
    if processes:
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
        encode = partial(_in_worker, tok.name)
    else:
        pool = ThreadPoolExecutor(workers, "tokenise")
        encode = partial(encode_texts, tok)
    ahead: deque[tuple[Future[Encoded], BatchPlace]] = deque()
    complete = False
    try:
        with closing(_batches(reading)) as batches:
            try:
                for texts, place in batches:
                    ahead.append((pool.submit(encode, texts, seed), place))
                    yield from _all_but(2 * workers, ahead)
            except UserError:  # a broken stream or a bad line: keep what was read before it
                yield from _all_but(0, ahead)
                raise
            yield from _all_but(0, ahead)
        complete = True
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process died (was memory short, or is the calling script without "
            "`if __name__ == '__main__':`?): try --workers 1"
        ) from error
    finally:
        if not complete:  # Ctrl-C does not wait for a document of a gigabyte
            for worker in list((getattr(pool, "_processes", None) or {}).values()):
                worker.kill()
        pool.shutdown(wait=complete, cancel_futures=True)


def _all_but(kept: int, ahead: deque[tuple[Future[Encoded], BatchPlace]]) -> Iterator[tuple[Encoded, BatchPlace]]:
    while len(ahead) > kept:
        task, place = ahead.popleft()
        yield task.result(), place


def encode_texts(tok: Tokenizer, texts: list[str], seed: int) -> Encoded:
    eot = np.array([tok.eot], np.uint16)
    documents = tok.encode_batch(texts)
    ids = np.concatenate([part for ids in documents for part in (eot, ids)])
    lengths = np.array([len(ids) + 1 for ids in documents], np.int64)
    return Encoded(ids, lengths, np.array([document_hash(text, seed) for text in texts], np.uint64))


def document_hash(text: str, seed: int) -> int:
    """64 bits of BLAKE2b of the text, salted with the seed."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=str(seed).encode()[:16]).digest()
    return int.from_bytes(digest, "big")


def _batches(reading: Reading) -> Generator[tuple[list[str], BatchPlace], None, None]:
    texts: list[str] = []
    sides: list[str | None] = []
    size = 0

    def place() -> BatchPlace:
        return BatchPlace(sides, reading.position(), reading.done())

    for document in reading:
        texts.append(document.text)
        sides.append(document.side)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield texts, place()
            texts, sides, size = [], [], 0
    if texts:
        yield texts, place()


def _start_worker() -> None:
    """The initializer of each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_the_parent() -> None:  # a killed parent cannot tell its workers, which would wait for ever
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()


def _in_worker(tokenizer: str, texts: list[str], seed: int) -> Encoded:
    return encode_texts(get_tokenizer(tokenizer), texts, seed)
