"""Write one side of a preparation: append tokens to shards so that another process can continue after a kill.

Tokens go straight into the shard's file. ``commit`` flushes them to the disk and returns a few numbers that describe what
is there. The next process starts from those numbers and cuts off whatever was written after the last commit.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastgpt.common import UserError, file_sha256
from fastgpt.data.shards import HEADER_BYTES, header


@dataclass
class ShardWriter:
    """Writes shards of exactly ``shard_tokens`` tokens; the last holds the rest.

    ``folder`` holds ``SIDE_000000.bin``, ... The other fields are what ``commit`` returned, to continue from there: files of
    that side that they do not count are removed.
    """

    folder: Path
    side: str
    shard_tokens: int
    documents: int = 0
    tokens: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    """File name, tokens and sha256 of each finished shard."""
    held: int = 0
    """Tokens in the shard that is being filled."""
    _file: BinaryIO | None = None

    def __post_init__(self) -> None:
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
        return {name: getattr(self, name) for name in ("documents", "tokens", "shards", "held")}

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard, and return ``shards``."""
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
        path = self._path()
        # Read back, since an unfinished hash cannot be saved.
        self.shards.append({"file": path.name, "tokens": self.held, "sha256": file_sha256(path)})
        self.held = 0


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
