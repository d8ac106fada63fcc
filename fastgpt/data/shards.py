"""Token files: the shard format of llm.c and modded-nanogpt, nanoGPT's headerless files, and build-nanogpt's NumPy arrays.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros) and then the tokens as little-endian uint16.
(The header is handled as unsigned, which is the same up to 2**31 tokens and also allows files of 4 to 8 GiB.)
nanoGPT's ``train.bin`` is the tokens alone. The two cannot be confused: read as two tokens, the magic number begins with
55448, which is not a GPT-2 id. An ``.npy`` file holds one row of uint16.
"""

from __future__ import annotations

import codecs
import os
from pathlib import Path

import numpy as np

from fastgpt.common import UserError, first_line, kind_of_file

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 256 * 4
OTHER_MAGICS = {20240522: "an evaluation file of llm.c", 20240801: "a 32-bit token file of llm.c (Llama 3)"}
SUFFIXES = (".bin", ".npy")
CHUNK = 1 << 24
"""Tokens processed at a time: 32 MiB."""
_TEXT_BYTES = 64
"""Bytes that, if all of them are letters, are text: two letters together are an id that GPT-2 has, too."""


def shards_in(folder: Path, side: str = "") -> list[Path]:
    """The token files of a folder, sorted: all of them, or those of the side "train" or "val". [] if it is not a folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if side in path.name and path.suffix in SUFFIXES and not path.is_dir()
    )


def header(count: int) -> bytes:
    """The 1024 bytes before ``count`` tokens."""
    words = np.zeros(256, "<u4")
    words[:3] = MAGIC, VERSION, count
    return words.tobytes()


def open_shard(path: str | os.PathLike[str]) -> np.memmap:
    """The tokens of a shard or of a headerless file, uint16, memory-mapped read-only.

    Raises:
        UserError: the file is missing, empty, truncated, longer than its header says, or of another format, which is named.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"data file {str(path)!r} {'is not a regular file' if path.exists() else 'does not exist'}")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"data file {str(path)!r} is empty: it must hold uint16 tokens")
    kind = kind_of_file(path)
    if path.suffix == ".npy" and (kind is None or "NumPy" in kind):
        return _open_array(path)
    with path.open("rb") as file:
        start = file.read(4096)
    if kind is None and len(start) >= _TEXT_BYTES and _is_text(start):
        kind = "text: run python -m fastgpt.data prepare on it"
    if kind is not None:
        raise UserError(f"data file {str(path)!r} holds no tokens, it is {kind}")
    magic, version, count = np.frombuffer(start[:12].ljust(12, b"\0"), "<u4").tolist()
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


def _open_array(path: Path) -> np.memmap:
    """The tokens of a NumPy file. Nothing in it is executed."""
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"data file {str(path)!r} cannot be read as a NumPy array: {first_line(error)}") from error
    if tokens.dtype != np.dtype("<u2") or tokens.ndim != 1:
        raise UserError(
            f"data file {str(path)!r} holds {tokens.dtype} of shape {tokens.shape}: it must be one row of uint16, such as "
            "tokens.astype(np.uint16)"
        )
    if not len(tokens):
        raise UserError(f"data file {str(path)!r} holds no tokens")
    return tokens


def _is_text(start: bytes) -> bool:
    """Whether bytes are UTF-8 without control characters; the last character may be cut."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\t\n\r" for c in text)


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
