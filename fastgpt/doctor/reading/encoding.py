"""Text as people's machines write it (UTF-8, PowerShell's UTF-16, colours, any line end), as lines of UTF-8 bytes.

A log can be larger than memory: it is streamed, a block at a time.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 20
"""Bytes read at a time, and the longest line that stays whole."""

_ANSI = re.compile(
    rb"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours, cursor movements
    rb"|\][^\x07\x1b]*(?:\x07|\x1b\\)"  # window titles, links
    rb"|[@-Z\\-_])"
)
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b")) + b"\x7f"


def encoding_of(head: bytes) -> str:
    """The codec of a text that starts with ``head``: UTF-16 by its mark, or by a zero in every second byte; else UTF-8."""
    if head.startswith(codecs.BOM_UTF16_LE) or (head[:400:2].count(0) == 0 and _mostly_zero(head[1:400:2])):
        return "utf-16-le"
    if head.startswith(codecs.BOM_UTF16_BE) or (head[1:400:2].count(0) == 0 and _mostly_zero(head[:400:2])):
        return "utf-16-be"
    return "utf-8"


def is_text(head: bytes) -> bool:
    """Whether bytes read as text: less than a fifth control characters or broken UTF-8 (or UTF-16)."""
    text = head.decode(encoding_of(head), "replace")
    encoded = text.encode("utf-8", "replace")
    bad = text.count("\ufffd") + len(encoded) - len(encoded.translate(None, _CONTROL))
    return bad * 5 <= len(text)


def decode(data: bytes) -> str:
    """A whole small file as text with \\n line ends; invalid bytes become U+FFFD."""
    text = data.decode(encoding_of(data), "replace").lstrip("\ufeff")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def blocks(path: Path) -> Iterator[bytes]:
    """A file's text in blocks of about a megabyte that end where a line ends, colours removed. Raises OSError.

    Only \\n ends a line (as grep -n counts): a progress bar's carriage returns, and Windows' own, stay in it. A "line" past
    ``BLOCK`` bytes is cut."""
    with open(path, "rb") as file:
        codec = encoding_of(file.read(1024))
        to_text = None if codec == "utf-8" else codecs.getincrementaldecoder(codec)("replace")
        file.seek(0)
        rest, first = b"", True
        while block := file.read(BLOCK):
            if to_text is not None:
                block = to_text.decode(block).encode("utf-8", "replace")
            if first:
                block, first = block.removeprefix(codecs.BOM_UTF8), False
            block = rest + block
            if b"\x1b" in block:
                block = _ANSI.sub(b"", block)
            end = block.rfind(b"\n") + 1 or (len(block) if len(block) > BLOCK else 0)
            block, rest = block[:end], block[end:]
            if block:
                yield block
        if rest:
            yield rest


def _mostly_zero(data: bytes) -> bool:
    return len(data) > 0 and data.count(0) * 10 >= len(data) * 9
