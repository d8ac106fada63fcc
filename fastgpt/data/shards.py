"""Token files: the shard format of llm.c and modded-nanogpt, and nanoGPT's headerless files.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros) and then the tokens as little-endian uint16.
(The header is handled as unsigned, which is the same up to 2**31 tokens and also allows files of 4 to 8 GiB.)
nanoGPT's ``train.bin`` is the tokens alone. The two cannot be confused: read as two tokens, the magic number begins with
55448, which is not a GPT-2 id.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fastgpt.common import UserError

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
OTHER_MAGICS = {20240522: "an evaluation file of llm.c", 20240801: "a 32-bit token file of llm.c (Llama 3)"}
CHUNK = 1 << 24
"""Tokens processed at a time: 32 MiB."""


def header(count: int) -> bytes:
    """The 1024 bytes before ``count`` tokens."""
    words = np.zeros(256, "<u4")
    words[:3] = MAGIC, VERSION, count
    return words.tobytes()


def open_shard(path: str | os.PathLike[str]) -> np.memmap:
    """The tokens of a shard or of a headerless file, uint16, memory-mapped read-only.

    Raises:
        UserError: the file is missing, empty, truncated, longer than its header says, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {str(path)!r} does not exist")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"data file {str(path)!r} is empty: it must hold uint16 tokens")
    with path.open("rb") as file:
        start = file.read(12)
    magic, version, count = np.frombuffer(start.ljust(12, b"\0"), "<u4").tolist()
    if magic in OTHER_MAGICS:
        raise UserError(f"data file {str(path)!r} is {OTHER_MAGICS[magic]}: it must be a uint16 shard ({MAGIC})")
    if magic != MAGIC:
        if size % 2:
            raise UserError(f"data file {str(path)!r} has {size} bytes, an odd number: uint16 tokens take two each")
        return np.memmap(path, "<u2", mode="r")
    if size < HEADER_BYTES:
        raise UserError(f"data file {str(path)!r} is truncated: {size} bytes, and the header alone has {HEADER_BYTES}")
    if version != VERSION:
        raise UserError(f"data file {str(path)!r} has shard version {version}: it must be {VERSION}")
    if size != HEADER_BYTES + 2 * count:
        what = "truncated" if size < HEADER_BYTES + 2 * count else "too long"
        raise UserError(
            f"data file {str(path)!r} is {what}: its header says {count} tokens, {HEADER_BYTES + 2 * count} bytes, "
            f"and it has {size} bytes"
        )
    if count == 0:
        raise UserError(f"data file {str(path)!r} holds no tokens")
    return np.memmap(path, "<u2", mode="r", offset=HEADER_BYTES)


def check_ids(tokens: np.ndarray, vocab_size: int, path: str | os.PathLike[str]) -> None:
    """Raises UserError with the first id past the vocabulary and its position."""
    for start in range(0, len(tokens), CHUNK):
        chunk = np.asarray(tokens[start : start + CHUNK])
        if chunk.max() >= vocab_size:
            at = int((chunk >= vocab_size).argmax())
            raise UserError(
                f"data file {str(path)!r} holds the id {int(chunk[at])} at token {start + at}, and vocab_size is "
                f"{vocab_size}: every id must be below it (was it made with another tokenizer?)"
            )
