"""One process at a time in a run's folder: the second is told who is there, and a killed one's traces stop nobody."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import psutil
import pytest

from fastgpt.checkpoints import lock
from fastgpt.common import UserError

ROOT = Path(__file__).parents[2]


def started(pid):
    return psutil.Process(pid).create_time()


def record(out, **holder):
    """What a process that did not end in order leaves behind."""
    holder = {**lock.this_process(), "started": 1e9, "since": "2026-11-30", **holder}
    path = out.with_name(f".{out.name}.lock.json")
    path.write_text(json.dumps(holder))
    return path


def test_the_second_is_refused_and_nothing_is_left_behind(tmp_path):
    out = tmp_path / "runs" / "mine"  # neither exists
    for _ in range(2):
        with lock.held(out):
            (tmp_path / "runs" / "link").symlink_to(out)
            for name in (out, out.parent / ".." / "runs" / "mine", out.parent / "link"):
                with (
                    pytest.raises(
                        UserError, match=rf"^out is \S+, where process {os.getpid()} on .* since 20\S+ .*: wait"
                    ),
                    lock.held(name),
                ):
                    pass
            with lock.held(out.with_name("another")):
                pass
            (tmp_path / "runs" / "link").unlink()
        assert list(tmp_path.iterdir()) == []


def test_a_folder_above_that_was_made_stays_if_something_is_in_it(tmp_path):
    with lock.held(tmp_path / "runs" / "mine"):
        (tmp_path / "runs" / "mine").mkdir()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]


def test_a_process_holds_it_until_it_is_killed(tmp_path):
    code = "import sys; from pathlib import Path; from fastgpt.checkpoints import lock\n"
    code += "with lock.held(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    child = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        child.stdout.readline()
        with pytest.raises(UserError, match=f"process {child.pid} on"), lock.held(tmp_path / "run"):
            pass
        child.send_signal(signal.SIGKILL)
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:  # dead, not yet waited for: gone all the same
            os.sched_yield()
        assert (tmp_path / ".run.lock.json").exists()
        with lock.held(tmp_path / "run"):
            assert json.loads((tmp_path / ".run.lock.json").read_text())["pid"] == os.getpid()
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    ("holder", "alive"),
    [
        (lambda: {"pid": 2**22 + 1}, False),
        (lambda: {"started": started(os.getpid()) - 100}, False),  # another process has its number now
        (lambda: {"started": started(os.getpid())}, True),
        (lambda: {"pid": os.getppid(), "started": started(os.getppid())}, True),
    ],
)
def test_a_lock_that_could_be_taken_is_not_trusted_while_its_last_holder_lives(tmp_path, holder, alive):
    path = record(tmp_path / "run", **holder())
    if alive:
        with pytest.raises(UserError, match="has been writing since 2026-11-30"), lock.held(tmp_path / "run"):
            pass
        assert path.exists()
    else:
        with lock.held(tmp_path / "run"):
            pass
        assert not path.exists()


@pytest.mark.parametrize("alive", [True, False])
def test_of_a_process_on_another_machine_a_sign_of_life_is_waited_for(tmp_path, monkeypatch, capsys, alive):
    path = record(tmp_path / "run", host="elsewhere", pid=7)
    monkeypatch.setattr(lock, "PULSE", 0.02)
    # The wait itself is where the other machine's beat falls.
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: os.utime(path, (1, 1)) if alive else None)
    if alive:
        with pytest.raises(UserError, match="process 7 on elsewhere has been writing"), lock.held(tmp_path / "run"):
            pass
    else:
        with lock.held(tmp_path / "run"):
            pass
    assert "names process 7 on 'elsewhere': waiting 0 s for a sign of life" in capsys.readouterr().err


def test_a_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PULSE", 0.001)
    beat, real = threading.Event(), os.utime
    monkeypatch.setattr(os, "utime", lambda path: (real(path), beat.set()))
    with lock.held(tmp_path / "run"):
        assert beat.wait(60)
    assert threading.active_count() == 1 or not any(t.name == "run lock" for t in threading.enumerate())


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(errno.ENOLCK, "No locks available")])
def test_a_file_system_without_locks_is_said_and_the_record_keeps_others_out(tmp_path, monkeypatch, capsys, error):
    def missing(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", missing)
    with lock.held(tmp_path / "run"):
        assert "on a file system without locks: only" in capsys.readouterr().err
        with pytest.raises(UserError, match=f"process {os.getpid()} on"), lock.held(tmp_path / "run"):
            pass


def test_it_lies_inside_where_nothing_can_be_written_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with lock.held(tmp_path / "volume"):
        assert {path.name for path in (tmp_path / "volume").iterdir()} == {".lock", ".lock.json"}


def test_a_place_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"which cannot be written \("), lock.held(tmp_path / "file" / "run"):
        pass

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lock, "write_json", full)
    with pytest.raises(UserError, match="No space left on device"), lock.held(tmp_path / "run"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("pid", [-1, "x", None, 10**30])
def test_a_number_that_is_no_process_is_no_traceback(pid):
    assert not lock.is_running(lock.this_process() | {"pid": pid})


def test_a_name_that_no_checkpoint_could_be_read_from_is_refused(tmp_path):
    with pytest.raises(UserError, match="not UTF-8"), lock.held(tmp_path / "run\udcff"):
        pass
    assert not list(tmp_path.iterdir())
