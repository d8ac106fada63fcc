"""One process at a time writes in a run's folder: the lock that train and convert hold while they do.

Two files stand beside the folder, so that renaming it leaves them in place. ``.NAME.lock`` is locked by the system, which frees
it when the process ends, in whatever way. ``.NAME.lock.json`` says which process holds it (host, number, start time), and a
thread renews its modification time. The second file is for people, and for network file systems whose locks do not reach
other machines (NFS with local_lock, Lustre without flock) or do not exist: a process that got the lock goes on only when the
one named in the file is gone.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from fastgpt.common import UserError, read_json, say, write_json

PULSE = 5.0
"""Seconds between two signs of life."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What file systems without locks answer, such as NFS with no lock daemon."""


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold the lock of the run's folder ``out``, which need not exist yet. Leaves no file behind.

    Raises UserError if another process holds it, naming that process, where no lock can be written, and for a name that is not
    UTF-8: safetensors reads none.
    """
    if any("\ud800" <= letter <= "\udfff" for letter in str(out)):
        raise UserError(f"out is {str(out)!r}, a name that is not UTF-8: no checkpoint in it could be read again")
    with ExitStack() as undo:
        try:
            path = _lock_file(out)
            undo.callback(_remove, *(folder for folder in path.parents if not folder.exists()))
            path.parent.mkdir(parents=True, exist_ok=True)
            record = path.with_name(f"{path.name}.json")
            if why := _locked(path, record, out, undo):
                say(f"{why}: only {record} keeps others out", sys.stderr)
            if (holder := read_json(record)) is not None and _is_alive(holder, record):
                raise UserError(_in_use(out, holder))
            undo.callback(_remove, record)
            since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            write_json(record, {**this_process(), "since": since})
        except OSError as error:
            raise UserError(f"out is {out}, which cannot be written ({error.strerror}): name another folder") from error
        end = threading.Event()
        pulse = threading.Thread(target=_beat, args=(record, end), name="run lock", daemon=True)
        pulse.start()
        undo.callback(pulse.join)
        undo.callback(end.set)
        yield


def _locked(path: Path, record: Path, out: Path, undo: ExitStack) -> str | None:
    """Take the system's lock, which ``undo`` gives back; why there is none. Raises UserError if another process has it."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        return "filelock is not installed"
    lock, why = FileLock(path), None
    try:
        lock.acquire(timeout=1)  # a killed process's threads end one by one, and its lock with the last
    except Timeout:
        path.stat()  # raises where no lock can be made at all, as in /proc, which filelock reports alike
        raise UserError(_in_use(out, read_json(record) or {})) from None
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        why = f"{out} is on a file system without locks"
    undo.callback(_remove, path)
    undo.callback(lock.release)
    return why


def _lock_file(out: Path) -> Path:
    """Beside the folder; inside it where nothing can be written beside it, as beside a container's volume."""
    folder = Path(os.path.realpath(out))
    if not folder.name or (folder.parent.is_dir() and not os.access(folder.parent, os.W_OK)):
        return folder / ".lock"
    return folder.with_name(f".{folder.name}.lock")


def this_process() -> dict[str, Any]:
    """Which process this is, on which machine, in plain values: what ``is_running`` asks about."""
    return {"host": socket.gethostname(), "pids": _pid_space(), "pid": os.getpid(), "started": _start_of(os.getpid())}


def is_running(process: dict[str, Any]) -> bool | None:
    """Whether that process still runs; None where this cannot be known: on another machine, or without psutil. Its number alone
    proves nothing, it may be another's by now: the start time has to agree."""
    pid, started = process.get("pid"), process.get("started")
    here = (process.get("host"), process.get("pids")) == (socket.gethostname(), _pid_space())
    if not here or not isinstance(pid, int) or not isinstance(started, float) or _start_of(os.getpid()) is None:
        return None
    now = _start_of(pid)
    return now is not None and abs(now - started) < 1  # the clock may have been set since


def _pid_space() -> str:
    """What tells the process numbers of one container from another's; "" where there are none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> float | None:
    """When a process of this machine started, in seconds since 1970; None if it has ended, or psutil is missing."""
    try:
        import psutil
    except ImportError:
        return None
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except (psutil.NoSuchProcess, ValueError):  # ValueError: a negative number
        return None


def _is_alive(holder: dict[str, Any], record: Path) -> bool:
    """Whether the process that ``record`` names is still at work; where that cannot be known, a sign of life is waited for."""
    running = is_running(holder)
    if running is not None:
        return running
    say(
        f"{record} names process {holder.get('pid')!r} on {holder.get('host')!r}: waiting {3 * PULSE:.0f} s for a sign of life",
        sys.stderr,
    )
    before = _renewed(record)
    time.sleep(3 * PULSE)
    return _renewed(record) != before


def _renewed(record: Path) -> int | None:
    """The time of the last sign of life, by the file server's clock."""
    try:
        with open(record, "rb") as file:  # opened, because NFS remembers a name's times for up to a minute
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


def _beat(record: Path, end: threading.Event) -> None:
    while not end.wait(PULSE):
        with suppress(OSError):  # a file system that is gone for a while costs no run
            os.utime(record)


def _in_use(out: Path, holder: dict[str, Any]) -> str:
    what_to_do = "wait until it ends, stop it, or name another folder"
    if "pid" not in holder:  # it has only just begun
        return f"out is {out}, where another process writes: {what_to_do}"
    return (
        f"out is {out}, where process {holder['pid']} on {holder.get('host')} has been writing since {holder.get('since')}: "
        f"{what_to_do}"
    )


def _remove(*paths: Path) -> None:
    """Files, and folders that are empty; others stay."""
    for path in paths:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink()
