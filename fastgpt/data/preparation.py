"""Turn a corpus into a folder of shards, once, however often the process is killed on the way.

``prepare`` writes train_000000.bin, ..., val_000000.bin, ... and manifest.json. Each document begins with the end-of-text
id, as in llm.c and modded-nanogpt. The work happens in ``OUT.partial``, which is renamed when all of it is on the disk, so
a folder with the final name is complete.

``OUT.partial/progress.json`` records the position in the corpus and the sizes of the shards at that position. It is
replaced atomically every few seconds, after the tokens that it counts are on the disk. The next process starts from it,
cuts off whatever was written later, and does that part again. Neither interruptions nor the number of cores change the
result: the shards and the manifest are the same, byte for byte.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastgpt import __version__
from fastgpt.common import UserError, at_least, read_json, say, sync_folder, within, write_json
from fastgpt.data import encoding
from fastgpt.data.corpora import Corpus, open_corpus
from fastgpt.data.encoding import BatchPlace, Encoded, cores, encode_corpus
from fastgpt.data.hub import HUB
from fastgpt.data.manifest import MANIFEST, PROGRESS, SHARD_TOKENS, VAL_FRACTION, differences, recipe_of, whole
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.data.writing import ShardWriter

SIDES = ("train", "val")
SAVED = ("limit", "smallest", "position")
"""Attributes of a preparation that progress.json holds."""
COMMIT_SECONDS = 5.0
"""The most work that a killed process loses."""


def prepare(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    max_tokens: int | None = None,
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "train",
    workers: int | None = None,
) -> dict[str, Any]:
    """Tokenise a source into ``out`` and return the manifest. Continue where an earlier call with the same arguments
    was interrupted; if the result exists already, only return its manifest.

    The split depends on each document's text, salted with ``seed``: equal documents go to the same side, so nothing in
    validation was trained on. A single text file is split by position, and its end is for validation.

    Args:
        source, text_column, config_name, split: see ``corpora.open_corpus``.
        val_fraction: the share of documents (of bytes, for a single text) that goes to validation.
        shard_tokens: tokens per shard.
        max_tokens: stop after the document with which both sides together reach this many tokens; None: no limit.
        workers: default all cores. The result does not depend on it.

    Raises:
        UserError: there is nothing to read or too little to split; ``out`` or its ``.partial`` holds something else
            (which is never overwritten); or the disk is full (what was written stays and can be continued).
    """
    within("(0, 1)", val_fraction=val_fraction)
    at_least(1, shard_tokens=shard_tokens, max_tokens=max_tokens, workers=workers)
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError("prepare() was called while a worker imports the main script: guard it by __name__")
    out = Path(out).expanduser()
    if out.name in ("", ".."):  # of "." and "..", which nothing can be put behind
        out = Path(os.path.abspath(out))
    if not out.name:
        raise UserError(f"out is {out}: name a folder below it")
    work = out.with_name(out.name + ".partial")
    corpus = open_corpus(
        source,
        text_column=text_column,
        config_name=config_name,
        split=split,
        revision=_known_revision(source, out / MANIFEST, work / PROGRESS),
    )
    recipe = recipe_of(corpus, tokenizer, val_fraction, seed, shard_tokens, max_tokens)
    if (manifest := whole(out, recipe)) is not None:
        return manifest
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            if (manifest := whole(out, recipe)) is not None:  # another process has finished it meanwhile
                return manifest
            manifest = _Preparation(work, corpus, tokenizer, recipe, workers or cores()).run()
            _publish(work, out)
            return manifest
    except OSError as error:
        raise UserError(_cannot_write(error, out, work)) from error


@dataclass
class _Preparation:
    """The work in ``OUT.partial``."""

    work: Path
    corpus: Corpus
    tok: Tokenizer
    recipe: dict[str, Any]
    workers: int
    cut: int | None = None
    """The byte at which a single text is split."""
    # The state in progress.json:
    limit: int = 0
    """Documents whose hash is below it go to validation."""
    smallest: int | None = None
    """The smallest hash so far."""
    position: dict[str, Any] | None = None
    writers: dict[str, ShardWriter] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Return the manifest when it and all shards are on the disk in the work folder."""
        if (manifest := whole(self.work, self.recipe)) is not None:
            return manifest  # killed just before it was renamed
        self.cut = self.corpus.split_by_position(self.recipe["val_fraction"])
        if self.cut is not None and (most := self.recipe["max_tokens"]) is not None:
            raise UserError(
                f"max_tokens is {most}, and data {self.corpus.source!r} is one text, whose end validates: shorten the file"
            )
        self._take_up()
        try:
            self._fill()
            manifest = self._manifest()
        except UserError:
            if self._tokens():
                self._commit()
            else:  # nothing worth continuing: leave nothing behind
                (self.work / PROGRESS).unlink()
                with suppress(OSError):
                    self.work.rmdir()
            raise
        finally:
            for writer in self.writers.values():
                writer.abandon()
        write_json(self.work / MANIFEST, manifest)
        return manifest

    def _manifest(self) -> dict[str, Any]:
        """Finish the shards and describe them."""
        if self.cut is None:
            rule = f"by document: blake2b-64(text, salt=seed) < {self.limit} is validation"
        else:
            rule = f"by position: the bytes from {self.cut} on are validation"
        return {
            **self.recipe,
            "fastgpt": __version__,
            "split": rule,
            "vocab_size": self.tok.vocab_size,
            "eot": self.tok.eot,
            "eot_is": "the first token of every document",
            "skipped_files": self._skipped(),
            "skipped_rows": (self.position or {}).get("nulls", 0),
            "replaced": (self.position or {}).get("replaced", 0),
            "documents": {side: w.documents for side, w in self.writers.items()},
            "tokens": {side: w.tokens for side, w in self.writers.items()},
            "shards": [shard for w in self.writers.values() for shard in w.close()],
        }

    def _fill(self) -> None:
        """Write all tokens. In a small corpus chance may leave one side without documents: then the one with the smallest
        hash validates."""
        self._pass()
        while not all(writer.documents for writer in self.writers.values()):
            smallest, skipped = self.smallest, self._skipped()
            self._start_over()
            if smallest is None:
                files = f" ({len(skipped)} files were not UTF-8)" if skipped else ""
                raise UserError(f"data {self.corpus.source!r} holds no text{files}")
            if self.cut is not None or self.limit == smallest + 1:
                raise UserError(
                    f"data {self.corpus.source!r} holds one document: there must be two, to train and to validate on"
                )
            self.limit = smallest + 1
            self._pass()

    def _pass(self) -> None:
        """Write the corpus from the current position to its end."""
        from fastgpt.data.progress import ProgressReport

        reading = self.corpus.read(self.position)
        size = self.corpus.size
        processes = self.workers > 1 and (size is None or size >= encoding.SMALL)
        report = ProgressReport(f"tokenising {self.corpus.source} ({self.tok.name})", self._tokens())
        encoded = encode_corpus(reading, self.tok, self.recipe["seed"], self.workers, processes)
        max_tokens = self.recipe["max_tokens"]
        committed = time.monotonic()
        with report, closing(encoded):
            for batch, place in encoded:
                full = self._add(batch, place, max_tokens)
                share = place.done
                if max_tokens is not None:
                    share = max(share or 0.0, min(1.0, self._tokens() / max_tokens))
                report.show(self._tokens(), share)
                if full:
                    break
                if time.monotonic() - committed >= COMMIT_SECONDS:
                    self._commit()
                    committed = time.monotonic()
            else:  # after a break the reading would be ahead of what was written
                self.position = reading.position()

    def _add(self, batch: Encoded, place: BatchPlace, max_tokens: int | None) -> bool:
        """Append a batch, up to the document that reaches ``max_tokens``; return whether that was reached."""
        keep = len(batch.lengths)
        if max_tokens is not None:
            if self._tokens() >= max_tokens:
                return True
            keep = min(keep, 1 + int(np.searchsorted(np.cumsum(batch.lengths), max_tokens - self._tokens())))
        lengths, hashes = batch.lengths[:keep], batch.hashes[:keep]
        ids = batch.ids[: int(lengths.sum())]
        val = hashes < self.limit if self.cut is None else np.array([side == "val" for side in place.sides[:keep]])
        tokens = np.repeat(val, lengths)
        self.writers["train"].append(ids[~tokens], int((~val).sum()))
        self.writers["val"].append(ids[tokens], int(val.sum()))
        self.smallest = min(int(hashes.min()), 2**64 if self.smallest is None else self.smallest)
        self.position = place.position
        return max_tokens is not None and self._tokens() >= max_tokens

    def _tokens(self) -> int:
        return sum(w.tokens for w in self.writers.values())

    def _skipped(self) -> list[str]:
        """Files that could not be decoded."""
        return (self.position or {}).get("undecoded", [])

    def _take_up(self) -> None:
        """Continue from progress.json if there is one, else start from the beginning."""
        self.limit = int(self.recipe["val_fraction"] * 2**64)
        saved = read_json(self.work / PROGRESS)
        if saved is None or not isinstance(saved.get("sides"), dict):
            if self.work.exists() and any(not p.name.startswith(".") for p in self.work.iterdir()):
                raise UserError(f"{str(self.work)!r} is in the way and no preparation of this program: move it away")
            self.work.mkdir(exist_ok=True)
            self._start_over()
        elif saved.get("recipe") == self.recipe:
            for key in SAVED:
                setattr(self, key, saved[key])
            self._open_writers(saved["sides"])
            if self._tokens():
                say(f"continuing in {self.work} after {self._tokens():,} tokens", sys.stderr)
        elif any(saved["sides"].values()):
            raise UserError(
                f"{str(self.work)!r} holds an unfinished preparation of something else "
                f"({differences(saved.get('recipe') or {}, self.recipe)}): finish it as it was begun, delete it, or name "
                "another --out"
            )
        else:  # of something else, but nothing was written
            self._start_over()

    def _start_over(self) -> None:
        self.smallest = self.position = None
        for writer in self.writers.values():
            writer.abandon()
        nothing: dict[str, Any] = {side: {} for side in SIDES}
        self._record(nothing)  # before the files change
        self._open_writers(nothing)

    def _open_writers(self, sides: dict[str, Any]) -> None:
        tokens = self.recipe["shard_tokens"]
        self.writers = {side: ShardWriter(self.work, side, tokens, **(sides[side] or {})) for side in SIDES}

    def _commit(self) -> None:
        self._record({side: writer.commit() for side, writer in self.writers.items()})

    def _record(self, sides: dict[str, Any]) -> None:
        saved = {key: getattr(self, key) for key in SAVED}
        write_json(self.work / PROGRESS, {"recipe": self.recipe, **saved, "sides": sides})


def _publish(work: Path, out: Path) -> None:
    (work / PROGRESS).unlink(missing_ok=True)
    for left in work.glob(".*.tmp"):  # left by a process that was killed while it replaced a file
        left.unlink()
    if out.is_dir():
        out.rmdir()  # an empty folder may be replaced
    os.rename(work, out)
    sync_folder(out.parent)


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Let one process work; the others wait and then find it done. The system frees the lock of a killed process."""
    from filelock import FileLock, Timeout

    path = out.with_name(f".{out.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0.1)
    except Timeout:
        path.stat()  # raises where no lock can be made at all, as in /proc, which filelock waits for too
        say(f"another process prepares {out}: waiting for it", sys.stderr)
        lock.acquire()
    try:
        yield
        path.unlink(missing_ok=True)  # only after success: a process that waits for it then finds the folder complete
    finally:
        lock.release()


def _cannot_write(error: OSError, out: Path, work: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full ({error.strerror}): what {str(work)!r} holds is whole; "
            "free some space and give the same command again to continue"
        )
    return f"the prepared data cannot be written to {str(out)!r}: {error}"


def _known_revision(source: str | os.PathLike[str], *notes: Path) -> str | None:
    """The revision of this hub dataset that an earlier call recorded."""
    for note in notes:
        saved = read_json(note) or {}
        saved = saved.get("recipe", saved)
        if saved.get("source") == HUB + str(source).removeprefix(HUB) and isinstance(saved.get("revision"), str):
            return str(saved["revision"])
    return None
