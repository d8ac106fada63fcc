"""What every part of the package may use: the exception for bad input, files that are whole or absent, how a command ends."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class UserError(Exception):
    """The input is wrong, not the program: one sentence naming the field, the value and what would be right. Commands print
    it and exit with 2."""


def first_line(error: BaseException, limit: int = 200) -> str:
    """An exception's message, short enough to be part of one sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= limit else text[: limit - 3] + "..."


# ---------------------------------------------------------------- files


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to that takes the place of ``path`` at the end. Readers see the old file or the new one; after
    an exception or a kill, the old one is still there. Its content is on the disk before it is renamed. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two processes do not write the same one
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, as ``atomic_file`` does, and make the new name durable. Makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())
    sync_folder(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """``write_whole`` of a JSON object."""
    write_whole(path, json.dumps(value, indent=2))


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file or it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` durable: a file's own fsync does not. Windows cannot, and does not need it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- commands


def run(main: Callable[[list[str]], int]) -> None:
    """Run a command on the command line's arguments and exit: with its code, 2 and one sentence for bad input, 130 for a
    second Ctrl-C, 141 in silence (as SIGPIPE would end it) when what reads the output has gone: ``fastgpt plan | head``."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def report(error: UserError) -> None:
    """Print the one sentence."""
    from rich.console import Console  # only a command that fails needs it
    from rich.markup import escape

    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[bold red]error:[/] {escape(str(error))}")
