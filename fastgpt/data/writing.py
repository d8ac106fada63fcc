"""One side of a preparation: tokens appended to shards in a way that a killed process can continue.

Tokens go straight into the shard's file. ``commit`` puts them on the disk and says in a few numbers what is there;
whatever a process wrote after its last commit is cut off when the next one begins from those numbers.
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
    """Shards of exactly ``shard_tokens`` tokens; the last has the rest.

    Args:
        folder: where ``SIDE_000000.bin``, ... go; files of that side that ``state`` does not know are removed.
        state: what ``commit`` returned, to go on from there.
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
        """uint16 ids, with which ``documents`` documents begin."""
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
        """Everything appended so far is on the disk when this returns; what it returns continues it."""
        if self._file is not None:
            _to_disk(self._file)
        return {"documents": self.documents, "tokens": self.tokens, "shards": self.shards, "held": self.held}

    def close(self) -> list[dict[str, Any]]:
        """Ends the last shard and returns file name, tokens and sha256 of each."""
        if self.held:
            self._finish()
        return self.shards

    def abandon(self) -> None:
        """Lets go of the file; what was not committed may or may not be in it."""
        if self._file is not None:
            with suppress(OSError):  # a full disk fails once more here
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
        with self._path().open("rb") as file:  # read back: a hash cannot be put aside half done
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        self.shards = [
            *self.shards,
            {"file": self._path().name, "tokens": self.held, "sha256": digest.hexdigest()},
        ]
        self.held = 0

    def _take_up(self) -> None:
        """The files exactly as they were at the commit."""
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
                    f"data file {str(path)!r} is missing or cut short: delete {str(self.folder)!r} to begin anew"
                )
        if self.held:
            self._file = self._path().open("r+b")
            self._file.truncate(HEADER_BYTES + 2 * self.held)
            self._file.write(header(self.shard_tokens))  # a killed process may have written that of a last shard
            self._file.seek(0, os.SEEK_END)


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
