"""The letters of nanoGPT's character datasets: ``meta.pkl`` beside train.bin and val.bin, ``{vocab_size, itos, stoi}``.

A pickle is a program. This one is taken apart instead of run (pickletools): only what builds strings, whole numbers, lists
and dictionaries may be in it, so nothing is imported, called or made larger than the file says.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any, NoReturn

from fastgpt.common import UserError, open_file

META = "meta.pkl"
LARGEST_FILE = 1 << 21
"""Bytes of the largest meta.pkl that is read: 65,536 letters take 1.5 MB."""
MOST = 1 << 16
"""Letters whose ids fit uint16."""
_PLAIN = {
    *("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "EMPTY_LIST", "SETITEM", "SETITEMS", "APPEND", "APPENDS"),
    *("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
}
"""Opcodes that build plain values, or refer to what was built."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_letters(path: Path) -> list[str]:
    """The letters of a ``meta.pkl`` by id. Raises UserError for anything but that."""
    meta = _load(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    stoi = meta.get("stoi") if isinstance(meta, dict) else None
    if itos is None and isinstance(stoi, dict) and all(type(number) is int for number in stoi.values()):
        itos = {number: letter for letter, number in stoi.items()}
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))):
        raise UserError(f"{path} has no table itos of one letter for each id: it is not nanoGPT's")
    letters = [itos[number] for number in range(len(itos))]
    check_letters(letters, str(path))
    said = meta.get("vocab_size", len(letters))
    if said != len(letters) or (stoi is not None and stoi != {letter: i for i, letter in itos.items()}):
        raise UserError(f"{path} contradicts itself: its vocab_size, itos and stoi are not of the same letters")
    return letters


def check_letters(letters: Any, source: str) -> None:
    """Raise UserError, which begins with ``source``, unless these are the letters of a vocabulary, by id."""
    if not isinstance(letters, list) or not all(isinstance(letter, str) and letter for letter in letters):
        raise UserError(f"{source} has a vocabulary that is not a list of letters")
    if not 2 <= len(letters) <= MOST or len(set(letters)) < len(letters):
        raise UserError(f"{source} has a vocabulary of {len(letters)} letters: it must have 2 to {MOST}, no two alike")


def _load(path: Path) -> Any:
    with open_file(path) as file:
        content = file.read(LARGEST_FILE + 1)
    try:
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE / 1e6:.0f} MB")
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name not in _PLAIN:
                raise ValueError(f"it holds more than strings, whole numbers and tables ({opcode.name})")
            if opcode.name == "LONG_BINPUT" and int(argument or 0) > len(content):  # would reserve memory for as many
                raise ValueError("it counts more objects than it has bytes")
        return _Plain(io.BytesIO(content)).load()
    except Exception as error:  # damage shows as ValueError, UnpicklingError, EOFError, IndexError, TypeError, ...
        why = str(error) or type(error).__name__
        raise UserError(f"{path} is not read, {why}: nanoGPT's holds its letters") from error
