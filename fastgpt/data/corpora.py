"""Where text comes from: the standard library's sources, or files of the user's.

A corpus is an ordered list of files, each a stream of (name, text) documents in an order that never changes: what
``prepare`` makes of it can be repeated, and later continued, exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from fastgpt.errors import UserError

STDLIB = "stdlib"
TEXT_SUFFIXES = {".txt", ".text", ".md", ".rst", ".py"}
ALL_SUFFIXES = TEXT_SUFFIXES | {".jsonl", ".parquet"}
NOT_IN_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
PIECE = 1 << 20
"""Bytes after which a long text file goes on as another document, at the end of a line: no file is ever in memory
whole, and a long file is spread over both sides of the split."""
LONG_LINE = 1 << 16


@dataclass
class Corpus:
    """Files to read documents from. ``skipped`` names those that the last pass of ``documents()`` could not decode."""

    source: str
    root: Path
    files: list[Path]
    strict: bool = False
    """An undecodable file is an error, not skipped: it was named by the user himself."""
    skipped: list[str] = field(default_factory=list)

    def documents(self) -> Iterator[tuple[str, str]]:
        """Every non-empty document with its name: ``file``, ``file#piece`` or ``file:row``."""
        self.skipped.clear()
        for path in self.files:
            name = path.relative_to(self.root).as_posix()
            try:
                for at, text in _READERS.get(path.suffix, _read_text)(path):
                    if text:
                        yield name + at, text
            except (UnicodeDecodeError, OSError) as error:
                if self.strict:
                    raise UserError(f"data {str(path)!r} cannot be read as UTF-8 text: {error}") from error
                self.skipped.append(name)

    @property
    def single_text(self) -> Path | None:
        """The file, where the whole corpus is one text file: it is split by position, not by document."""
        only = self.files[0]
        return only if len(self.files) == 1 and only.suffix not in _READERS else None

    @property
    def total_bytes(self) -> int | None:
        """Bytes of text to come, for a progress bar; unknown where files are compressed."""
        if any(f.suffix == ".parquet" for f in self.files):
            return None
        return sum(f.stat().st_size for f in self.files)

    def digest(self) -> str:
        """Changes when the files do. From names, sizes and times: hashing 100 GB of text at every start would not do.
        The standard library goes by version, names and sizes, so that a reinstalled interpreter finds its cache."""
        known = hashlib.sha256(platform.python_version().encode() if self.source == STDLIB else b"")
        for path in self.files:
            stat = path.stat()
            time = 0 if self.source == STDLIB else stat.st_mtime_ns
            known.update(f"{path.relative_to(self.root).as_posix()}\0{stat.st_size}\0{time}\n".encode())
        return known.hexdigest()


def open_corpus(source: str | os.PathLike[str]) -> Corpus:
    """``"stdlib"``, a text, ``.jsonl`` (field ``text``) or ``.parquet`` (column ``text``) file, or a folder of those.

    Raises:
        UserError: there is nothing there, or nothing in it.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _walk(root, {".py"}, without=NOT_IN_STDLIB)
        if not files:
            raise UserError(f"data 'stdlib': {root} holds no .py files; name a text file or a folder of your own")
        return Corpus(STDLIB, root, files)
    path = Path(source).expanduser()
    if path.is_dir():
        files = _walk(path, ALL_SUFFIXES)
        if not files:
            wanted = " ".join(sorted(ALL_SUFFIXES))
            raise UserError(f"data {str(source)!r} is a folder without text: it must hold files that end in {wanted}")
        return Corpus(str(source), path, files)
    if not path.is_file():
        raise UserError(f"data {str(source)!r} does not exist: it must be 'stdlib', or a file or folder of text")
    if path.stat().st_size == 0:
        raise UserError(f"data {str(source)!r} is empty: it must hold text")
    return Corpus(str(source), path.parent, [path], strict=True)


def documents(source: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """The (name, text) documents of a source, see ``open_corpus``."""
    return open_corpus(source).documents()


def read_pieces(path: Path, start: int = 0, stop: int | None = None) -> Iterator[str]:
    """Bytes start..stop of a text file as pieces of about ``PIECE`` bytes that end where a line does."""
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        while left > 0:
            data = file.read(min(PIECE, left))
            if not data:
                return
            if len(data) < left:
                data += _rest_of_line(file, min(LONG_LINE, left - len(data)))
            left -= len(data)
            yield data.decode("utf-8")


def cut_position(path: Path, fraction: float) -> int:
    """The byte offset, at the end of a line if one is near, that leaves about ``fraction`` of the file behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        target = file.seek(int(size * (1 - fraction)))
        # Looks at half of the remainder at most: a file of one line must not lose all of it.
        return target + len(_rest_of_line(file, min(LONG_LINE, (size - target) // 2)))


def _rest_of_line(file: BinaryIO, limit: int) -> bytes:
    """Up to and with the next newline; without one in ``limit`` bytes, to the end of a UTF-8 character."""
    rest = file.readline(limit) if limit > 0 else b""
    while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:
        rest += byte
    if byte:
        file.seek(-1, os.SEEK_CUR)
    return rest


def _walk(root: Path, suffixes: set[str], without: frozenset[str] = frozenset()) -> list[Path]:
    """Files below root, sorted; folders named in ``without`` are not entered (site-packages can be huge)."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in without]
        found += [Path(folder, name) for name in names if os.path.splitext(name)[1] in suffixes]
    return sorted(f for f in found if f.is_file())


def _read_text(path: Path) -> Iterator[tuple[str, str]]:
    for i, text in enumerate(read_pieces(path)):
        yield (f"#{i}" if i else ""), text


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as file:
        for i, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                text = None
            if not isinstance(text, str):
                raise UserError(f"data {str(path)!r} line {i}: each line must be a JSON object with a string 'text'")
            yield f":{i}", text


def _read_parquet(path: Path) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"data {str(path)!r} is parquet, which needs pyarrow: run `pip install pyarrow`") from None
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise UserError(f"data {str(path)!r} has no column 'text', only {', '.join(names) or 'none'}")
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if text is not None and not isinstance(text, str):
                        raise UserError(f"data {str(path)!r}: column 'text' must hold strings, not {type(text)}")
                    yield f":{row}", text or ""
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data {str(path)!r} cannot be read as parquet: {str(error).splitlines()[0]}") from error


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
