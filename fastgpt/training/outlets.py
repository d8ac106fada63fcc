"""Where a run writes beside its checkpoints: metrics.jsonl, TensorBoard events, its configuration, the terminal.

None of them is worth the run. When one cannot be written (a full disk, a read-only file system, a terminal that is gone),
that is said once, what is lost is counted, and the run goes on.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

from fastgpt.common import first_line, why_unwritten


class Outlet:
    """Something to write to that may stop taking it. ``news`` gets a sentence when that begins, and another when it ends."""

    def __init__(
        self, name: str, news: list[str], folder: Path | None = None, caught: type[Exception] = OSError
    ) -> None:
        """``folder`` is the one that it lies in, if any; ``caught`` is what failing to write raises."""
        self.name, self.news, self.folder, self.caught = name, news, folder, caught
        self.failing, self.lost = False, 0

    def take(self, write: Callable[..., object], *args: Any, lines: int = 1, **options: Any) -> None:
        """Call ``write(*args, **options)``, which writes ``lines`` lines and raises where it cannot."""
        try:
            write(*args, **options)
        except self.caught as error:
            if not self.failing:
                self.news.append(f"{self.name} cannot be written ({self._why(error)}): the run goes on without it")
            self.failing, self.lost = True, self.lost + lines
        else:
            if self.failing:
                self.news.append(f"{self.name} can be written again; lines lost: {self.lost:,}")
            self.failing, self.lost = False, 0

    def _why(self, error: Exception) -> str:
        if isinstance(error, OSError) and self.folder is not None:
            return why_unwritten(error, self.folder)
        return getattr(error, "strerror", None) or first_line(error)

    def close(self) -> None:
        if self.lost:
            self.news.append(f"{self.name} could not be written to the end; lines lost: {self.lost:,}")


class Appended(Outlet):
    """A file that grows by whole records: of one that does not fit, nothing stays. If the file is deleted, another is begun,
    with ``head()``."""

    def __init__(self, path: Path, head: Callable[[], bytes], news: list[str]) -> None:
        """Raises OSError for a file that cannot be opened."""
        super().__init__(str(path), news, path.parent)
        self.path, self._head = path, head
        self._file = self._open()

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self.path, "ab", buffering=0)

    @property
    def size(self) -> int:
        """Bytes; 0 if the file is gone."""
        with suppress(OSError):
            return self.path.stat().st_size
        return 0

    def write(self, record: bytes) -> None:
        """Append a record, or lose it. The first one of a file follows the head."""
        self.take(self._write, record)

    def _write(self, record: bytes) -> None:
        if not os.path.exists(self.path):  # the file that is open would go on taking what nobody can read
            file = self._open()
            self._file.close()
            self._file = file
        before = self.size
        if not before:
            record = self._head() + record
        try:
            if self._file.write(record) < len(record):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(before)
            raise

    def close(self) -> None:
        super().close()
        self._file.close()


class Terminal(Outlet):
    """A text stream that rich can write to: ``stream`` without its buffer, which would keep what failed and fail again."""

    def __init__(self, stream: TextIO, news: list[str]) -> None:
        super().__init__("the terminal", news)
        self._stream = stream
        self._raw = getattr(getattr(stream, "buffer", None), "raw", None)
        self.take(stream.flush, lines=0)

    def write(self, text: str) -> None:
        self.take(self._write, text, lines=text.count("\n"))

    def _write(self, text: str) -> None:
        if self._raw is None:  # a stream of Python's own, such as StringIO
            self._stream.write(text)
            self._stream.flush()
            return
        data = text.encode(self._stream.encoding, "replace")
        while data:
            data = data[self._raw.write(data) or 0 :]

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
