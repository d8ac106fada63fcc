"""Where text comes from: the standard library's sources, the user's files, or a dataset of the Hugging Face hub.

A corpus is a stream of documents in an order that never changes, and every position in it can be written down. So ``prepare``
can repeat its work exactly, and continue exactly where it was interrupted.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fastgpt.common import UserError, first_line
from fastgpt.data.hub import HUB, HubCorpus, HubReading
from fastgpt.data.readers import (
    ALL_SUFFIXES,
    MARKUP,
    NAMED_SUFFIXES,
    TABLE_SUFFIXES,
    Document,
    NotText,
    cut_position,
    read_file,
)

STDLIB = "stdlib"
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
NOT_IN_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass
class FileCorpus:
    """An ordered list of files."""

    source: str
    """The name by which the user asked for it."""
    root: Path
    files: list[Path]
    text_column: str = "text"
    strict: bool = False
    """A file that cannot be decoded is an error instead of being skipped, since the user named it."""
    cut: int | None = None

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return sum(f.stat().st_size for f in self.files)

    def recipe(self) -> dict[str, Any]:
        """Everything that determines the documents, as JSON."""
        where = self.source if self.source == STDLIB else str(Path(self.source).expanduser().resolve())
        return {"source": where, "source_digest": self.digest(), "text_column": self.text_column}

    def digest(self) -> str:
        """A hash of names, sizes and times, since hashing 100 GB of text at every start would take too long. For the
        standard library it is version, names and sizes, so that a reinstalled interpreter finds its cache."""
        known = hashlib.sha256(platform.python_version().encode() if self.source == STDLIB else b"")
        for path in self.files:
            stat = path.stat()
            time = 0 if self.source == STDLIB else stat.st_mtime_ns
            known.update(os.fsencode(f"{path.relative_to(self.root).as_posix()}\0{stat.st_size}\0{time}\n"))
        return known.hexdigest()

    def split_by_position(self, val_fraction: float) -> int | None:
        """The byte at which a corpus of one single text is split in two; None for a corpus of documents."""
        only = self.files[0]
        if len(self.files) > 1 or only.name.endswith((*TABLE_SUFFIXES, *NAMED_SUFFIXES)):
            return None
        self.cut = cut_position(only, val_fraction)
        return self.cut

    def read(self, position: dict[str, Any] | None = None) -> FileReading:
        return FileReading(self, **(position or {}))


@dataclass
class FileReading:
    """A pass that has read all files before number ``file``, and ``row`` rows of that one."""

    corpus: FileCorpus
    file: int = 0
    row: int = 0
    undecoded: list[str] = field(default_factory=list)
    """Files that are no UTF-8 text."""
    nulls: int = 0
    """Rows of tables that hold no text."""
    replaced: int = 0
    """Places that are not UTF-8."""
    _offset: int = 0

    def __post_init__(self) -> None:
        self._before = [0, *accumulate(f.stat().st_size for f in self.corpus.files)]
        """Bytes of the files before each."""

    def __iter__(self) -> Iterator[Document]:
        corpus = self.corpus
        while self.file < len(corpus.files):
            path = corpus.files[self.file]
            try:
                for document in read_file(path, corpus.text_column, self.row, corpus.cut):
                    self.row += 1
                    self._offset = document.offset
                    if document.text:
                        yield document
                    self.nulls += document.missing
                    self.replaced += document.replaced
            except (NotText, OSError) as error:
                if corpus.strict:
                    raise UserError(f"data {str(path)!r} cannot be read as UTF-8 text: {first_line(error)}") from error
                self.undecoded = [*self.undecoded, path.relative_to(corpus.root).as_posix()]
            self.file, self.row, self._offset = self.file + 1, 0, 0

    def position(self) -> dict[str, Any]:
        """The position after the last document, as JSON; ``corpus.read(position)`` continues there."""
        return {name: getattr(self, name) for name in ("file", "row", "undecoded", "nulls", "replaced")}

    def done(self) -> float:
        """The share of the corpus that has been read, 0..1, for a progress bar."""
        return min(1.0, (self._before[self.file] + self._offset) / max(1, self._before[-1]))


Corpus = FileCorpus | HubCorpus
Reading = FileReading | HubReading
"""One pass over a corpus: an iterator that knows its position."""


def open_corpus(
    source: str | os.PathLike[str],
    *,
    text_column: str = "text",
    config_name: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Corpus:
    """The corpus that ``source`` names.

    Args:
        source: ``"stdlib"``; a text, ``.jsonl`` (also ``.gz``, ``.zst``) or ``.parquet`` file, or a folder of those; a
            ``.json``, ``.csv`` or ``.tsv`` file; if there is no such file, a dataset of the Hugging Face hub. ``hf:NAME`` is
            always opened by the datasets library.
        text_column: the field of a JSON line, or the column of a table, that holds the text.
        config_name, split, revision: of a Hugging Face dataset.

    Raises:
        UserError: the source does not exist or is empty.
    """
    if is_hub_name(source):
        return HubCorpus(str(source).removeprefix(HUB), config_name, split, text_column, revision)
    path = Path(source).expanduser()
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        corpus = FileCorpus(STDLIB, root, _walk(root, (".py",), without=NOT_IN_STDLIB))
    elif path.is_dir():
        corpus = FileCorpus(str(source), path, _walk(path, ALL_SUFFIXES), text_column)
    elif path.is_file():
        if path.name.lower().endswith(MARKUP):
            raise UserError(
                f"data {str(source)!r} holds its text among other things ({path.suffix}): take the text out of it first, as "
                ".txt or .jsonl"
            )
        corpus = FileCorpus(str(source), path.parent, [path], text_column, strict=True)
    else:
        raise UserError(f"data {str(source)!r} does not exist: it must be 'stdlib', or a file or folder of text")
    if config_name is not None:
        raise UserError(f"config_name is {config_name!r}, and data {str(source)!r} is not a hub dataset: leave it out")
    if not corpus.files:
        raise UserError(
            f"data {str(source)!r} is a folder without text: it must hold files that end in {' '.join(ALL_SUFFIXES)} "
            f"(a {' '.join(NAMED_SUFFIXES)} file is read where it is named itself)"
        )
    if corpus.size == 0:
        raise UserError(f"data {str(source)!r} is empty: it must hold text")
    return corpus


def is_hub_name(source: str | os.PathLike[str]) -> bool:
    """``hf:...``; or ``owner/name`` or ``name`` if there is no such file and no ending that suggests a file."""
    if not isinstance(source, str) or source == STDLIB:
        return False
    if source.startswith(HUB):
        return True
    looks_so = HUB_NAME.fullmatch(source) and not source.endswith((*ALL_SUFFIXES, *NAMED_SUFFIXES, *MARKUP, ".bin"))
    return bool(looks_so) and not Path(source).exists()


def _walk(root: Path, suffixes: tuple[str, ...], without: frozenset[str] = frozenset()) -> list[Path]:
    """Files below root, sorted; folders named in ``without`` are not entered (site-packages can be huge)."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in without]
        found += [Path(folder, name) for name in names if name.endswith(suffixes)]
    return sorted(f for f in found if f.is_file())
