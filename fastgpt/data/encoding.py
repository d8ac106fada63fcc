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
from collections.abc import Generator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from fastgpt.common import UserError
from fastgpt.data.corpora import Reading
from fastgpt.data.tokenizer import Tokenizer, get_tokenizer

BATCH_CHARS = 1 << 20
"""Text that one worker takes at a time: about 30 ms of work, so that the cost of handing it over does not matter."""
SMALL = 64 << 20
"""Bytes of a corpus up to which threads are used."""
Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass
class EncodedBatch:
    """A batch of tokenised documents, and the position in the corpus after it."""

    ids: np.ndarray
    """uint16; each document is preceded by end-of-text."""
    lengths: np.ndarray
    """Tokens per document, end-of-text included; int64."""
    hashes: np.ndarray
    """A hash of each document's text, uint64."""
    sides: list[str | None]
    position: dict[str, Any]
    done: float | None
    skipped: list[str]


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_corpus(
    reading: Reading, tok: Tokenizer, seed: int, workers: int, processes: bool
) -> Generator[EncodedBatch, None, None]:
    """The rest of ``reading``, batch by batch, tokenised a few batches ahead of the caller."""
    pool: Executor = (
        ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker, (tok.name,))
        if processes
        else ThreadPoolExecutor(workers, "tokenise")
    )
    ahead: deque[tuple[Future[Arrays], dict[str, Any]]] = deque()
    batches = _batches(reading)
    broken: UserError | None = None
    try:
        try:
            with closing(batches):
                for texts, about in batches:
                    task = (
                        pool.submit(_in_worker, texts, seed)
                        if processes
                        else pool.submit(encode_texts, tok, texts, seed)
                    )
                    ahead.append((task, about))
                    if len(ahead) > 2 * workers:
                        yield _finished(*ahead.popleft())
        except UserError as error:  # a broken stream or a bad line: keep what was read before it
            broken = error
        while ahead:
            yield _finished(*ahead.popleft())
        if broken is not None:
            raise broken
    except BrokenProcessPool as error:
        raise UserError(
            "a tokenising process died (was memory short, or is the calling script without "
            "`if __name__ == '__main__':`?): try --workers 1"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finished(task: Future[Arrays], about: dict[str, Any]) -> EncodedBatch:
    ids, lengths, hashes = task.result()
    return EncodedBatch(ids, lengths, hashes, **about)


def encode_texts(tok: Tokenizer, texts: list[str], seed: int) -> Arrays:
    """ids, lengths and hashes, as in ``EncodedBatch``."""
    eot = np.array([tok.eot], np.uint16)
    documents = tok.encode_batch(texts)
    ids = np.concatenate([part for ids in documents for part in (eot, ids)])
    lengths = np.array([len(ids) + 1 for ids in documents], np.int64)
    return ids, lengths, np.array([document_hash(text, seed) for text in texts], np.uint64)


def document_hash(text: str, seed: int) -> int:
    """64 bits of BLAKE2b of the text, salted with the seed."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=str(seed).encode()[:16]).digest()
    return int.from_bytes(digest, "big")


def _batches(reading: Reading) -> Generator[tuple[list[str], dict[str, Any]], None, None]:
    texts: list[str] = []
    sides: list[str | None] = []
    size = 0

    def about() -> dict[str, Any]:
        return {
            "sides": sides,
            "position": reading.position(),
            "done": reading.done(),
            "skipped": list(reading.skipped()),
        }

    for document in reading:
        texts.append(document.text)
        sides.append(document.side)
        size += len(document.text)
        if size >= BATCH_CHARS:
            yield texts, about()
            texts, sides, size = [], [], 0
    if texts:
        yield texts, about()


_worker_tokenizer: Tokenizer


def _start_worker(tokenizer: str) -> None:
    """The initializer of each worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_the_parent() -> None:  # a killed parent cannot tell its workers, which would wait for ever
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    global _worker_tokenizer
    _worker_tokenizer = get_tokenizer(tokenizer)


def _in_worker(texts: list[str], seed: int) -> Arrays:
    return encode_texts(_worker_tokenizer, texts, seed)
