"""Where a run writes beside its checkpoints: what cannot be written is said once and counted, and what follows is whole."""

import errno
import json
import os
import resource
import shutil
import types
from contextlib import contextmanager

import pytest

from fastgpt.common import why_unwritten
from fastgpt.config import Config, TrainConfig
from fastgpt.training import metrics
from fastgpt.training.metrics import Metrics
from fastgpt.training.outlets import Appended, Terminal

NEEDS_FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")


@contextmanager
def no_file_larger_than(size):
    """The system itself refuses, as a full disk does: what fits is written, what follows is not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_that_does_not_fit_leaves_nothing_and_is_counted(tmp_path):
    news = []
    log = Appended(tmp_path / "log", lambda: b"head\n", news)
    log.write(b"one\n")
    with no_file_larger_than(12):
        for _ in range(3):
            log.write(b"lost\n")
    assert (tmp_path / "log").read_bytes() == b"head\none\n"
    (begin,) = news
    assert begin.startswith(f"{tmp_path / 'log'} cannot be written (") and begin.endswith("the run goes on without it")
    log.write(b"two\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"head\none\ntwo\n"
    assert news[1:] == [f"{tmp_path / 'log'} can be written again; lines lost: 3"]


@NEEDS_FULL
def test_a_full_disk_to_the_end_is_summed_up(tmp_path):
    (tmp_path / "log").symlink_to("/dev/full")
    news = []
    log = Appended(tmp_path / "log", bytes, news)
    log.write(b"a\n")
    log.write(b"b\n")
    log.close()
    assert "is full (" in news[0] and news[1:] == [f"{tmp_path / 'log'} could not be written to the end; lines lost: 2"]


@NEEDS_FULL
def test_a_terminal_on_a_full_disk_keeps_nothing_that_fails_at_exit(tmp_path):
    news = []
    with open("/dev/full", "w") as full:
        terminal = Terminal(full, news)
        terminal.write("one\ntwo\n")
        terminal.write("three\n")
        terminal.flush()
    assert news == ["the terminal cannot be written (No space left on device): the run goes on without it"]
    assert terminal.lost == 3
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        Terminal(file, news).write("caf\u00e9\n")  # no reason to end a run either
    assert (tmp_path / "out").read_text() == "caf?\n"


@pytest.mark.parametrize(
    ("inodes", "words"), [((100, 0), "has no inodes left"), ((100, 5), "is full ("), ((0, 0), "is full (")]
)
def test_a_disk_without_inodes_is_not_called_full(tmp_path, monkeypatch, inodes, words):
    space = {"f_blocks": 9, "f_bfree": 1, "f_bavail": 1, "f_frsize": 4096, "f_files": inodes[0], "f_favail": inodes[1]}
    monkeypatch.setattr(os, "statvfs", lambda _: types.SimpleNamespace(**space))
    assert words in why_unwritten(OSError(errno.ENOSPC, "No space left on device"), tmp_path)


def test_a_read_only_file_system_and_a_folder_that_is_gone_are_named(tmp_path):
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "x"))
    assert why_unwritten(read_only, tmp_path) == f"{tmp_path / 'x'}: Read-only file system"
    assert why_unwritten(read_only, tmp_path / "a") == f"{tmp_path / 'a'} is gone: it was deleted or moved away"


def test_a_deleted_folder_is_begun_anew_with_all_that_describes_the_run(tmp_path):
    out, news = tmp_path / "run", []
    log = Metrics(out, "a", 0, Config(train=TrainConfig()), environment={"torch": "2"}, news=news)
    log.write({"step": 1, "loss": 3.0})
    shutil.rmtree(out)
    for step in (2, 3):
        log.write({"step": step, "loss": 2.0})
    log.close()
    assert news == [f"{out} was deleted or moved away while the run went on: it is begun anew"]
    records = metrics.read(out)
    assert records[0]["run"] == "a" and [record["step"] for record in records[1:]] == [2, 3]
    assert json.loads((out / "environment.json").read_text()) == {"torch": "2"} and (out / "config.json").exists()
    assert next((out / "tensorboard").iterdir()).stat().st_size > 0


def test_a_folder_that_cannot_be_begun_anew_yet_costs_lines(tmp_path):
    out, news = tmp_path / "run", []
    log = Metrics(out, "a", 0, Config(train=TrainConfig(tensorboard=False)), news=news)
    out.rename(tmp_path / "elsewhere")
    out.touch()  # in the way
    log.write({"step": 1})
    log.write({"step": 2})
    assert log.size == 0 and len(news) == 1 and news[0].startswith(f"{out / 'metrics.jsonl'} cannot be written (")
    out.unlink()
    (tmp_path / "elsewhere").rename(out)  # back again
    log.write({"step": 3})
    log.close()
    assert [record.get("step") for record in metrics.read(out)] == [None, 3]
    assert news[1:] == [f"{out / 'metrics.jsonl'} can be written again; lines lost: 2"]


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "tensorboard"])
def test_what_is_in_the_way_is_said_before_anything_is_written(tmp_path, name):
    (tmp_path / name).touch() if name == "tensorboard" else (tmp_path / name).mkdir()
    with pytest.raises(metrics.UserError, match=name):
        Metrics(tmp_path, "a", 0, Config())
    assert [path.name for path in tmp_path.iterdir()] == [name]
