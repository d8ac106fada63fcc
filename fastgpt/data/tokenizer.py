"""Three tokenizers: GPT-2's byte-pair encoding through tiktoken, plain bytes for models too small for 50257 ids, and the
letters of a character dataset.

tiktoken would download GPT-2's vocabulary. It lies here instead (gpt2/vocab.bpe.gz, OpenAI's licence beside it) and has the
sha256 that tiktoken expects, so the ids are the same, on machines without a network, too.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastgpt.common import UserError, unknown
from fastgpt.data.letters import check_letters

if TYPE_CHECKING:
    import tiktoken

NAMES = ("gpt2", "bytes")
"""Tokenizers that are the same everywhere."""
CHARS = "chars"
SIZES = {"gpt2": 50257, "bytes": 256}
MERGES = Path(__file__).parent / "gpt2" / "vocab.bpe.gz"
MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
"""Hash of the unpacked file, which is the one that tiktoken checks."""
END_OF_TEXT = "<|endoftext|>"


class BytesTokenizer:
    """The ids are the UTF-8 bytes. Byte 0, which does not occur in text, separates documents."""

    name = "bytes"
    vocab_size = 256
    eot = 0
    """The id that separates documents."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint16 ids of many texts, on one core. Long work releases the GIL."""
        return [np.frombuffer(t.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text. Ids past the vocabulary (rows that pad a model's embedding) are left out."""
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class GPT2Tokenizer:
    """GPT-2's BPE. ``<|endoftext|>`` in a text is ordinary text; only the id ``eot`` separates documents."""

    name = "gpt2"
    vocab_size = 50257
    eot = 50256

    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self.encoding = encoding

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode_array(text) for text in texts]

    def _encode_array(self, text: str) -> np.ndarray:
        try:  # makes no Python int per token: a fifth faster, and holds the GIL for less time
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:  # half a surrogate pair, which only encode_ordinary replaces
            return np.array(self.encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


class CharTokenizer:
    """One id for each letter of a list, as nanoGPT's character datasets have it. No id separates documents."""

    name = CHARS
    eot = None

    def __init__(self, letters: list[str], source: str = "the tokenizer") -> None:
        check_letters(letters, source)
        self.letters = letters
        self.vocab_size = len(letters)
        self._ids = {letter: i for i, letter in enumerate(letters)}

    def encode(self, text: str) -> list[int]:
        """Raises UserError for a letter that the vocabulary does not have."""
        for letter in text:
            if letter not in self._ids:
                some = "".join(sorted(one for one in self.letters if len(one) == 1 and one.isprintable()))[:80]
                raise UserError(
                    f"the text has {letter!r}, which is none of the {self.vocab_size} letters that the model knows: {some}"
                )
        return [self._ids[letter] for letter in text]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), np.uint16) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.letters[i] for i in ids if 0 <= i < self.vocab_size)


Tokenizer = BytesTokenizer | GPT2Tokenizer | CharTokenizer


@lru_cache
def get_tokenizer(name: str) -> Tokenizer:
    """``"gpt2"`` or ``"bytes"``.

    Raises:
        UserError: the name is neither, or the file with GPT-2's vocabulary is damaged.
    """
    if name == CHARS:
        raise UserError(
            "tokenizer is 'chars', whose letters are those of a folder with nanoGPT's meta.pkl: give it as data"
        )
    if name == "bytes":
        return BytesTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer(_gpt2_encoding())
    raise UserError(unknown("tokenizer", name, NAMES))


def _gpt2_encoding() -> tiktoken.Encoding:
    """As in tiktoken_ext.openai_public, whose pattern means what GPT-2's does and is faster."""
    import tiktoken

    byte_of, vocabulary = byte_letters(), gpt2_vocabulary()
    end = vocabulary.pop(END_OF_TEXT)
    return tiktoken.Encoding(
        "gpt2",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks={bytes(byte_of[c] for c in token): i for token, i in vocabulary.items()},
        special_tokens={END_OF_TEXT: end},
        explicit_n_vocab=GPT2Tokenizer.vocab_size,
    )


def gpt2_merges() -> str:
    """GPT-2's vocab.bpe, a line for each merge. Raises UserError for a damaged file."""
    try:
        content = gzip.decompress(MERGES.read_bytes())
    except (OSError, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != MERGES_SHA256:
        raise UserError(f"{MERGES} is not GPT-2's vocabulary as it was installed: install fastgpt again")
    return content.decode()


def gpt2_vocabulary() -> dict[str, int]:
    """GPT-2's encoder.json, in its order: bytes as letters, what each merge makes, the end of text. Raises UserError."""
    merged = [line.replace(" ", "") for line in gpt2_merges().splitlines()[1:]]
    return {token: i for i, token in enumerate([*byte_letters(), *merged, END_OF_TEXT])}


def byte_letters() -> dict[str, int]:
    """{letter: byte}, as GPT-2's files write every byte as one printable character: itself if it is printable, else the next
    code point from 256 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
