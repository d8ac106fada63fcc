"""Every id is read once, whoever wrote it; what is remembered is forgotten when the file changes."""

import json
import os

import numpy as np
import pytest

import fastgpt.data.verification as module
from fastgpt.common import UserError
from fastgpt.data.preparation import prepare
from fastgpt.data.tokenizer import get_tokenizer
from fastgpt.data.verification import verify_files
from tests.shards import write_shard


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CACHED_FROM", 0)
    return tmp_path / "cache" / "fastgpt" / "checked"


@pytest.fixture
def reads(monkeypatch):
    """The names of the files that were read whole, in order."""
    seen = []

    class Counting:
        def __init__(self):
            seen.append(None)
            self.update = lambda data: None
            self.hexdigest = lambda: "0" * 64

    real = module.hashlib.sha256
    monkeypatch.setattr(module.hashlib, "sha256", lambda *data: real(*data) if data else Counting())
    return seen


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path, cache, reads):
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path in paths:
        write_shard(path, np.arange(100))
    reads.clear()
    verify_files(paths, 100)
    assert len(reads) == 2 and len(list(cache.iterdir())) == 2
    verify_files(paths, 100)
    verify_files(paths, 50257)
    assert len(reads) == 2, "remembered, for every vocabulary"
    with pytest.raises(UserError, match=r"a\.bin' holds the id 99 at token 99, and vocab_size is 99"):
        verify_files(paths, 99)
    assert len(reads) == 2

    stat = paths[0].stat()
    raw = bytearray(paths[0].read_bytes())
    raw[1024 + 2 * 7 : 1024 + 2 * 7 + 2] = np.uint16(60000).tobytes()
    with paths[0].open("r+b") as file:
        file.write(raw)
    os.utime(paths[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same name, same time
    with pytest.raises(UserError, match=r"a\.bin' holds the id 60000 at token 7, and vocab_size is 50257"):
        verify_files(paths, 50257)
    assert len(reads) == 3


def test_headerless_files_too(tmp_path, cache):
    np.array([1, 2, 50257], np.uint16).tofile(tmp_path / "train.bin")
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.bin' holds the id 50257 at token 2"):
            verify_files([tmp_path / "train.bin"], 50257)
    assert len(list(cache.iterdir())) == 1


def test_a_shard_that_is_not_its_manifests_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    prepare(tmp_path / "in", tmp_path / "out", get_tokenizer("bytes"))
    paths = sorted((tmp_path / "out").glob("*.bin"))
    verify_files(paths, 256)
    raw = bytearray(paths[0].read_bytes())
    raw[1030] ^= 1  # still a byte below 256
    paths[0].write_bytes(raw)
    with pytest.raises(UserError, match=r"train_000000\.bin' is not what was prepared \(sha256 .* its manifest says"):
        verify_files(paths, 256)


TOKENS = np.random.default_rng(0).integers(1, 50257, 3000)


@pytest.mark.parametrize(
    "ids, what",
    [
        (TOKENS.astype(np.uint32).view(np.uint16), "every second id is 0, as where wider integers are read"),
        (TOKENS.astype(np.int64).view(np.uint16), "every second id is 0"),
        (TOKENS.astype(np.int32).view(np.uint16)[1::2], "all of its 3,000 ids are 0"),
        (np.full(1024, 198), "all of its 1,024 ids are 198"),
        (np.append(TOKENS, np.zeros(3000)), "all ids from 3,000 on are 0, more than half"),
        (np.append(TOKENS % 90, np.zeros(4000)), "all ids from 3,000 on are 0"),
        (np.concatenate([TOKENS[:1000], np.zeros(2500), TOKENS[:500]]), "62% of its ids are 0: part of it"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, monkeypatch, ids, what):
    monkeypatch.setattr(module, "PART", 512)
    write_shard(tmp_path / "a.bin", ids)
    for _ in range(2):  # the second time from memory
        with pytest.raises(UserError, match=f"a.bin' does not hold tokens of a text: {what}"):
            verify_files([tmp_path / "a.bin"], 50257)


@pytest.mark.parametrize(
    "ids", [TOKENS, TOKENS % 2, TOKENS % 97 // 60, np.zeros(1023), np.append(TOKENS, np.zeros(2999))]
)
def test_a_file_that_may_be_a_text_passes(tmp_path, ids):
    """Also one in an alphabet of two letters, of which one is common."""
    write_shard(tmp_path / "a.bin", ids)
    verify_files([tmp_path / "a.bin"], 50257)


def test_the_sha256_is_the_files(tmp_path):
    sha = write_shard(tmp_path / "a.bin", np.arange(1000))
    assert module.examine(tmp_path / "a.bin") == module.FileFacts(sha, 999)
    assert module.examine(tmp_path / "a.bin") == module.FileFacts(sha, 999)


def test_small_files_leave_no_trace_and_a_damaged_memory_is_no_harm(tmp_path, cache, monkeypatch):
    write_shard(tmp_path / "a.bin", np.arange(100))
    with monkeypatch.context() as patch:
        patch.setattr(module, "CACHED_FROM", 10_000)
        verify_files([tmp_path / "a.bin"], 100)
    assert not cache.exists()
    verify_files([tmp_path / "a.bin"], 100)
    [memory] = cache.iterdir()
    for damage in ("", "[]", '{"state": 1}'):
        memory.write_text(damage)
        verify_files([tmp_path / "a.bin"], 100)
    assert json.loads(memory.read_text())["largest_id"] == 99


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_shard(tmp_path / "a.bin", np.arange(100))
    verify_files([tmp_path / "a.bin"], 100)
    with pytest.raises(UserError, match="id 99 at token 99"):
        verify_files([tmp_path / "a.bin"], 99)


def test_much_to_read_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SAID_FROM", 1)
    write_shard(tmp_path / "a.bin", np.arange(100))
    verify_files([tmp_path / "a.bin"], 100)
    assert "checking 1 token files" in capsys.readouterr().err
    verify_files([tmp_path / "a.bin"], 100)
    assert capsys.readouterr().err == ""
