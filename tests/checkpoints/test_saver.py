"""Saving in the background: what is on disk is one whole state whatever happens, and training never waits or fails for it."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import resource
import signal
import threading
import time

import pytest
import torch

from fastgpt.checkpoints import checkpoint, folder, write
from fastgpt.checkpoints.folder import best, existing, newest_valid, step_of
from fastgpt.checkpoints.saver import AsyncSaver, save


def state(step, val_loss=math.inf):
    """Every number says which step it belongs to."""
    tensors = {f"w{i}": torch.full((50, 50), float(step)) for i in range(4)}
    return {"model": tensors, "best_val_loss": val_loss, "rng": {"cpu": torch.get_rng_state()}, "marker": step}


def assert_is_one_state(path):
    saved = checkpoint.load(path)
    step = saved["step"]
    assert saved["marker"] == step == step_of(path)
    assert all((tensor == step).all() for tensor in saved["model"].values())


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def held(monkeypatch):
    """An event that the background thread waits for before its first fsync."""
    release, real = threading.Event(), os.fsync

    def fsync(handle):
        assert threading.current_thread() is threading.main_thread() or release.wait(20)
        real(handle)

    monkeypatch.setattr(write.os, "fsync", fsync)
    yield release
    release.set()


# --- in the background ----------------------------------------------------------------------------------------------


def test_training_goes_on_at_once_and_does_not_change_what_is_saved(tmp_path, held):
    now = state(1)
    with AsyncSaver(tmp_path, keep=2) as saver:
        saver.save(1, now)
        for tensor in now["model"].values():
            tensor.fill_(99.0)
        now["marker"] = 99
        assert saver.news() == [] and not existing(tmp_path)  # still being written
        held.set()
        saver.wait()
        assert saver.last_error is None and existing(tmp_path) == [tmp_path / "step-00000001"]
        (sentence,) = saver.news()
        assert sentence.startswith(f"saved {tmp_path / 'step-00000001'} (in the background, ") and saver.news() == []
    assert_is_one_state(tmp_path / "step-00000001")


def test_a_save_waits_for_the_one_before(tmp_path, held):
    with AsyncSaver(tmp_path, keep=5) as saver:
        saver.save(1, state(1))
        threading.Timer(0.2, held.set).start()
        saver.save(2, state(2))
        assert existing(tmp_path)[0].name == "step-00000001"
        saver.save(3, state(3))
    for path in existing(tmp_path):
        assert_is_one_state(path)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_a_state_that_cannot_be_stored_is_the_callers_error(tmp_path):
    with AsyncSaver(tmp_path, keep=1) as saver, pytest.raises(TypeError, match="model is a function"):
        saver.save(1, {"model": names})


def test_an_interrupt_leaves_without_waiting(tmp_path, held):
    with pytest.raises(KeyboardInterrupt), AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, state(1))
        raise KeyboardInterrupt
    assert not existing(tmp_path) and saver._thread.daemon


# --- which are kept -------------------------------------------------------------------------------------------------


def test_the_last_k_and_the_best_are_kept(tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: 3.0, 5: math.nan, 6: 6.0}
    with AsyncSaver(tmp_path, keep=2) as saver:
        for step, loss in losses.items():
            saver.save(step, state(step, loss), is_best=True)  # each claims to be the best: the lowest is
        saver.save(7, state(7, 1.0))  # not claimed: not its own loss
    assert names(tmp_path) == ["best.json", "step-00000002", "step-00000006", "step-00000007"]
    assert best(tmp_path) == (tmp_path / "step-00000002", 3.0)
    assert json.loads((tmp_path / "best.json").read_text()) == {
        "checkpoint": "step-00000002",
        "step": 2,
        "val_loss": 3.0,
    }


def test_the_best_outlives_a_resume_that_forgot_it(tmp_path):
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, state(1, 3.0), is_best=True)
    (tmp_path / "best.json").unlink()  # the truth is in the checkpoints
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(2, state(2, 3.5), is_best=True)
        saver.save(3, state(3, 2.5), is_best=True)
    assert best(tmp_path) == (tmp_path / "step-00000003", 2.5)
    assert names(tmp_path) == ["best.json", "step-00000003"]


def test_after_a_rollback_the_newest_is_the_one_saved_last(tmp_path):
    with AsyncSaver(tmp_path, keep=2) as saver:
        for step in (100, 200, 300, 150):  # rolled back to 100 after 300
            saver.save(step, state(step))
        saver.wait()
        assert newest_valid(tmp_path)[0].name == "step-00000150"
        assert names(tmp_path) == ["step-00000150", "step-00000300"]
        saver.save(200, state(200))
    assert names(tmp_path) == ["step-00000150", "step-00000200"]


def test_a_step_can_be_saved_again_without_touching_the_first(tmp_path):
    first = save(tmp_path, 5, state(5))
    (first / "tensors-00000.safetensors").write_bytes(b"damaged")
    second = save(tmp_path, 5, state(5))
    assert (first.name, second.name) == ("step-00000005", "step-00000005.1")
    assert newest_valid(tmp_path) == (second, [])
    assert_is_one_state(second)
    third = save(tmp_path, 6, state(6))
    folder.rotate(tmp_path, keep=2)
    assert existing(tmp_path) == [second, third]


def test_one_that_cannot_be_read_is_neither_counted_nor_deleted(tmp_path):
    strange = save(tmp_path, 9, state(9))
    (strange / "state.json").write_text("{}")
    for step in (10, 11, 12):
        save(tmp_path, step, state(step))
        folder.rotate(tmp_path, keep=2)
    assert names(tmp_path) == ["step-00000009", "step-00000011", "step-00000012"]
    path, damaged = newest_valid(tmp_path)
    assert path.name == "step-00000012" and str(strange) in damaged[0]


def test_leftovers_are_removed_at_the_start_and_nothing_else(tmp_path):
    good = save(tmp_path, 1, state(1))
    for name in ("step-00000002.partial", "step-00000001.1.deleted"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tensors-00000.safetensors").write_bytes(b"half")
    for name in (".best.json.12.tmp", "best.json.partial", "metrics.jsonl", "my.partial"):
        (tmp_path / name).write_text("x")
    AsyncSaver(tmp_path, keep=1)
    assert names(tmp_path) == ["metrics.jsonl", "my.partial", "step-00000001"]
    assert_is_one_state(good)


# --- when the disk does not do its part -----------------------------------------------------------------------------


def fails(error, after=0):
    calls = iter(range(10**9))
    return lambda real: lambda *args, **kwargs: real(*args) if next(calls) < after else (_ for _ in ()).throw(error)


FULL = OSError(errno.ENOSPC, "No space left on device")


def full_files(after=0):
    """``open`` for a disk that is full after so many writes."""
    calls = iter(range(10**9))

    class FullFile(io.FileIO):
        def write(self, data):
            if next(calls) >= after:
                raise FULL
            return super().write(data)

    return lambda _: FullFile


PLACES = {
    "first bytes": (write, "open", full_files()),
    "later bytes": (write, "open", full_files(after=4)),
    "fsync": (write.os, "fsync", fails(FULL)),
    "manifest's fsync": (write.os, "fsync", fails(FULL, after=3)),
    "rename": (write.os, "rename", fails(FULL)),
}


@pytest.mark.parametrize("place", PLACES)
def test_disk_full_anywhere_leaves_the_old_one_whole_and_is_tried_again(tmp_path, monkeypatch, place):
    owner, name, failing = PLACES[place]
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, state(1))
        saver.wait()
        saver.news()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name, open)), raising=False)
            saver.save(2, state(2))
            saver.wait()
            saver.save(3, state(3))  # again: it is not said again
            saver.wait()
        assert names(tmp_path) == ["step-00000001"]
        assert_is_one_state(tmp_path / "step-00000001")
        (said,) = saver.news()
        assert said.startswith(f"the checkpoint of step 2 was not saved: the disk of {tmp_path} is full (")
        assert said.endswith("; the next save tries again")
        # What a run ends with: no save follows that could try again.
        assert saver.last_error.startswith(f"the checkpoint of step 3 was not saved: the disk of {tmp_path} is full (")
        assert saver.last_error.endswith(f"; the last good checkpoint is {tmp_path / 'step-00000001'}")
        saver.save(3, state(3))
        saver.wait()
        assert saver.last_error is None and names(tmp_path) == ["step-00000003"]
        assert_is_one_state(tmp_path / "step-00000003")


def test_the_system_refusing_to_write_more_is_survived(tmp_path):
    """Not simulated: the process may not make files of more than 8 kB."""
    save(tmp_path, 1, state(1))

    def child():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        saver = AsyncSaver(tmp_path, keep=1)
        saver.save(2, state(2))
        saver.wait()
        os._exit(0 if "step 2 was not saved: " in saver.last_error and "File too large" in saver.last_error else 1)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(child), 0)[1]) == 0
    assert names(tmp_path) == ["step-00000001"]
    assert_is_one_state(tmp_path / "step-00000001")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with AsyncSaver(tmp_path / "file", keep=1) as saver:
        saver.save(1, state(1))
        saver.wait()
        assert "step 1 was not saved" in saver.last_error and "there is no checkpoint yet" in saver.last_error


def test_a_file_system_that_does_not_answer_is_said(tmp_path, monkeypatch):
    with AsyncSaver(tmp_path, keep=1) as saver:
        stale = OSError(errno.ESTALE, "Stale file handle")
        monkeypatch.setattr(write.os, "rename", fails(stale)(os.rename))
        monkeypatch.setattr(folder, "existing", fails(stale)(None))
        saver.save(1, state(1))
        saver.wait()
        assert "Stale file handle; there is no checkpoint yet" in saver.last_error


def test_a_synchronous_save_raises_and_changes_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, state(1))
    monkeypatch.setattr(write.os, "fsync", fails(FULL)(os.fsync))
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, state(2))
    assert names(tmp_path) == ["step-00000001"]


def test_old_ones_that_cannot_be_deleted_do_not_make_the_save_a_failure(tmp_path, monkeypatch):
    with AsyncSaver(tmp_path, keep=1) as saver:
        saver.save(1, state(1))
        saver.wait()
        with monkeypatch.context() as patch:
            patch.setattr(folder.shutil, "rmtree", fails(PermissionError(errno.EACCES, "denied"))(None))
            saver.save(2, state(2))
            saver.wait()
        assert saver.last_error is None and "cannot be deleted (denied)" in saver.news()[-1]
    assert newest_valid(tmp_path) == (tmp_path / "step-00000002", [])


# --- kill -9 --------------------------------------------------------------------------------------------------------


def forked(child):
    """Run ``child`` in a copy of this process; it must not return."""
    pid = os.fork()
    if pid == 0:
        try:
            child()
        finally:
            os._exit(3)
    return pid


def test_kill_minus_9_at_random_moments_always_leaves_a_whole_state(tmp_path):
    save(tmp_path, 1, state(1))
    rng = random.Random(0)
    inside = 0
    for _ in range(10):

        def child():
            with AsyncSaver(tmp_path, keep=2) as saver:
                step = step_of(newest_valid(tmp_path)[0])
                while True:
                    step += 1
                    saver.save(step, state(step, 1 / step), is_best=step % 3 == 0)

        newest = max(map(step_of, existing(tmp_path)))
        pid = forked(child)
        while max(map(step_of, existing(tmp_path))) == newest and os.waitpid(pid, os.WNOHANG) == (0, 0):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, "the child died by itself"
        inside += any(name.endswith((".partial", ".deleted")) for name in names(tmp_path))
        path, damaged = newest_valid(tmp_path)
        assert damaged == []
        for kept in existing(tmp_path):
            assert_is_one_state(kept)
    assert inside > 0, "no kill fell into a save"
    assert step_of(path) > 10
    with AsyncSaver(tmp_path, keep=2) as saver:  # killed ones may not have come to deleting
        saver.save(step_of(path) + 1, state(step_of(path) + 1))
    assert len(existing(tmp_path)) <= 4 and not [n for n in names(tmp_path) if n.endswith(".partial")]
