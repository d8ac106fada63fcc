"""Check every id of every token file once, before training on it.

An id past the vocabulary is an out-of-bounds read in the embedding: on a GPU at best an unexplained crash hours into the
run. So no file is trusted. Each is read completely; its largest id is compared with the vocabulary, and its sha256 with
that of the manifest beside it, if there is one. For a large file both are remembered in the user's cache together with
its size, inode and times, and it is read again if any of these has changed. (No program can set back the inode's change
time, which is one of them.)

The same reading tells tokens from what has no header to tell it by: wider integers, floating-point numbers, a file that was
never filled.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastgpt.common import UserError, cache_dir, gigabytes, read_json, write_json
from fastgpt.data.manifest import read_manifest
from fastgpt.data.shards import check_ids, open_shard

CACHED_FROM = 32 << 20
"""Bytes from which on the result is remembered: a smaller file is read in less than 20 ms."""
SAID_FROM = 1 << 30
"""Bytes to read from which on a message says so."""
THREADS = 8
LEAST = 1024
"""Tokens from which on a file is judged by what its ids look like."""
SELDOM, MUCH = 0.01, 0.2
"""In a text the commonest token (a blank, a comma) is more than SELDOM of it. Of floating-point numbers none is, but more than
MUCH have the same exponent."""
PART = 1 << 21
"""Tokens counted at a time: counting widens them to 64 bits."""


class FileFacts(NamedTuple):
    """What a token file holds."""

    sha256: str
    largest_id: int
    strange: str | None = None
    """What its ids cannot be, as part of a sentence: a text's."""


def verify_files(paths: Sequence[str | os.PathLike[str]], vocab_size: int) -> None:
    """Check that all ids of all files are below ``vocab_size``, and that the files match their manifests.

    Raises:
        UserError: names the file, and the first id past the vocabulary with its position.
    """
    files = [Path(path) for path in paths]
    shas = {
        folder / str(shard["file"]): str(shard["sha256"])
        for folder in {path.parent for path in files}
        for shard in (read_manifest(folder) or {"shards": []})["shards"]
    }
    unknown = [path for path in files if _remembered(path) is None]
    if (size := sum(path.stat().st_size for path in unknown)) >= SAID_FROM:
        print(f"checking {len(unknown)} token files, {gigabytes(size)} (only once)", file=sys.stderr)
    with ThreadPoolExecutor(min(THREADS, max(1, len(unknown)))) as pool:
        for path, facts in zip(files, pool.map(examine, files)):
            if facts.strange:
                raise UserError(f"data file {str(path)!r} does not hold tokens of a text: {facts.strange}")
            if facts.largest_id >= vocab_size:
                check_ids(open_shard(path), vocab_size, path)
            expected = shas.get(path, facts.sha256)
            if facts.sha256 != expected:
                raise UserError(
                    f"data file {str(path)!r} is not what was prepared (sha256 {facts.sha256[:12]}..., its manifest says "
                    f"{expected[:12]}...): delete {str(path.parent)!r} and prepare it again"
                )


def examine(path: Path) -> FileFacts:
    """Read the whole file, or remember an earlier reading. Raises UserError as ``open_shard`` does."""
    tokens = open_shard(path)
    if (facts := _remembered(path)) is not None:
        return facts
    state = _state_of(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(path.stat().st_size - 2 * len(tokens)))
    counts, filled, odd_are_zero = np.zeros(1 << 16, np.int64), 0, True
    for start in range(0, len(tokens), PART):
        chunk = np.asarray(tokens[start : start + PART])
        digest.update(chunk.data)
        counts += np.bincount(chunk, minlength=1 << 16)
        nonzero = chunk != 0
        odd_are_zero = odd_are_zero and not nonzero[1::2].any()
        if nonzero.any():
            filled = start + len(chunk) - int(nonzero[::-1].argmax())
    largest, zeros, commonest = int(np.flatnonzero(counts)[-1]), int(counts[0]), int(counts.max())
    # Without the sign, the first 5 bits of a floating-point number are its exponent's.
    exponents = counts.reshape(2, 32, 1024).sum((0, 2))
    usual = int(exponents.argmax())
    strange = None
    if len(tokens) >= LEAST:
        if commonest == len(tokens):
            strange = f"all of its {len(tokens):,} ids are {tokens[0]}"
        elif odd_are_zero:
            strange = "every second id is 0, as where wider integers are read as uint16: save it as uint16"
        elif 2 * filled <= len(tokens):
            strange = f"all ids from {filled:,} on are 0, more than half: the program that wrote it did not finish"
        elif 2 * zeros > len(tokens) and largest >= 256:
            strange = f"{zeros / len(tokens):.0%} of its ids are 0: part of it was never written"
        elif commonest < SELDOM * len(tokens) and usual >= 4 and exponents[usual] > MUCH * len(tokens):
            strange = (
                f"no id is {SELDOM:.0%} of it, and {exponents[usual] / len(tokens):.0%} lie from {1024 * usual:,} to "
                f"{1024 * usual + 1023:,} or as far above 32,768, as where floating-point numbers are read as uint16"
            )
    facts = FileFacts(digest.hexdigest(), largest, strange)
    if path.stat().st_size >= CACHED_FROM and _state_of(path) == state:
        with suppress(OSError):  # in a read-only home the file is read again next time
            write_json(_memory_of(path), {"state": state, **facts._asdict()})
    return facts


def _remembered(path: Path) -> FileFacts | None:
    if path.stat().st_size < CACHED_FROM:
        return None
    saved = read_json(_memory_of(path)) or {}
    if saved.get("state") != _state_of(path) or "strange" not in saved:  # of an earlier version
        return None
    return FileFacts(saved["sha256"], saved["largest_id"], saved["strange"])


def _memory_of(path: Path) -> Path:
    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return cache_dir() / "checked" / f"{name}.json"


def _state_of(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
