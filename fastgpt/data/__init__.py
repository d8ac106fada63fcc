"""Text to tokens to batches.

``corpora`` finds documents (``readers``: in files, ``hub``: of Hugging Face datasets), ``tokenizer`` turns them into
ids, ``encoding`` does so on all cores, ``shards`` is the file format, ``preparation`` makes a folder of shards out of a
corpus once (``manifest``, ``writing``, ``progress``); ``loader`` reads batches from it (``windows``: which and in what order,
``verification``: that no id is past the vocabulary). ``resolution`` puts them together: what ``--data`` names becomes
shards to train on. ``python -m fastgpt.data --help`` is the command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastgpt.data.corpora import Corpus, documents, open_corpus
from fastgpt.data.preparation import prepare
from fastgpt.data.resolution import ResolvedData, resolve
from fastgpt.data.shards import check_ids, open_shard, write_shard
from fastgpt.data.tokenizer import Tokenizer, get_tokenizer

if TYPE_CHECKING:
    from fastgpt.data.loader import TokenLoader

__all__ = [
    "Corpus",
    "ResolvedData",
    "TokenLoader",
    "Tokenizer",
    "check_ids",
    "documents",
    "get_tokenizer",
    "open_corpus",
    "open_shard",
    "prepare",
    "resolve",
    "write_shard",
]


def __getattr__(name: str) -> Any:
    """The loader brings torch, which the workers of a preparation do without."""
    if name == "TokenLoader":
        from fastgpt.data.loader import TokenLoader

        return TokenLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
