"""Read the documents of each kind of file: text in pieces, JSON lines (plain, gzip, zstd), parquet.

A reader skips as many rows as it is told: so an interrupted preparation continues, at a much lower cost than reading (no
decoding, whole row groups at once).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastgpt.common import UserError, first_line

PIECE = 1 << 20
"""Bytes after which a long text file continues as another document, at the end of a line. So no file is ever in memory
as a whole, and a long file contributes to both sides of the split."""
LONG_LINE = 1 << 16
LONGEST_LINE = 1 << 28
"""Bytes of the longest line of JSON: a few kilobytes of gzip can hold gigabytes without an end of line."""
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")
TABLE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")
ALL_SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES


class Document(NamedTuple):
    text: str
    """Empty for a row without text."""
    offset: int = 0
    """About how many bytes of its file have been read, for a progress bar."""
    side: str | None = None
    """``"train"`` or ``"val"`` where the corpus is split by position; None where the text's hash decides."""


def read_file(path: Path, column: str, skip: int = 0, cut: int | None = None) -> Iterator[Document]:
    """The rows of a file after the first ``skip``. ``column`` of a table holds the text; ``cut`` is ``read_text``'s."""
    if path.name.endswith(JSON_SUFFIXES):
        return _read_jsonl(path, column, skip)
    if path.name.endswith(".parquet"):
        return _read_parquet(path, column, skip)
    return read_text(path, skip, cut)


def read_text(path: Path, skip: int = 0, cut: int | None = None) -> Iterator[Document]:
    """A text file in pieces. With ``cut``, those up to that byte are for training, and those after it for validation."""
    size = path.stat().st_size
    parts = [(None, 0, size)] if cut is None else [("train", 0, cut), ("val", cut, size)]
    offset = 0
    for side, start, stop in parts:
        for piece in _pieces(path, start, stop):
            offset += len(piece)
            if skip > 0:
                skip -= 1
            else:
                yield Document(piece.decode("utf-8"), offset, side)


def cut_position(path: Path, fraction: float) -> int:
    """The byte offset, at the end of a line if one is near, that leaves about ``fraction`` of the file behind it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        target = file.seek(int(size * (1 - fraction)))
        # Look at half of the remainder at most: a file of one line must not lose all of it.
        return target + len(_rest_of_line(file, min(LONG_LINE, (size - target) // 2)))


def _pieces(path: Path, start: int, stop: int) -> Iterator[bytes]:
    """Bytes start..stop of a text file as pieces of about ``PIECE`` bytes that end where a line does."""
    with path.open("rb") as file:
        file.seek(start)
        left = stop - start
        while left > 0:
            data = file.read(min(PIECE, left))
            if not data:
                return
            if len(data) < left:
                data += _rest_of_line(file, min(LONG_LINE, left - len(data)))
            left -= len(data)
            yield data


def _rest_of_line(file: BinaryIO, limit: int) -> bytes:
    """The bytes up to and including the next newline; if there is none in ``limit`` bytes, to the end of a character."""
    rest = file.readline(limit) if limit > 0 else b""
    while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80:
        rest += byte
    if byte:
        file.seek(-1, os.SEEK_CUR)
    return rest


def _read_jsonl(path: Path, column: str, skip: int) -> Iterator[Document]:
    """One JSON object per line, with its text in the field ``column``. ``.gz`` and ``.zst`` are decompressed on the way."""
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        lines = stack.enter_context(_decompressed(path, raw))
        try:
            whole_lines = iter(lambda: lines.readline(LONGEST_LINE + 1), b"")
            for number, line in enumerate(islice(whole_lines, skip, None), skip + 1):
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"data {str(path)!r} line {number} is longer than {LONGEST_LINE >> 20} MiB: put one document on a line"
                    )
                yield Document(_text_of(line, path, number, column) if line.strip() else "", raw.tell())
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"data {str(path)!r} cannot be decompressed: {first_line(error)}") from error


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if path.suffix == ".zst":
        pa = _pyarrow(path, "zstd-compressed")
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _text_of(line: bytes, path: Path, number: int, column: str) -> str:
    decoded = line.decode("utf-8")
    try:
        text = json.loads(decoded)[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"data {str(path)!r} line {number}: each line must be a JSON object with a string {column!r}")
    return text


def _read_parquet(path: Path, column: str, skip: int) -> Iterator[Document]:
    """The strings of one column."""
    pa = _pyarrow(path, "parquet")
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(f"data {str(path)!r} has no column {column!r}, only {', '.join(names) or 'none'}")
            kind = table.schema_arrow.field(column).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if str(kind) not in ("string", "large_string", "string_view", "null"):
                raise UserError(f"data {str(path)!r}: column {column!r} must hold strings, not {kind}")
            size, total = path.stat().st_size, table.metadata.num_rows
            row, group = 0, 0
            while group < table.num_row_groups and row + table.metadata.row_group(group).num_rows <= skip:
                row += table.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, table.num_row_groups))
            for batch in table.iter_batches(batch_size=1024, row_groups=groups, columns=[column]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    if row > skip:
                        yield Document(text or "", size * row // total)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data {str(path)!r} cannot be read as parquet: {first_line(error)}") from error


def _pyarrow(path: Path, kind: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"data {str(path)!r} is {kind}, which needs pyarrow: run `pip install pyarrow`") from None
    return pa
