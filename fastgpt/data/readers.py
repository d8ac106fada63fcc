"""Read the documents of each kind of file: text in pieces, JSON lines (plain, gzip, zstd), JSON arrays, CSV, parquet.

A reader skips as many rows as it is told: so an interrupted preparation continues, at a much lower cost than reading (no
decoding, whole row groups at once).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastgpt.common import LARGEST_TEXT, UserError, first_line, kind_of_file, shortened

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
"""What is taken from a folder."""
NAMED_SUFFIXES = (".json", ".csv", ".tsv")
"""Tables that are read only when they are named: beside texts they are often something else."""
MARKUP = (".html", ".htm", ".xml", ".ipynb", ".pdf", ".docx", ".epub", ".rtf")
"""Files whose text is among other things."""


class Document(NamedTuple):
    text: str
    """Empty for a row without text."""
    offset: int = 0
    """About how many bytes of its file have been read, for a progress bar."""
    side: str | None = None
    """``"train"`` or ``"val"`` where the corpus is split by position; None where the text's hash decides."""
    missing: bool = False
    """The row holds no text: null, a number, or bytes of which more than ``MOST_REPLACED`` are not UTF-8."""
    replaced: int = 0
    """Places that are not UTF-8, each of them U+FFFD now."""


MOST_REPLACED = 0.3
"""The share of a text that may have to be replaced: of German and French in Latin-1 it is some percent, of Russian, Japanese in
an older encoding and of random bytes nearly half and more. What has more than this is no text."""


class NotText(Exception):
    """A file that is no UTF-8 text; the message says what it is."""


def _decoded(data: bytes) -> tuple[str, int]:
    """Bytes as UTF-8, with U+FFFD where they are not, and in how many places that is."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError:
        text = data.decode(errors="replace")
        return text, text.count("\ufffd") - data.count("\ufffd".encode())


def _row(text: str | None, offset: int, replaced: int = 0) -> Document:
    if text is None or replaced > MOST_REPLACED * len(text):
        return Document("", offset, missing=True)
    return Document(text, offset, replaced=replaced)


def read_file(path: Path, column: str, skip: int = 0, cut: int | None = None) -> Iterator[Document]:
    """The rows of a file after the first ``skip``. ``column`` of a table holds the text; ``cut`` is ``read_text``'s."""
    if "Git LFS" in (kind := kind_of_file(path) or ""):
        raise UserError(f"data {str(path)!r} is {kind}")
    if path.name.endswith(".json"):
        return _read_json(path, column, skip)
    if path.name.endswith((".csv", ".tsv")):
        return _read_csv(path, column, skip)
    if path.name.endswith(JSON_SUFFIXES):
        return _read_jsonl(path, column, skip)
    if path.name.endswith(".parquet"):
        return _read_parquet(path, column, skip)
    return read_text(path, skip, cut)


def read_text(path: Path, skip: int = 0, cut: int | None = None) -> Iterator[Document]:
    """A text file in pieces. With ``cut``, those up to that byte are for training, and those after it for validation. Raises
    NotText for a file that begins as no text does."""
    size = path.stat().st_size
    parts = [(None, 0, size)] if cut is None else [("train", 0, cut), ("val", cut, size)]
    offset = 0
    for side, start, stop in parts:
        for piece in _pieces(path, start, stop):
            offset += len(piece)
            if begins := offset == len(piece):
                piece = piece.removeprefix(codecs.BOM_UTF8)
            if skip > 0:
                skip -= 1
                continue
            text, replaced = _decoded(piece)
            if begins:
                if piece.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise NotText("it is UTF-16: save it as UTF-8")
                if (strange := replaced + text.count("\0")) > MOST_REPLACED * len(text):
                    raise NotText(f"{strange / len(text):.0%} of its characters are no UTF-8, or zero bytes")
            yield Document(text, offset, side, replaced=replaced)


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

    def rows() -> Iterator[tuple[Any, str, int, int]]:
        whole_lines = iter(lambda: lines.readline(LONGEST_LINE + 1), b"")
        for number, line in enumerate(islice(whole_lines, skip, None), skip + 1):
            where = f"data {str(path)!r} line {number}"
            if len(line) > LONGEST_LINE:
                raise UserError(f"{where} is longer than {LONGEST_LINE / 1e6:.0f} MB: put a document on a line")
            text, replaced = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            row: Any = {column: ""}  # a blank line
            if text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    row = None
            yield row, where, raw.tell(), replaced

    with path.open("rb") as raw, _decompressed(path, raw) as lines:
        try:
            yield from _fields(rows(), column, skip > 0)
        except (EOFError, zlib.error, OSError) as error:
            raise UserError(f"data {str(path)!r} cannot be decompressed: {first_line(error)}") from error


def _decompressed(path: Path, raw: BinaryIO) -> Any:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw, mode="rb")
    if path.suffix == ".zst":
        pa = _pyarrow(path, "zstd-compressed")
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 1 << 20)
    return raw


def _fields(rows: Iterable[tuple[Any, str, int, int]], column: str, had_text: bool) -> Iterator[Document]:
    """Yields the field ``column`` of JSON rows: (row, where it stands, bytes read, places replaced). ``had_text``: whether
    a row before these had a text. Raises UserError for a row that is not an object, and if no row has a text there."""
    wrong, other = f"each line must be a JSON object with a string {column!r}", None
    for row, where, offset, replaced in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: {wrong}")
        if column not in row:
            raise UserError(_no_column(f"{where}: there is", "field", column, row))
        text = row[column] if isinstance(row[column], str) else None
        had_text = had_text or bool(text)
        if text is None and row[column] is not None:
            other = other or where
        yield _row(text, offset, min(replaced, (text or "").count("\ufffd")))
    if other and not had_text:
        raise UserError(f"{other}: {wrong}, as none is")


def _no_column(begin: str, kind: str, column: str, there: Iterable[str]) -> str:
    names = shortened(", ".join(map(str, there)) or "none", 200)
    return f"{begin} no {kind} {column!r}, only {names}: name the one that holds the text with --text-column"


def _read_json(path: Path, column: str, skip: int) -> Iterator[Document]:
    """An array of objects, or JSON lines, as many a .json file is."""
    with path.open("rb") as file:
        array = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
    if not array:
        yield from _read_jsonl(path, column, skip)
        return
    if (size := path.stat().st_size) > LARGEST_TEXT:
        raise UserError(
            f"data {str(path)!r} is a JSON array of more than {LARGEST_TEXT / 1e6:.0f} MB, which would be read as a whole: "
            "write one object on a line (jq -c '.[]') into a .jsonl file"
        )
    content, replaced = _decoded(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    try:
        items = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"data {str(path)!r} is damaged: it is not JSON") from error
    rows = (
        (item, f"data {str(path)!r} item {number}", size * number // len(items), replaced)
        for number, item in enumerate(items[skip:], skip + 1)
    )
    yield from _fields(rows, column, skip > 0)


def _read_csv(path: Path, column: str, skip: int) -> Iterator[Document]:
    """The cells of one column, under a header line; separated by commas, semicolons or tabs, whichever the header has most."""
    csv.field_size_limit(LONGEST_LINE)
    try:
        with path.open("rb") as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
            header = file.readline(LONG_LINE)
            separator = max(",;\t", key=header.count)
            names = next(csv.reader([header], delimiter=separator), [])
            if column not in names:
                raise UserError(_no_column(f"data {str(path)!r} has", "column", column, names))
            at, lines = names.index(column), iter(lambda: file.readline(LONGEST_LINE), "")
            for row in islice(csv.reader(lines, delimiter=separator), skip, None):
                cell = row[at].encode("utf-8", "surrogateescape") if at < len(row) else b""
                text, replaced = _decoded(cell)
                yield _row(text or None, raw.tell(), replaced)  # an empty cell is what null is written as
    except csv.Error as error:
        raise UserError(f"data {str(path)!r} cannot be read as CSV: {first_line(error)}") from error


def _read_parquet(path: Path, column: str, skip: int) -> Iterator[Document]:
    """The strings of one column."""
    pa = _pyarrow(path, "parquet")
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise UserError(_no_column(f"data {str(path)!r} has", "column", column, names))
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
                for text, replaced in _texts(batch.column(0)):
                    row += 1
                    if row > skip:
                        yield _row(text, size * row // total, replaced)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data {str(path)!r} cannot be read as parquet: {first_line(error)}") from error


def _texts(column: Any) -> Iterator[tuple[str | None, int]]:
    """The strings of one of pyarrow's arrays, each with the number of places that had to be replaced."""
    try:
        yield from ((text, 0) for text in column.to_pylist())
    except UnicodeDecodeError:
        column = column.dictionary_decode() if hasattr(column, "dictionary") else column
        yield from ((None, 0) if data is None else _decoded(data) for data in column.cast("large_binary").to_pylist())


def _pyarrow(path: Path, kind: str) -> Any:
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError(f"data {str(path)!r} is {kind}, which needs pyarrow: run `pip install pyarrow`") from None
    return pa
