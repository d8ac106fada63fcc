"""A prepared folder is whole or absent, a function of its source, and never shares a document between its sides."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgpt.data.preparation as module
from fastgpt.data import get_tokenizer, open_shard, prepare, resolve
from fastgpt.data.tokenizer import BytesTokenizer
from fastgpt.errors import UserError

BYTES = get_tokenizer("bytes")


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
        assert [p.name for p in tmp.iterdir()] == ["in"]
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


def test_stdlib_with_gpt2_has_end_of_text_between_files(tmp_path, monkeypatch):
    corpus = module.open_corpus("stdlib")
    corpus.files = corpus.files[:30]
    monkeypatch.setattr(module, "open_corpus", lambda _: corpus)
    tok = get_tokenizer("gpt2")
    manifest = prepare("stdlib", tmp_path / "out", tok, val_fraction=0.3)
    texts = {text for _, text in corpus.documents()}
    for side in ("train", "val"):
        ids = np.array(_side(tmp_path / "out", side))
        starts = np.flatnonzero(ids == tok.eot)
        assert starts[0] == 0 and len(starts) == manifest["documents"][side]
        assert {tok.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])} <= texts


def test_the_same_again_is_reused_and_something_else_is_never_overwritten(tmp_path, monkeypatch):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    first = prepare(source, tmp_path / "out", BYTES)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fill", None)
        assert prepare(source, tmp_path / "out", BYTES) == first
    before = _files(tmp_path / "out")
    for change in ({"seed": 1}, {"val_fraction": 0.5}):
        with pytest.raises(UserError, match="already holds something else"):
            prepare(source, tmp_path / "out", BYTES, **change)
    assert _files(tmp_path / "out") == before
    (tmp_path / "out" / first["shards"][0]["file"]).write_bytes(b"")
    with pytest.raises(UserError, match=r"is empty.*delete '.*out' to prepare it again"):
        prepare(source, tmp_path / "out", BYTES)


class _Interrupted(BytesTokenizer):
    calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        if self.calls == 3:
            raise KeyboardInterrupt
        return super().encode_batch(texts)


# bug 26: interrupted data preparation.
def test_interrupted_preparation_leaves_nothing_and_a_second_run_is_as_if_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 20)
    source = _write_docs(tmp_path / "in", [f"document {i}" for i in range(50)])
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", _Interrupted(), shard_tokens=16)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    prepare(source, tmp_path / "out", BYTES, shard_tokens=16)
    prepare(source, tmp_path / "undisturbed", BYTES, shard_tokens=16)
    assert _files(tmp_path / "out") == _files(tmp_path / "undisturbed")


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_killed_preparation_leaves_no_folder_of_that_name(tmp_path):
    source = _write_docs(tmp_path / "in", [f"document {i}" for i in range(50)])
    program = (
        "import os, signal, sys\n"
        "import fastgpt.data.preparation as p\n"
        "from fastgpt.data import get_tokenizer\n"
        "write = p.write_shard\n"
        "def third(path, tokens):\n"
        "    if '_000002' in path.name: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(path, tokens)\n"
        "p.write_shard = third\n"
        "p.prepare(sys.argv[1], sys.argv[2], get_tokenizer('bytes'), shard_tokens=64)\n"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    assert subprocess.run(command, env=env).returncode == -signal.SIGKILL
    [left] = [p for p in tmp_path.iterdir() if p.name != "in"]
    assert left.name.startswith(".out.partial-") and list(left.glob("train_*.bin"))
    for p in (left, *left.iterdir()):
        os.utime(p, (0, 0))  # long ago: a live process would have written since
    prepare(source, tmp_path / "out", BYTES, shard_tokens=64)
    prepare(source, tmp_path / "undisturbed", BYTES, shard_tokens=64)
    assert _files(tmp_path / "out") == _files(tmp_path / "undisturbed")
    assert not left.exists()


def test_two_processes_at_once_agree(tmp_path, monkeypatch):
    source = _write_docs(tmp_path / "in", ["a", "b", "c"])
    publish = module._publish

    def overtaken(work, out, manifest):
        module.shutil.copytree(work, out)
        return publish(work, out, manifest)

    monkeypatch.setattr(module, "_publish", overtaken)
    manifest = prepare(source, tmp_path / "out", BYTES)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    source = _write_docs(tmp_path / "in", ["a", "b"])
    with pytest.raises(UserError, match="cannot be written"):
        prepare(source, tmp_path / "file" / "out", BYTES)


def test_resolve_text_goes_through_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "my book.txt"
    path.write_text("to be or not to be\n" * 100)
    train, _, tok = resolve(str(path), tokenizer="bytes", vocab_size=256, block_size=8)
    assert tok is BYTES and train[0].parent.parent == tmp_path / "cache" / "fastgpt"
    assert resolve(str(path), tokenizer="bytes", block_size=8)[0] == train
    path.write_text("something new\n" * 100)
    assert resolve(str(path), tokenizer="bytes", block_size=8)[0] != train
    with pytest.raises(UserError, match=r"fewer than block_size \+ 1 = 5001"):
        resolve(str(path), tokenizer="bytes", block_size=5000)


def test_resolve_stdlib(tmp_path):
    train, val, _ = resolve("stdlib", tokenizer="bytes", vocab_size=256, block_size=32, cache_dir=tmp_path)
    assert train[0].name == "train_000000.bin" and train[0].parent.name.startswith("stdlib-py3.")
    assert len(open_shard(train[0])) > 5e6 and len(open_shard(val[0])) > 1e5


@pytest.mark.parametrize("names", [("train.bin", "val.bin"), ("fineweb_train_000001.bin", "fineweb_val_000000.bin")])
def test_resolve_folders_of_others(tmp_path, names):
    for name in names:
        np.arange(100, dtype=np.uint16).tofile(tmp_path / name)
    train, val, tok = resolve(str(tmp_path), vocab_size=50304, block_size=32)
    assert ([p.name for p in train + val], tok.name) == (list(names), "gpt2")


@pytest.mark.parametrize(
    "write, arguments, message",
    [
        (lambda d: (d / "train.bin").write_bytes(b"ab"), {}, r"no \*val\*\.bin"),
        (lambda d: (d / "x.txt").write_text("ab"), {"tokenizer": "gpt2", "vocab_size": 256}, "needs at least 50257"),
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
def test_resolve_refuses_in_one_sentence(tmp_path, write, arguments, message):
    write(tmp_path)
    before = sorted(tmp_path.iterdir())
    data = str(tmp_path / arguments.get("data", ""))
    arguments = {key: value for key, value in arguments.items() if key != "data"}
    with pytest.raises(UserError, match=message):
        resolve(data, cache_dir=tmp_path / "cache", **arguments)
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"
