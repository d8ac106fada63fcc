"""From text to tokens to batches.

``corpora`` finds documents, in files (``readers``) and in Hugging Face datasets (``hub``). ``tokenizer`` turns them into
ids, and ``encoding`` does so on all cores. ``shards`` is the file format. ``preparation`` turns a corpus into a folder of
shards, once (``manifest``, ``writing``, ``progress``). ``loader`` reads batches from it; ``windows`` decides which tokens and
in what order, and ``verification`` checks that no id is past the vocabulary. ``resolution`` puts them together: it turns
the value of ``--data`` into shards to train on. ``python -m fastgpt.data --help`` is the command.
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
    """Import the loader only when it is asked for: it imports torch, which the workers of a preparation do not need."""
    if name == "TokenLoader":
        from fastgpt.data.loader import TokenLoader

        return TokenLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
