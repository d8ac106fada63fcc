"""A prepared folder is whole or absent, a function of its source, and never shares a document between its sides."""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.common import UserError
from fastgpt.data import corpora, encoding, readers, writing
from fastgpt.data import preparation as module
from fastgpt.data.preparation import prepare
from fastgpt.data.resolution import resolve
from fastgpt.data.shards import open_shard
from fastgpt.data.tokenizer import BytesTokenizer, get_tokenizer

BYTES = get_tokenizer("bytes")
ENV = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}


def _write_docs(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return folder


def _side(folder: Path, side: str) -> list[int]:
    return np.concatenate([open_shard(p) for p in sorted(folder.glob(f"{side}*.bin"))]).tolist()


def _documents(folder: Path, side: str) -> list[str]:
    ids = bytes(_side(folder, side))
    assert ids[0] == 0, "each document is preceded by end-of-text"
    return [d.decode() for d in ids[1:].split(b"\0")]


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.sampled_from("abc\n"), min_size=1, max_size=6), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
    shard_tokens=st.integers(1, 50),
)
def test_split_is_complete_and_never_leaks(tmp_path_factory, texts, fraction, shard_tokens):
    tmp = tmp_path_factory.mktemp("split")
    source = _write_docs(tmp / "in", texts)
    if len(set(texts)) == 1:
        with pytest.raises(UserError, match="one document"):
            prepare(source, tmp / "out", BYTES, val_fraction=fraction)
        assert [p.name for p in tmp.iterdir() if not p.name.startswith(".")] == ["in"]
        return
    manifest = prepare(source, tmp / "out", BYTES, val_fraction=fraction, shard_tokens=shard_tokens)
    train, val = _documents(tmp / "out", "train"), _documents(tmp / "out", "val")
    assert sorted(train + val) == sorted(texts)
    assert not set(train) & set(val), "validation must not leak into training"
    assert train == [t for t in texts if t in set(train)], "order is the corpus's"
    assert manifest["documents"] == {"train": len(train), "val": len(val)}
    for shard in manifest["shards"]:
        path = tmp / "out" / shard["file"]
        assert shard["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert len(open_shard(path)) == shard["tokens"] <= shard_tokens
    for side in ("train", "val"):
        assert sum(s["tokens"] for s in manifest["shards"] if s["file"].startswith(side)) == manifest["tokens"][side]


def test_the_side_of_a_document_does_not_depend_on_the_others(tmp_path):
    texts = [f"document {i}" for i in range(400)]
    prepare(_write_docs(tmp_path / "a", texts), tmp_path / "out_a", BYTES)
    prepare(_write_docs(tmp_path / "b", [*texts[::-1][:300], "new"]), tmp_path / "out_b", BYTES)
    assert not set(_documents(tmp_path / "out_a", "val")) & set(_documents(tmp_path / "out_b", "train"))
    assert 5 <= len(_documents(tmp_path / "out_a", "val")) <= 45  # 5% of 400
    prepare(tmp_path / "a", tmp_path / "out_c", BYTES, seed=1)
    assert _documents(tmp_path / "out_c", "val") != _documents(tmp_path / "out_a", "val")


@pytest.mark.parametrize(
    "text", ["line of text\n" * 500, "no newline " * 500, "东" * 3000], ids=["lines", "one", "utf8"]
)
def test_one_text_file_is_split_by_position(tmp_path, text):
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    manifest = prepare(tmp_path / "input.txt", tmp_path / "out", BYTES)
    train, val = (bytes(_side(tmp_path / "out", side)).replace(b"\0", b"").decode() for side in ("train", "val"))
    assert train + val == text
    assert 0.02 < len(val) / len(text) < 0.06
    assert "position" in manifest["split"]
    with pytest.raises(UserError, match=r"max_tokens is 5, and data '.*input\.txt' is one text"):
        prepare(tmp_path / "input.txt", tmp_path / "other", BYTES, max_tokens=5)
    assert not list(tmp_path.glob("other*"))


def test_stdlib_with_gpt2_has_end_of_text_between_files(tmp_path, monkeypatch):
    corpus = corpora.open_corpus("stdlib")
    corpus.files = corpus.files[:30]
    monkeypatch.setattr(module, "open_corpus", lambda *_, **__: corpus)
    tok = get_tokenizer("gpt2")
    manifest = prepare("stdlib", tmp_path / "out", tok, val_fraction=0.3)
    texts = {document.text for document in corpus.read()}
    for side in ("train", "val"):
        ids = np.array(_side(tmp_path / "out", side))
        starts = np.flatnonzero(ids == tok.eot)
        assert starts[0] == 0 and len(starts) == manifest["documents"][side]
        assert {tok.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])} <= texts


def test_the_same_again_is_reused_and_something_else_is_never_overwritten(tmp_path, monkeypatch):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    first = prepare(source, tmp_path / "out", BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Preparation", None)
        assert prepare(source, tmp_path / "out", BYTES) == first
    before = _files(tmp_path / "out")
    for change, said in (
        ({"seed": 1}, "seed 0 then, 1 now"),
        ({"val_fraction": 0.5}, "val_fraction 0.05 then, 0.5 now"),
        ({"text_column": "body"}, "text_column 'text' then, 'body' now"),
    ):
        with pytest.raises(UserError, match=rf"already holds something else \({said}\)"):
            prepare(source, tmp_path / "out", BYTES, **change)
    with pytest.raises(UserError, match="tokenizer 'bytes' then, 'gpt2' now"):
        prepare(source, tmp_path / "out", get_tokenizer("gpt2"))
    with pytest.raises(UserError, match=r"source '.*in' then, '.*other' now"):
        prepare(_write_docs(tmp_path / "other", ["a", "b"]), tmp_path / "out", BYTES)
    with pytest.raises(UserError, match="the files of the source have changed since"):
        prepare(_write_docs(tmp_path / "in", ["changed", "b"]), tmp_path / "out", BYTES)
    assert _files(tmp_path / "out") == before and not (tmp_path / "out.partial").exists()
    _write_docs(tmp_path / "in", ["a", "b", "c"])
    (tmp_path / "out" / first["shards"][0]["file"]).write_bytes(b"")
    os.utime(source / "docs.jsonl", ns=(1, 1))
    with pytest.raises(UserError, match="changed since"):
        prepare(source, tmp_path / "out", BYTES)


def test_a_damaged_shard_is_no_silent_redo(tmp_path):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    first = prepare(source, tmp_path / "out", BYTES)
    (tmp_path / "out" / first["shards"][0]["file"]).write_bytes(b"")
    with pytest.raises(UserError, match=r"is empty.*delete '.*out' to prepare it again"):
        prepare(source, tmp_path / "out", BYTES)


def test_files_of_others_are_in_nobodys_way(tmp_path):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("years of work")
        with pytest.raises(UserError, match=r"already holds something else|is in the way"):
            prepare(source, tmp_path / "out", BYTES)
        assert [p.name for p in (tmp_path / name).iterdir()] == ["thesis.tex"]
        (tmp_path / name / "thesis.tex").unlink()
    prepare(source, tmp_path / "out", BYTES)  # empty folders are fine


@pytest.mark.parametrize("kind", ["jsonl", "text"])
@pytest.mark.parametrize("shard_tokens, max_tokens", [(64, None), (1000, 700), (30, 501)])
def test_the_result_does_not_depend_on_workers_or_batches(tmp_path, monkeypatch, kind, shard_tokens, max_tokens):
    if kind == "jsonl":
        source = _write_docs(tmp_path / "in", [f"document {i} " * (i % 5 + 1) for i in range(60)])
    else:
        max_tokens = None  # refused for one text
        source = tmp_path / "in.txt"
        source.write_text("a line of text\n" * 100)
        monkeypatch.setattr(readers, "PIECE", 100)
    made = []
    for workers, batch in ((1, 1), (3, 50), (2, 10**6)):
        monkeypatch.setattr(encoding, "BATCH_CHARS", batch)
        out = tmp_path / f"out{workers}"
        manifest = prepare(
            source, out, BYTES, shard_tokens=shard_tokens, max_tokens=max_tokens, workers=workers, val_fraction=0.3
        )
        made.append(_files(out))
    assert made[0] == made[1] == made[2]
    total = sum(manifest["tokens"].values())
    if max_tokens is not None:
        assert max_tokens <= total < max_tokens + 120, "it ends with the document that reaches it"
    assert all(s["tokens"] == shard_tokens for s in manifest["shards"][: total // shard_tokens // 2])


def test_worker_processes_give_what_threads_give(tmp_path, monkeypatch):
    source = _write_docs(tmp_path / "in", [f"document {i} \ud800" for i in range(300)])
    tok = get_tokenizer("gpt2")
    prepare(source, tmp_path / "threads", tok, workers=2)
    monkeypatch.setattr(encoding, "SMALL", 0)
    monkeypatch.setattr(encoding, "BATCH_CHARS", 500)
    prepare(source, tmp_path / "processes", tok, workers=2)
    assert _files(tmp_path / "threads") == _files(tmp_path / "processes")


def test_a_script_without_a_main_guard_ends_in_one_sentence(tmp_path):
    """A worker process imports the script, which calls prepare() again: it must neither hang nor start more of them."""
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from fastgpt.data import encoding\n"
        "from fastgpt.data.preparation import prepare\n"
        "from fastgpt.data.tokenizer import get_tokenizer\n"
        "from fastgpt.common import UserError\n"
        "encoding.SMALL = 0\n"
        "try:\n"
        "    prepare(*sys.argv[1:], get_tokenizer('bytes'), workers=2)\n"
        "except UserError as error:\n"
        "    sys.exit(str(error))\n"
    )
    command = [sys.executable, script, source, tmp_path / "out"]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "a tokenising process died" in done.stderr and "__main__" in done.stderr
    assert not list(tmp_path.glob("out*"))


class _Interrupted(BytesTokenizer):
    calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


# bug 26: interrupted data preparation.
def test_an_interrupted_preparation_is_gone_on_with(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 20)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    source = _write_docs(tmp_path / "in", [f"document {i}" for i in range(50)])
    prepare(source, tmp_path / "undisturbed", BYTES, shard_tokens=16)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", _Interrupted(), shard_tokens=16, workers=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "in", "out.partial", "undisturbed"]
    with pytest.raises(UserError, match=r"'.*out' is not finished"):
        resolve(str(tmp_path / "out"), "bytes", 256)
    with pytest.raises(UserError, match=r"unfinished preparation of something else \(seed 0 then, 5 now\)"):
        prepare(source, tmp_path / "out", BYTES, shard_tokens=16, seed=5)
    prepare(source, tmp_path / "out", BYTES, shard_tokens=16)
    assert "continuing in" in capsys.readouterr().err
    assert _files(tmp_path / "out") == _files(tmp_path / "undisturbed")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "undisturbed"]


# One process, single-threaded until it forks; each child runs to its n-th write, sync or rename and is killed there.
KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
import filelock, rich.progress  # here, not in each child: they are the most of its time
import fastgpt.data.preparation as module
from fastgpt.data import encoding, shards, writing
from fastgpt.data.tokenizer import get_tokenizer

module.COMMIT_SECONDS = 0
encoding.BATCH_CHARS = int(sys.argv[3])
os.fsync = lambda _: None  # still a step to be killed at
source, folder = sys.argv[1], Path(sys.argv[2])
steps = 0

def counted(function, last):
    def call(*args, **kwargs):
        global steps
        steps += 1
        if steps == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def run(out, last):
    os.fsync, os.replace, os.rename = (counted(f, last) for f in (os.fsync, os.replace, os.rename))
    writing.ShardWriter._finish = counted(writing.ShardWriter._finish, last)
    Path.unlink = counted(Path.unlink, last)
    options = dict(shard_tokens=40, workers=1, val_fraction=float(sys.argv[4]))
    module.prepare(source, out, get_tokenizer("bytes"), **options)

def in_child(out, last):
    if (pid := os.fork()) == 0:
        try:
            run(out, last)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]

last, status = 0, 9
while status == signal.SIGKILL:
    last += 1
    status = in_child(folder / f"out{last}", last)  # killed once
    if status == signal.SIGKILL:
        for later in (last % 5 + 1, last % 7 + 2, 0):  # twice more, soon after it went on, and then not
            again = in_child(folder / f"out{last}", later)
        assert again == 0, again
assert status == 0, status
print(last - 1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL are POSIX")
@pytest.mark.parametrize("val_fraction", [0.3, 1e-9], ids=["two sides", "second pass"])
def test_killed_at_every_step_the_result_is_the_same(tmp_path, val_fraction):
    source = _write_docs(tmp_path / "in", [f"document {i}" for i in range(12 if val_fraction == 0.3 else 8)])
    (tmp_path / "made").mkdir()
    batch = "50"
    command = [sys.executable, "-W", "ignore", "-c", KILLED_AT_EVERY_STEP, source, tmp_path / "made", batch]
    done = subprocess.run([*command, str(val_fraction)], env=ENV, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    prepare(source, tmp_path / "want", BYTES, shard_tokens=40, val_fraction=val_fraction)
    want = _files(tmp_path / "want")
    made = [p for p in (tmp_path / "made").iterdir() if p.is_dir()]
    assert len(made) == int(done.stdout) + 1 > 20 and all(_files(p) == want for p in made)
    assert not list((tmp_path / "made").glob("*.partial"))


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_killed_by_the_clock_with_worker_processes_which_end_too(tmp_path):
    """The parent of two worker processes is killed while they all work. The workers hold its output open: that run()
    returns shows that they have ended."""
    source = _write_docs(tmp_path / "in", [f"document {i} " * 5 for i in range(20_000)])
    program = (
        "import os, signal, sys, threading\n"
        "import fastgpt.data.preparation as module\n"
        "from fastgpt.data import encoding\n"
        "from fastgpt.data.tokenizer import get_tokenizer\n"
        "module.COMMIT_SECONDS, encoding.BATCH_CHARS, encoding.SMALL = 0.01, 1000, 0\n"
        "commit = module._Preparation._commit\n"
        "def first_commit(self):\n"
        "    module._Preparation._commit = commit\n"
        "    commit(self)\n"
        "    threading.Timer(float(sys.argv[3]), os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "module._Preparation._commit = first_commit\n"
        "module.prepare(*sys.argv[1:3], get_tokenizer('bytes'), shard_tokens=50_000, workers=2)\n"
        "os._exit(0)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    rows = [0]
    for seconds in (0.02, 0.05, 0.1):
        done = subprocess.run([*command, str(seconds)], env=ENV, capture_output=True, timeout=60)
        assert done.returncode == -signal.SIGKILL, done.stderr
        rows.append(json.loads((tmp_path / "out.partial" / "progress.json").read_text())["position"]["row"])
    assert rows == sorted(set(rows)), "each went on where the one before was"
    prepare(source, tmp_path / "out", BYTES, shard_tokens=50_000)
    prepare(source, tmp_path / "want", BYTES, shard_tokens=50_000)
    assert _files(tmp_path / "out") == _files(tmp_path / "want")


def test_two_processes_at_once_do_the_work_once(tmp_path, capsys):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    entered, go_on = threading.Event(), threading.Event()

    class Slow(BytesTokenizer):
        def encode_batch(self, texts):
            entered.set()
            assert go_on.wait(30)
            return super().encode_batch(texts)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(prepare, source, tmp_path / "out", Slow())
        assert entered.wait(30)
        second = pool.submit(prepare, source, tmp_path / "out", BYTES)
        with pytest.raises(concurrent.futures.TimeoutError):
            second.result(0.4)
        go_on.set()
        assert first.result(30) == second.result(30)
    assert "another process prepares" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="which file a descriptor is, is read from /proc")
def test_what_progress_counts_is_on_the_disk_first(tmp_path, monkeypatch):
    """The tokens, then the note that they are there, then its name: in this order at every commit."""
    monkeypatch.setattr(encoding, "BATCH_CHARS", 20)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    events = []

    def fsync(fd):
        events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))

    replace = os.replace

    def renamed(a, b):
        events.append(("name", os.path.basename(b)))
        replace(a, b)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    prepare(_write_docs(tmp_path / "in", [f"document {i}" for i in range(9)]), tmp_path / "out", BYTES, workers=1)
    assert events[-1] == ("sync", tmp_path.name), "the last rename too"
    commits = [i for i, event in enumerate(events) if event == ("name", "progress.json")]
    assert len(commits) > 3
    for before, at in pairwise(commits[1:]):
        between = events[before + 1 : at]
        assert between[0] == ("sync", "out.partial"), "the name before"
        assert any(kind == "sync" and name.endswith(".bin") for kind, name in between)
        assert between[-1][0] == "sync" and between[-1][1].startswith(".progress.json")


@pytest.mark.parametrize("where", ["write", "fsync", "progress"])
def test_a_full_disk_ends_in_one_sentence_and_can_be_gone_on_from(tmp_path, monkeypatch, where):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 20)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    source = _write_docs(tmp_path / "in", [f"document {i}" for i in range(50)])
    prepare(source, tmp_path / "undisturbed", BYTES, shard_tokens=100)
    holder, name = {
        "write": (writing.ShardWriter, "append"),
        "fsync": (writing.os, "fsync"),
        "progress": (module, "write_json"),
    }[where]
    real, calls = getattr(holder, name), []

    def full(*args):
        calls.append(1)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, full)
        with pytest.raises(UserError, match=r"disk is full.*out\.partial' holds is whole.*same command again") as error:
            prepare(source, tmp_path / "out", BYTES, shard_tokens=100, workers=1)
        assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "out.partial" / "progress.json").read_text())["position"]["row"] > 0
    prepare(source, tmp_path / "out", BYTES, shard_tokens=100)
    assert _files(tmp_path / "out") == _files(tmp_path / "undisturbed")


def test_a_preparation_killed_before_it_wrote_anything_is_in_nobodys_way(tmp_path):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", type("Tok", (_Interrupted,), {"calls": 2})())
    assert (tmp_path / "out.partial" / "progress.json").exists()
    assert prepare(source, tmp_path / "out", BYTES, seed=5)["seed"] == 5


def test_a_partial_folder_that_lost_a_shard_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARS", 20)
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0)
    source = _write_docs(tmp_path / "in", [f"document {i}" for i in range(50)])
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", _Interrupted(), shard_tokens=16, workers=1)
    (tmp_path / "out.partial" / "train_000000.bin").unlink()
    with pytest.raises(UserError, match=r"train_000000\.bin' is missing or cut short: delete '.*out\.partial'"):
        prepare(source, tmp_path / "out", BYTES, shard_tokens=16)


def test_an_empty_corpus(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('{"text": ""}\n\n')
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"holds no text \(1 files were not UTF-8\)"):
        prepare(tmp_path / "in", tmp_path / "out", BYTES)
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["in"]


@pytest.mark.parametrize("name", ["shard_tokens", "max_tokens", "workers"])
def test_counts_are_positive(tmp_path, name):
    with pytest.raises(UserError, match=f"{name} is 0: it must be at least 1"):
        prepare("stdlib", tmp_path / "out", BYTES, **{name: 0})


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    source = _write_docs(tmp_path / "in", ["a", "b"])
    with pytest.raises(UserError, match="cannot be written"):
        prepare(source, tmp_path / "file" / "out", BYTES)


@pytest.mark.parametrize(
    ("out", "said"),
    [(".", "already holds something else"), ("..", "already holds something else"), ("/", "out is /: name")],
)
def test_a_folder_without_a_name_is_refused_as_any_other(tmp_path, monkeypatch, out, said):
    (tmp_path / "a").mkdir()
    source = _write_docs(tmp_path / "a" / "in", ["a", "b"])
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(UserError, match=said):
        prepare(source, out, BYTES)
    assert [path.name for path in tmp_path.rglob("*")].count("in") == 1 and not list(tmp_path.rglob("*partial"))


def test_resolve_text_goes_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "my book.txt"
    path.write_text("to be or not to be\n" * 100)
    train, _, tok = resolve(str(path), "bytes", 256)
    assert tok is BYTES and train[0].parent.parent == tmp_path / "cache" / "fastgpt"
    assert resolve(str(path), "bytes", 256)[0] == train
    path.write_text("something new\n" * 100)
    assert resolve(str(path), "bytes", 256)[0] != train


def test_resolve_stdlib(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train, val, _ = resolve("stdlib", "bytes", 256)
    assert train[0].name == "train_000000.bin" and train[0].parent.name.startswith("stdlib-py3.")
    assert len(open_shard(train[0])) > 5e6 and len(open_shard(val[0])) > 1e5


@pytest.mark.parametrize("names", [("train.bin", "val.bin"), ("fineweb_train_000001.bin", "fineweb_val_000000.bin")])
def test_resolve_folders_of_others(tmp_path, names):
    for name in names:
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name)
    train, val, tok = resolve(str(tmp_path), "gpt2", 50304)
    assert ([p.name for p in train + val], tok.name) == (list(names), "gpt2")


@pytest.mark.parametrize(
    "write, arguments, message",
    [
        (lambda d: (d / "train.bin").write_bytes(b"ab"), {}, r"no \*val\*\.bin"),
        (lambda d: (d / "x.txt").write_text("ab"), {"vocab_size": 256}, "needs at least 50257"),
        (
            lambda d: prepare(_write_docs(d, ["a", "b"]), d / "out", BYTES),
            {"data": "out"},
            "made with the bytes tokeni",
        ),
        (lambda d: (d / "a.bin").write_bytes(b"ab"), {"data": "a.bin"}, "one token file"),
        (lambda d: None, {"data": "none"}, "does not exist"),
        (lambda d: None, {"tokenizer": "bpe"}, "tokenizer is 'bpe'"),
        (lambda d: None, {}, "folder without text"),
    ],
)
def test_resolve_refuses_in_one_sentence(tmp_path, monkeypatch, write, arguments, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write(tmp_path)
    before = sorted(tmp_path.iterdir())
    data = str(tmp_path / arguments.get("data", ""))
    with pytest.raises(UserError, match=message):
        resolve(data, arguments.get("tokenizer", "gpt2"), arguments.get("vocab_size", 50304))
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"
