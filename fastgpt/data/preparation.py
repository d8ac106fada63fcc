"""A corpus becomes a folder of shards, once.

``prepare`` writes train_000000.bin, ..., val_000000.bin, ... and manifest.json. Each document is preceded by the
end-of-text id (as llm.c and modded-nanogpt write it: the id counts as the first of its document). The folder is built
under another name beside its place and renamed when all of it is on the disk: what bears the name is whole, whenever
the process was killed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastgpt.data.corpora import STDLIB, Corpus, cut_position, open_corpus, read_pieces
from fastgpt.data.shards import atomic_file, open_shard, write_shard
from fastgpt.data.tokenizer import Tokenizer
from fastgpt.errors import UserError

MANIFEST = "manifest.json"
FORMAT = 1
VAL_FRACTION = 0.05
SHARD_TOKENS = 100_000_000
BATCH_CHARS = 1 << 22
"""Text tokenised in one go, on all cores: enough to keep them busy, little enough to forget."""
STALE_SECONDS = 3600.0


def prepare(
    source: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    val_fraction: float = VAL_FRACTION,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenises a source into ``out_dir`` and returns the manifest; with the very same one there, just returns it.

    The split is a function of each document's content, salted with ``seed``: equal documents go to the same side, so
    nothing in validation was trained on. A source of one text file is split by position, its end for validation.

    Raises:
        UserError: nothing to read, too little to split, or ``out_dir`` holds something else (it is never overwritten).
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}: it must lie between 0 and 1")
    corpus = open_corpus(source)
    recipe = recipe_of(corpus, tokenizer, val_fraction, seed, shard_tokens)
    out = Path(out_dir).expanduser()
    if (manifest := _whole(out, recipe)) is not None:
        return manifest
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} already holds something else: delete it or name another folder")
    work = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        work.mkdir()
        try:
            manifest = _fill(work, corpus, tokenizer, recipe)
            return _publish(work, out, manifest)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise UserError(f"the prepared data cannot be written to {str(out)!r}: {error}") from error


def recipe_of(corpus: Corpus, tok: Tokenizer, val_fraction: float, seed: int, shard_tokens: int) -> dict[str, Any]:
    """All that the shards are a function of."""
    source = corpus.source if corpus.source == STDLIB else str(Path(corpus.source).expanduser().resolve())
    return {
        "format": FORMAT,
        "source": source,
        "source_digest": corpus.digest(),
        "tokenizer": tok.name,
        "val_fraction": val_fraction,
        "seed": seed,
        "shard_tokens": shard_tokens,
    }


class _Split:
    """Assigns documents by a hash of their text. ``limit`` is exclusive: hashes below it go to validation."""

    def __init__(self, val_fraction: float, seed: int) -> None:
        self.limit = int(val_fraction * 2**64)
        self.salt = str(seed).encode()
        self.smallest = self.largest = -1

    def side(self, text: str) -> str:
        digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, salt=self.salt[:16]).digest()
        h = int.from_bytes(digest, "big")
        self.smallest = h if self.smallest < 0 else min(self.smallest, h)
        self.largest = max(self.largest, h)
        return "val" if h < self.limit else "train"


def _fill(work: Path, corpus: Corpus, tok: Tokenizer, recipe: dict[str, Any]) -> dict[str, Any]:
    """Writes the shards and the manifest into ``work``."""
    split = _Split(recipe["val_fraction"], recipe["seed"])
    for _ in range(2):
        if corpus.single_text is not None:
            cut = cut_position(corpus.single_text, recipe["val_fraction"])
            rule = f"by position: the bytes from {cut} on are validation"
            sides = _by_position(corpus.single_text, cut)
        else:
            rule = f"by document: blake2b-64(text, salt=seed) < {split.limit} is validation"
            sides = ((split.side(text), text) for _, text in corpus.documents())
        writers = {side: _ShardWriter(work, side, recipe["shard_tokens"]) for side in ("train", "val")}
        _tokenise(sides, writers, tok, corpus)
        if all(w.documents for w in writers.values()):
            break
        if not any(w.documents for w in writers.values()):
            raise UserError(f"data {corpus.source!r} holds no text ({len(corpus.skipped)} files were not UTF-8)")
        if corpus.single_text is not None or split.smallest == split.largest:
            raise UserError(
                f"data {corpus.source!r} holds one document: there must be two, to train and to validate on"
            )
        # A small corpus, and chance left one side without any: its document of the smallest hash validates.
        for writer in writers.values():
            writer.discard()
        split.limit = split.smallest + 1
    manifest = {
        **recipe,
        "split": rule,
        "vocab_size": tok.vocab_size,
        "eot": tok.eot,
        "eot_is": "the first token of every document",
        "skipped_files": corpus.skipped,
        "documents": {side: w.documents for side, w in writers.items()},
        "tokens": {side: w.tokens for side, w in writers.items()},
        "shards": [shard for w in writers.values() for shard in w.close()],
    }
    with atomic_file(work / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=2).encode())
    return manifest


def _by_position(path: Path, cut: int) -> Iterator[tuple[str, str]]:
    try:
        for side, start, stop in (("train", 0, cut), ("val", cut, None)):
            for text in read_pieces(path, start, stop):
                yield side, text
    except UnicodeDecodeError as error:
        raise UserError(f"data {str(path)!r} cannot be read as UTF-8 text: {error}") from error


def _tokenise(
    sides: Iterable[tuple[str, str]], writers: dict[str, _ShardWriter], tok: Tokenizer, corpus: Corpus
) -> None:
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("tokenising {task.description}"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task(f"{corpus.source} ({tok.name})", total=corpus.total_bytes, rate="")
        begin = time.perf_counter()
        for batch in _batches(sides):
            texts = [text for _, text in batch]
            for (side, _), ids in zip(batch, tok.encode_batch(texts)):
                writers[side].add_document(tok.eot, ids)
            done = sum(w.tokens for w in writers.values())
            rate = f"{done / 1e6 / (time.perf_counter() - begin):.1f}M tokens/s"
            progress.update(task, advance=sum(len(t.encode("utf-8", "surrogatepass")) for t in texts), rate=rate)


def _batches(sides: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch: list[tuple[str, str]] = []
    size = 0
    for side, text in sides:
        batch.append((side, text))
        size += len(text)
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _ShardWriter:
    """Documents of one side into shards of exactly ``shard_tokens`` (the last has the rest). Holds one shard in memory
    at most."""

    def __init__(self, folder: Path, side: str, shard_tokens: int) -> None:
        self.folder, self.side, self.shard_tokens = folder, side, shard_tokens
        self.documents = self.tokens = 0
        self.shards: list[dict[str, Any]] = []
        self._held: list[np.ndarray] = []
        self._size = 0

    def add_document(self, eot: int, ids: np.ndarray) -> None:
        self.documents += 1
        self.tokens += 1 + len(ids)
        for part in (np.array([eot], np.uint16), ids):
            self._held.append(part)
            self._size += len(part)
        while self._size >= self.shard_tokens:
            self._flush(self.shard_tokens)

    def close(self) -> list[dict[str, Any]]:
        if self._size:
            self._flush(self._size)
        return self.shards

    def discard(self) -> None:
        for shard in self.shards:
            (self.folder / shard["file"]).unlink()

    def _flush(self, count: int) -> None:
        held = np.concatenate(self._held)
        name = f"{self.side}_{len(self.shards):06d}.bin"
        digest = write_shard(self.folder / name, held[:count])
        self.shards.append({"file": name, "tokens": count, "sha256": digest})
        self._held, self._size = [held[count:].copy()], len(held) - count


def _whole(folder: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest, if the folder is what the recipe would make; a damaged shard there is an error, no silent redo."""
    manifest = read_manifest(folder)
    if manifest is None or any(manifest.get(key) != value for key, value in recipe.items()):
        return None
    for shard in manifest["shards"]:
        try:
            found = len(open_shard(folder / shard["file"]))
        except UserError as error:
            raise UserError(f"{error}; delete {str(folder)!r} to prepare it again") from error
        if found != shard["tokens"]:
            raise UserError(
                f"data file {str(folder / shard['file'])!r} holds {found} tokens and its manifest says "
                f"{shard['tokens']}; delete {str(folder)!r} to prepare it again"
            )
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("format") == FORMAT else None


def _publish(work: Path, out: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    if out.is_dir():
        with suppress(OSError):
            out.rmdir()  # an empty folder gives way
    try:
        os.rename(work, out)
    except OSError:
        # Another process was faster. If it made the same, all is well.
        if (other := read_manifest(out)) == manifest:
            return other
        raise
    return manifest


def _sweep(out: Path) -> None:
    """Removes what a killed process left half done, once nothing has written to it for an hour."""
    for left in out.parent.glob(f".{out.name}.partial-*"):
        with suppress(OSError):
            newest = max(p.stat().st_mtime for p in (left, *left.iterdir()))
            if time.time() - newest > STALE_SECONDS:
                shutil.rmtree(left)
