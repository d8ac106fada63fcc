"""What every part of the package may use: the exception for bad input, files that are whole or absent, numbers as people
read them, how a command ends."""

from __future__ import annotations

import codecs
import difflib
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from decimal import Decimal
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, BinaryIO

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class UserError(Exception):
    """The input is wrong, not the program: one sentence naming the field, the value and what would be right. Commands print
    it and exit with 2."""


def first_line(error: BaseException) -> str:
    """An exception's message, short enough to be part of one sentence."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."


_NO_ROOM = (
    "out of memory",  # CUDA and Triton's launcher; torch.compile, which wraps either in an error of its own
    "STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN: a handle, a workspace
    "STATUS_NOT_INITIALIZED when calling `cublasCreate",  # a handle, on a card that is almost full
    "DefaultCPUAllocator",  # PyTorch's, which raises for this reason alone
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice. PyTorch's allocators, CUDA (pinning memory, loading a kernel) and
    libraries (workspaces) each say so in words of their own; only the first have a class of their own."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_ROOM)
    )


LARGEST = 2**63 - 1
"""The largest number that an option, a setting or a field of a file can have: what PyTorch and NumPy take as a size."""


def at_least(least: float, **values: float | None) -> None:
    """Raise UserError for the first value below ``least``, and for one that is not finite or above LARGEST. None, for what is
    not given, passes."""
    for name, value in values.items():
        if value is None or least <= value <= LARGEST:
            continue
        if value > LARGEST:
            raise UserError(f"{name} is {shortened(value)}: it must be finite and below 2^63")
        raise UserError(
            f"{name} is {shortened(value)}: it must {f'be at least {least:g}' if least else 'not be negative'}"
        )


def within(interval: str, **values: float | None) -> None:
    """Raise UserError for the first value outside of ``interval``: "[0, 1)" has 0 in it and 1 not. None passes."""
    low, high = map(float, interval[1:-1].split(","))
    for name, value in values.items():
        inside = value is None or low < value < high or (value == low and interval[0] == "[")
        if not (inside or (value == high and interval[-1] == "]")):
            raise UserError(f"{name} is {shortened(value)}: it must lie in {interval}")


_NUMBER = re.compile(r"([+-]?(?:\d+(?:_\d+)*\.?\d*|\.\d+)(?:e[+-]?\d{1,4})?)([kmbt]?)", re.IGNORECASE)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(,\d{3})+")


def number(text: str, whole: bool) -> float | None:
    """A number as people write it: 524288, 524,288 (``whole`` ones only), 10_000, 5e4, 1e-3, 300M, 2.5B. None for anything
    else, a fraction where ``whole`` is asked for, and what is not finite or above LARGEST."""
    text = text.strip()
    if whole and _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    match = _NUMBER.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        return None
    value = Decimal(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}[match[2].lower()]
    if not whole:
        return float(value) if abs(float(value)) < float("inf") else None
    return int(value) if abs(value) <= LARGEST and value == int(value) else None


def shortened(value: object, most: int = 60) -> str:
    """A value as part of a sentence."""
    text = f"a number of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 2**200 else str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A sentence for a name that does not exist: the nearest that does, and all there are."""
    names = list(known)
    return f"{what} is {name!r}{nearest(name, names)}: it can be {', '.join(names)}"


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """ " (did you mean 'this'?)", or "" if nothing is that much alike."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return f" (did you mean {close[0]!r}?)" if close else ""


# ---------------------------------------------------------------- files


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/fastgpt, or ~/.cache/fastgpt."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastgpt"


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


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that is named ``path`` at the end, which must be free or an empty folder. Made under a name of its own
    beside it, so that nothing of others is touched; after an exception it is gone, a kill leaves it there. Raises OSError."""
    path = path.absolute()
    work = path.with_name(f"{path.name}.{os.getpid()}.partial")
    work.mkdir(parents=True)
    try:
        yield work
        if path.is_dir():
            path.rmdir()
        work.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, as ``atomic_file`` does, and make the new name durable. Makes the folder. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(text.encode())
    sync_folder(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """``write_whole`` of a JSON object."""
    write_whole(path, json.dumps(value, indent=2))


LARGEST_TEXT = 1 << 26
"""Bytes of the largest file that is read as a whole: a checkpoint's tables take a few kilobytes for each layer."""


_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: run git lfs pull where it was cloned",
    b"\x93NUMPY": "a NumPy array: let its name end in .npy",
    b"PAR1": "a parquet table",
    b"PK\x03\x04": "a zip archive, or what torch.save wrote",
    b"\x1f\x8b\x08": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"GGUF": "a model of llama.cpp (GGUF)",
    b"%PDF-": "a PDF document",
}


def kind_of_file(path: Path) -> str | None:
    """What a file is by its first bytes, as part of a sentence, where it is one that people take for another; else None.
    Raises OSError."""
    with open_file(path) as file:
        head = file.read(512)
    for beginning, kind in _BEGINNINGS.items():
        if head.startswith(beginning):
            return kind
    if head.removeprefix(codecs.BOM_UTF8).lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page: the download failed, or the address was that of a page about it"
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < LARGEST_TEXT:
        return "a safetensors file"
    return None


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises OSError for anything else: a FIFO would wait forever, a device never ends."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(0, "it is not a regular file", str(path))
    return open(path, "rb")


def read_text(path: Path, name: str = "file") -> str:
    """A text file of at most LARGEST_TEXT bytes: UTF-8, or UTF-16 with a byte-order mark (PowerShell's). Raises UserError,
    which calls it ``name``, for any other and for what cannot be read."""
    try:
        with open_file(path) as file:
            data = file.read(LARGEST_TEXT + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise UserError(f"{name} {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > LARGEST_TEXT:
        raise UserError(f"{name} {path} is larger than {LARGEST_TEXT / 1e6:.0f} MB: it is no {name}")
    marked = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if marked else "utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} {path} is damaged or not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def load_json(path: Path, name: str = "file") -> Any:
    """The JSON in a file. Raises UserError, which calls it ``name``, for a file that cannot be read or holds something else."""
    try:
        return json.loads(read_text(path, name))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} {path} is damaged: it is not JSON") from error


def load_toml(path: Path, name: str = "file") -> dict[str, Any]:
    """The table in a TOML file. Raises UserError as ``load_json`` does."""
    return parse_toml(read_text(path, name), f"{name} {path}")


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """``tomllib.loads`` that raises UserError, for nesting and numbers that Python refuses as well."""
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UserError(f"{name} is not valid TOML: it is nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError is one, and a number of 5,000 digits raises another
        raise UserError(f"{name} is not valid TOML: {first_line(error)}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is no such file or it holds anything else."""
    try:
        value = load_json(path)
    except UserError:
        return None
    return value if isinstance(value, dict) else None


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def packaged_toml(package: str, name: str) -> dict[str, Any]:
    """A TOML file of ours, which lies beside the modules of ``package``."""
    return tomllib.loads((files(package) / name).read_text(encoding="utf-8"))


def why_unwritten(error: OSError, folder: Path) -> str:
    """What kept a file in ``folder`` from being written, as part of a sentence."""
    if not os.path.exists(folder):
        return f"{folder} is gone: it was deleted or moved away"
    if error.errno != errno.ENOSPC:
        return f"{error.filename or folder}: {error.strerror or error}"
    with suppress(OSError, AttributeError):  # Windows has no statvfs, and no inodes
        space = os.statvfs(folder)
        if space.f_files and not space.f_favail:
            return f"the file system of {folder} has no inodes left: it holds too many files"
    with suppress(OSError):
        return f"the disk of {folder} is full ({gigabytes(shutil.disk_usage(folder).free, 2)} free)"
    return f"the disk of {folder} is full"


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` durable: a file's own fsync does not. Windows cannot, and does not need it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- numbers as people read them


def rounded(number: float, letters: str = "kMBT", gap: str = "") -> str:
    """A count in three digits, with a letter per thousand: 950, 12.3k, 5.2M, 1.3B. "kMGT" and a blank are for units:
    "1.3 G" + "FLOP"."""
    for exponent, letter in reversed(list(enumerate(letters, 1))):
        scale = 1000.0**exponent
        if number >= 0.9995 * scale:  # less would round to 1000 of the smaller unit
            return f"{number / scale:.3g}{gap}{letter}"
    return f"{number:.3g}{gap}"


def millions(parameters: float) -> str:
    """Parameters as nanoGPT prints them: 123.59M; of a tiny model 3.5k, not 0.00M."""
    return f"{parameters / 1e6:.2f}M" if parameters >= 1e5 else rounded(parameters)


def gigabytes(size: float, digits: int = 1) -> str:
    """Bytes in GB of 1e9 bytes: 5.2 GB."""
    return f"{size / 1e9:.{digits}f} GB"


def teraflops(rate: float) -> str:
    """FLOP per second: 58.3 TFLOP/s."""
    return f"{rate / 1e12:.1f} TFLOP/s"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1: 12.9%; "n/a" for one that is not known."""
    return "n/a" if share is None else f"{100 * share:.{digits}f}%"


def duration(seconds: float) -> str:
    """8 s, 14 min, 3 h 5 min."""
    minutes = int(seconds / 60 + 0.5)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


# ---------------------------------------------------------------- commands


@contextmanager
def importing() -> Iterator[None]:
    """For imports that take seconds: Ctrl-C ends the process at once and in silence, where an exception would end in the middle
    of some module, or be swallowed there. In the main thread."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    yield
    signal.signal(signal.SIGINT, before)


def run(main: Callable[[list[str]], int]) -> None:
    """Run a command on the command line's arguments and exit: with its code, 2 and one sentence for bad input, for a file that
    cannot be read or written and for memory that does not suffice, 130 for Ctrl-C, 141 in silence (as SIGPIPE would end it)
    when what reads the output has gone: ``fastgpt plan | head``. Any other exception is a bug, and keeps its traceback."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
        sys.exit(code)
    except UserError as error:
        report(error)
        sys.exit(2)
    except KeyboardInterrupt:
        with suppress(OSError):
            sys.stdout.flush()
        # An orderly end, which waits for no thread for long, nor prints the next Ctrl-C's traceback.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        last = threading.Timer(2, os._exit, (130,))
        last.daemon = True
        last.start()
        sys.exit(130)
    except BrokenPipeError:
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None:
            raise
        report(UserError(f"{error.filename} cannot be read or written: {error.strerror}"))
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        why = first_line(error).split(". ")[0]
        report(UserError(f"memory does not suffice ({why}): end what else uses it, or take a smaller model or batch"))
        sys.exit(2)


def report(error: UserError) -> None:
    """Print the one sentence; of a name that is a page long its ends, and in quotes a Windows path as it was typed, where
    repr has two of each backslash."""
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    text = re.sub(r"\S{400,}", lambda word: f"{word[0][:80]}...{word[0][-40:]}", printable(as_typed(str(error))))
    text = re.sub(r"(?<!\w)'[^'\n]*'", lambda quoted: quoted[0].replace("\\\\", "\\"), text)
    with suppress(OSError):  # a terminal that is gone
        print("\033[1;31merror:\033[0m" if coloured else "error:", text, file=sys.stderr)


_COMMAND = re.compile(r"\bpython (?:-m fastgpt\.(?:data (?=prepare))?(\w+)|(train)\.py)")


def as_typed(text: str, way: bool = True) -> str:
    """The commands in a text of ours, ``python -m fastgpt.NAME`` and ``python train.py``, as they can be typed here:
    ``fastgpt NAME`` where that was typed now, and, if ``way``, with the path of a Python, or fastgpt, that is not on PATH."""
    ours = Path(sys.argv[0]).stem == "fastgpt"
    program, names = (Path(sys.argv[0]), ["fastgpt"]) if ours else (Path(sys.executable), ["python", "python3"])

    def plain(path: object) -> str:  # Windows' may end in .EXE
        return os.path.normcase(str(path)).removesuffix(".exe")

    name = next((name for name in names if not way or plain(shutil.which(name)) == plain(program)), None)
    if name is None:
        name = str(program)
        with suppress(OSError, ValueError):  # there is no working directory any more, or it is elsewhere
            name = str(program.relative_to(Path.cwd()))
        name = f'"{name}"' if " " in name else name
    return _COMMAND.sub(lambda m: f"{name} {m[1] or m[2]}" if ours else m[0].replace("python", name, 1), text)


_CONTROL = dict.fromkeys({*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)} - {*b"\t\n"})
_UNPRINTABLE = _CONTROL | dict.fromkeys(range(0xD800, 0xE000), "?")
"""With the surrogates: Python has them for the bytes of a file name that is not UTF-8, and no stream encodes them."""


def printable(text: str) -> str:
    """A text of somebody else's without the characters that a terminal obeys: escapes that move the cursor, set the title or
    hide what was said, and those that turn the direction of writing, so that a name reads as another one. What was behind them
    stays, as letters; a byte of a file name that is no letter becomes ``?``."""
    return text.translate(_UNPRINTABLE)


def say(text: str, file: IO[str] | None = None) -> None:
    """Print a line that may hold a name of somebody else's: of a file, a column, a host. A terminal gets it broken between
    words, a pipe whole."""
    text, out = printable(text), file or sys.stdout
    if out.isatty():
        behind = " " * (len(text) - len(text.lstrip()) + 2)
        text = textwrap.fill(
            text,
            shutil.get_terminal_size().columns,
            subsequent_indent=behind,
            break_long_words=False,
            break_on_hyphens=False,
        )
    print(text, file=out, flush=True)


class PlainConsole:
    """Prints lines where rich is not installed: what a training run and tables need of a Console, without colours."""

    is_terminal, width = False, 80

    def __init__(self, file: IO[str] | None = None, quiet: bool = False, **_: Any) -> None:
        self.file, self.quiet = file, quiet

    def print(self, text: object = "", **_: Any) -> None:
        if not self.quiet:
            print(printable(str(text)), file=self.file)


def styled(*parts: str | tuple[str, str]) -> Any:
    """A line for a console: texts, and (text, rich's style) pairs."""
    try:
        from rich.text import Text
    except ImportError:
        return "".join(part if isinstance(part, str) else part[0] for part in parts)
    return Text.assemble(*parts)


def console(**options: Any) -> Any:
    """A rich Console that prints the control characters of no text; its own colours stay. A PlainConsole without rich."""
    try:
        from rich.console import Console
        from rich.segment import Segment
    except ImportError:
        return PlainConsole(**options)

    class Safe(Console):
        def render(self, *args: Any, **kwargs: Any) -> Iterator[Segment]:
            for segment in super().render(*args, **kwargs):
                yield segment if segment.control else segment._replace(text=printable(segment.text))

    return Safe(**options)
