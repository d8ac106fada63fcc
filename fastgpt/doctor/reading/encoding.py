"""Text as people's machines write it: UTF-8, or PowerShell's UTF-16, with any line end."""

from __future__ import annotations

import codecs

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
    """A whole file as text, Windows' line ends as \\n; invalid bytes become U+FFFD."""
    return data.decode(encoding_of(data), "replace").lstrip("\ufeff").replace("\r\n", "\n")


def _mostly_zero(data: bytes) -> bool:
    return len(data) > 0 and data.count(0) * 10 >= len(data) * 9
