"""Read the rows of each kind of file: text in pieces, JSON lines (plain, gzip, zstd), parquet.

A reader takes the file, the column that holds the text, and the number of rows to skip, and yields ``TextRow``s. Skipping
is how an interrupted preparation continues; it is much cheaper than reading (no decoding, whole row groups at once).
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastgpt.common import UserError, first_line

PIECE = 1 << 20
"""Bytes after which a long text file continues as another document, at the end of a line. So no file is ever in memory
as a whole, and a long file contributes to both sides of the split."""
LONG_LINE = 1 << 16


class Document(NamedTuple):
    name: str
    text: str
    side: str | None = None
    """``"train"`` or ``"val"`` where the corpus is split by position; None where the text's hash decides."""


class TextRow(NamedTuple):
    at: str
    """The place in the file, for names and messages: ``""``, ``"#piece"`` or ``":line"``."""
    text: str
    """Empty for a row without text."""
    offset: int
    """About how many bytes of the file on the disk have been read, for a progress bar."""


RowReader = Callable[[Path, str, int], Iterator[TextRow]]


def reader_of(path: Path) -> RowReader:
    for suffixes, reader in _READERS.items():
        if path.name.endswith(suffixes):
            return reader
    return read_text


def read_text(path: Path, column: str = "text", skip: int = 0) -> Iterator[TextRow]:
    """A text file in pieces. ``column`` has no meaning for it."""
    offset = 0
    for i, piece in enumerate(_pieces(path, 0, path.stat().st_size)):
        offset += len(piece)
        if i >= skip:
            yield TextRow(f"#{i}" if i else "", piece.decode("utf-8"), offset)


def read_cut_text(path: Path, cut: int, skip: int = 0) -> Iterator[tuple[str, TextRow]]:
    """A text file in two parts: ("train", row) up to byte ``cut``, ("val", row) after it."""
    offset = 0
    for side, start, stop in (("train", 0, cut), ("val", cut, path.stat().st_size)):
        for piece in _pieces(path, start, stop):
            offset += len(piece)
            if skip > 0:
                skip -= 1
            else:
                yield side, TextRow("", piece.decode("utf-8"), offset)


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


def read_jsonl(path: Path, column: str, skip: int) -> Iterator[TextRow]:
    """One JSON object per line, with its text in the field ``column``. ``.gz`` and ``.zst`` are decompressed on the way."""
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb"))
        lines = stack.enter_context(_decompressed(path, raw))
        try:
            for i, line in enumerate(islice(lines, skip, None), skip + 1):
                yield TextRow(f":{i}", _text_of(line, path, i, column) if line.strip() else "", raw.tell())
        except UnicodeDecodeError:
            raise
        except (EOFError, zlib.error, gzip.BadGzipFile, OSError) as error:
            raise UserError(f"data {str(path)!r} cannot be decompressed: {first_line(error)}") from error


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if path.suffix == ".zst":
        pa = _pyarrow(path, "zstd-compressed")
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _text_of(line: bytes, path: Path, number: int, column: str) -> str:
    try:
        text = json.loads(line.decode("utf-8"))[column]
    except UnicodeDecodeError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise UserError(f"data {str(path)!r} line {number}: each line must be a JSON object with a string {column!r}")
    return text


def read_parquet(path: Path, column: str, skip: int) -> Iterator[TextRow]:
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
                        yield TextRow(f":{row}", text or "", size * row // total)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data {str(path)!r} cannot be read as parquet: {first_line(error)}") from error


def _pyarrow(path: Path, kind: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"data {str(path)!r} is {kind}, which needs pyarrow: run `pip install pyarrow`") from None
    return pa


_READERS: dict[tuple[str, ...], RowReader] = {
    (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst"): read_jsonl,
    (".parquet",): read_parquet,
}
TABLE_SUFFIXES = tuple(suffix for suffixes in _READERS for suffix in suffixes)
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
ALL_SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
