"""Write one side of a preparation: append tokens to shards so that another process can continue after a kill.

Tokens go straight into the shard's file. ``commit`` flushes them to the disk and returns a few numbers that describe what
is there. The next process starts from those numbers and cuts off whatever was written after the last commit.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastgpt.common import UserError
from fastgpt.data.shards import HEADER_BYTES, header


class ShardWriter:
    """Writes shards of exactly ``shard_tokens`` tokens; the last holds the rest.

    Args:
        folder: holds ``SIDE_000000.bin``, ...; files of that side that are not in ``state`` are removed.
        state: the result of the ``commit`` to continue from.
    """

    def __init__(self, folder: Path, side: str, shard_tokens: int, state: dict[str, Any] | None = None) -> None:
        self.folder, self.side, self.shard_tokens = folder, side, shard_tokens
        state = state or {"documents": 0, "tokens": 0, "shards": [], "held": 0}
        self.documents: int = state["documents"]
        self.tokens: int = state["tokens"]
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.held: int = state["held"]
        """Tokens in the shard that is being filled."""
        self._file: BinaryIO | None = None
        self._take_up()

    def append(self, ids: np.ndarray, documents: int) -> None:
        """Append uint16 ids, in which ``documents`` documents begin."""
        self.documents += documents
        self.tokens += len(ids)
        while len(ids):
            part, ids = np.split(ids, [self.shard_tokens - self.held])
            if self._file is None:
                self._file = self._path().open("wb")
                self._file.write(header(self.shard_tokens))
            self._file.write(part.astype("<u2").tobytes())
            self.held += len(part)
            if self.held == self.shard_tokens:
                self._finish()

    def commit(self) -> dict[str, Any]:
        """Flush everything appended so far to the disk, and return the state from which to continue."""
        if self._file is not None:
            _to_disk(self._file)
        return {"documents": self.documents, "tokens": self.tokens, "shards": self.shards, "held": self.held}

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard, and return file name, tokens and sha256 of each."""
        if self.held:
            self._finish()
        return self.shards

    def abandon(self) -> None:
        """Close the file. It may or may not hold what was not committed."""
        if self._file is not None:
            with suppress(OSError):  # a full disk fails again here
                self._file.close()
            self._file = None

    def _path(self) -> Path:
        return self.folder / f"{self.side}_{len(self.shards):06d}.bin"

    def _finish(self) -> None:
        assert self._file is not None
        if self.held != self.shard_tokens:
            self._file.seek(0)
            self._file.write(header(self.held))
        _to_disk(self._file)
        self._file.close()
        self._file = None
        with self._path().open("rb") as file:  # read back, since an unfinished hash cannot be saved
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        self.shards = [
            *self.shards,
            {"file": self._path().name, "tokens": self.held, "sha256": digest.hexdigest()},
        ]
        self.held = 0

    def _take_up(self) -> None:
        """Restore the files as they were at the commit."""
        known = {shard["file"]: shard["tokens"] for shard in self.shards}
        if self.held:
            known[self._path().name] = self.held
        for path in self.folder.glob(f"{self.side}_*.bin"):
            if path.name not in known:
                path.unlink()
        for name, tokens in known.items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < HEADER_BYTES + 2 * tokens:
                raise UserError(
                    f"data file {str(path)!r} is missing or cut short: delete {str(self.folder)!r} to start again"
                )
        if self.held:
            self._file = self._path().open("r+b")
            self._file.truncate(HEADER_BYTES + 2 * self.held)
            self._file.write(header(self.shard_tokens))  # a killed process may have written the count of a last shard
            self._file.seek(0, os.SEEK_END)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
