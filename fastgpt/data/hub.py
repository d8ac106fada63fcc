"""A dataset of the Hugging Face hub as a corpus. It is streamed: documents are tokenised as they arrive, and only the
tokens are kept.

The revision (a commit of the dataset's repository) is fixed when a preparation begins and recorded in its manifest, so
a preparation that continues a day later reads the same data, whatever was uploaded in between.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.common import UserError, first_line
from fastgpt.data.readers import Document

HUB = "hf:"


@dataclass
class HubCorpus:
    """``name`` is a dataset on the hub, or a local folder that the datasets library can read."""

    name: str
    config_name: str | None = None
    split: str = "train"
    text_column: str = "text"
    revision: str | None = None
    size = None
    """Its bytes are not known."""

    def __post_init__(self) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"data {self.name!r} is not a file or folder here; for a Hugging Face dataset run `pip install datasets`"
            ) from None
        self._datasets = datasets
        if self._is_local():
            self.revision = _digest_of(Path(self.name))
        elif self.revision is None:
            self.revision = _newest_revision(self.name)

    @property
    def source(self) -> str:
        return HUB + self.name

    def recipe(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "config_name": self.config_name,
            "source_split": self.split,
            "text_column": self.text_column,
            "revision": self.revision,
        }

    def split_by_position(self, val_fraction: float) -> None:
        return None

    def read(self, position: dict[str, Any] | None = None) -> HubReading:
        return HubReading(self, self._open(), position)

    def _is_local(self) -> bool:
        return os.path.exists(self.name)

    def _open(self) -> Any:
        try:
            return self._datasets.load_dataset(
                self.name,
                name=self.config_name,
                split=self.split,
                streaming=True,
                revision=None if self._is_local() else self.revision,
            )
        except Exception as error:
            # The library's ValueErrors list the configs or splits that exist, on several lines.
            what = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"data {self.source!r} cannot be opened: {what[:400]}") from error


class HubReading:
    def __init__(self, corpus: HubCorpus, stream: Any, position: dict[str, Any] | None) -> None:
        self.corpus, self.stream = corpus, stream
        self.count = 0
        """Rows read so far, including those before an interruption."""
        self.nulls = 0
        """Rows among them whose text is null."""
        self._state: dict[str, Any] | None = None
        if position is not None:
            self.count, self._state = position["row"], position["state"]
            self.nulls = position.get("nulls", 0)
            stream.load_state_dict(self._state)
        splits = stream.info.splits
        self._total = splits[corpus.split].num_examples if splits and corpus.split in splits else None

    def __iter__(self) -> Iterator[Document]:
        column, source = self.corpus.text_column, self.corpus.source
        rows = iter(self.stream)
        try:
            for row in rows:
                self.count += 1
                self._state = None  # from here on the stream itself knows its state
                if column not in row:
                    raise UserError(
                        f"data {source!r} has no column {column!r}, only {', '.join(row)}: name the one that holds the "
                        "text with --text-column"
                    )
                text = row[column]
                if text is not None and not isinstance(text, str):
                    raise UserError(
                        f"data {source!r} row {self.count}: column {column!r} must hold strings, not {type(text).__name__}"
                    )
                if text:
                    yield Document(text)
                self.nulls += text is None
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the stream of {source!r} broke after {self.count} rows ({type(error).__name__}: {first_line(error)}): "
                "give the same command again to continue"
            ) from error
        finally:
            rows.close()

    def position(self) -> dict[str, Any]:
        return {"row": self.count, "nulls": self.nulls, "state": self._state or self.stream.state_dict()}

    def done(self) -> float | None:
        return min(1.0, self.count / self._total) if self._total else None


def _newest_revision(name: str) -> str | None:
    """The newest commit of the dataset on the hub. This is also the quick way to find out that there is no network:
    loading the dataset would try for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    here = f"data {name!r} is not a file or folder here"
    try:
        return HfApi().dataset_info(name, timeout=20).sha
    except GatedRepoError as error:
        raise UserError(f"data {name!r} needs your consent on huggingface.co, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{here}, and the Hugging Face hub has no public dataset of that name (for a private one: `hf auth login`)"
        ) from error
    except Exception as error:
        raise UserError(
            f"{here}, and the Hugging Face hub cannot be asked for a dataset of that name "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _digest_of(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder.is_dir() else [folder]
    known = hashlib.sha256()
    for path in files:
        stat = path.stat()
        known.update(os.fsencode(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"))
    return known.hexdigest()
