"""Text to tokens to batches.

``corpora`` finds documents, ``tokenizer`` turns them into ids, ``shards`` is the file format, ``preparation`` makes a
folder of shards out of a corpus once, ``loader`` reads batches from it. ``resolution`` puts them together: what
``--data`` names becomes shards to train on.
"""

from __future__ import annotations

from fastgpt.data.corpora import Corpus, documents, open_corpus
from fastgpt.data.loader import TokenLoader
from fastgpt.data.preparation import prepare
from fastgpt.data.resolution import ResolvedData, resolve
from fastgpt.data.shards import check_ids, open_shard, write_shard
from fastgpt.data.tokenizer import Tokenizer, get_tokenizer

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
